"""Networks for masks among the models to time."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

PUBLISHED = dict(herseg=1024, fsgnet=608)
"""Names of the heads with an own decoder, and the published side of their images in pixels."""
_SIDE = 512


def mask_network(text: str, kwargs: dict[str, Any]) -> tuple[nn.Module, int] | None:
    """A network for masks and the side of its images.

    Args:
        text: ``herseg``, ``fsgnet``, either with ``/BACKBONE`` in place of its own encoder, or ``DECODER/BACKBONE``
            with a decoder of segmentation_models_pytorch.
        kwargs: Further arguments of the network.

    Returns:
        None if ``text`` names none.

    Raises:
        ValueError: An unknown backbone.
    """
    head, _, backbone = text.partition("/")
    if head == "herseg":
        from visionattn.heads.herseg import HERSeg

        return HERSeg(backbone or "lgvit_d96", **kwargs), PUBLISHED[head]
    if head == "fsgnet":
        from visionattn.heads.fsgnet import FSGNet, FSGNetDecoder

        return FSGNetDecoder(backbone, **kwargs) if backbone else FSGNet(**kwargs), PUBLISHED[head]
    if not backbone:
        return None
    from visionattn.heads.segmenter import DECODERS, Segmenter

    return (Segmenter(backbone, head, **kwargs), _SIDE) if head in DECODERS else None


def mask_loss(text: str, mask: Tensor) -> Callable[[Any], Tensor]:
    """The published loss of the network, FSG-Net's (cross-entropy and Dice of every output) for other decoders.

    Args:
        text: As of ``mask_network``.
        mask: ``[B, 1, H, W]``, 0 and 1.
    """
    from visionattn.heads.fsgnet import multiscale_dice_bce
    from visionattn.heads.losses import DiceFocalLoss

    if text.partition("/")[0] != "herseg":
        return lambda output: multiscale_dice_bce(output, mask)
    focal = DiceFocalLoss()
    return lambda output: focal(output.float(), mask)
