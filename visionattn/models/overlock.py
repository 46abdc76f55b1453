"""OverLoCK: a convolutional network that looks at the whole image first and then again, closely, with that in mind.

The Base-Net, three stages, feeds a small Overview-Net, whose map is the context of the Focus-Net: two more stages on
the Base-Net's map, with dynamic convolutions that take their kernels from the context.

Paper: OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels, Lou and Yu, CVPR 2025,
arXiv:2502.20087. Code: https://github.com/LMMMEng/OverLoCK (Apache-2.0), ``models/overlock.py``.

Departures: the auxiliary classifier is left out unless asked for, and where a map is smaller than a dynamic kernel its
longer side is scaled exactly (floating point loses a pixel at some shapes from 9:1 on).
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, SqueezeExcite
from timm.layers.grn import GlobalResponseNorm
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.utils import reparameterize_model
from torch import Tensor, nn

from visionattn.layers import (
    ChannelAffine,
    ChannelsLast,
    ContextMixing,
    DilatedReparamConv,
    MapSequential,
    ResidualDepthwiseConv,
    add_scaled,
    on_map,
    update_last,
)
from visionattn.layers.initialization import trunc_normal_
from visionattn.models._pyramid import PyramidBackbone, PyramidStage, check_image
from visionattn.models._weights import build_backbone, rename_keys, unwrap


def conv_norm(in_dim: int, dim: int, kernel_size: int = 1, stride: int = 1, **dd: Any) -> MapSequential:
    """Convolution without bias, then batch norm."""
    return MapSequential(
        nn.Conv2d(in_dim, dim, kernel_size, stride, kernel_size // 2, bias=False, **dd), nn.BatchNorm2d(dim, **dd)
    )


def conv_mlp(in_dim: int, hidden_dim: int, dim: int, **dd: Any) -> MapSequential:
    """MLP of every pixel with a depthwise convolution and a response norm between its layers."""
    return MapSequential(
        nn.Conv2d(in_dim, hidden_dim, 1, **dd),
        nn.GELU(),
        ResidualDepthwiseConv(hidden_dim, **dd),
        GlobalResponseNorm(hidden_dim, channels_last=False, **dd),
        nn.Conv2d(hidden_dim, dim, 1, **dd),
    )


def squeeze_excite(dim: int, **dd: Any) -> nn.Module:
    """Gates of the channels from their means."""
    return SqueezeExcite(dim, rd_channels=max(16, dim // 8), act_layer=nn.GELU, **dd)


class RepConvBlock(nn.Module):
    """Large convolution and MLP in one residual branch; ``[B, C, H, W]`` in and out.

    Args:
        dim: Channels.
        kernel_size: Side of the large convolution.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        scaled: With factors on the residual (not on the branch).
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self, dim: int, kernel_size: int, mlp_ratio: float = 4.0, scaled: bool = True, drop_path: float = 0.0, **dd: Any
    ):
        super().__init__()
        self.dwconv = ResidualDepthwiseConv(dim, **dd)
        self.ls = ChannelAffine(dim, **dd) if scaled else nn.Identity()
        self.branch = MapSequential(
            LayerNorm2d(dim, eps=1e-6, **dd),
            DilatedReparamConv(dim, kernel_size, **dd),
            nn.BatchNorm2d(dim, **dd),
            squeeze_excite(dim, **dd),
        )
        self.mlp = conv_mlp(dim, int(mlp_ratio * dim), dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        y = self.mlp(self.branch(x))
        if torch.jit.is_scripting():
            return self.ls(x) + self.drop_path(y)
        return add_scaled(self.ls, self.drop_path, x, y)


class DynamicConvBlock(nn.Module):
    """Context-mixing convolution and MLP over a map and its running context.

    The block updates both together, after it has added the context of the start to the running one.

    Args:
        dim: Channels ``C`` of the map.
        context_dim: Channels ``K`` of the context.
        num_heads: Heads of the dynamic convolution.
        kernel_size: Side of its large kernels and of the fixed large convolution.
        small_kernel: Side of its small kernels.
        mlp_ratio: Hidden width of the MLP over ``C``.
        first: The running context is that of the start, so nothing is added.
        drop_path: Rate of stochastic depth.

    Shape:
        x: Map and running context, ``[B, C + K, H, W]``.
        prior: Context of the start, ``[B, K, H, W]``.
        returns: ``[B, C + K, H, W]``.
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        num_heads: int,
        kernel_size: int,
        small_kernel: int = 5,
        mlp_ratio: float = 3.0,
        first: bool = False,
        drop_path: float = 0.0,
        **dd: Any,
    ):
        super().__init__()
        self.dims = [dim, context_dim]
        both = dim + context_dim
        self.context_scale = None if first else ChannelAffine(context_dim, **dd)
        self.prior_scale = None if first else ChannelAffine(context_dim, **dd)
        self.dwconv1 = ResidualDepthwiseConv(both, **dd)
        self.norm1 = LayerNorm2d(both, eps=1e-6, **dd)
        self.fusion = MapSequential(
            nn.Conv2d(both, both, 3, padding=1, groups=both, **dd),
            nn.BatchNorm2d(both, **dd),
            nn.GELU(),
            nn.Conv2d(both, dim, 1, **dd),
            GlobalResponseNorm(dim, channels_last=False, **dd),
        )
        self.gate = MapSequential(*conv_norm(dim, dim, **dd), nn.SiLU())
        self.lepe = MapSequential(DilatedReparamConv(dim, kernel_size, **dd), nn.BatchNorm2d(dim, **dd))
        self.mix = ContextMixing(dim, context_dim, num_heads, kernel_size, small_kernel, **dd)
        self.mix_proj = conv_norm(dim, dim, **dd)
        self.se = squeeze_excite(dim, **dd)
        self.proj = MapSequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, both, 1, **dd))
        self.ls1 = ChannelAffine(both, **dd)
        self.dwconv2 = ResidualDepthwiseConv(both, **dd)
        self.norm2 = LayerNorm2d(both, eps=1e-6, **dd)
        self.mlp = conv_mlp(both, int(mlp_ratio * dim), both, **dd)
        self.ls2 = ChannelAffine(both, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        if self.context_scale is not None and self.prior_scale is not None:
            if torch.jit.is_scripting():
                x, context = x.split(self.dims, dim=1)
                x = torch.cat((x, self.context_scale(context) + self.prior_scale(prior)), dim=1)
            else:
                x = update_last(self.context_scale, self.prior_scale, x, prior)
        x = self.dwconv1(x)
        if torch.jit.is_scripting():
            x = self.ls1(x) + self.drop_path(self._mixed(self.norm1(x)))
        else:
            x = add_scaled(self.ls1, self.drop_path, x, self._mixed(on_map(self.norm1, x)))
        x = self.dwconv2(x)
        if torch.jit.is_scripting():
            return self.ls2(x) + self.drop_path(self.mlp(self.norm2(x)))
        return add_scaled(self.ls2, self.drop_path, x, self.mlp(on_map(self.norm2, x)))

    def _mixed(self, x: Tensor) -> Tensor:
        query, context = x.split(self.dims, dim=1)
        value = self.fusion(x)
        out = self.mix_proj(self.mix(value, query, context)) + self.lepe(value)
        return self.proj(self.se(out) * self.gate(value))


class FocusBlocks(nn.Module):
    """A row of ``DynamicConvBlock``, all with the same context of the start."""

    grad_checkpointing: bool

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, prior)
            else:
                x = block(x, prior)
        return x


# A stage takes and returns a list of maps. The first is the stage's own, to which the third stage adds the context of
# the start and the Overview-Net's map.


class BaseStage(nn.Module):
    """First and second stage: the Base-Net's.

    Args:
        base: The blocks, after their downsampling.
    """

    def __init__(self, base: PyramidStage):
        super().__init__()
        self.base = base

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.base(maps[0])]


class OverviewStage(nn.Module):
    """Third stage: the end of the Base-Net, the Overview-Net on top, and the Focus-Net's start beside it.

    Args:
        base: Blocks at stride 16.
        overview: Blocks at stride 32.
        context: From the Overview-Net's channels to those of the context.
        focus: Dynamic blocks at stride 16.
    """

    def __init__(self, base: PyramidStage, overview: PyramidStage, context: nn.Conv2d, focus: FocusBlocks):
        super().__init__()
        self.base, self.overview, self.context, self.focus = base, overview, context, focus

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        x = self.base(maps[0])
        overview = self.overview(x)
        prior = self.context(overview) if torch.jit.is_scripting() else on_map(self.context, overview)
        near = F.interpolate(prior, size=x.shape[2:], mode="bilinear", align_corners=False)
        return [self.focus(torch.cat((x, near), dim=1), near), prior, overview]


class FocusStage(nn.Module):
    """Fourth stage: the Focus-Net at the stride of the Overview-Net.

    Args:
        in_dim: Channels of the map.
        dim: Its channels after the downsampling.
        context_dim: Channels of the context.
        focus: Dynamic blocks.
    """

    def __init__(self, in_dim: int, dim: int, context_dim: int, focus: FocusBlocks, **dd: Any):
        super().__init__()
        self.dims = [in_dim, context_dim]
        self.downsample = nn.ModuleList(
            [conv_norm(in_dim, dim, 3, 2, **dd), conv_norm(context_dim, context_dim, 3, 2, **dd)]
        )
        self.focus = focus

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        x, context = maps[0].split(self.dims, dim=1)
        x = torch.cat((self.downsample[0](x), self.downsample[1](context)), dim=1)
        return [self.focus(x, maps[1]), maps[1], maps[2]]


class OverLoCK(PyramidBackbone):
    """OverLoCK.

    The maps of the third and fourth stage hold map and context, ``embed_dims[i] + embed_dims[3] // 4`` channels.
    With ``aux_head`` and in training ``forward`` returns the logits of both classifiers, else always one tensor.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifiers out.
        global_pool: Pooling before the classifier.
        depths: Blocks of the Base-Net's three stages and the Overview-Net.
        focus_depths: Blocks of the Focus-Net's two stages.
        embed_dims: Channels per stage, of the Overview-Net and the Focus-Net's second stage alike the last.
        num_heads: Heads of the Focus-Net's two stages.
        kernel_sizes: Sides of the large kernels per stage, odd, 5 to 19.
        small_kernel: Side of the small dynamic kernels, odd.
        mlp_ratio: Hidden width of the MLPs over the channels.
        focus_mlp_ratio: The same in the Focus-Net.
        head_hidden_size: Channels of the map that is pooled for the classifier.
        aux_head: With a classifier on the Overview-Net, for a second loss.
        merged: For inference: one large convolution in place of each sum of branches, what
            ``timm.utils.reparameterize_model`` makes of a trained model.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: Lists of other lengths, heads that do not divide channels, or kernels that are not offered.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (4, 4, 6, 2),
        focus_depths: tuple[int, ...] = (12, 2),
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        num_heads: tuple[int, ...] = (4, 8),
        kernel_sizes: tuple[int, ...] = (17, 15, 13, 7),
        small_kernel: int = 5,
        mlp_ratio: float = 4.0,
        focus_mlp_ratio: float = 3.0,
        head_hidden_size: int = 1024,
        aux_head: bool = False,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not len(depths) == len(embed_dims) == len(kernel_sizes) == 4 or not len(focus_depths) == len(num_heads) == 2:
            raise ValueError(
                "depths, embed_dims and kernel_sizes need 4 values, focus_depths and num_heads 2, "
                f"got {depths}, {embed_dims}, {kernel_sizes}, {focus_depths}, {num_heads}"
            )
        if embed_dims[3] % 4:
            raise ValueError(f"embed_dims={embed_dims}: the last must be a multiple of 4, a quarter being the context")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        count = sum(depths) + sum(focus_depths)
        rates = iter([drop_path_rate * i / max(count - 1, 1) for i in range(count)])
        context_dim = embed_dims[3] // 4

        def base(i: int) -> PyramidStage:
            dim = embed_dims[i]
            blocks: list[nn.Module] = [
                RepConvBlock(dim, kernel_sizes[i], mlp_ratio, i >= 2, next(rates), **dd) for _ in range(depths[i])
            ]
            return PyramidStage(conv_norm(embed_dims[i - 1], dim, 3, 2, **dd) if i > 0 else nn.Identity(), blocks)

        def focus(i: int) -> FocusBlocks:
            args = (embed_dims[i], context_dim, num_heads[i - 2], kernel_sizes[i], small_kernel, focus_mlp_ratio)
            first = [i == 2 and j == 0 for j in range(focus_depths[i - 2])]
            return FocusBlocks([DynamicConvBlock(*args, no_context, next(rates), **dd) for no_context in first])

        self.stem = conv_stem(in_chans, embed_dims[0], **dd)
        context = nn.Conv2d(embed_dims[3], context_dim, 1, **dd)
        stages: list[nn.Module] = [
            BaseStage(base(0)),
            BaseStage(base(1)),
            OverviewStage(base(2), base(3), context, focus(2)),
            FocusStage(embed_dims[2], embed_dims[3], context_dim, focus(3), **dd),
        ]
        dims = (*embed_dims[:2], embed_dims[2] + context_dim, embed_dims[3] + context_dim)
        self.overview_dim, self.projection_dim, self.with_aux_head = embed_dims[3], head_hidden_size, aux_head
        self.projection = MapSequential()
        self.finish(stages, nn.Identity(), dims, in_chans, num_classes, global_pool, drop_rate, **dd)
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init_weights)
        if merged:
            reparameterize_model(self, inplace=True)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifiers.

        Args:
            num_classes: Classes; 0 leaves the classifiers out.
            global_pool: Other pooling; the present one by default. With no classes and ``""`` the projection goes too.
        """
        parameter = next(self.parameters())
        dd: dict[str, Any] = dict(device=parameter.device, dtype=parameter.dtype)
        if global_pool is None:
            global_pool = self.head.global_pool.pool_type
        whole = len(self.stages) == 4
        projected = whole and bool(num_classes or global_pool)
        if projected != (len(self.projection) > 0):
            width = self.projection_dim if projected else self.num_features
            layers = (*conv_norm(self.num_features, width, **dd), nn.SiLU()) if projected else ()
            self.projection = MapSequential(*layers).apply(_init_weights).train(self.training)
            self.head = ClassifierHead(width, 0, global_pool, self.head.drop.p, **dd).train(self.training)
        super().reset_classifier(num_classes, global_pool)
        self.aux_head = None
        if self.with_aux_head and whole and num_classes:
            classifier = ClassifierHead(self.overview_dim, num_classes, "avg", **dd)
            self.aux_head = nn.Sequential(nn.BatchNorm2d(self.overview_dim, **dd), classifier).train(self.training)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates in the order of computation: stem, Base-Net, Overview-Net with
        the context, Focus-Net; by stages (``coarse``) or single blocks.
        """
        if coarse:
            return dict(
                stem=r"^stem", base=r"^stages\.(\d)\.base", overview=r"^stages\.2\.[oc]", focus=r"^stages\.(\d)"
            )
        return dict(
            stem=r"^stem",
            base=[(r"^stages\.(\d)\.base\.downsample", (0,)), (r"^stages\.(\d)\.base\.blocks\.(\d+)", None)],
            overview=[
                (r"^stages\.2\.overview\.downsample", (0,)),
                (r"^stages\.2\.overview\.blocks\.(\d+)", None),
                (r"^stages\.2\.context", (99999,)),
            ],
            focus=[(r"^stages\.(3)\.downsample", (0,)), (r"^stages\.(\d)\.focus\.blocks\.(\d+)", None)],
        )

    def _run(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(check_image(x, self.in_chans))]
        for stage in self.stages:
            maps = stage(maps)
        return maps

    def stage_maps(self, x: Tensor, count: int) -> list[Tensor]:
        """Images ``[B, in_chans, H, W]`` to the outputs of the first ``count`` stages."""
        state, maps = [self.stem(check_image(x, self.in_chans))], []
        for stage in self.stages[:count]:
            state = stage(state)
            maps.append(state[0])
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to the last map and its context, ``[B, C * 5 / 4, H/32, W/32]``."""
        return self._run(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map to logits ``[B, num_classes]``, or to the pooled features with ``pre_logits``."""
        x = self.projection(x)
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps = self._run(x)
        if self.aux_head is not None and self.training:
            return self.forward_head(maps[0]), self.aux_head(maps[2])
        return self.forward_head(maps[0])


def conv_stem(in_chans: int, dim: int, **dd: Any) -> ChannelsLast:
    """Four convolutions to stride 4."""
    return ChannelsLast(
        *conv_norm(in_chans, dim // 2, 3, 2, **dd),
        nn.GELU(),
        *conv_norm(dim // 2, dim // 2, 3, **dd),
        nn.GELU(),
        *conv_norm(dim // 2, dim, 3, 2, **dd),
        nn.GELU(),
        *conv_norm(dim, dim, 3, **dd),
    )


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_OFFICIAL_KEYS = (
    (r"^patch_embed1\.", "stem."),
    (r"^patch_embed([23])\.", lambda m: f"stages.{int(m[1]) - 1}.base.downsample."),
    (r"^patch_embed4\.", "stages.2.overview.downsample."),
    (r"^patch_embedx\.x_proj\.", "stages.3.downsample.0."),
    (r"^patch_embedx\.h_proj\.", "stages.3.downsample.1."),
    (r"^high_level_proj\.", "stages.2.context."),
    (r"^blocks([123])\.", lambda m: f"stages.{int(m[1]) - 1}.base.blocks."),
    (r"^blocks4\.", "stages.2.overview.blocks."),
    (r"^sub_blocks([34])\.", lambda m: f"stages.{int(m[1]) - 1}.focus.blocks."),
    (r"^head\.([01])\.", r"projection.\1."),
    (r"^head\.4\.", "head.fc."),
    (r"^aux_head\.2\.", "aux_head.1.fc."),
    (r"((?:base|overview)\.blocks\.\d+)\.proj\.([0-3])\.", r"\1.branch.\2."),
    (r"((?:base|overview)\.blocks\.\d+)\.proj\.([4-8])\.", lambda m: f"{m[1]}.mlp.{int(m[2]) - 4}."),
    (r"\.se_layer\.", ".se."),
    (r"\.(branch\.3|se)\.proj\.1\.", r".\1.fc1."),
    (r"\.(branch\.3|se)\.proj\.3\.", r".\1.fc2."),
    (r"\.origin_bn\.", ".large.1."),
    (r"\.dil_conv_(k\d+_\d+)\.", r".dilated.\1.0."),
    (r"\.dil_bn_(k\d+_\d+)\.", r".dilated.\1.1."),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.x_scale\.", ".context_scale."),
    (r"\.h_scale\.", ".prior_scale."),
    (r"\.weight_query\.", ".mix.query."),
    (r"\.weight_key\.", ".mix.key."),
    (r"\.weight_proj\.", ".mix.taps."),
    (r"\.rpb1$", ".mix.bias_small"),
    (r"\.rpb2$", ".mix.bias_large"),
    (r"\.dyconv_proj\.", ".mix_proj."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``state_dict`` or ``model``.
        model: The model to fill. Classifiers that it has not are dropped; an auxiliary one for other classes keeps the
            model's weights.

    Returns:
        The state dict under our names.

    Raises:
        ValueError: A checkpoint with merged convolutions for a model with branches, or the reverse.
    """
    state_dict = unwrap(state_dict)
    own, renamed = model.state_dict(), {}
    large = [key.rpartition(".")[2] for key in state_dict if ".lk_origin." in key]
    merged, branches = "bias" in large, any(isinstance(module, DilatedReparamConv) for module in model.modules())
    if large and merged == branches:
        raise ValueError(
            f"the checkpoint has {'merged' if merged else 'multi-branch'} convolutions; create the model with "
            f"merged={merged} (timm.utils.reparameterize_model merges a loaded one)"
        )
    names = (*_OFFICIAL_KEYS, (r"\.lk_origin\.", "." if merged else ".large.0."))
    for key, tensor in rename_keys(state_dict, names).items():
        if key not in own and key.startswith(("projection.", "aux_head.")):
            continue
        if key in own and tensor.shape != own[key].shape:
            if [side for side in tensor.shape if side > 1] == [side for side in own[key].shape if side > 1]:
                tensor = tensor.reshape(own[key].shape)  # some vectors and matrices are published as kernels
            elif key.startswith("aux_head.1."):
                tensor = own[key]
        renamed[key] = tensor
    return renamed


def _create_overlock(variant: str, pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    if kwargs.get("pretrained_cfg") == "in1k_merged":  # the tag in a name
        kwargs.setdefault("merged", True)
    return build_backbone(OverLoCK, variant, pretrained, checkpoint_filter_fn, **kwargs)


_RELEASE = "https://github.com/LMMMEng/OverLoCK/releases/download/v1/{}_in1k_224{}.pth"


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/LMMMEng/OverLoCK",
        "paper_name": "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels",
        "paper_ids": "arXiv:2502.20087",
        **kwargs,
    }


def _cfgs(name: str, **kwargs: Any) -> dict[str, dict[str, Any]]:
    return {
        f"{name}.in1k": _cfg(url=_RELEASE.format(name, ""), **kwargs),
        f"{name}.in1k_merged": _cfg(url=_RELEASE.format(name, "_reparam"), **kwargs),
    }


default_cfgs = generate_default_cfgs(
    {
        **_cfgs("overlock_xt", crop_pct=0.925),
        **_cfgs("overlock_t"),
        **_cfgs("overlock_s"),
        **_cfgs("overlock_b", crop_pct=0.975),
        "test_overlock.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0),
    }
)


@register_model
def test_overlock(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """Smallest OverLoCK, for tests; not a published model."""
    args = dict(depths=(1, 1, 1, 1), focus_depths=(2, 1), embed_dims=(16, 32, 48, 64), num_heads=(1, 2))
    sizes = dict(kernel_sizes=(7, 7, 5, 5), small_kernel=3, head_hidden_size=128)
    return _create_overlock("test_overlock", pretrained, **{**args, **sizes, **kwargs})


@register_model
def overlock_xt(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-XT."""
    args = dict(depths=(2, 2, 3, 2), focus_depths=(6, 2), embed_dims=(56, 112, 256, 336), num_heads=(4, 6))
    return _create_overlock("overlock_xt", pretrained, **{**args, **kwargs})


@register_model
def overlock_t(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-T."""
    return _create_overlock("overlock_t", pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-S."""
    args = dict(depths=(6, 6, 8, 3), focus_depths=(16, 3), embed_dims=(64, 128, 320, 512), num_heads=(8, 16))
    return _create_overlock("overlock_s", pretrained, **{**args, **kwargs})


@register_model
def overlock_b(pretrained: bool = False, **kwargs: Any) -> OverLoCK:
    """OverLoCK-B."""
    args = dict(depths=(8, 8, 10, 4), focus_depths=(20, 4), embed_dims=(80, 160, 384, 576), num_heads=(6, 9))
    return _create_overlock("overlock_b", pretrained, **{**args, **kwargs})
