"""Reading image files of every common kind, with errors that name the file."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_MODES = {1: "L", 3: "RGB"}


def check_channels(in_chans: int) -> None:
    """Refuse a number of channels that no picture has.

    Raises:
        ValueError: ``in_chans`` is neither 1 nor 3.
    """
    if in_chans not in _MODES:
        raise ValueError(
            f"in_chans={in_chans}: pictures have 1 (grey) or 3 (RGB) channels; "
            "set data.in_chans to 1 or 3, or write a source of images for other data"
        )


def as_mode(image: Image.Image, in_chans: int) -> Image.Image:
    """Convert a picture to 1 or 3 channels of 8 bits.

    16-bit and floating point greys are scaled rather than clipped, palettes are looked up, transparency is dropped,
    CMYK becomes RGB.

    Args:
        image: Any PIL image.
        in_chans: 1 for grey, 3 for RGB.

    Returns:
        An image of mode ``L`` or ``RGB``.

    Raises:
        ValueError: ``in_chans`` is neither 1 nor 3.
    """
    check_channels(in_chans)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = (0.0, 65535.0) if image.mode.startswith("I") else (values.min(), values.max())
        image = Image.fromarray(np.uint8(np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255 + 0.5))
    elif image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert(_MODES[in_chans])


def read_image(path: str | Path, in_chans: int = 3, exif: bool = False) -> Image.Image:
    """Read a picture completely.

    Args:
        path: File.
        in_chans: 1 for grey, 3 for RGB.
        exif: Turn the picture as its EXIF tag says (ImageNet training does not).

    Returns:
        A loaded image of mode ``L`` or ``RGB``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, truncated or no picture, or is a decompression bomb.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image at {path}")
    return _decode(path, str(path), path.stat().st_size, in_chans, exif)


def decode_image(content: bytes, name: str, in_chans: int = 3) -> Image.Image:
    """Decode the bytes of a picture's file completely.

    Args:
        content: What the file holds.
        name: What errors call it.
        in_chans: 1 for grey, 3 for RGB.

    Returns:
        A loaded image of mode ``L`` or ``RGB``.

    Raises:
        ValueError: The content is empty, truncated or no picture, or is a decompression bomb.
    """
    return _decode(io.BytesIO(content), name, len(content), in_chans, False)


def _decode(file: Path | io.BytesIO, name: str, size: int, in_chans: int, exif: bool) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            if exif:
                image = ImageOps.exif_transpose(image)
            return as_mode(image, in_chans)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, EOFError, IndexError) as error:
        raise ValueError(f"cannot read image {name} ({size} bytes): {error}; repair or remove it") from error
