"""NAT and DiNAT: hierarchical transformers whose attention looks at the window around every pixel.

Papers: Neighborhood Attention Transformer, Hassani et al., CVPR 2023, arXiv:2204.07143; Dilated Neighborhood Attention
Transformer, Hassani and Shi, arXiv:2209.15001.
Code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT), ``classification/nat.py`` and ``dinat.py``.

Departures: none in what is computed. Maps smaller than kernel x dilation are padded as natten 0.14 did, which the
published code relied on; later versions of natten refuse them.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerNorm2d, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers import ChannelsLast, MapSequential, NeighborhoodAttention, add_normalize, normalize, transform
from visionattn.layers.initialization import trunc_normal_
from visionattn.models._pyramid import PyramidBackbone, PyramidStage
from visionattn.models._weights import build_backbone, rename_keys

Dilations = int | tuple[int | tuple[int, ...], ...]


class NATBlock(nn.Module):
    """Neighbourhood attention and MLP, each with a residual; ``[B, C, H, W]`` in and out.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        kernel_size: Side of the attention window.
        dilation: Dilation of the window.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        layer_scale: Initial factor on the branches, a parameter per channel; None for no factor.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        **dd: Any,
    ):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.attn = NeighborhoodAttention(dim, num_heads, kernel_size, dilation, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if torch.jit.is_scripting():
            x = x + self._branch(self.attn(self.norm1(x)), self.gamma1)
            return (x + self._branch(self.mlp(self.norm2(x)), self.gamma2)).permute(0, 3, 1, 2)
        x, normed = add_normalize(self.norm2, x, self._branch(self.attn(normalize(self.norm1, x)), self.gamma1))
        return (x + self._branch(transform(self.mlp, normed), self.gamma2)).permute(0, 3, 1, 2)

    def _branch(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        return self.drop_path(x if gamma is None else gamma * x)


class NAT(PyramidBackbone):
    """NAT, and DiNAT where windows are dilated.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        depths: Blocks per stage.
        embed_dims: Channels per stage.
        num_heads: Attention heads per stage.
        kernel_size: Side of the attention windows, odd.
        dilations: Dilations of the windows: one for all, or for each stage one or a tuple that its blocks repeat;
            larger images take larger ones with the same weights.
        mlp_ratio: Hidden width of the MLPs over the channels.
        layer_scale: Initial factor on the residual branches, None for no factor.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Heads that do not divide channels, an even kernel, or lists of other lengths than 4.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (3, 4, 18, 5),
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        kernel_size: int = 7,
        dilations: Dilations = 1,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        per_stage = (dilations,) * 4 if isinstance(dilations, int) else tuple(dilations)
        if not len(depths) == len(embed_dims) == len(num_heads) == len(per_stage) == 4:
            raise ValueError(
                "depths, embed_dims, num_heads and dilations need one value for each of the 4 stages, "
                f"got {depths}, {embed_dims}, {num_heads}, {dilations}"
            )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.stem = ChannelsLast(
            nn.Conv2d(in_chans, embed_dims[0] // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(embed_dims[0] // 2, embed_dims[0], 3, stride=2, padding=1, **dd),
            LayerNorm2d(embed_dims[0], eps=1e-5, **dd),
        )
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        stages: list[nn.Module] = []
        for i, (depth, dim) in enumerate(zip(depths, embed_dims, strict=True)):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = MapSequential(
                    nn.Conv2d(embed_dims[i - 1], dim, 3, stride=2, padding=1, bias=False, **dd),
                    LayerNorm2d(dim, eps=1e-5, **dd),
                )
            cycle = per_stage[i]
            row = (cycle,) if isinstance(cycle, int) else tuple(cycle)
            blocks: list[nn.Module] = [
                NATBlock(dim, num_heads[i], kernel_size, row[j % len(row)], mlp_ratio, layer_scale, next(rates), **dd)
                for j in range(depth)
            ]
            stages.append(PyramidStage(downsample, blocks))
        norm = LayerNorm2d(embed_dims[-1], eps=1e-5, **dd)
        self.finish(stages, norm, embed_dims, in_chans, num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The tables of relative positions."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, NeighborhoodAttention):
        trunc_normal_(module.rpb, std=0.02)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        model: The model to fill; tables of relative positions of another kernel size are resampled to its own.

    Returns:
        The state dict under our names.
    """
    names = (
        (r"^patch_embed\.proj\.(\d)\.", r"stem.\1."),
        (r"^patch_embed\.norm\.", "stem.2."),
        (r"^levels\.(\d+)\.blocks\.", r"stages.\1.blocks."),
        (r"^levels\.(\d+)\.downsample\.reduction\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.0."),
        (r"^levels\.(\d+)\.downsample\.norm\.", lambda m: f"stages.{int(m[1]) + 1}.downsample.1."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )
    own, renamed = model.state_dict(), rename_keys(state_dict, names)
    for key, tensor in renamed.items():
        if key.endswith(".rpb") and key in own and tensor.shape != own[key].shape and tensor.dim() == 3:
            size = own[key].shape[1:]
            renamed[key] = nn.functional.interpolate(tensor[None], size, mode="bicubic", align_corners=False)[0]
    return renamed


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> NAT:
    return build_backbone(NAT, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2204.07143",
        **kwargs,
    }


def _dicfg(**kwargs: Any) -> dict[str, Any]:
    return _cfg(paper_ids="arXiv:2209.15001", **kwargs)


_NAT = "https://shi-labs.com/projects/nat/checkpoints/CLS/{}.pth"
_DINAT = "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/{}.pth"
_LARGE = dict(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg(url=_NAT.format("nat_mini")),
        "nat_t.in1k": _cfg(url=_NAT.format("nat_tiny")),
        "nat_s.in1k": _cfg(url=_NAT.format("nat_small")),
        "nat_b.in1k": _cfg(url=_NAT.format("nat_base")),
        "dinat_mini.in1k": _dicfg(url=_DINAT.format("dinat_mini_in1k_224")),
        "dinat_t.in1k": _dicfg(url=_DINAT.format("dinat_tiny_in1k_224")),
        "dinat_s.in1k": _dicfg(url=_DINAT.format("dinat_small_in1k_224")),
        "dinat_b.in1k": _dicfg(url=_DINAT.format("dinat_base_in1k_224")),
        "dinat_l.in22k_ft_in1k": _dicfg(url=_DINAT.format("dinat_large_in22k_in1k_224")),
        "dinat_l.in22k_ft_in1k_384": _dicfg(url=_DINAT.format("dinat_large_in22k_in1k_384"), **_LARGE),
        "dinat_l.in22k_ft_in1k_384_k11": _dicfg(url=_DINAT.format("dinat_large_in22k_in1k_384_11x11"), **_LARGE),
        "test_nat.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
        "test_dinat.untrained": _dicfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)

_MINI = dict(depths=(3, 4, 6, 5))
_SMALL = dict(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), mlp_ratio=2.0)
_BASE = dict(embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), mlp_ratio=2.0, layer_scale=1e-5)
_WIDE = dict(embed_dims=(192, 384, 768, 1536), num_heads=(6, 12, 24, 48), mlp_ratio=2.0)
_TEST = dict(depths=(1, 1, 2, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), kernel_size=3)
_DILATED: dict[str, Any] = dict(dilations=((1, 8, 1), (1, 4), (1, 2), 1))
_DINAT_L = {
    "in22k_ft_in1k_384": dict(dilations=((1, 13, 1), (1, 6), (1, 3), 1)),
    "in22k_ft_in1k_384_k11": dict(kernel_size=11),
}


@register_model
def test_nat(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Smallest NAT, for tests; not a published model."""
    return _create_nat("test_nat", pretrained, **{**_TEST, **kwargs})


@register_model
def test_dinat(pretrained: bool = False, **kwargs: Any) -> NAT:
    """Smallest DiNAT, for tests; not a published model."""
    return _create_nat("test_dinat", pretrained, **{**_TEST, "dilations": (2, 2, (1, 2), 1), **kwargs})


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini."""
    return _create_nat("nat_mini", pretrained, **{**_MINI, **kwargs})


@register_model
def nat_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny."""
    return _create_nat("nat_t", pretrained, **kwargs)


@register_model
def nat_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small."""
    return _create_nat("nat_s", pretrained, **{**_SMALL, "layer_scale": 1e-5, **kwargs})


@register_model
def nat_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base."""
    return _create_nat("nat_b", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini."""
    return _create_nat("dinat_mini", pretrained, **{**_MINI, **_DILATED, **kwargs})


@register_model
def dinat_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny."""
    return _create_nat("dinat_t", pretrained, **{**_DILATED, **kwargs})


@register_model
def dinat_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small."""
    return _create_nat("dinat_s", pretrained, **{**_SMALL, **_DILATED, **kwargs})


@register_model
def dinat_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base."""
    return _create_nat("dinat_b", pretrained, **{**_BASE, **_DILATED, **kwargs})


@register_model
def dinat_l(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, trained on ImageNet-22K; the tags for 384 pixels bring their dilations or kernel with them."""
    tag = kwargs.get("pretrained_cfg")
    tagged = _DINAT_L.get(tag if isinstance(tag, str) else "", {})
    return _create_nat("dinat_l", pretrained, **{**_WIDE, **_DILATED, **tagged, **kwargs})
