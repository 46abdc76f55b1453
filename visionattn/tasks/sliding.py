"""Masks of images of any size: windows over tensors, and tiles of files that do not fit into memory."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from monai.inferers import sliding_window_inference
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn._writing import replaced
from visionattn.data.masks import read_pixels, with_channels
from visionattn.tasks.segmentation_metrics import class_probabilities

_CACHE = 256 * 2**20  # bytes of decoded segments of a TIFF that are kept
_BLACK_IS_0, _RGB = 1, 2  # PhotometricInterpretation
_FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))


def probabilities(
    model: nn.Module, images: Tensor, window: int | None = None, overlap: float = 0.25, flips: bool = False
) -> Tensor:
    """Probabilities of the foreground classes.

    Args:
        model: Images to logits ``[B, K, H, W]`` or a tuple of them, of which the first counts.
        images: ``[B, C, H, W]``.
        window: Side of the windows that larger images are cut into; None: whole images.
        overlap: Share of a window that the next one covers again; windows are blended with Gaussian weights.
        flips: Average over the image and its three reflections.

    Returns:
        ``[B, 1, H, W]``, or ``[B, K - 1, H, W]`` for K > 1, float32.

    Raises:
        ValueError: A window below 1 or an overlap outside [0, 1).
    """
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be a number of pixels, at least 1, or null")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap={overlap} must lie in [0, 1)")

    def once(x: Tensor) -> Tensor:
        output = model(x)
        return class_probabilities(output[0] if isinstance(output, tuple) else output)

    total: Any = 0
    for axes in _FLIPS if flips else _FLIPS[:1]:
        x = images.flip(axes) if axes else images
        if window is not None and max(x.shape[-2:]) > window:
            found: Any = sliding_window_inference(x, window, 4, once, overlap, mode="gaussian")
        else:
            found = once(x)
        total = total + (found.flip(axes) if axes else found)
    return total / (len(_FLIPS) if flips else 1)


@contextmanager
def _of_any_size() -> Iterator[None]:
    """Without Pillow's limit on pixels, which refuses 20,000 x 20,000."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def pixels_of_file(path: Path) -> int:
    """Height times width of an image file, which is not decoded.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read as an image.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        if path.suffix.lower() in (".tif", ".tiff"):
            with tifffile.TiffFile(path) as file:
                return int(file.pages[0].imagelength * file.pages[0].imagewidth)
        with _of_any_size(), Image.open(path) as image:
            return image.width * image.height
    except (OSError, tifffile.TiffFileError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


class TiledImage:
    """Parts of an image file.

    TIFF is decoded tile by tile (or strip by strip), with a bounded store of decoded ones; a file of one single
    compressed strip has to be decoded whole. PNG and JPEG know no parts: Pillow decodes them whole, which takes
    height x width x channels bytes (1.2 GB for 20,000 x 20,000 RGB).

    Args:
        path: Image file.
        in_chans: Channels of the parts, 1 or 3, made as ``read_pixels`` makes them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, is no plane of pixels with channels last, or is a TIFF that is neither RGB nor
            grey with 0 for black.
    """

    def __init__(self, path: str | Path, in_chans: int = 3):
        self.path, self.in_chans = Path(path), in_chans
        if not self.path.is_file():
            raise FileNotFoundError(f"no image at {self.path}")
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._page: Any = None
        try:
            if self.path.suffix.lower() in (".tif", ".tiff"):
                self._file = tifffile.TiffFile(self.path)
                self._page = self._file.pages[0]
                shape = self._page.shape
                planar = int(self._page.planarconfig) == 2 and len(shape) == 3
                if int(self._page.photometric) not in (_BLACK_IS_0, _RGB):
                    raise ValueError(
                        f"{self.path} has the colours {self._page.photometric.name}; convert it to RGB or grey"
                    )
            else:
                with _of_any_size():
                    self._whole = read_pixels(self.path, in_chans)
                shape, planar = self._whole.shape, False
        except (OSError, tifffile.TiffFileError) as error:
            raise ValueError(f"{self.path} cannot be read as an image: {error}") from error
        if len(shape) not in (2, 3) or planar:
            raise ValueError(f"{self.path} has shape {list(shape)}; expected one page [H, W] or [H, W, C]")
        self.height, self.width = int(shape[0]), int(shape[1])
        self.channels = int(shape[2]) if len(shape) == 3 else 1  # of the file

    def _segment(self, i: int) -> Any:
        if i not in self._kept:
            handle = self._file.filehandle
            handle.seek(self._page.dataoffsets[i])
            count = self._page.databytecounts[i]
            data = handle.read(count) if count else None  # a sparse file has no bytes for an empty tile
            decoded, place, _ = self._page.decode(data, i, jpegtables=self._page.jpegtables)
            self._kept[i] = (decoded, place)
            size = 0 if decoded is None else decoded.nbytes
            while len(self._kept) > 1 and len(self._kept) * size > _CACHE:
                self._kept.popitem(last=False)
        self._kept.move_to_end(i)
        return self._kept[i]

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Pixels ``[height, width, in_chans]``; beyond the image its border is reflected or, if too small, repeated."""
        y0, y1 = max(top, 0), min(top + height, self.height)
        x0, x1 = max(left, 0), min(left + width, self.width)
        if self._page is None:
            part = self._whole[y0:y1, x0:x1]
        else:
            part = np.zeros((y1 - y0, x1 - x0, self.channels), self._page.dtype)
            page = self._page
            tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, self.width)
            across = -(-self.width // wide)
            for row in range(y0 // tall, -(-y1 // tall)):
                for column in range(x0 // wide, -(-x1 // wide)):
                    decoded, _ = self._segment(row * across + column)
                    if decoded is None:  # a tile without data
                        continue
                    block = decoded[0]
                    ys, xs = row * tall, column * wide
                    a, b = max(y0, ys), min(y1, ys + block.shape[0])
                    c, d = max(x0, xs), min(x1, xs + block.shape[1])
                    part[a - y0 : b - y0, c - x0 : d - x0] = block[a - ys : b - ys, c - xs : d - xs]
            part = with_channels(part, self.in_chans)
        pad = ((y0 - top, top + height - y1), (x0 - left, left + width - x1), (0, 0))
        reflected = all(max(p) < max(side, 1) for p, side in zip(pad, part.shape, strict=True))
        return np.pad(part, pad, mode="reflect" if reflected else "edge") if np.any(pad) else part


def segment_file(
    image: str | Path,
    output: str | Path,
    label: Callable[[np.ndarray], np.ndarray],
    tile: int = 512,
    margin: int = 64,
    in_chans: int = 3,
) -> None:
    """Write the mask of an image file as a tiled TIFF, holding one tile at a time.

    Each tile is read with a margin on every side and its middle is kept, so that no seam has a border's context.

    Args:
        image: File for ``TiledImage``.
        output: TIFF to write, under a temporary name until it is complete.
        label: Pixels ``[h, w, in_chans]`` to labels ``[h, w]`` uint8.
        tile: Side of the tiles, a multiple of 16.
        margin: Context around a tile, pixels.
        in_chans: Channels that the image is read with.

    Raises:
        ValueError: A tile that is no multiple of 16 or a negative margin; as ``TiledImage``.
        FileNotFoundError: As ``TiledImage``.
    """
    if tile < 16 or tile % 16:
        raise ValueError(f"tile={tile} must be a positive multiple of 16, as TIFF wants")
    if margin < 0:
        raise ValueError(f"margin={margin} must not be negative")
    source, target = TiledImage(image, in_chans), Path(output)

    def tiles() -> Iterator[np.ndarray]:
        for top in range(0, source.height, tile):
            for left in range(0, source.width, tile):
                side = tile + 2 * margin
                mask = label(source.read(top - margin, left - margin, side, side))
                middle = mask[margin : margin + tile, margin : margin + tile]
                # what lies beyond the image is not part of the file
                yield np.ascontiguousarray(middle)

    shape = (source.height, source.width)
    with replaced(target) as temporary:
        tifffile.imwrite(
            temporary, tiles(), shape=shape, dtype=np.uint8, tile=(tile, tile), compression="zlib", maxworkers=1
        )


def of_size(found: Tensor, like: Tensor) -> Tensor:
    """Maps ``[B, K, h, w]`` enlarged or reduced to the height and width of another tensor, bilinearly."""
    if found.shape[-2:] == like.shape[-2:]:
        return found
    return F.interpolate(found, like.shape[-2:], mode="bilinear", align_corners=False)


def labels(found: Tensor, threshold: float) -> Tensor:
    """Labels ``[B, H, W]`` of foreground probabilities ``[B, K, H, W]``: above the threshold, or the most probable."""
    if found.shape[1] == 1:
        return (found[:, 0] > threshold).long()
    return torch.cat([1 - found.sum(1, keepdim=True), found], 1).argmax(1)
