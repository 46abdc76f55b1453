"""Networks with heads among the models to time: for masks, boxes, answer grounding and scanpaths."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.tasks.benchmark_dense import GATHERED, PUBLISHED_SIZE, Boxed, dense_arguments, gathered

PUBLISHED = dict(herseg=1024, fsgnet=608)
"""Names of the heads with an own decoder, and the published side of their images in pixels."""
_SIDE = 512
_WORDS = 384  # pixels of a side for questions, and by chance the length of their embeddings too
_ROWS, _COLS, _STEPS = 2, 11, 12  # OAT's wine shelf, and about the length of its scanpaths
_CROP = (150, 93)


class Asked(nn.Module):
    """A network for answer grounding, each of whose images comes with the same embedded question."""

    text: Tensor

    def __init__(self, backbone: str, **kwargs: Any):
        from visionattn.heads.sentence_attention import SentenceAttentionNet

        super().__init__()
        self.network = SentenceAttentionNet(backbone, **kwargs)
        self.register_buffer("text", torch.randn(1, self.network.decoder.text_dim))

    def forward(self, images: Tensor) -> Any:
        return self.network(images, self.text.expand(len(images), -1))


class Watched(nn.Module):
    """OAT on images of a shelf of 2 x 11 objects; gives the loss of a scanpath of 12 fixations under teacher forcing.

    Args:
        backbone: Of one pass over the image; None: the published CNN on crops.
        **kwargs: Further arguments of OAT.
    """

    def __init__(self, backbone: str | None, **kwargs: Any):
        from visionattn.heads.oat import OAT

        super().__init__()
        self.network = OAT(_ROWS, _COLS, objects="image" if backbone else "crops", backbone=backbone, **kwargs)
        self.crops = backbone is None

    def forward(self, images: Tensor) -> Tensor:
        from visionattn.heads.object_encoders import Scenes

        (n, _, height, width), device = images.shape, images.device
        number = torch.arange(_ROWS * _COLS, device=device)
        places = torch.stack([number // _COLS, number % _COLS], -1)
        cell = torch.tensor([height / _ROWS, width / _COLS], device=device)
        corner = (places * cell).flip(-1)
        boxes = torch.cat([corner, corner + cell.flip(0)], -1)
        if self.crops:
            cells = images.unflatten(3, (_COLS, -1)).unflatten(2, (_ROWS, -1))  # [B, C, rows, h, cols, w]
            images = cells.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        target, mask = torch.full((n,), 5, device=device), torch.ones(n, len(number), dtype=torch.bool, device=device)
        every = [x.expand(n, *x.shape) for x in (boxes, places)]
        path = (torch.arange(_STEPS, device=device) * 3 % len(number)).expand(n, -1)
        return self.network.loss(Scenes(images, *every, target, mask), path)


def _asking(head: str, backbone: str, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[int, int]] | None:
    if head == "sentence_attention":
        return Asked(backbone or "tf_efficientnet_b7", **kwargs), (_WORDS, _WORDS)
    if head == "oat":
        height, width = _ROWS * _CROP[0], _COLS * _CROP[1]
        return Watched(backbone or None, **kwargs), (height, width) if not backbone else (_SIDE, _SIDE)
    return None


def head_network(text: str, kwargs: dict[str, Any]) -> tuple[nn.Module, tuple[int, int]] | None:
    """A network with a head, and height and width of its images.

    Args:
        text: ``herseg``, ``fsgnet``, either with ``/BACKBONE`` in place of its own encoder, ``DECODER/BACKBONE``
            with a decoder of segmentation_models_pytorch, ``DETECTOR/BACKBONE`` with one of torchvision, or
            ``sentence_attention`` or ``oat``, alone (as published) or with ``/BACKBONE``. ``:gather`` behind a
            BiFormer of a decoder or detector: with the attention of the published code.
        kwargs: Further arguments of the network.

    Returns:
        None if ``text`` names none.

    Raises:
        ValueError: An unknown backbone, or ``:gather`` for another one.
    """
    head, _, backbone = text.partition("/")
    if head in ("sentence_attention", "oat"):
        return _asking(head, backbone, kwargs)
    if head == "herseg":
        from visionattn.heads.herseg import HERSeg

        return HERSeg(backbone or "lgvit_d96", **kwargs), (PUBLISHED[head], PUBLISHED[head])
    if head == "fsgnet":
        from visionattn.heads.fsgnet import FSGNet, FSGNetDecoder

        network = FSGNetDecoder(backbone, **kwargs) if backbone else FSGNet(**kwargs)
        return network, (PUBLISHED[head], PUBLISHED[head])
    if not backbone:
        return None
    from visionattn.heads.detection import DETECTORS
    from visionattn.heads.segmenter import DECODERS, Segmenter

    name = backbone.removesuffix(GATHERED)
    size = PUBLISHED_SIZE if head in DETECTORS else (_SIDE, _SIDE)
    if head not in (*DECODERS, *DETECTORS):
        return None
    kwargs = dense_arguments(head, name, size, kwargs)
    network: nn.Module = Segmenter(name, head, **kwargs) if head in DECODERS else Boxed(name, head, **kwargs)
    return (gathered(network) if name != backbone else network), size


def is_detector(text: str) -> bool:
    """Whether ``text``, as of ``head_network``, names a detector."""
    from visionattn.heads.detection import DETECTORS

    return text.partition("/")[0] in DETECTORS


def head_loss(text: str, mask: Tensor) -> Callable[[Any], Tensor]:
    """The published loss of the network, FSG-Net's (cross-entropy and Dice of every output) for other masks.

    Args:
        text: As of ``head_network``.
        mask: ``[B, 1, H, W]``, 0 and 1.
    """
    from visionattn.heads.fsgnet import multiscale_dice_bce
    from visionattn.heads.losses import DiceFocalLoss

    head = text.partition("/")[0]
    if head == "oat" or is_detector(text):
        return lambda output: output  # these give their loss
    if head != "herseg":
        return lambda output: multiscale_dice_bce(output, mask)
    focal = DiceFocalLoss()
    return lambda output: focal(output.float(), mask)
