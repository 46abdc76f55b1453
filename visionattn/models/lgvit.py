"""LGViT: the encoder of HER-Seg, inverted bottlenecks and dual-gated linear attention at one stride.

Everything after the 16 x 16 patches happens at their resolution, so that one image of 1,024 pixels is 4,096 tokens;
the attention is linear in their number.

Paper: HER-Seg, arXiv:2504.06205 (version 1: HRMedSeg). Code: https://github.com/xq141839/HER-Seg, ``SAM/LGViT.py``.

Departures: images of any size, completed to whole patches by zeros at the bottom and right, since the rotary table is
built for the map at hand (the published one is tied to one square size; the same there). A pooled linear classifier,
which the published encoder does not have, makes it an ordinary model of timm.
"""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers import DualGatedBlock, on_map
from visionattn.layers.channels_last import channels_last_on_gpu
from visionattn.layers.initialization import trunc_normal_
from visionattn.models._tokens import PatchStem, TokenBackbone, block_rates
from visionattn.models._weights import build_backbone, rename_keys, unwrap


class InvertedBottleneck(nn.Module):
    """1 x 1 expansion to twice the channels, 3 x 3 depthwise, 1 x 1 reduction, residual, GELU; ``[B, C, H, W]``.

    Every convolution has a batch norm behind it; the last one's scale starts at 0, so that a new block is its GELU.
    """

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        wide = 2 * dim
        self.conv1 = nn.Conv2d(dim, wide, 1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(wide, **dd)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False, **dd)
        self.norm2 = nn.BatchNorm2d(wide, **dd)
        self.conv3 = nn.Conv2d(wide, dim, 1, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(dim, **dd)
        self.act = nn.GELU()
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last_on_gpu(x)
        if torch.jit.is_scripting():
            y = self.act(self.norm1(self.conv1(x)))
            y = self.act(self.norm2(self.conv2(y)))
            y = self.norm3(self.conv3(y))
        else:
            y = self.act(self.norm1(on_map(self.conv1, x)))
            y = self.act(self.norm2(on_map(self.conv2, y)))
            y = self.norm3(on_map(self.conv3, y))
        return self.act(x + y)


class LGViT(TokenBackbone):
    """The encoder of HER-Seg: a stage of inverted bottlenecks and three of dual-gated attention, all at one stride.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        patch_size: Side of a patch in pixels.
        embed_dim: Channels, a multiple of 4.
        depths: Blocks per stage, the first of inverted bottlenecks.
        num_heads: Attention heads of the later stages; must divide ``embed_dim``.
        mlp_ratio: Hidden width of the MLPs over the channels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0 at the first inverted bottleneck,
            which have none themselves (0.1 in the published training).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Other than four depths with three numbers of heads, or heads or 4 that do not divide ``embed_dim``.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (6, 12, 24),
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        if len(depths) != 4 or len(num_heads) != 3 or min(depths) < 1:
            raise ValueError(
                "depths needs one positive number for each of the 4 stages and num_heads one for each of the last 3, "
                f"got {depths} and {num_heads}"
            )
        rates = iter(block_rates(drop_path_rate, sum(depths))[depths[0] :])
        rows: list[list[nn.Module]] = [[InvertedBottleneck(embed_dim, **dd) for _ in range(depths[0])]]
        for depth, heads in zip(depths[1:], num_heads, strict=True):
            rows.append(
                [
                    DualGatedBlock(embed_dim, heads, mlp_ratio, next(rates), channels_first=True, **dd)
                    for _ in range(depth)
                ]
            )
        stem = PatchStem(in_chans, embed_dim, patch_size, **dd)
        super().__init__(stem, rows, num_classes, global_pool, drop_rate, **dd)
        self.apply(_init_weights)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_PUBLISHED_KEYS = (
    (r"^patch_embed\.proj\.", "stem.proj."),
    (r"^layers\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"\.conv(\d)\.c\.", r".conv\1."),
    (r"\.conv(\d)\.bn\.", r".norm\1."),
    (r"\.act_proj\.", ".gate."),
    (r"\.out_proj\.", ".proj."),
    (r"\.attn\.up_proj\.", ".attn.v_reduce."),
    (r"\.attn\.down_proj\.", ".attn.v_expand."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint, of the encoder or of the whole network; our own pass unchanged.

    Of the whole network the encoder is taken. The rotary tables that the released code stores are computed here.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        model: The model to fill.

    Returns:
        The state dict under our names.
    """
    weights = unwrap(state_dict)
    prefix = "image_encoder."
    if any(key.startswith(prefix) for key in weights):
        weights = {key.removeprefix(prefix): x for key, x in weights.items() if key.startswith(prefix)}
    published = any(key.startswith("patch_embed.") for key in weights)
    weights = {key: x for key, x in weights.items() if not key.endswith(".rope.rotations")}
    return rename_keys(weights, _PUBLISHED_KEYS if published else ())


def _create_lgvit(variant: str, pretrained: bool = False, **kwargs: Any) -> LGViT:
    return build_backbone(LGViT, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "origin_url": "https://github.com/xq141839/HER-Seg",
        "paper_ids": "arXiv:2504.06205",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"lgvit_d{dim}.untrained": _cfg() for dim in (24, 96, 192)},
        "test_lgvit.untrained": _cfg(input_size=(3, 64, 64), pool_size=(4, 4), crop_pct=1.0),
    }
)


@register_model
def test_lgvit(pretrained: bool = False, **kwargs: Any) -> LGViT:
    """Smallest LGViT, for tests; not a published model."""
    args = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(2, 4, 8))
    return _create_lgvit("test_lgvit", pretrained, **{**args, **kwargs})


@register_model
def lgvit_d24(pretrained: bool = False, **kwargs: Any) -> LGViT:
    """LGViT of 24 channels, the width of the published variant for SAM 2."""
    return _create_lgvit("lgvit_d24", pretrained, **{**dict(embed_dim=24), **kwargs})


@register_model
def lgvit_d96(pretrained: bool = False, **kwargs: Any) -> LGViT:
    """LGViT of 96 channels, the encoder of HER-Seg."""
    return _create_lgvit("lgvit_d96", pretrained, **kwargs)


@register_model
def lgvit_d192(pretrained: bool = False, **kwargs: Any) -> LGViT:
    """LGViT of 192 channels; not a published model."""
    return _create_lgvit("lgvit_d192", pretrained, **{**dict(embed_dim=192), **kwargs})
