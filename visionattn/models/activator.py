"""Activator: gated linear units in the place of attention.

Paper: Activator: GLU Activation Function as the Core Component of a Vision Transformer, Abdullah and Aydin,
arXiv:2405.15953. Its first version has blocks of the gated unit and an MLP, the latest of the unit alone.
Code: https://github.com/Abdullah-88/Activator (BSD-3-Clause), ``activator.py``, ``activator_only_GEGLU.py`` and the
classifiers in their training scripts.

As released, nothing mixes tokens: every block treats each patch by itself and only the mean before the classifier
joins them, so the network sees a bag of patches, and shuffling them leaves the logits unchanged.

Departures: images are padded to whole patches. ``token_mixing=True`` is ours. The paper has models for small images
only; the one for 224 pixels is ours.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers import ResidualDepthwiseConv
from visionattn.models._tokens import PatchStem, SharedNormBlock, TokenBackbone, block_rates, rename_published
from visionattn.models._weights import build_backbone


class NormedGEGLU(nn.Module):
    """A GELU-gated linear unit whose two factors go through one and the same norm; channels are the last axis.

    Args:
        dim: Channels.
        hidden_dim: Channels of the factors.
    """

    def __init__(self, dim: int, hidden_dim: int, **dd: Any):
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, **dd)
        self.value = nn.Linear(dim, hidden_dim, **dd)
        self.norm = LayerNorm(hidden_dim, eps=1e-5, **dd)
        self.proj = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.norm(F.gelu(self.gate(x))) * self.norm(self.value(x)))


class Activator(TokenBackbone):
    """Activator.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        patch_size: Side of a patch in pixels.
        embed_dim: Channels.
        depth: Blocks.
        mlp_ratio: Hidden width of gated units and MLPs over ``embed_dim``.
        channel_mlp: With an MLP behind the gated unit of each block, as in the first version of the paper.
        token_mixing: With a residual depthwise 3 x 3 convolution before each block, a departure from the paper. It is
            the least that shows a patch its neighbours and, by the zeros at the borders, its place, at any image size.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs (published training: 0.5); the gated units have none.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A ``patch_size`` below 1, or no blocks.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 256,
        depth: int = 4,
        mlp_ratio: float = 2.0,
        channel_mlp: bool = True,
        token_mixing: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        stem = PatchStem(in_chans, embed_dim, patch_size, **dd)
        hidden_dim = int(mlp_ratio * embed_dim)
        rows: list[list[nn.Module]] = []
        for rate in block_rates(drop_path_rate, depth):
            mlp = Mlp(embed_dim, hidden_dim, drop=proj_drop_rate, **dd) if channel_mlp else None
            block = SharedNormBlock(embed_dim, NormedGEGLU(embed_dim, hidden_dim, **dd), mlp, rate, **dd)
            rows.append([ResidualDepthwiseConv(embed_dim, **dd), block] if token_mixing else [block])
        super().__init__(stem, rows, num_classes, global_pool, drop_rate, **dd)


_UNIT_KEYS = (
    (r"\.actgu\.proj_1\.", ".unit.gate."),
    (r"\.actgu\.proj_2\.", ".unit.value."),
    (r"\.actgu\.proj_3\.", ".unit.proj."),
    (r"\.actgu\.norm\.", ".unit.norm."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        model: The model to fill.

    Returns:
        The state dict under our names.
    """
    return rename_published(state_dict, _UNIT_KEYS)


def _create_activator(variant: str, pretrained: bool = False, **kwargs: Any) -> Activator:
    return build_backbone(Activator, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "bsd-3-clause",
        "origin_url": "https://github.com/Abdullah-88/Activator",
        "paper_name": "Activator: GLU Activation Function as the Core Component of a Vision Transformer",
        "paper_ids": "arXiv:2405.15953",
        **kwargs,
    }


_PHOTO = dict(num_classes=1000, input_size=(3, 224, 224), pool_size=(14, 14), crop_pct=0.875)

default_cfgs = generate_default_cfgs(
    {
        "activator_p4_32.untrained": _cfg(),
        "activator_glu_p4_32.untrained": _cfg(),
        "activator_p16_224.untrained": _cfg(**_PHOTO),
        "test_activator.untrained": _cfg(input_size=(3, 64, 64)),
    }
)


@register_model
def test_activator(pretrained: bool = False, **kwargs: Any) -> Activator:
    """Smallest Activator, for tests; not a published model."""
    return _create_activator("test_activator", pretrained, **{**dict(patch_size=8, embed_dim=64), **kwargs})


@register_model
def activator_p4_32(pretrained: bool = False, **kwargs: Any) -> Activator:
    """Activator of gated unit and MLP for 32 pixels, the model of the published CIFAR-10 script."""
    return _create_activator("activator_p4_32", pretrained, **{**dict(patch_size=4), **kwargs})


@register_model
def activator_glu_p4_32(pretrained: bool = False, **kwargs: Any) -> Activator:
    """Activator of the gated unit alone for 32 pixels, the model of the published CIFAR-10 script."""
    args = dict(patch_size=4, channel_mlp=False)
    return _create_activator("activator_glu_p4_32", pretrained, **{**args, **kwargs})


@register_model
def activator_p16_224(pretrained: bool = False, **kwargs: Any) -> Activator:
    """The same blocks for 224 pixels; not a published model."""
    return _create_activator("activator_p16_224", pretrained, **kwargs)
