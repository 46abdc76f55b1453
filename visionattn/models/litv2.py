"""LITv2: convolutional MLPs in the first two stages, HiLo attention in the others.

Paper: Fast Vision Transformers with HiLo Attention, Pan et al., NeurIPS 2022, arXiv:2205.13213.
Code: https://github.com/ziplab/LITv2 (Apache-2.0), ``classification/models/litv2.py``.

Departures: none in what is computed. Images of any size are padded as in the published detection backbone; the
published classifiers take squares of one size. The norms which that backbone adds to its outputs are not here: the
ImageNet weights have none.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, register_notrace_module
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers import DeformablePatches, HiLoAttention
from visionattn.layers.initialization import trunc_normal_
from visionattn.models._pyramid import PyramidBackbone, PyramidStage
from visionattn.models._weights import build_backbone, rename_keys
from visionattn.ops import pad_to_multiple


class ConvMlp(nn.Module):
    """An MLP with a depthwise convolution of its hidden map, whose zeros at the borders tell positions.

    Args:
        dim: Channels ``C``.
        hidden_dim: Channels of the hidden map.

    Shape:
        x: ``[B, H, W, C]``.
        returns: ``[B, H, W, C]``.
    """

    def __init__(self, dim: int, hidden_dim: int, **dd: Any):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **dd)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(self.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.fc2(self.act(x))


class LITv2Block(nn.Module):
    """Attention, if any, and MLP, each with a residual; ``[B, C, H, W]`` in and out.

    Args:
        dim: Channels.
        attn: Attention ``[B, H, W, C]`` to the same, or None.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, attn: nn.Module | None, mlp_ratio: float = 4.0, drop_path: float = 0.0, **dd: Any):
        super().__init__()
        self.norm1 = None if attn is None else LayerNorm(dim, eps=1e-5, **dd)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = ConvMlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


@register_notrace_module  # a leaf for torch.fx: the operator's argument checks are not traceable
class LITv2Stem(nn.Module):
    """4 x 4 patches and a norm; the image is padded with zeros at the bottom and right."""

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(x.permute(0, 2, 3, 1), 4)
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class LITv2(PyramidBackbone):
    """LITv2.

    An image needs at least 29 pixels on each side, for maps of an odd size lose a row or column on the way down.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        depths: Blocks per stage.
        embed_dims: Channels per stage.
        num_heads: Attention heads per stage.
        window_sizes: Windows of HiLo attention per stage; 0 for a stage without attention. For large images the
            published detectors also take 4 in the third stage, with the same weights.
        alpha: Share of the heads that attend to the pooled map.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Heads that do not divide channels, ``alpha`` outside ``[0, 1]``, negative windows, or lists of
            other lengths than 4.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 6, 2),
        embed_dims: tuple[int, ...] = (96, 192, 384, 768),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_sizes: tuple[int, ...] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not len(depths) == len(embed_dims) == len(num_heads) == len(window_sizes) == 4:
            raise ValueError(
                "depths, embed_dims, num_heads and window_sizes need one value for each of the 4 stages, "
                f"got {depths}, {embed_dims}, {num_heads}, {window_sizes}"
            )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.stem = LITv2Stem(in_chans, embed_dims[0], **dd)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        stages: list[nn.Module] = []
        for i, (dim, heads, window) in enumerate(zip(embed_dims, num_heads, window_sizes, strict=True)):
            downsample = deformable_merging(embed_dims[i - 1], dim, **dd) if i > 0 else nn.Identity()
            blocks: list[nn.Module] = []
            for _ in range(depths[i]):
                attn = HiLoAttention(dim, heads, window, alpha, **dd) if window else None
                blocks.append(LITv2Block(dim, attn, mlp_ratio, next(rates), **dd))
            stages.append(PyramidStage(downsample, blocks))
        norm = LayerNorm2d(embed_dims[-1], eps=1e-5, **dd)
        self.finish(stages, norm, embed_dims, in_chans, num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)

    @torch.jit.ignore
    def lr_scales(self) -> dict[str, float]:
        """Factors on the learning rate by parameter name; parameters that are not named have 1.

        As published the weights that predict offsets learn at a hundredth of the rate, their biases at the full one.
        """
        return {name: 0.01 for name, _ in self.named_parameters() if name.endswith("conv_offset.weight")}


def deformable_merging(in_dim: int, dim: int, **dd: Any) -> nn.Sequential:
    """Deformable patches to half the size."""
    return nn.Sequential(DeformablePatches(in_dim, dim, **dd), nn.BatchNorm2d(dim, **dd), nn.GELU())


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ConvMlp):
        nn.init.normal_(module.dwconv.weight, std=(2 / 9) ** 0.5)
        nn.init.zeros_(module.dwconv.bias)


_OFFICIAL_KEYS = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.downsample\.dconv\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.0."),
    (r"^layers\.(\d+)\.downsample\.norm_layer\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.1."),
    (r"\.attn\.l_", ".attn.low_"),
    (r"\.attn\.h_", ".attn.high_"),
    (r"\.dwconv\.dwconv\.", ".dwconv."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        model: The model to fill.

    Returns:
        The state dict under our names.
    """
    return rename_keys(state_dict, _OFFICIAL_KEYS)


def _create_litv2(variant: str, pretrained: bool = False, **kwargs: Any) -> LITv2:
    return build_backbone(LITv2, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/ziplab/LITv2",
        "paper_name": "Fast Vision Transformers with HiLo Attention",
        "paper_ids": "arXiv:2205.13213",
        **kwargs,
    }


_RELEASE = "https://github.com/ziplab/LITv2/releases/download/v1.0/"

default_cfgs = generate_default_cfgs(
    {
        "litv2_s.in1k": _cfg(url=_RELEASE + "litv2_s.pth"),
        "litv2_m.in1k": _cfg(url=_RELEASE + "litv2_m.pth"),
        "litv2_b.in1k": _cfg(url=_RELEASE + "litv2_b.pth"),
        "litv2_b.in1k_384": _cfg(
            url=_RELEASE + "litv2_b_384.pth",
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
            crop_mode="squash",
        ),
        "test_litv2.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


@register_model
def test_litv2(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """Smallest LITv2, for tests; not a published model."""
    args = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4))
    return _create_litv2("test_litv2", pretrained, **{**args, **kwargs})


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-S."""
    return _create_litv2("litv2_s", pretrained, **kwargs)


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-M."""
    return _create_litv2("litv2_m", pretrained, **{**dict(depths=(2, 2, 18, 2)), **kwargs})


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    """LITv2-B."""
    args = dict(depths=(2, 2, 18, 2), embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32))
    return _create_litv2("litv2_b", pretrained, **{**args, **kwargs})
