"""The detectors of torchvision on any backbone that timm knows.

RetinaNet: "Focal Loss for Dense Object Detection", https://arxiv.org/abs/1708.02002; FCOS: "FCOS: Fully Convolutional
One-Stage Object Detection", https://arxiv.org/abs/1904.01355; Faster R-CNN: https://arxiv.org/abs/1506.01497; Mask
R-CNN: https://arxiv.org/abs/1703.06870; the feature pyramid: https://arxiv.org/abs/1612.03144. Their code is
``torchvision.models.detection``; this file only gives them backbones and anchors.
"""

import inspect
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from visionattn.heads._backbones import check_name, create_backbone

DETECTORS = ("retinanet", "fcos", "faster_rcnn", "mask_rcnn")
_DENSE = ("retinanet", "fcos")  # predict at every place of the maps; the others crop proposals out of them
_COARSER = (None, "pool", "p6p7")


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(32, max(channels // 2, 1)), channels)  # two channels or more a group


class FeaturePyramid(nn.Module):
    """A timm backbone with torchvision's feature pyramid: the ``backbone`` of any detector of torchvision.

    Args:
        backbone: A name in timm; the model must give maps at several strides (``features_only``).
        strides: Of the maps taken, in pixels; None takes those of 4, 8, 16 and 32, from ``finest`` on, that there are.
        channels: Of every map of the pyramid.
        coarser: Levels made from the coarsest: ``"p6p7"`` (two, by convolutions of stride 2), ``"pool"`` (one) or None.
        norm: None, or ``"group"`` for group normalization behind every convolution of the pyramid, which training from
            random weights in small batches wants.
        norm_eval: The BatchNorms of the backbone keep their statistics, as usual when fine-tuning with two images a
            device.
        in_chans: Channels of the image.
        pretrained: Load the backbone's published weights.
        finest: Least of the strides that None takes.
        **backbone_kwargs: Arguments of the backbone, for example ``drop_path_rate=0.2``.

    Shape:
        x: Images ``[B, in_chans, H, W]``.
        returns: ``{"0": [B, channels, H / s0, W / s0], "1": ...}``, finest first, sides rounded up; the attributes
            ``out_channels``, ``strides`` and ``names`` describe them.

    Raises:
        ValueError: An unknown backbone, one that gives no maps at these strides, or unknown settings.
    """

    def __init__(
        self,
        backbone: str = "biformer_s",
        strides: Sequence[int] | None = None,
        channels: int = 256,
        coarser: str | None = None,
        norm: str | None = None,
        norm_eval: bool = False,
        in_chans: int = 3,
        pretrained: bool = False,
        finest: int = 4,
        **backbone_kwargs: Any,
    ):
        super().__init__()
        if coarser not in _COARSER or norm not in (None, "group"):
            raise ValueError(f"coarser={coarser!r}, norm={norm!r}: expected one of {_COARSER}, and None or 'group'")
        arguments = dict(in_chans=in_chans, features_only=True, **backbone_kwargs)
        try:  # without weights first: which maps there are is only known once it is made
            found = create_backbone(backbone, **arguments).feature_info.reduction()
        except (AttributeError, RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(f"backbone {backbone!r} gives no feature maps with {arguments}: {error}") from error
        chosen = _levels(backbone, found, strides, finest)
        indices = [found.index(stride) for stride in chosen]
        self.body = create_backbone(backbone, out_indices=indices, pretrained=pretrained, **arguments)
        self.channels_last = str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        extra: dict[str | None, Any] = {"pool": LastLevelMaxPool, "p6p7": lambda: LastLevelP6P7(channels, channels)}
        self.fpn = FeaturePyramidNetwork(
            self.body.feature_info.channels(),
            channels,
            extra_blocks=extra[coarser]() if coarser else None,
            norm_layer=_group_norm if norm else None,
        )
        self.out_channels, self.norm_eval = channels, norm_eval
        more = {"pool": 1, "p6p7": 2}.get(coarser or "", 0)
        self.names = [str(i) for i in range(len(chosen))]
        self.strides = [*chosen, *(chosen[-1] * 2 ** (i + 1) for i in range(more))]
        cfg: dict[str, Any] = getattr(self.body, "pretrained_cfg", None) or {}
        self.mean, self.std = (_statistics(cfg.get(key, 0.5), in_chans) for key in ("mean", "std"))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x)
        if self.channels_last:
            maps = [y.movedim(-1, 1).contiguous() for y in maps]
        return self.fpn(OrderedDict(zip(self.names, maps, strict=True)))

    def train(self, mode: bool = True) -> "FeaturePyramid":
        """Training or evaluation mode; with ``norm_eval`` the backbone's BatchNorms stay in the latter."""
        super().train(mode)
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _levels(backbone: str, found: list[int], strides: Sequence[int] | None, finest: int) -> list[int]:
    """The strides to take of those that a backbone has."""
    chosen: list[int] = [s for s in (4, 8, 16, 32) if s in found and s >= finest] if strides is None else list(strides)
    if len(set(found)) < len(found) or len(chosen) < 2:
        raise ValueError(
            f"backbone {backbone!r} gives maps at the strides {found}; a feature pyramid needs two or more different "
            "ones, so take a backbone of stages, for example biformer_s"
        )
    if chosen != sorted(set(chosen)) or not set(chosen) <= set(found):
        raise ValueError(f"strides={chosen} must ascend and be among {found}, those of the backbone {backbone!r}")
    return chosen


def _statistics(values: Any, in_chans: int) -> list[float]:
    """Mean or deviation for each channel; one grey value for images of other than three."""
    values = [float(v) for v in values] if isinstance(values, list | tuple) else [float(values)]
    return values if len(values) == in_chans else [sum(values) / len(values)] * in_chans


class _AsItIs(GeneralizedRCNNTransform):
    """torchvision's normalization and batching of images, without its resizing."""

    def resize(self, image: Tensor, target: Any = None) -> Any:
        return image, target


class Detector(nn.Module):
    """A detector of torchvision on a timm backbone, for images of any size.

    Args:
        backbone: A name in timm.
        detector: One of ``DETECTORS``.
        in_chans: Channels of the image.
        num_classes: Kinds of objects; labels are 1 to ``num_classes``, 0 is the background.
        pretrained: Load the backbone's published weights.
        strides: Maps to take, see ``FeaturePyramid``; by default 8, 16, 32 for ``"retinanet"`` and ``"fcos"``, and from
            4 on for the others.
        channels: Of the pyramid and the heads.
        coarser: Further levels, see ``FeaturePyramid``; ``"auto"`` is ``"p6p7"`` for ``"retinanet"`` and ``"fcos"``,
            ``"pool"`` for the others.
        convs: Convolutions of each head of ``"retinanet"`` and ``"fcos"``, at most 4.
        norm: See ``FeaturePyramid``; also in RetinaNet's heads. FCOS's heads always have group normalization.
        norm_eval: See ``FeaturePyramid``.
        anchor_scale: Side of a level's smallest anchor in units of its stride; by default 4 for RetinaNet, 8 for the
            R-CNNs, and for FCOS 1, where it scales the ranges of box sizes of the levels.
        anchor_octaves: Anchors of a level differ by this root of two: 3 gives sizes of 1, 1.26, 1.59 (RetinaNet).
        aspect_ratios: Height by width of anchors; not for FCOS, which has none.
        min_size: Shorter side that images are resized to, in pixels; None leaves them as they are.
        max_size: Longest side that resizing may give, in pixels.
        backbone_kwargs: Arguments of the backbone.
        detector_kwargs: Further arguments of torchvision's class, for example ``dict(score_thresh=0.01)``.

    Shape:
        images: B tensors ``[in_chans, H, W]`` in [0, 1], of any sizes.
        targets: In training, B dictionaries with ``boxes [N, 4]`` (left, top, right, bottom in pixels), ``labels [N]``
            and for ``"mask_rcnn"`` ``masks [N, H, W]`` uint8.
        returns: In training a dictionary of losses; otherwise B dictionaries with ``boxes [M, 4]``, ``labels [M]``,
            ``scores [M]`` and for ``"mask_rcnn"`` ``masks [M, 1, H, W]``, probabilities.

    Raises:
        ValueError: An unknown detector or backbone, settings that do not fit, or in ``forward`` images of another
            number of channels.
    """

    def __init__(
        self,
        backbone: str = "biformer_s",
        detector: str = "retinanet",
        in_chans: int = 3,
        num_classes: int = 1,
        pretrained: bool = False,
        strides: Sequence[int] | None = None,
        channels: int = 256,
        coarser: str | None = "auto",
        convs: int = 4,
        norm: str | None = None,
        norm_eval: bool = False,
        anchor_scale: float | None = None,
        anchor_octaves: int | None = None,
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
        min_size: int | None = 800,
        max_size: int = 1333,
        backbone_kwargs: dict[str, Any] | None = None,
        detector_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_name(detector, DETECTORS, "detector")
        if num_classes < 1 or in_chans < 1 or not 1 <= convs <= 4:
            raise ValueError(f"num_classes={num_classes}, in_chans={in_chans}, convs={convs}: expected 1 or more, 1-4")
        if detector == "fcos" and channels % 32:
            raise ValueError(f"channels={channels}: FCOS normalizes 32 groups of channels; give a multiple of 32")
        self.in_chans, self.num_classes, self.detector_name = in_chans, num_classes, detector
        dense = detector in _DENSE
        pyramid = FeaturePyramid(
            backbone,
            strides,
            channels,
            ("p6p7" if dense else "pool") if coarser == "auto" else coarser,
            norm,
            norm_eval,
            in_chans,
            pretrained,
            8 if dense else 4,
            **(backbone_kwargs or {}),
        )
        anchors = _anchors(detector, pyramid.strides, anchor_scale, anchor_octaves, tuple(aspect_ratios))
        parts = _parts(detector, pyramid, anchors, num_classes, convs, norm)
        statistics = dict(image_mean=pyramid.mean, image_std=pyramid.std)
        sizes = dict(min_size=min_size or 1, max_size=max_size)
        kind = dict(retinanet=RetinaNet, fcos=FCOS, faster_rcnn=FasterRCNN, mask_rcnn=MaskRCNN)[detector]
        given = dict(detector_kwargs or {})
        # torchvision hands unknown arguments on to a class that ignores them
        if unknown := [key for key in given if key not in inspect.signature(kind).parameters]:
            raise ValueError(f"detector_kwargs: {kind.__name__} has no argument {', '.join(unknown)}")
        self.net = kind(pyramid, num_classes + 1, **sizes, **statistics, **parts, **given)
        if min_size is None:
            self.net.transform = _AsItIs(1, max_size, **statistics)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        for image in images:
            if image.dim() != 3 or image.shape[0] != self.in_chans:
                raise ValueError(f"Detector wants images [{self.in_chans}, H, W], got {list(image.shape)}")
        return self.net(images, targets)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone wants without weight decay."""
        body = self.net.backbone.body
        model, inner = (body.model, "model.") if hasattr(body, "model") else (body, "")
        names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        return {f"net.backbone.body.{inner}{name}" for name in names}


def _anchors(
    detector: str, strides: list[int], scale: float | None, octaves: int | None, ratios: tuple[float, ...]
) -> AnchorGenerator:
    if detector == "fcos":  # one box a place, whose side is the unit of distances to the object's sides
        return AnchorGenerator(tuple((round(s * (scale or 1)),) for s in strides), ((1.0,),) * len(strides))
    least, steps = (scale or 4, octaves or 3) if detector == "retinanet" else (scale or 8, octaves or 1)
    sizes = tuple(tuple(round(least * s * 2 ** (i / steps)) for i in range(steps)) for s in strides)
    return AnchorGenerator(sizes, (ratios,) * len(strides))


def _parts(
    detector: str, pyramid: FeaturePyramid, anchors: AnchorGenerator, num_classes: int, convs: int, norm: str | None
) -> dict[str, Any]:
    """Anchors and heads under the names of torchvision's arguments."""
    channels, count = pyramid.out_channels, anchors.num_anchors_per_location()[0]
    if detector == "fcos":
        return dict(anchor_generator=anchors, head=FCOSHead(channels, count, num_classes + 1, convs))
    if detector == "retinanet":
        head = RetinaNetHead(channels, count, num_classes + 1, norm_layer=_group_norm if norm else None)
        for part in (head.classification_head, head.regression_head):
            part.conv = part.conv[:convs]
        return dict(anchor_generator=anchors, head=head)
    sampled = dict(featmap_names=pyramid.names, sampling_ratio=2)
    parts: dict[str, Any] = dict(
        rpn_anchor_generator=anchors, box_roi_pool=MultiScaleRoIAlign(output_size=7, **sampled)
    )
    if detector == "mask_rcnn":
        parts["mask_roi_pool"] = MultiScaleRoIAlign(output_size=14, **sampled)
    return parts
