"""Reading images and masks as arrays, and folders of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.datasets import EXTENSIONS
from visionattn.data.images import check_channels, read_image
from visionattn.data.segmentation import IGNORE, Sample, SegmentationSource
from visionattn.data.splits import check_split, group_names, split_groups

Palette = Mapping[str, Sequence[int]]
_BITS_PER_SAMPLE = 258  # a TIFF tag
READ_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError, EOFError, IndexError, KeyError)
"""What Pillow raises for files that it cannot read."""


def read_pixels(path: str | Path, in_chans: int = 3) -> np.ndarray:
    """Read an image without reducing its depth.

    Grey of 16 bits stays uint16 and of 32 bits becomes float32; TIFF of 16 bits and three or four channels is read
    with tifffile. Everything else is read as ``read_image`` does (palettes looked up, transparency dropped).

    Args:
        path: File.
        in_chans: 1 for grey, 3 for RGB; a grey image is repeated, an RGB image is averaged by luminance.

    Returns:
        ``[H, W, in_chans]``, uint8, uint16 or float32.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no readable image, or ``in_chans`` is neither 1 nor 3.
    """
    check_channels(in_chans)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            # PIL reduces colour of 16 bits to 8
            bits = np.max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, 8))
            if image.mode in ("RGB", "RGBA") and bits > 8:
                raise OSError(f"{bits} bits in colour need the package tifffile")
            if not image.mode.startswith(("I", "F")):
                return np.array(read_image(path, in_chans)).reshape(image.height, image.width, in_chans)
            pixels = np.asarray(image)
    except READ_ERRORS as error:
        deep = _read_deep(path)
        if deep is None:
            raise ValueError(f"cannot read image {path}: {error}; repair or remove it") from error
        pixels = deep
    if pixels.dtype.kind in "iu" and pixels.dtype != np.uint8:
        fits = pixels.min() >= 0 and pixels.max() < 2**16
        pixels = pixels.astype(np.uint16 if fits else np.float32)
    return with_channels(pixels.astype(np.float32) if pixels.dtype.kind == "f" else pixels, in_chans)


def _read_deep(path: Path) -> np.ndarray | None:
    """A TIFF that PIL does not know; None where that fails too."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return None
    try:
        import tifffile

        pixels = tifffile.imread(path)
    except (ImportError, OSError, ValueError, IndexError, RuntimeError):
        return None
    return pixels if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4)) else None


def with_channels(pixels: np.ndarray, in_chans: int) -> np.ndarray:
    """Pixels ``[H, W]`` or ``[H, W, C]`` as ``[H, W, in_chans]``: grey repeated, RGB averaged, opacity dropped."""
    if pixels.ndim == 2 or pixels.shape[2] == 2:  # grey, or grey with opacity
        pixels = pixels.reshape(*pixels.shape[:2], -1)[..., :1]
    pixels = pixels[..., :3]
    if pixels.shape[2] == in_chans:
        return np.ascontiguousarray(pixels)
    if in_chans == 3:
        return np.repeat(pixels, 3, axis=2)
    grey = pixels.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    return (grey + (0.5 if pixels.dtype.kind == "u" else 0)).astype(pixels.dtype)[..., None]


def read_mask(
    path: str | Path, classes: Sequence[str], palette: Palette | None = None, threshold: int | None = None
) -> np.ndarray:
    """Read a mask as labels.

    - With a palette: each colour is its class, ``IGNORE`` for the entry ``"ignore"``.
    - Two classes: foreground where the value (palettes looked up, as grey) is at least ``threshold``. By default a
      mask whose values end at 1 counts every 1, any other counts values of at least 128 (32768 in 16 bits), so that
      the traces of JPEG are background; a mask with values above 1 of which none reaches that is refused.
    - More classes: values are labels, 255 is ``IGNORE``; of palette images the index counts, as in PASCAL VOC.

    Args:
        path: File.
        classes: Names in label order, background first.
        palette: Colour ``[red, green, blue]`` of each class, by name.
        threshold: Smallest value of the foreground of a binary mask.

    Returns:
        ``[H, W]`` int64.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, is in colour without a palette, or has values outside the classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mask at {path}")
    try:
        with Image.open(path) as image:
            if palette:
                return _by_palette(np.asarray(image.convert("RGB")), classes, palette, path)
            indexed = image.mode == "P"
            values = np.asarray(image.convert("RGB") if indexed and len(classes) == 2 else image)
    except READ_ERRORS as error:
        deep = _read_deep(path)
        if deep is None:
            raise ValueError(f"cannot read mask {path}: {error}; repair or remove it") from error
        values = deep
    values = values.astype(np.int64)
    if values.ndim == 3:
        if values.shape[2] in (2, 4):
            values = values[..., :-1]  # transparency
        if len(classes) == 2:
            values = values.max(axis=2)
        elif (values == values[..., :1]).all():
            values = values[..., 0]
        else:
            raise ValueError(f"mask {path} is in colour; give palette={{class: [red, green, blue], ...}}")
    return _labels(values, classes, threshold, path)


def _labels(values: np.ndarray, classes: Sequence[str], threshold: int | None, path: Path) -> np.ndarray:
    highest = int(values.max(initial=0))
    if len(classes) == 2:
        least = threshold or (1 if highest <= 1 else 128 if highest < 256 else 32768)
        if threshold is None and 1 < highest < least:
            raise ValueError(
                f"mask {path} has values up to {highest}, expected 0/1 or 0/255; "
                "set threshold to the smallest value of the foreground"
            )
        return (values >= least).astype(np.int64)
    wrong = sorted(set(np.unique(values).tolist()) - set(range(len(classes))) - {IGNORE})
    if wrong:
        raise ValueError(
            f"mask {path} has {len(wrong)} values outside the {len(classes)} classes (0 to {len(classes) - 1}, "
            f"{IGNORE} to ignore): {wrong[:5]}; correct classes or give a palette"
        )
    return values


def _by_palette(colours: np.ndarray, classes: Sequence[str], palette: Palette, path: Path) -> np.ndarray:
    code = np.array([1 << 16, 1 << 8, 1])
    coded = colours.astype(np.int64) @ code
    labels = np.full(coded.shape, -1, dtype=np.int64)
    for name, colour in palette.items():
        label = IGNORE if name == "ignore" else list(classes).index(name)
        labels[coded == int(np.array(colour) @ code)] = label
    if (labels < 0).any():
        row, column = np.argwhere(labels < 0)[0]
        raise ValueError(
            f"mask {path} has {(labels < 0).sum()} pixels of colours that the palette lacks, first "
            f"{colours[row, column].tolist()} at row {row}, column {column}; complete the palette"
        )
    return labels


def check_classes(classes: Sequence[str], palette: Palette | None = None) -> list[str]:
    """Class names as a list.

    Raises:
        ValueError: Fewer than two classes, more than 255, twice the same name, or a palette with other names.
    """
    names = [str(name) for name in classes]
    if not 2 <= len(names) <= IGNORE or len(set(names)) < len(names):
        raise ValueError(f"classes={names}: expected 2 to {IGNORE} different names, the background first")
    strange = set(palette or {}) ^ set(names) if palette else set()
    if strange - {"ignore"}:
        raise ValueError(f"palette and classes differ in {sorted(strange - {'ignore'})}; give one colour per class")
    return names


def check_sizes(image: np.ndarray, mask: np.ndarray, name: str | Path) -> None:
    """Refuse a mask or field of another size than its image.

    Raises:
        ValueError: Heights or widths differ.
    """
    if image.shape[:2] != mask.shape[:2]:
        height, width = image.shape[:2]
        raise ValueError(
            f"{name}: the image is {height} x {width} (height x width), its mask {mask.shape[0]} x {mask.shape[1]}; "
            "they must be equal, repair or remove the pair"
        )


def split_folders(root: str | Path, split: str, images: str, masks: str) -> tuple[Path, Path, bool]:
    """Folders of images and of masks, and whether they still have to be split.

    Looked for in this order: ``ROOT/SPLIT/images``, ``ROOT/images/SPLIT``, ``ROOT/images``.

    Raises:
        FileNotFoundError: There are none.
        ValueError: Another ``split`` than train, val, test.
    """
    check_split(split)
    root = Path(root)
    candidates = [
        (root / split / images, root / split / masks),
        (root / images / split, root / masks / split),
        (root / images, root / masks),
    ]
    for number, (image_folder, mask_folder) in enumerate(candidates):
        if image_folder.is_dir():
            if number == 2 and any((image_folder / other).is_dir() for other in ("train", "val", "test")):
                break
            if not mask_folder.is_dir():
                raise FileNotFoundError(f"images are in {image_folder}, but there is no folder of masks {mask_folder}")
            return image_folder, mask_folder, number == 2
    raise FileNotFoundError(
        f"no images of split {split!r} under {root}; expected ROOT/{split}/{images}, ROOT/{images}/{split} or "
        f"ROOT/{images} (and {masks} likewise), set data.root to ROOT"
    )


def numbers_of_split(
    groups: Sequence[str], split: str, mixed: bool, folder: Path, shares: Mapping[str, Any]
) -> Sequence[int]:
    """Images of a folder that belong to a split: those that ``split_groups`` gives it, or all where it is the split.

    Raises:
        ValueError: Folds of images that are split already, an empty split, or what ``split_groups`` refuses.
    """
    if not mixed:
        if shares["fold"] is not None or shares["folds"] is not None:
            raise ValueError(f"folds need images that are not split yet, but {folder} is one split")
        return range(len(groups))
    numbers = split_groups(groups, **shares)[split]
    if not numbers:
        raise ValueError(
            f"split {split!r} of {folder} is empty, since its share is {shares[split]}; raise data.source.{split}"
        )
    return numbers


def pair_files(images: Mapping[str, Path], masks: Mapping[str, Path], where: Path) -> list[tuple[str, Path, Path]]:
    """Stem, image and mask of each pair, by stem.

    Raises:
        FileNotFoundError: There is no image at all.
        ValueError: Images without mask or masks without image, named and counted.
    """
    if not images:
        raise FileNotFoundError(f"{where} holds no images")
    lacking, surplus = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
    if lacking or surplus:
        raise ValueError(
            f"{where}: {len(images)} images and {len(masks)} masks; {len(lacking)} images have no mask "
            f"{lacking[:3]}, {len(surplus)} masks have no image {surplus[:3]}; names must agree up to the extension "
            "and mask_suffix"
        )
    return [(stem, images[stem], masks[stem]) for stem in sorted(images)]


def files_by_stem(folder: Path, suffix: str = "", extensions: Sequence[str] = EXTENSIONS) -> dict[str, Path]:
    """Files of a folder by stem less ``suffix``; files whose stem ends otherwise are left out.

    Raises:
        ValueError: Two files have one stem.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        ending = next((e for e in extensions if path.name.lower().endswith(e)), None)
        if ending is None or path.name.startswith(".") or not path.name[: -len(ending)].endswith(suffix):
            continue
        stem = path.name[: -len(ending) - len(suffix)]
        if stem in found:
            raise ValueError(f"{found[stem]} and {path} have one stem; remove or rename one of them")
        found[stem] = path
    return found


class MaskFolder:
    """Images and masks in two folders, paired by stem.

    ``ROOT/SPLIT/images`` and ``ROOT/images/SPLIT`` hold their splits; ``ROOT/images`` alone is split by groups,
    at random and always alike for one ``seed``.

    Args:
        root: Dataset folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        classes: Names in label order, background first.
        images: Name of the folder of images.
        masks: Name of the folder of masks.
        in_chans: Channels that the images are read with, 1 or 3.
        palette: Colours of masks in colour, ``{class: [red, green, blue]}``.
        mask_suffix: What a mask's stem has after its image's, for example ``"_mask"``.
        threshold: Smallest foreground value of binary masks; see ``read_mask``.
        group_pattern: Regular expression that finds the patient in a stem.
        val: Share of the groups for validation.
        test: Share of the groups for the test.
        seed: Seed of the split.
        fold: Fold of a cross-validation, from 0.
        folds: Number of folds.

    Raises:
        FileNotFoundError: Folders are missing or hold no image.
        ValueError: Files without partner, or wrong classes, palette or shares.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        classes: Sequence[str] = ("background", "foreground"),
        images: str = "images",
        masks: str = "masks",
        in_chans: int = 3,
        palette: Palette | None = None,
        mask_suffix: str = "",
        threshold: int | None = None,
        group_pattern: str | None = None,
        val: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        fold: int | None = None,
        folds: int | None = None,
    ):
        check_channels(in_chans)
        self.classes, self.palette = check_classes(classes, palette), palette
        self.in_chans, self.threshold = in_chans, threshold
        image_folder, mask_folder, mixed = split_folders(root, split, images, masks)
        pairs = pair_files(files_by_stem(image_folder), files_by_stem(mask_folder, mask_suffix), image_folder)
        groups = group_names([stem for stem, _, _ in pairs], group_pattern)
        shares = dict(val=val, test=test, seed=seed, fold=fold, folds=folds)
        kept = numbers_of_split(groups, split, mixed, image_folder, shares)
        self.samples = [(*pairs[i], groups[i]) for i in kept]
        # only a pattern tells patients; equal names in folders of splits may be different images
        self.groups = [groups[i] for i in kept] if group_pattern else []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        stem, image_path, mask_path, group = self.samples[i]
        image = read_pixels(image_path, self.in_chans)
        mask = read_mask(mask_path, self.classes, self.palette, self.threshold)
        check_sizes(image, mask, image_path)
        return Sample(image, mask, stem, group)


def survey(source: SegmentationSource) -> dict[str, Any]:
    """Read a whole source and say what is in it.

    Returns:
        ``images``, ``groups``, ``empty`` (names of masks without foreground), ``pixels`` of each class, ``dtypes``
        and ``sizes`` with their counts, and ``faults``, the messages of what cannot be read.
    """
    dtypes: Counter[str] = Counter()
    sizes: Counter[tuple[int, ...]] = Counter()
    pixels = np.zeros(len(source.classes), dtype=np.int64)
    groups, empty, faults = set(), [], []
    for i in range(len(source)):
        try:
            sample = source[i]
        except (ValueError, FileNotFoundError) as error:
            faults.append(str(error))
            continue
        groups.add(sample.group)
        dtypes[str(sample.image.dtype)] += 1
        sizes[sample.image.shape[:2]] += 1
        if sample.mask is not None:
            counts = np.bincount(sample.mask.ravel(), minlength=256)[: len(pixels)]
            pixels += counts
            if not counts[1:].any():
                empty.append(sample.name)
    return dict(
        images=len(source),
        groups=len(groups),
        empty=empty,
        pixels=dict(zip(source.classes, pixels.tolist(), strict=True)),
        dtypes=dict(dtypes),
        sizes=dict(sizes),
        faults=faults,
    )
