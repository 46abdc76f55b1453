"""Slices of medical volumes: DICOM files and NIfTI volumes, with their spacing."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.datasets import EXTENSIONS
from visionattn.data.images import check_channels
from visionattn.data.masks import check_classes, check_sizes, numbers_of_split, read_mask, split_folders
from visionattn.data.segmentation import IGNORE, Sample
from visionattn.data.splits import group_names

Window = Sequence[float]
_NIFTI = (".nii", ".nii.gz")


def window_values(values: np.ndarray, window: Window | None) -> np.ndarray:
    """Values to float32 in [0, 1].

    Args:
        values: Any array, for CT in Hounsfield units.
        window: Centre and width: ``centre - width / 2`` becomes 0, ``centre + width / 2`` becomes 1, the rest is cut
            off. None: the 0.5th and 99.5th percentile become 0 and 1.

    Raises:
        ValueError: Not two numbers, or a width that is not positive.
    """
    if window is None:
        low, high = (float(limit) for limit in np.percentile(values, (0.5, 99.5)))
    else:
        if len(window) != 2 or not window[1] > 0:
            raise ValueError(f"window={list(window)} must be [centre, width] with a width above 0, as [40, 400]")
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    return np.clip((values.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def read_dicom(path: str | Path, window: Window | None = None) -> tuple[np.ndarray, tuple[float, float]]:
    """Read one DICOM image.

    Stored values are rescaled by slope and intercept, then windowed: by ``window``, else by the file's own first
    centre and width, else by percentiles. MONOCHROME1 is turned so that high is bright.

    Args:
        path: File.
        window: Centre and width, see ``window_values``.

    Returns:
        ``[H, W]`` float32 in [0, 1], and millimetres from row to row and from column to column.

    Raises:
        ImportError: The package pydicom is not installed.
        FileNotFoundError: There is no such file.
        ValueError: No DICOM image, in colour or of several frames, compressed without a decoder, without spacing.
    """
    values, dataset = _dicom_values(Path(path))
    if window is None and "WindowCenter" in dataset and "WindowWidth" in dataset:
        window = [float(np.atleast_1d(dataset[tag].value)[0]) for tag in ("WindowCenter", "WindowWidth")]
    try:
        image = window_values(values, window)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
        image = 1 - image
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing")
    if spacing is None or len(spacing) != 2 or min(float(step) for step in spacing) <= 0:
        raise ValueError(f"{path} has no PixelSpacing, got {spacing}; add the tag, or convert the file to PNG")
    return image, (float(spacing[0]), float(spacing[1]))


def _open_dicom(path: Path, **options: Any) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise ImportError('DICOM needs the package pydicom: pip install "visionattn[seg]"') from error
    if not path.is_file():
        raise FileNotFoundError(f"no DICOM file {path}")
    try:
        return pydicom.dcmread(path, **options)
    except (pydicom.errors.InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path} as DICOM: {error}; repair or remove it") from error


def _dicom_values(path: Path) -> tuple[np.ndarray, Any]:
    dataset = _open_dicom(path)
    if "PixelData" not in dataset:
        raise ValueError(f"{path} holds no image (no PixelData); remove it")
    try:
        values = dataset.pixel_array
    except Exception as error:  # decoders raise what they like
        syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
        kind = syntax.name if syntax is not None else "no transfer syntax"
        raise ValueError(
            f"cannot decode {path} ({kind}): {error}; install a decoder (pylibjpeg with pylibjpeg-libjpeg and "
            "pylibjpeg-openjpeg, or python-gdcm) or decompress the file"
        ) from error
    if values.ndim != 2:
        raise ValueError(f"{path} has an image of shape {values.shape}, expected one grey slice (rows, columns)")
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    return values.astype(np.float32) * slope + intercept, dataset


def _patient(name: str, path: Path) -> str:
    folder, slash, _ = name.partition("/")
    if slash:
        return folder
    dataset = _open_dicom(path, stop_before_pixels=True, specific_tags=["PatientID"])
    return str(dataset.get("PatientID") or name)


class _Slices:
    """What the two sources share: grey slices repeated to ``in_chans``, splits by patient."""

    classes: list[str]

    def __init__(self, classes: Sequence[str], in_chans: int, window: Window | None):
        check_channels(in_chans)
        self.classes, self.in_chans = check_classes(classes), in_chans
        self.window = list(window) if window is not None else None
        if self.window is not None:
            window_values(np.zeros(1), self.window)

    def _repeat(self, values: np.ndarray) -> np.ndarray:
        return np.repeat(values[..., None], self.in_chans, axis=2)

    def _check_labels(self, mask: np.ndarray, path: Path) -> np.ndarray:
        labels = mask.astype(np.int64)
        if len(self.classes) == 2 and (labels == IGNORE).any() and not (labels == 1).any():
            raise ValueError(f"mask {path} has the values 0 and 255, expected 0 and 1; write 1 for {self.classes[1]!r}")
        wrong = sorted(set(np.unique(mask).tolist()) - set(range(len(self.classes))) - {IGNORE})
        if wrong:
            raise ValueError(
                f"mask {path} has values outside the {len(self.classes)} classes: {wrong[:5]}; "
                "correct data.source.classes"
            )
        return labels


def _files(folder: Path, endings: Sequence[str]) -> dict[str, Path]:
    """Files below a folder by their path without the ending."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        ending = next((e for e in sorted(endings, key=len, reverse=True) if path.name.lower().endswith(e)), None)
        if path.is_file() and ending and not path.name.startswith("."):
            place = path.relative_to(folder).as_posix()[: -len(ending)]
            if place in found:
                raise ValueError(f"{found[place]} and {path} have one name; remove or rename one of them")
            found[place] = path
    return found


def _pairs(images: Mapping[str, Path], masks: Mapping[str, Path], folder: Path, kind: str) -> list[str]:
    if not images:
        raise FileNotFoundError(f"{folder} holds no {kind}")
    lacking, surplus = sorted(set(images) - set(masks)), sorted(set(masks) - set(images))
    if lacking or surplus:
        raise ValueError(
            f"{folder}: {len(lacking)} images have no mask {lacking[:3]}, {len(surplus)} masks have no image "
            f"{surplus[:3]}; images and masks must have the same paths up to the extension"
        )
    return sorted(images)


class DicomSlices(_Slices):
    """Single DICOM files and series, one sample per file.

    ``ROOT/SPLIT/images/PATIENT/FILE.dcm``, ``ROOT/images/SPLIT/...`` or ``ROOT/images/...`` (split by patient), and
    below ``masks`` the same paths with a picture (PNG, ...) or a DICOM file of labels. A patient is what
    ``group_pattern`` finds in the path; without it the first folder below the images, or, for files that lie there
    directly, the file's PatientID (the file itself where that is empty).

    Args:
        root: Dataset folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        classes: Names in label order, background first.
        in_chans: Channels, 1 or 3 (the grey slice repeated).
        window: Centre and width; by default each file's own.
        images: Name of the folder of images.
        masks: Name of the folder of masks.
        group_pattern: Regular expression that finds the patient in the path below the images.
        val: Share of the patients for validation.
        test: Share of the patients for the test.
        seed: Seed of the split.
        fold: Fold of a cross-validation, from 0.
        folds: Number of folds.

    Raises:
        FileNotFoundError: Folders are missing or hold no DICOM file.
        ValueError: Files without partner, or wrong classes, window or shares.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        classes: Sequence[str] = ("background", "foreground"),
        in_chans: int = 1,
        window: Window | None = None,
        images: str = "images",
        masks: str = "masks",
        group_pattern: str | None = None,
        val: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        fold: int | None = None,
        folds: int | None = None,
    ):
        super().__init__(classes, in_chans, window)
        image_folder, mask_folder, mixed = split_folders(root, split, images, masks)
        found = _files(image_folder, (".dcm", ".dicom", ".ima"))
        truth = _files(mask_folder, (".dcm", ".dicom", ".ima", *EXTENSIONS))
        names = _pairs(found, truth, image_folder, "DICOM file (.dcm, .dicom, .ima)")
        groups = group_names(names, group_pattern) if group_pattern else [_patient(n, found[n]) for n in names]
        shares = dict(val=val, test=test, seed=seed, fold=fold, folds=folds)
        kept = numbers_of_split(groups, split, mixed, image_folder, shares)
        self.samples = [(names[i], found[names[i]], truth[names[i]], groups[i]) for i in kept]
        self.groups = [groups[i] for i in kept]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        name, image_path, mask_path, group = self.samples[i]
        image, spacing = read_dicom(image_path, self.window)
        if mask_path.name.lower().endswith(EXTENSIONS):
            mask = read_mask(mask_path, self.classes)
        else:
            mask = self._check_labels(_dicom_values(mask_path)[0], mask_path)
        check_sizes(image, mask, image_path)
        return Sample(self._repeat(image), mask, name.replace("/", "__"), group, spacing=spacing)


class NiftiSlices(_Slices):
    """Slices of NIfTI volumes along one axis.

    ``ROOT/SPLIT/images/NAME.nii.gz``, ``ROOT/images/SPLIT/...`` or ``ROOT/images/...`` (split by patient), and label
    maps of the same name below ``masks``. Rows and columns of a slice are the other two axes of the array in their
    order. A patient is the volume, or what ``group_pattern`` finds in its name.

    Args:
        root: Dataset folder.
        split: ``"train"``, ``"val"`` or ``"test"``.
        classes: Names in label order, background first.
        in_chans: Channels, 1 or 3 (the grey slice repeated).
        window: Centre and width; by default the slice's percentiles.
        axis: Axis along which slices are taken, 0 to 2.
        keep_empty: Whether training slices without any label are taken; those for evaluation always are.
        images: Name of the folder of volumes.
        masks: Name of the folder of label maps.
        group_pattern: Regular expression that finds the patient in a volume's name.
        val: Share of the patients for validation.
        test: Share of the patients for the test.
        seed: Seed of the split.
        fold: Fold of a cross-validation, from 0.
        folds: Number of folds.

    Raises:
        ImportError: The package nibabel is not installed.
        FileNotFoundError: Folders are missing or hold no volume.
        ValueError: Files without partner, volumes that are not three-dimensional, shapes of volume and label map
            that differ, or a wrong axis, classes, window or shares.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        classes: Sequence[str] = ("background", "foreground"),
        in_chans: int = 1,
        window: Window | None = None,
        axis: int = 2,
        keep_empty: bool = True,
        images: str = "images",
        masks: str = "masks",
        group_pattern: str | None = None,
        val: float = 0.15,
        test: float = 0.15,
        seed: int = 0,
        fold: int | None = None,
        folds: int | None = None,
    ):
        super().__init__(classes, in_chans, window)
        if axis not in (0, 1, 2):
            raise ValueError(f"axis={axis} must be 0, 1 or 2")
        self.axis = axis
        image_folder, mask_folder, mixed = split_folders(root, split, images, masks)
        found, truth = _files(image_folder, _NIFTI), _files(mask_folder, _NIFTI)
        names = _pairs(found, truth, image_folder, "NIfTI volume (.nii, .nii.gz)")
        groups = group_names(names, group_pattern)
        shares = dict(val=val, test=test, seed=seed, fold=fold, folds=folds)
        kept = numbers_of_split(groups, split, mixed, image_folder, shares)
        self.samples = []
        self.groups = [groups[i] for i in kept] if group_pattern else []
        for i in kept:
            shape = _check_volumes(found[names[i]], truth[names[i]])
            for number in range(shape[axis]):
                entry = (
                    f"{names[i].replace('/', '__')}_{number:04d}",
                    found[names[i]],
                    truth[names[i]],
                    groups[i],
                    number,
                )
                if keep_empty or split != "train" or self._mask(truth[names[i]], number).any():
                    self.samples.append(entry)

    def _mask(self, path: Path, number: int) -> np.ndarray:
        return self._check_labels(np.take(_volume(path)[0], number, axis=self.axis), path)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample:
        name, image_path, mask_path, group, number = self.samples[i]
        volume, zooms = _volume(image_path)
        image = window_values(np.take(volume, number, axis=self.axis), self.window)
        mask = self._mask(mask_path, number)
        rows, columns = (zooms[axis] for axis in range(3) if axis != self.axis)
        return Sample(self._repeat(image), mask, name, group, spacing=(rows, columns))


def _open_nifti(path: Path) -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ImportError('NIfTI needs the package nibabel: pip install "visionattn[seg]"') from error
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read {path} as NIfTI: {error}; repair or remove it") from error
    if len(image.shape) != 3:
        raise ValueError(f"{path} has shape {image.shape}, expected three axes; split it into volumes")
    return image


def _check_volumes(image_path: Path, mask_path: Path) -> tuple[int, int, int]:
    image, mask = _open_nifti(image_path), _open_nifti(mask_path)
    if image.shape != mask.shape:
        raise ValueError(f"{image_path} has shape {image.shape}, its label map {mask_path} {mask.shape}; resample one")
    zooms = image.header.get_zooms()[:3]
    if not all(np.isfinite(zoom) and zoom > 0 for zoom in zooms):
        raise ValueError(f"{image_path} has no usable spacing, got {zooms}; write pixdim into its header")
    return image.shape


# neighbouring slices are mostly asked for together, and a compressed volume can only be read whole
@lru_cache(maxsize=4)
def _volume(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    image = _open_nifti(path)
    try:
        values = np.asarray(image.dataobj, dtype=np.float32)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"cannot read the values of {path}: {error}; repair or remove it") from error
    return values, tuple(float(zoom) for zoom in image.header.get_zooms()[:3])
