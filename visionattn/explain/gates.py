"""Gates: factors between a block's input and its output that depend on the image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from timm.layers import SqueezeExcite
from torch import Tensor, nn

from visionattn.layers import DualGatedBlock
from visionattn.models.activator import NormedGEGLU
from visionattn.models.ninformer import MixerGate
from visionattn.models.patnet import (
    MergedSpatialAttention,
    PartialChannelAttention,
    PartialSpatialAttention,
    spatial_moments,
)


@dataclass
class Gate:
    """Values of one gate for one batch.

    Args:
        layer: Name of the module in the model.
        stage: Stage of the module, counted from 1; 0 for modules outside the stages.
        values: ``[B, C]``, one per channel; ``[B, H, W]``, one per pixel; or ``[B, H, W, C]``, one for each of both.
            Values of the first two kinds lie between 0 and 1, those of the last do not.
    """

    layer: str
    stage: int
    values: Tensor

    @property
    def map(self) -> Tensor | None:
        """``[B, H, W]``: the values, or the mean of their sizes over the channels; None if pixels share them."""
        if self.values.dim() == 4:
            return self.values.abs().mean(dim=-1)
        return self.values if self.values.dim() == 3 else None


def _partial_channels(module: PartialChannelAttention, x: Tensor) -> Tensor:
    gated = x.split(module.split, dim=1)[1]
    return F.hardsigmoid(module.gate_norm(module.gate_fc(spatial_moments(gated))))


def _pixels(module: PartialSpatialAttention, x: Tensor) -> Tensor:
    return F.hardsigmoid(module.gate_conv(x.chunk(2, dim=1)[0]))[:, 0]


def _merged_pixels(module: MergedSpatialAttention, x: Tensor) -> Tensor:
    return F.hardsigmoid(x[:, -1])


def _squeeze_excite(module: SqueezeExcite, x: Tensor) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return module.gate(module.fc2(module.act(module.bn(module.fc1(means))))).flatten(1)


def _mixer(module: MixerGate, x: Tensor) -> Tensor:
    return module.mixer(x.flatten(1, 2)).reshape(x.shape)


def _geglu(module: NormedGEGLU, x: Tensor) -> Tensor:
    return module.norm(F.gelu(module.gate(x)))


def _dual(module: DualGatedBlock, x: Tensor) -> Tensor:
    return F.silu(module.gate(module.norm1(x.permute(0, 2, 3, 1) if module.channels_first else x)))


def whole_module(module: nn.Module, x: Tensor) -> Tensor:
    """A gate that is a module of its own, ``[B, C, H, W]`` to ``[B, H, W, C]``."""
    return module(x).permute(0, 2, 3, 1)


CHANNEL_GATES: dict[type, Callable[..., Tensor]] = {
    PartialChannelAttention: _partial_channels,
    SqueezeExcite: _squeeze_excite,
}
"""By class of the module: inputs to one value per channel, between 0 and 1."""

GATES: dict[type, Callable[..., Tensor]] = {
    PartialSpatialAttention: _pixels,
    MergedSpatialAttention: _merged_pixels,
    MixerGate: _mixer,
    NormedGEGLU: _geglu,
    DualGatedBlock: _dual,
}
"""By class of the module: inputs to values per pixel, or per pixel and channel."""
