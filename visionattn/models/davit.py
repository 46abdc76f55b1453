"""DaViT: attention over windows alternates with attention over channels.

Paper: DaViT: Dual Attention Vision Transformers, Ding et al., ECCV 2022, arXiv:2204.03645.
Code: https://github.com/dingmyu/davit (MIT), ``timm/models/davit.py``.

Weights load under the published names and under those of timm's own ``davit_tiny``, ``_small`` and ``_base``.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    LayerNorm2d,
    Mlp,
    NormMlpClassifierHead,
    register_notrace_module,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers import ResidualDepthwiseConv, WindowAttention
from visionattn.layers.initialization import trunc_normal_
from visionattn.models._pyramid import PyramidBackbone, PyramidStage
from visionattn.models._weights import build_backbone, rename_keys
from visionattn.ops import pad_to_multiple, state_attention


@register_notrace_module  # a leaf for torch.fx: the operator's argument checks are not traceable
class ChannelAttention(nn.Module):
    """Attention between channels: keys and values of all pixels make a matrix for each head that mixes the queries.

    With ``N`` pixels and ``d`` channels a head ``A = softmax(k^T v / sqrt(d))`` is ``[d, d]``, the output ``q A^T``;
    the cost is linear in ``N``.

    Args:
        dim: Channels ``C``.
        num_heads: Groups of channels; must divide ``dim``.

    Shape:
        x: ``[B, H, W, C]``.
        returns: ``[B, H, W, C]``.
    """

    def __init__(self, dim: int, num_heads: int, **dd: Any):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H, W, 3, self.num_heads, C // self.num_heads)
        out = self._scripted(qkv) if torch.jit.is_scripting() else self._mixed(qkv)
        return self.proj(out.reshape(B, H, W, C))

    @torch.jit.unused
    def _mixed(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(3)
        return state_attention(q, k, v, mode="channel_softmax", scale=self.scale)

    def _scripted(self, qkv: Tensor) -> Tensor:
        """The same by PyTorch's own operators: TorchScript knows no arguments that are keywords only."""
        q, k, v = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, d]
        mix = ((k * self.scale).transpose(2, 3) @ v).softmax(dim=-1)  # [B, heads, d, d]
        return (q @ mix.transpose(2, 3)).transpose(1, 2)


class DaViTBlock(nn.Module):
    """Position convolution, attention, position convolution, MLP, each with a residual; ``[B, C, H, W]``.

    Args:
        dim: Channels.
        attn: Attention ``[B, H, W, C]`` to the same.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0, **dd: Any):
        super().__init__()
        self.cpe1 = ResidualDepthwiseConv(dim, **dd)
        self.norm1 = LayerNorm(dim, eps=1e-5, **dd)
        self.attn = attn
        self.cpe2 = ResidualDepthwiseConv(dim, **dd)
        self.norm2 = LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class DaViTStem(nn.Module):
    """Overlapping patches at stride 4, then a norm. (The published padding of the image to a multiple of 4 changes
    nothing: the convolution's own zeros reach as far.)
    """

    def __init__(self, in_chans: int, dim: int, **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


@register_notrace_module  # a leaf for torch.fx: the operator's argument checks are not traceable
class DaViTDownsample(nn.Module):
    """A norm, zeros at the bottom and right of odd maps, and 2 x 2 patches."""

    def __init__(self, in_dim: int, dim: int, **dd: Any):
        super().__init__()
        self.norm = LayerNorm(in_dim, eps=1e-5, **dd)
        self.conv = nn.Conv2d(in_dim, dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_multiple(self.norm(x.permute(0, 2, 3, 1)), 2)
        return self.conv(x.permute(0, 3, 1, 2))


class DaViT(PyramidBackbone):
    """DaViT.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        depths: Pairs of a window and a channel block per stage.
        embed_dims: Channels per stage.
        num_heads: Attention heads per stage, of windows and channels alike.
        window_size: Side of the windows in pixels of the map.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Heads that do not divide channels, or lists of other lengths than 4.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (1, 1, 3, 1),
        embed_dims: tuple[int, ...] = (96, 192, 384, 768),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not len(depths) == len(embed_dims) == len(num_heads) == 4:
            raise ValueError(
                "depths, embed_dims and num_heads need one value for each of the 4 stages, "
                f"got {depths}, {embed_dims}, {num_heads}"
            )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.stem = DaViTStem(in_chans, embed_dims[0], **dd)
        count = 2 * sum(depths)
        rates = iter([drop_path_rate * i / max(count - 1, 1) for i in range(count)])
        stages: list[nn.Module] = []
        for i, (depth, dim, heads) in enumerate(zip(depths, embed_dims, num_heads, strict=True)):
            downsample = DaViTDownsample(embed_dims[i - 1], dim, **dd) if i > 0 else nn.Identity()
            blocks: list[nn.Module] = [
                nn.Sequential(
                    DaViTBlock(dim, WindowAttention(dim, heads, window_size, **dd), mlp_ratio, next(rates), **dd),
                    DaViTBlock(dim, ChannelAttention(dim, heads, **dd), mlp_ratio, next(rates), **dd),
                )
                for _ in range(depth)
            ]
            stages.append(PyramidStage(downsample, blocks))
        head = NormMlpClassifierHead(
            embed_dims[-1],
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=1e-5),
            **dd,
        )
        self.finish(stages, nn.Identity(), embed_dims, in_chans, num_classes, global_pool, drop_rate, head=head, **dd)
        self.apply(_init_weights)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As in the base class; the final norm stands behind the pooling and goes with the head."""
        kept = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if (prune_norm or prune_head) and isinstance(self.head, NormMlpClassifierHead):
            self.head.norm = nn.Identity()
        return kept


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_PUBLISHED_KEYS = (
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"\.cpe([12])\.proj\.", r".cpe\1."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint or one of timm's; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``state_dict`` or ``model``.
        model: The model to fill.

    Returns:
        The state dict under our names.
    """
    return rename_keys(state_dict, _PUBLISHED_KEYS)


def _create_davit(variant: str, pretrained: bool = False, **kwargs: Any) -> DaViT:
    return build_backbone(DaViT, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/dingmyu/davit",
        "paper_name": "DaViT: Dual Attention Vision Transformers",
        "paper_ids": "arXiv:2204.03645",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "davit_t.msft_in1k": _cfg(hf_hub_id="timm/davit_tiny.msft_in1k"),
        "davit_s.msft_in1k": _cfg(hf_hub_id="timm/davit_small.msft_in1k"),
        "davit_b.msft_in1k": _cfg(hf_hub_id="timm/davit_base.msft_in1k"),
        "test_davit.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


@register_model
def test_davit(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """Smallest DaViT, for tests; not a published model."""
    args = dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2, 3, 4), window_size=4)
    return _create_davit("test_davit", pretrained, **{**args, **kwargs})


@register_model
def davit_t(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-Tiny."""
    return _create_davit("davit_t", pretrained, **kwargs)


@register_model
def davit_s(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-Small."""
    return _create_davit("davit_s", pretrained, **{**dict(depths=(1, 1, 9, 1)), **kwargs})


@register_model
def davit_b(pretrained: bool = False, **kwargs: Any) -> DaViT:
    """DaViT-Base."""
    args = dict(depths=(1, 1, 9, 1), embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32))
    return _create_davit("davit_b", pretrained, **{**args, **kwargs})
