"""Segmentation with the decoders of segmentation_models_pytorch on any backbone that timm knows.

Decoders: https://github.com/qubvel-org/segmentation_models.pytorch, whose ``tu-NAME`` encoders take timm's names.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.heads._backbones import check_backbone, check_name
from visionattn.heads.bottleneck import BottleneckAttention

DECODERS = dict(
    unet="Unet",
    unetplusplus="UnetPlusPlus",
    upernet="UPerNet",
    fpn="FPN",
    segformer="Segformer",
    dpt="DPT",
    linknet="Linknet",
    manet="MAnet",
    pspnet="PSPNet",
    pan="PAN",
)
"""Names of decoders and their classes in segmentation_models_pytorch."""
# below this side the pooling pyramid of PAN has no pixel left
_LEAST = dict(pan=256)


class Segmenter(nn.Module):
    """A decoder on a timm backbone, for images of any size.

    Args:
        backbone: A name in timm; the model must give feature maps (``features_only``; DPT: ``forward_intermediates``).
        decoder: One of ``DECODERS``. DeepLab is not among them: it needs a backbone that trades strides for dilation
            (``output_stride``), which attention backbones do not offer.
        in_chans: Channels of the image.
        num_classes: 1 gives the logit of a binary mask, more give logits of a softmax.
        pretrained: Load the backbone's published weights.
        bottleneck: ``"routed"``, ``"neighborhood"`` or None: an attention block on the deepest map.
        bottleneck_kwargs: Arguments of its attention layer.
        backbone_kwargs: Arguments of the backbone, for example ``dict(drop_path_rate=0.1)``.
        decoder_kwargs: Arguments of the decoder's class, for example ``dict(decoder_channels=[64, 32, 16, 8, 4])``.
        aux_channels: Width of an auxiliary head (3 x 3 convolution and classifier) on the last map but one, as
            UPerNet's published recipes have it; 0: none.

    Shape:
        x: Images ``[B, in_chans, H, W]``. They are completed with zeros at the bottom and right to what encoder and
            decoder need.
        returns: Logits ``[B, num_classes, H, W]``; in training with an auxiliary head two of them.

    Raises:
        ValueError: An unknown decoder, backbone or bottleneck, a bottleneck or auxiliary head for DPT, or a backbone
            that gives no maps for the decoder; in ``forward``, images of another shape; in ``freeze``, an unknown part.
    """

    def __init__(
        self,
        backbone: str = "biformer_s",
        decoder: str = "unet",
        in_chans: int = 3,
        num_classes: int = 1,
        pretrained: bool = False,
        bottleneck: str | None = None,
        bottleneck_kwargs: dict[str, Any] | None = None,
        backbone_kwargs: dict[str, Any] | None = None,
        decoder_kwargs: dict[str, Any] | None = None,
        aux_channels: int = 0,
    ):
        super().__init__()
        import segmentation_models_pytorch as smp  # takes long to import

        if decoder.startswith("deeplab"):
            raise ValueError(
                f"decoder={decoder!r} needs a backbone with output_stride, which attention backbones do not offer; "
                f"take one of {', '.join(DECODERS)}"
            )
        check_name(decoder, list(DECODERS), "decoder")
        check_backbone(backbone)
        if (bottleneck is not None or aux_channels) and decoder == "dpt":
            raise ValueError(
                "bottleneck and aux_channels are not for the decoder dpt, whose maps are all of one depth's tokens"
            )
        if num_classes < 1 or in_chans < 1:
            raise ValueError(f"num_classes={num_classes} and in_chans={in_chans} must be at least 1")
        self.in_chans, self.num_classes, self.decoder_name = in_chans, num_classes, decoder
        try:
            self.net = getattr(smp, DECODERS[decoder])(
                encoder_name=f"tu-{backbone}",
                encoder_weights="imagenet" if pretrained else None,
                in_channels=in_chans,
                classes=num_classes,
                **(decoder_kwargs or {}),
                **(backbone_kwargs or {}),
            )
        except (AttributeError, RuntimeError, TypeError, KeyError, IndexError, AssertionError) as error:
            raise ValueError(f"decoder {decoder!r} does not fit backbone {backbone!r}: {error}") from error
        dim = self.net.encoder.out_channels[-1]
        self.bottleneck = (
            BottleneckAttention(dim, bottleneck, **(bottleneck_kwargs or {})) if bottleneck else nn.Identity()
        )
        self.aux: nn.Module | None = None
        if aux_channels:
            hidden = ConvNormAct(self.net.encoder.out_channels[-2], aux_channels, 3)
            self.aux = nn.Sequential(hidden, nn.Dropout2d(0.1), nn.Conv2d(aux_channels, num_classes, 1))
        self.multiple = max(32, int(getattr(self.net.encoder, "output_stride", 32)))
        self.least = _LEAST.get(decoder, 64)
        self._still: list[nn.Module] = []

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"Segmenter wants images [B, {self.in_chans}, H, W], got {list(x.shape)}")
        height, width = x.shape[-2:]
        down, right = (max(-(-side // self.multiple) * self.multiple, self.least) - side for side in (height, width))
        x = F.pad(x, (0, right, 0, down)) if down or right else x
        if self.decoder_name == "dpt":
            return self.net(x)[..., :height, :width]
        *maps, deepest = self.net.encoder(x)
        logits = self.net.segmentation_head(self.net.decoder([*maps, self.bottleneck(deepest)]))[..., :height, :width]
        if self.aux is None or not self.training:
            return logits
        aux = F.interpolate(self.aux(maps[-1]), x.shape[-2:], mode="bilinear")
        return logits, aux[..., :height, :width]

    def freeze(self, parts: Sequence[str]) -> None:
        """Stop training of parts; their BatchNorm keeps its statistics.

        Args:
            parts: Of ``"encoder"``, ``"decoder"`` (both: a linear probe), ``"batchnorm"`` (every BatchNorm keeps its
                statistics), or names of the backbone's modules, for example ``"stages_0"``.

        Raises:
            ValueError: A part that names nothing.
        """
        backbone = self.net.encoder.model
        for part in parts:
            if part in ("encoder", "decoder"):
                chosen: dict[str, nn.Module] = {part: getattr(self.net, part)}
            elif part == "batchnorm":
                chosen = {}
                self._still += [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            else:
                chosen = {name: module for name, module in backbone.named_modules() if name == part}
                if not chosen:
                    tops = ", ".join(name for name, _ in backbone.named_children())
                    raise ValueError(f"freeze={part!r} names no part; expected encoder, decoder, batchnorm or {tops}")
            for module in chosen.values():
                module.requires_grad_(False)
                self._still += [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.train(self.training)

    def train(self, mode: bool = True) -> "Segmenter":
        """Training or evaluation mode; frozen BatchNorm stays in the latter."""
        super().train(mode)
        for module in self._still:
            module.eval()
        return self

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone wants without weight decay."""
        model = self.net.encoder.model
        names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        return {f"net.encoder.model.{name}" for name in names}
