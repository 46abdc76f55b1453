"""PATNet: partial convolution whose untouched channels are given cheap attention instead of nothing.

A block convolves a quarter of the channels. The others are gated by their own mean and deviation (``PAT_ch``, first
three stages) or attend to each other's pixels (``PAT_sf``, last stage); a gate per pixel ends the MLP (``PAT_sp``).

Paper: Partial Convolution Meets Visual Attention, Huang et al., arXiv:2503.03148.
Code: none under this name; https://github.com/haiduo/PartialNet (MIT) of the same first author holds the network
without the learned split of its own paper, arXiv:2502.01303. No weights have been published.

What the sources leave open, and what is done here:
    depths of T0 and T1: 1, 2, 8, 2 as in the released files; 1, 2, 6, 4 would agree better with what is remembered of
        the paper's table, which could not be read.
    ``PAT_sp``: in every block, as the figures draw it; of the released files only that of T1 turns it on.
    heads: 4 for T0 and T1, 6 for the others; the released files set 4 everywhere by a switch that bears T0's name and
        whose other position is 6.

``timm.utils.reparameterize_model`` turns a trained network into its inference form: no batch norms, the gates' inner
convolutions merged with their neighbours, equal outputs.
"""

import copy
import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ConvMlp,
    DropPath,
    LayerNorm,
    SelectAdaptivePool2d,
    get_act_layer,
    register_notrace_function,
    register_notrace_module,
)
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers.initialization import trunc_normal_
from visionattn.models._pyramid import PyramidBackbone, PyramidStage
from visionattn.models._weights import build_backbone, rename_keys, unwrap


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Factor and offset that a batch norm comes to in evaluation."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


class PixelProduct(nn.Module):
    """A 1 x 1 convolution as a matrix product, on two cores and one image up to twice as fast.

    Args:
        weight: ``[C', C]``.
        bias: ``[C']``, or None.

    Shape:
        x: ``[B, C, H, W]``.
        returns: ``[B, C', H, W]``.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight.detach())
        self.bias = None if bias is None else nn.Parameter(bias.detach()[:, None])

    def forward(self, x: Tensor) -> Tensor:
        weight, pixels = self.weight.expand(x.shape[0], -1, -1), x.flatten(2)
        y = torch.bmm(weight, pixels) if self.bias is None else torch.baddbmm(self.bias, weight, pixels)
        return y.unflatten(2, (x.shape[2], x.shape[3]))


def _with_norm(layer: nn.Module, norm: nn.Module) -> nn.Module:
    """A convolution or linear layer without bias and the norm after it as one layer."""
    scale, shift = _affine(norm)
    merged = copy.deepcopy(layer)
    merged.weight = nn.Parameter((layer.weight.transpose(0, -1) * scale).transpose(0, -1).detach())
    merged.bias = nn.Parameter(shift.detach())
    return merged


class ConvNorm(nn.Module):
    """Patches without overlap and a batch norm.

    Args:
        in_dim: Channels of the input.
        dim: Channels of the output.
        size: Side of a patch.
    """

    def __init__(self, in_dim: int, dim: int, size: int, **dd: Any):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, size, stride=size, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))

    def fuse(self) -> nn.Module:
        """The same as one convolution, with the running statistics."""
        return _with_norm(self.conv, self.norm)


@register_notrace_function
def spatial_moments(x: Tensor) -> Tensor:
    """Mean and unbiased standard deviation of each channel, one after the other, ``[B, C, H, W]`` to ``[B, 2C]``.

    Raises:
        ValueError: A map of a single pixel, which has no such deviation.
    """
    pixels = x.shape[2] * x.shape[3]
    if (torch.jit.is_scripting() or not torch.compiler.is_compiling()) and pixels < 2:
        raise ValueError("the channel gate needs a map of at least 2 pixels, got 1; use images of 32 x 32 or more")
    mean = x.mean(dim=(2, 3), keepdim=True)
    # torch.std_mean takes twenty times as long on a CPU, about as long as a block's convolutions
    std = torch.linalg.vector_norm(x - mean, dim=(2, 3), keepdim=True) / (pixels - 1) ** 0.5
    return torch.cat((mean, std), dim=3).flatten(1)


class PartialChannelAttention(nn.Module):
    """``PAT_ch``: a quarter of the channels is convolved, the rest gated by its statistics; ``[B, C, H, W]``.

    Args:
        dim: Channels, a multiple of 4.
    """

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        self.split = (dim // 4, dim - dim // 4)
        self.conv = nn.Conv2d(self.split[0], self.split[0], 3, padding=1, bias=False, **dd)
        # the released code has a convolution with a kernel of 1 x 2, which is the same and at times slow on a CPU
        self.gate_fc = nn.Linear(2 * self.split[1], self.split[1], bias=False, **dd)
        self.gate_norm = nn.BatchNorm1d(self.split[1], **dd)
        self.norm = nn.BatchNorm2d(self.split[1], **dd)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.split(self.split, dim=1)
        gate = F.hardsigmoid(self.gate_norm(self.gate_fc(spatial_moments(x2))))
        return torch.cat((self.conv(x1), self.norm(x2 * gate[:, :, None, None])), dim=1)


def distance_buckets(height: int, width: int, device: torch.device) -> Tensor:
    """Row of the bias table for every pair of pixels of a map, ``[N, N]`` with ``N = height * width``.

    Euclidean distances are rounded to pixels; beyond 20 they grow logarithmically, from 160 on they stay. The rows
    are 40 to 80: the lower half of the published tables is for signed distances, which this network does not use.

    Reference: iRPE, Wu et al., ICCV 2021, arXiv:2107.14222.
    """
    # no division by the width: where that is a symbol, ONNX has no translation for it
    row = torch.arange(height, device=device)[:, None].expand(height, width).flatten()
    column = torch.arange(width, device=device).expand(height, width).flatten()
    dy, dx = row[:, None] - row[None, :], column[:, None] - column[None, :]
    near = (dy * dy + dx * dx).float().sqrt().round()
    far = (20 + 20 / math.log(8.0) * (near.clamp(min=1) / 20).log()).round().clamp(max=40)
    return torch.where(near <= 20, near, far).long() + 40


@register_notrace_module  # a leaf for torch.fx: sizes enter the arithmetic
class DistanceAttention(nn.Module):
    """Multi-head attention over the whole map with a learned bias for each distance, ``[B, H, W, C]``.

    Args:
        dim: Channels.
        num_heads: Attention heads; must divide ``dim``.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the output.
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0, **dd: Any):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"attn_heads={num_heads} must divide {dim}, three quarters of the last stage's channels")
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.bias_table = nn.Parameter(torch.zeros(num_heads, 81, **dd))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x).reshape(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head_dim]
        bias = self.bias_table[:, distance_buckets(H, W, x.device)]  # [heads, N, N], no smaller than the weights
        weights = self.attn_drop((q * self.scale @ k.transpose(2, 3) + bias).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(B, H, W, C)))


class PartialSelfAttention(nn.Module):
    """``PAT_sf``: a quarter of the channels is convolved, the rest attends to all pixels; ``[B, C, H, W]``.

    Args:
        dim: Channels, a multiple of 4.
        num_heads: Attention heads; must divide three quarters of ``dim``.
        attn_drop: Dropout of the attention weights.
        proj_drop: Dropout of the attention's output.
    """

    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.1, proj_drop: float = 0.1, **dd: Any):
        super().__init__()
        self.split = (dim // 4, dim - dim // 4)
        self.conv = nn.Conv2d(self.split[0], self.split[0], 3, padding=1, bias=False, **dd)
        self.norm = LayerNorm(self.split[1], eps=1e-6, **dd)
        self.attn = DistanceAttention(self.split[1], num_heads, attn_drop, proj_drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.split(self.split, dim=1)
        x2 = self.attn(self.norm(x2.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return torch.cat((self.conv(x1), x2), dim=1)


class PartialSpatialAttention(nn.Module):
    """``PAT_sp``: half of the channels is gated by one value per pixel, the other half mixed; ``[B, C, H, W]``.

    Args:
        dim: Channels, even.
    """

    def __init__(self, dim: int, **dd: Any):
        super().__init__()
        half = dim // 2
        self.gate_conv = nn.Conv2d(half, 1, 1, bias=False, **dd)
        self.norm1 = nn.BatchNorm2d(half, **dd)
        self.norm2 = nn.BatchNorm2d(half, **dd)
        self.conv = nn.Conv2d(half, half, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        return torch.cat((self.norm1(a * F.hardsigmoid(self.gate_conv(a))), self.conv(self.norm2(b))), dim=1)


class MergedSpatialAttention(nn.Module):
    """``PAT_sp`` whose convolutions and norms are part of the layer before, which gives the gate as last channel.

    Args:
        offset: What is added to every pixel, ``[C]``.

    Shape:
        x: ``[B, C + 1, H, W]``.
        returns: ``[B, C, H, W]``.
    """

    def __init__(self, offset: Tensor):
        super().__init__()
        self.offset = nn.Parameter(offset.detach().view(2, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        gate = F.hardsigmoid(x[:, -1:]).unsqueeze(1)  # [B, 1, 1, H, W]
        factor = torch.cat((gate, torch.ones_like(gate)), dim=1)
        return torch.addcmul(self.offset, x[:, :-1].unflatten(1, (2, -1)), factor).flatten(1, 2)


class PATNetBlock(nn.Module):
    """Partial mixing, MLP and spatial gate; ``[B, C, H, W]`` in and out.

    The residual leads around everything where channels are gated, and around mixing and MLP each where they attend.

    Args:
        dim: Channels, a multiple of 4.
        mixer: ``PartialChannelAttention`` or ``PartialSelfAttention``.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        act_layer: Activation as timm names it.
        use_spatial_attn: End the MLP with the spatial gate.
        drop_path: Rate of stochastic depth of the MLP.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 2.0,
        act_layer: str = "relu",
        use_spatial_attn: bool = True,
        drop_path: float = 0.0,
        **dd: Any,
    ):
        super().__init__()
        self.mixer = mixer
        self.mixer_residual = isinstance(mixer, PartialSelfAttention)
        self.mlp = ConvMlp(
            dim,
            int(mlp_ratio * dim),
            act_layer=partial(get_act_layer(act_layer), inplace=True),
            norm_layer=nn.BatchNorm2d,
            bias=False,
            **dd,
        )
        self.gate = PartialSpatialAttention(dim, **dd) if use_spatial_attn else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        if self.mixer_residual:
            x = y = x + y
        return x + self.drop_path(self.gate(self.mlp(y)))

    def reparameterize(self) -> None:
        """Take the inference form: norms, with their running statistics, and the gates' convolutions merged."""
        mixer, mlp, gate = self.mixer, self.mlp, self.gate
        if isinstance(mlp.norm, nn.Identity):
            return
        scale, shift = _affine(mlp.norm)
        weight = mlp.fc1.weight.flatten(1) * scale[:, None]
        if isinstance(mixer, PartialChannelAttention):
            inner_scale, inner_shift = _affine(mixer.norm)
            kept, gated = weight.split(mixer.split, dim=1)
            weight, shift = torch.cat((kept, gated * inner_scale), dim=1), shift + gated @ inner_shift
            mixer.gate_fc = _with_norm(mixer.gate_fc, mixer.gate_norm)
            mixer.norm, mixer.gate_norm = nn.Identity(), nn.Identity()
        mlp.fc1, mlp.norm = PixelProduct(weight, shift), nn.Identity()
        weight = mlp.fc2.weight.flatten(1)
        if isinstance(gate, PartialSpatialAttention):
            (scale1, shift1), (scale2, shift2) = _affine(gate.norm1), _affine(gate.norm2)
            (a, b), mix = weight.chunk(2), gate.conv.weight.flatten(1)
            weight = torch.cat((a * scale1[:, None], mix * scale2 @ b, gate.gate_conv.weight.flatten(1) @ a))
            self.gate = MergedSpatialAttention(torch.cat((shift1, mix @ shift2)))
        mlp.fc2 = PixelProduct(weight)


class PATNetHead(nn.Module):
    """Pooling, a wider layer, activation and classifier.

    Without pooling the layers work on every pixel; without pooling and classes there are none and the map passes.

    Args:
        in_features: Channels of the map.
        num_classes: Classes; 0 leaves the classifier out.
        width: Channels of the wider layer.
        pool_type: Pooling as in timm, ``""`` for none.
        drop_rate: Dropout before the classifier.
        act_layer: Activation as timm names it.

    Raises:
        ValueError: A pooling that changes the number of channels.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        width: int = 1280,
        pool_type: str = "avg",
        drop_rate: float = 0.0,
        act_layer: str = "relu",
        **dd: Any,
    ):
        super().__init__()
        self.in_features, self.width = in_features, width
        self.conv: nn.Module = nn.Conv2d(in_features, width, 1, bias=False, **dd)
        self.act = get_act_layer(act_layer)()
        self.drop = nn.Dropout(drop_rate)
        self.reset(num_classes, pool_type, **dd)

    def reset(self, num_classes: int, pool_type: str | None = None, **dd: Any) -> None:
        """Replace the classifier, and the pooling unless it is None; new layers are initialised."""
        if pool_type is None:
            pool_type = self.global_pool.pool_type
        pool = SelectAdaptivePool2d(pool_type=pool_type)
        if pool.feat_mult() != 1:
            raise ValueError(f"global_pool={pool_type!r} changes the number of channels; use 'avg', 'max' or 'avgmax'")
        self.global_pool = pool
        self.flatten = nn.Flatten(1) if pool_type else nn.Identity()
        self.hidden_size = self.width if pool_type or num_classes else None
        if self.hidden_size is None:
            self.conv = nn.Identity()
        elif isinstance(self.conv, nn.Identity):
            self.conv = _init(nn.Conv2d(self.in_features, self.width, 1, bias=False, **dd))
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            layer = (
                nn.Linear(self.width, num_classes, **dd) if pool_type else nn.Conv2d(self.width, num_classes, 1, **dd)
            )
            self.fc = _init(layer)
        self.train(self.training)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.hidden_size is None:
            return x
        x = self.drop(self.flatten(self.act(self.conv(self.global_pool(x)))))
        return x if pre_logits else self.fc(x)


class PATNet(PyramidBackbone):
    """PATNet, for images of at least 32 x 32 pixels and, while it trains, batches of at least 2.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the head's wider layer; ``""`` leaves the whole head out.
        depths: Blocks per stage.
        embed_dims: Channels per stage, multiples of 4.
        attn_heads: Attention heads of the last stage; must divide three quarters of its channels.
        mlp_ratio: Hidden width of the MLPs over the channels.
        act_layer: Activation as timm names it.
        use_spatial_attn: With a gate per pixel at the end of every MLP (``PAT_sp``).
        head_hidden_size: Width of the layer between pooling and classifier.
        drop_rate: Dropout before the classifier.
        attn_drop_rate: Dropout of the attention weights.
        proj_drop_rate: Dropout of the attention's output.
        drop_path_rate: Stochastic depth of the last block's MLP, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Lists of other lengths than 4, channels that 4 does not divide, heads that do not divide.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 6, 4),
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        attn_heads: int = 6,
        mlp_ratio: float = 2.0,
        act_layer: str = "relu",
        use_spatial_attn: bool = True,
        head_hidden_size: int = 1280,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        proj_drop_rate: float = 0.1,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not len(depths) == len(embed_dims) == 4 or any(dim % 4 for dim in embed_dims):
            raise ValueError(
                "depths and embed_dims need one value for each of the 4 stages, and embed_dims multiples of 4, "
                f"got {depths} and {embed_dims}"
            )
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.stem = ConvNorm(in_chans, embed_dims[0], 4, **dd)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        stages: list[nn.Module] = []
        for i, (depth, dim) in enumerate(zip(depths, embed_dims, strict=True)):
            blocks: list[nn.Module] = []
            for _ in range(depth):
                mixer: nn.Module = PartialChannelAttention(dim, **dd)
                if i == 3:
                    mixer = PartialSelfAttention(dim, attn_heads, attn_drop_rate, proj_drop_rate, **dd)
                blocks.append(PATNetBlock(dim, mixer, mlp_ratio, act_layer, use_spatial_attn, next(rates), **dd))
            downsample = ConvNorm(embed_dims[i - 1], dim, 2, **dd) if i > 0 else nn.Identity()
            stages.append(PyramidStage(downsample, blocks))
        head = PATNetHead(embed_dims[-1], num_classes, head_hidden_size, global_pool, drop_rate, act_layer, **dd)
        self.finish(
            stages, nn.Identity(), embed_dims, in_chans, num_classes, global_pool, drop_rate, head, min_size=32, **dd
        )
        self.apply(_init)


def _init(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return module


_PUBLISHED_KEYS = (
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^stages\.([135])\.reduction\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.conv."),
    (r"^stages\.([135])\.norm\.", lambda m: f"stages.{(int(m[1]) + 1) // 2}.downsample.norm."),
    (r"^stages\.([0246])\.blocks\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.spatial_mixing\.partial_conv3\.", ".mixer.conv."),
    (r"\.spatial_mixing\.attn\.cfc1\.", ".mixer.gate_fc."),
    (r"\.spatial_mixing\.attn\.bn\.", ".mixer.gate_norm."),
    (r"\.spatial_mixing\.attn\.rpe_k\.lookup_table_bias$", ".mixer.attn.bias_table"),
    (r"\.spatial_mixing\.", ".mixer."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.norm."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"\.mlp\.4\.conv_attn\.", ".gate.gate_conv."),
    (r"\.mlp\.4\.norm\.", ".gate.norm1."),
    (r"\.mlp\.4\.", ".gate."),
    (r"^avgpool_pre_head\.1\.", "head.conv."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of the released code's checkpoints; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        model: The model to fill.

    Returns:
        The state dict under our names.
    """
    published = any(key.startswith("patch_embed.") for key in unwrap(state_dict))
    renamed = rename_keys(state_dict, _PUBLISHED_KEYS if published else ())
    return {key: x.flatten(1) if key.endswith(".gate_fc.weight") else x for key, x in renamed.items()}


def _create_patnet(variant: str, pretrained: bool = False, **kwargs: Any) -> PATNet:
    return build_backbone(PATNet, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/haiduo/PartialNet",
        "paper_name": "Partial Convolution Meets Visual Attention",
        "paper_ids": "arXiv:2503.03148",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **{f"patnet_{size}.untrained": _cfg() for size in ("t0", "t1", "t2", "s", "m", "l")},
        "test_patnet.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)

_TINY = dict(depths=(1, 2, 8, 2), attn_heads=4, act_layer="gelu")


@register_model
def test_patnet(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """Smallest PATNet, for tests; not a published model."""
    args = dict(depths=(1, 1, 2, 1), embed_dims=(16, 32, 64, 128), attn_heads=4, head_hidden_size=192)
    return _create_patnet("test_patnet", pretrained, **{**args, **kwargs})


@register_model
def patnet_t0(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """PATNet-T0."""
    return _create_patnet("patnet_t0", pretrained, **{**_TINY, "embed_dims": (32, 64, 128, 256), **kwargs})


@register_model
def patnet_t1(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """PATNet-T1."""
    return _create_patnet("patnet_t1", pretrained, **{**_TINY, "embed_dims": (48, 96, 192, 384), **kwargs})


@register_model
def patnet_t2(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """PATNet-T2."""
    return _create_patnet("patnet_t2", pretrained, **kwargs)


@register_model
def patnet_s(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """PATNet-S."""
    args = dict(depths=(2, 2, 9, 4), embed_dims=(96, 192, 384, 768))
    return _create_patnet("patnet_s", pretrained, **{**args, **kwargs})


@register_model
def patnet_m(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """PATNet-M."""
    args = dict(depths=(2, 3, 16, 4), embed_dims=(128, 256, 512, 1024))
    return _create_patnet("patnet_m", pretrained, **{**args, **kwargs})


@register_model
def patnet_l(pretrained: bool = False, **kwargs: Any) -> PATNet:
    """PATNet-L."""
    args = dict(depths=(2, 3, 20, 4), embed_dims=(160, 320, 640, 1280))
    return _create_patnet("patnet_l", pretrained, **{**args, **kwargs})
