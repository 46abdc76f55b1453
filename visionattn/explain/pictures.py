"""Heat maps over images."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from visionattn.explain._need import need


def to_image(image: Any) -> Image.Image:
    """A picture of any kind as RGB.

    Args:
        image: PIL image, or array or tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with 1 or 3 channels; integers
            in 0 to 255, or floating point in 0 to 1.

    Returns:
        An RGB image.

    Raises:
        ValueError: Another shape, or floating point outside 0 to 1 (normalised with mean and deviation, for example).
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    values = np.asarray(image.detach().cpu() if isinstance(image, Tensor) else image)
    if values.ndim == 3 and values.shape[0] in (1, 3) and values.shape[2] not in (1, 3):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3):
        raise ValueError(f"expected a picture [H, W], [H, W, 3] or [3, H, W], got shape {list(values.shape)}")
    if np.issubdtype(values.dtype, np.floating):
        if values.size and not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):
            raise ValueError(
                f"a floating point picture must lie in 0 to 1, got {values.min():.3g} to {values.max():.3g}; "
                "undo the normalisation first"
            )
        values = np.round(values.clip(0, 1) * 255)
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")


def overlay(image: Any, heat: Any, opacity: float = 0.65) -> Image.Image:
    """A heat map over a picture: the picture in grey, coloured the more the warmer.

    Args:
        image: As for ``to_image``.
        heat: Not negative, ``[H, W]``; its largest value gets the warmest colour. Another size than the picture's is
            resized to it.
        opacity: Of the warmest colour, in ``[0, 1]``.

    Returns:
        An RGB image of the picture's size.

    Raises:
        ValueError: A picture of another kind, a heat map with other than two axes, negative or not finite values, or
            an opacity outside its range.
        ImportError: matplotlib is not installed.
    """
    picture = to_image(image)
    values = np.asarray(heat.detach().cpu() if isinstance(heat, Tensor) else heat, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"heat must have the shape [H, W], got {list(values.shape)}")
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError("heat must be finite and not negative; take the absolute value or shift it first")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity={opacity} must lie in [0, 1]")
    values = values / max(values.max(), np.finfo(np.float64).tiny)
    if values.shape != (picture.height, picture.width):
        resized = Image.fromarray(values.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
        values = np.asarray(resized, dtype=np.float64).clip(0, 1)
    grey = np.asarray(picture.convert("L"), dtype=np.float64)[..., None] / 255
    colors = need("matplotlib", "matplotlib").colormaps["plasma"](values)[..., :3]
    alpha = opacity * np.sqrt(values)[..., None]  # faint attention stays visible
    return Image.fromarray(np.round(((1 - alpha) * grey + alpha * colors) * 255).astype(np.uint8))
