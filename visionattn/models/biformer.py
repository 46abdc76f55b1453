"""BiFormer: vision transformer with bi-level routing attention.

Early stages attend only to the few regions of the map that matter to a query's own region; the last stage attends to
everything.

Paper: BiFormer: Vision Transformer with Bi-Level Routing Attention, Zhu et al., CVPR 2023, arXiv:2303.08810.
Code: https://github.com/rayleizhu/BiFormer (MIT), files ``models/biformer.py`` and ``models/biformer_stl.py``.

Departures: maps of any size are padded inside the attention (the published ``auto_pad``, which its classifiers leave
off; the same where the sizes divide), and equal routing scores are broken by the lower region index.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, Mlp
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers import ChannelsLast, RoutingAttention, add_normalize, convolve, normalize, project, transform
from visionattn.layers.initialization import trunc_normal_
from visionattn.models._pyramid import PyramidBackbone, PyramidStage
from visionattn.models._weights import build_backbone, rename_keys, unwrap

DENSE = -2  # the published code's value of topk for a stage that attends to the whole map


class DenseAttention(nn.Module):
    """Multi-head attention over the whole map with a depthwise convolution of its input, ``[B, H, W, C]``."""

    def __init__(self, dim: int, num_heads: int, **dd: Any):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        qkv = qkv.reshape(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, H*W, head_dim]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        if torch.jit.is_scripting():
            return self.proj(out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return project(self.proj, convolve(self.lepe, x, residual=out))


class BiFormerBlock(nn.Module):
    """Depthwise position convolution, attention and MLP, each with a residual; ``[B, C, H, W]`` in and out.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        n_win: Regions per side.
        topk: Regions attended to, or ``DENSE``.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        pos_conv: With the position convolution (the ``stl`` layout has none).
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        mlp_ratio: float = 3.0,
        pos_conv: bool = True,
        drop_path: float = 0.0,
        **dd: Any,
    ):
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd) if pos_conv else None
        self.norm1 = LayerNorm(dim, eps=1e-6, **dd)
        self.attn = (
            DenseAttention(dim, num_heads, **dd)
            if topk == DENSE
            else RoutingAttention(dim, num_heads, num_regions=n_win, topk=topk, **dd)
        )
        self.norm2 = LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._forward_modules(x)
        x = x.permute(0, 2, 3, 1)
        if self.pos_embed is not None:
            x = convolve(self.pos_embed, x, residual=x)
        x, normed = add_normalize(self.norm2, x, self.drop_path(self.attn(normalize(self.norm1, x))))
        return (x + self.drop_path(transform(self.mlp, normed))).permute(0, 3, 1, 2)

    def _forward_modules(self, x: Tensor) -> Tensor:
        """The same with every module called, for TorchScript."""
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(PyramidBackbone):
    """BiFormer and its Swin-like layout.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        depths: Blocks per stage.
        embed_dims: Channels per stage.
        num_heads: Attention heads per stage.
        n_win: Regions per side of the routed stages (published: 7, for dense tasks 8 or 16).
        topks: Regions attended to per stage; ``DENSE`` (-2) for the whole map.
        mlp_ratio: Hidden width of the MLPs over the channels.
        stl: Swin-T layout: patch stem and merging, no position convolutions.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Heads that do not divide channels, or ``topks`` beyond ``n_win ** 2``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (4, 4, 18, 4),
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        num_heads: tuple[int, ...] = (2, 4, 8, 8),
        n_win: int = 7,
        topks: tuple[int, ...] = (1, 4, 16, DENSE),
        mlp_ratio: float = 3.0,
        stl: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not len(depths) == len(embed_dims) == len(num_heads) == len(topks) == 4:
            raise ValueError(
                "depths, embed_dims, num_heads and topks need one value for each of the 4 stages, "
                f"got {depths}, {embed_dims}, {num_heads}, {topks}"
            )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.stem = patch_stem(in_chans, embed_dims[0], **dd) if stl else conv_stem(in_chans, embed_dims[0], **dd)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        stages: list[nn.Module] = []
        for i in range(4):
            downsample: nn.Module = nn.Identity()
            if i > 0:
                downsample = (patch_merging if stl else conv_downsample)(embed_dims[i - 1], embed_dims[i], **dd)
            blocks: list[nn.Module] = [
                BiFormerBlock(embed_dims[i], num_heads[i], n_win, topks[i], mlp_ratio, not stl, next(rates), **dd)
                for _ in range(depths[i])
            ]
            stages.append(PyramidStage(downsample, blocks))
        norm = nn.BatchNorm2d(embed_dims[-1], **dd)
        self.finish(stages, norm, embed_dims, in_chans, num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)


def conv_stem(in_chans: int, dim: int, **dd: Any) -> ChannelsLast:
    """Two overlapping convolutions to stride 4."""
    return ChannelsLast(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        nn.BatchNorm2d(dim, **dd),
    )


def conv_downsample(in_dim: int, dim: int, **dd: Any) -> nn.Sequential:
    """An overlapping convolution to half the size."""
    return nn.Sequential(nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(dim, **dd))


def patch_stem(in_chans: int, dim: int, **dd: Any) -> ChannelsLast:
    """4 x 4 patches."""
    return ChannelsLast(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd))


def patch_merging(in_dim: int, dim: int, **dd: Any) -> nn.Sequential:
    """2 x 2 patches."""
    return nn.Sequential(nn.BatchNorm2d(in_dim, **dd), nn.Conv2d(in_dim, dim, 2, stride=2, **dd))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_OFFICIAL_KEYS = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.qkv\.qkv\.", ".attn.qkv."),
    (r"\.attn\.wo\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, or a published file's content with the weights under ``model``.
        model: The model to fill.

    Returns:
        The state dict under our names.
    """
    published = any(key.startswith("downsample_layers.") for key in unwrap(state_dict))
    return rename_keys(state_dict, _OFFICIAL_KEYS if published else ())


def _create_biformer(variant: str, pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return build_backbone(BiFormer, variant, pretrained, checkpoint_filter_fn, **kwargs)


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
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        "paper_name": "BiFormer: Vision Transformer with Bi-Level Routing Attention",
        "paper_ids": "arXiv:2303.08810",
        **kwargs,
    }


_SHARE = "https://api.onedrive.com/v1.0/shares/{}/root/content"

default_cfgs = generate_default_cfgs(
    {
        "biformer_t.in1k": _cfg(url=_SHARE.format("s!AkBbczdRlZvChHEOoGkgwgQzEDlM")),
        "biformer_s.in1k": _cfg(url=_SHARE.format("s!AkBbczdRlZvChHDyM-x9KWRBZ832")),
        "biformer_b.in1k": _cfg(url=_SHARE.format("s!AkBbczdRlZvChHI_XPhoadjaNxtO")),
        "biformer_stl.in1k": _cfg(url=_SHARE.format("s!AkBbczdRlZvChSf-m7ujkvx9lIQ1")),
        "biformer_nano.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
        "test_biformer.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


@register_model
def test_biformer(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """Smallest BiFormer, for tests; not a published model."""
    args = dict(
        depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), n_win=4, topks=(1, 4, 8, DENSE)
    )
    return _create_biformer("test_biformer", pretrained, **{**args, **kwargs})


@register_model
def biformer_nano(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer for images of about 64 pixels; not a published model."""
    args = dict(
        depths=(1, 1, 2, 1), embed_dims=(32, 64, 128, 256), num_heads=(1, 2, 4, 8), n_win=4, topks=(1, 4, 8, DENSE)
    )
    return _create_biformer("biformer_nano", pretrained, **{**args, **kwargs})


@register_model
def biformer_t(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T."""
    return _create_biformer("biformer_t", pretrained, **{**dict(depths=(2, 2, 8, 2)), **kwargs})


@register_model
def biformer_s(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S."""
    return _create_biformer("biformer_s", pretrained, **kwargs)


@register_model
def biformer_b(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B."""
    args = dict(embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 8))
    return _create_biformer("biformer_b", pretrained, **{**args, **kwargs})


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-STL, routed attention in the layout of Swin-T."""
    args = dict(depths=(2, 2, 6, 2), embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 8), mlp_ratio=4.0, stl=True)
    return _create_biformer("biformer_stl", pretrained, **{**args, **kwargs})
