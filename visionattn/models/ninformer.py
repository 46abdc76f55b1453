"""NiNformer: a small MLP-Mixer inside every block makes the gate of a linear projection.

Paper: NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function, Abdullah and Aydin,
Neural Computing and Applications 2025, arXiv:2403.02411.
Code: https://github.com/Abdullah-88/NiNformer (BSD-3-Clause), ``ninformer.py`` and the classifier in ``train.py``.

Departures: none in what is computed. The paper has models for 28 and 32 pixels only; the one for 224 is ours.
The MLPs over tokens fix the number of tokens, so a model takes images of one size.
"""

import warnings
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, Mlp, to_2tuple
from timm.models import MixerBlock, generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.models._tokens import PatchStem, SharedNormBlock, TokenBackbone, block_rates, rename_published
from visionattn.models._weights import build_backbone

try:
    from timm.models._input import update_model_input_size
except ImportError:  # timm 1.0.29 keeps no record of a new size
    update_model_input_size = None


class MixerGate(nn.Module):
    """A linear projection times what a Mixer block makes of the same tokens, ``[B, H, W, C]`` in and out.

    Args:
        dim: Channels.
        num_tokens: Pixels of the map, ``H * W``.
        mlp_ratio: Hidden width of both MLPs of the Mixer over ``dim``.
        drop: Dropout in these MLPs.
    """

    def __init__(self, dim: int, num_tokens: int, mlp_ratio: float = 2.0, drop: float = 0.0, **dd: Any):
        super().__init__()
        self.proj = nn.Linear(dim, dim, **dd)
        norm = partial(LayerNorm, eps=1e-5)
        self.mixer = MixerBlock(dim, num_tokens, (mlp_ratio, mlp_ratio), norm_layer=norm, drop=drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x) * self.mixer(x.flatten(1, 2)).reshape(x.shape)

    def resize(self, num_tokens: int) -> None:
        """Put a new MLP over ``num_tokens`` tokens, with weights as at the start, in the place of the present one."""
        old = self.mixer.mlp_tokens
        like = dict(device=old.fc1.weight.device, dtype=old.fc1.weight.dtype)
        new = Mlp(num_tokens, old.fc1.out_features, drop=old.drop1.p, **like).train(self.training)
        self.mixer.mlp_tokens = new.requires_grad_(old.fc1.weight.requires_grad)


class NiNformer(TokenBackbone):
    """NiNformer.

    Args:
        img_size: Height and width of the images in pixels.
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        patch_size: Side of a patch in pixels; must divide ``img_size``.
        embed_dim: Channels.
        depth: Blocks.
        mlp_ratio: Hidden width of all MLPs, those over tokens too, over ``embed_dim``.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout in the MLPs (published training: 0.5).
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A ``patch_size`` that does not divide ``img_size``, no blocks, or images of another size.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 16,
        embed_dim: int = 256,
        depth: int = 4,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        _check_grid(img_size, patch_size)
        stem = PatchStem(in_chans, embed_dim, patch_size, img_size, **dd)
        rows: list[list[nn.Module]] = []
        for rate in block_rates(drop_path_rate, depth):
            gate = MixerGate(embed_dim, stem.num_patches, mlp_ratio, proj_drop_rate, **dd)
            mlp = Mlp(embed_dim, int(mlp_ratio * embed_dim), drop=proj_drop_rate, **dd)
            rows.append([SharedNormBlock(embed_dim, gate, mlp, rate, **dd)])
        super().__init__(stem, rows, num_classes, global_pool, drop_rate, **dd)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Take images of another size, or other patches (whose weights are resampled).

        Where the number of rows or columns of patches changes, the MLPs over tokens start anew, with a warning:
        nothing published says how to carry them over.

        Args:
            img_size: Height and width of the images in pixels; the present ones by default.
            patch_size: Side of a patch in pixels; the present one by default.

        Raises:
            ValueError: A ``patch_size`` that does not divide ``img_size``.
        """
        img_size = self.stem.img_size if img_size is None else to_2tuple(img_size)
        _check_grid(img_size, self.stem.patch_size[0] if patch_size is None else patch_size)
        previous = self.stem.grid_size
        self.stem.set_input_size(img_size, patch_size)
        self._set_reductions()
        if self.stem.grid_size != previous:
            for stage in self.stages:
                stage.blocks[0].unit.resize(self.stem.num_patches)
            warnings.warn(
                f"the MLPs over {previous[0]}x{previous[1]} tokens were replaced by untrained ones over "
                f"{self.stem.grid_size[0]}x{self.stem.grid_size[1]}; train the model at its new size",
                stacklevel=2,
            )
        if update_model_input_size is not None:
            update_model_input_size(self, img_size, patch_size=patch_size)


def _check_grid(img_size: int | tuple[int, int], patch_size: int) -> None:
    height, width = to_2tuple(img_size)
    if not 1 <= patch_size <= min(height, width) or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size={patch_size} must be positive and divide img_size={height}x{width}; "
            "choose another patch, or resize the images to a multiple of it"
        )


_UNIT_KEYS = (
    (r"\.mgu\.proj\.", ".unit.proj."),
    (r"\.mgu\.Mixer\.token_mix\.0\.", ".unit.mixer.norm1."),
    (r"\.mgu\.Mixer\.token_mix\.2\.net\.0\.", ".unit.mixer.mlp_tokens.fc1."),
    (r"\.mgu\.Mixer\.token_mix\.2\.net\.3\.", ".unit.mixer.mlp_tokens.fc2."),
    (r"\.mgu\.Mixer\.channel_mix\.0\.", ".unit.mixer.norm2."),
    (r"\.mgu\.Mixer\.channel_mix\.1\.net\.0\.", ".unit.mixer.mlp_channels.fc1."),
    (r"\.mgu\.Mixer\.channel_mix\.1\.net\.3\.", ".unit.mixer.mlp_channels.fc2."),
)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Rename the keys of a published checkpoint; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        model: The model to fill.

    Returns:
        The state dict under our names.

    Raises:
        ValueError: A checkpoint for another number of tokens.
    """
    renamed = rename_published(state_dict, _UNIT_KEYS)
    for key, own in model.state_dict().items():
        if key.endswith(".mlp_tokens.fc1.weight") and key in renamed and renamed[key].shape[1] != own.shape[1]:
            raise ValueError(
                f"the checkpoint's MLPs are over {renamed[key].shape[1]} tokens, those of the model over "
                f"{own.shape[1]}; create it at the checkpoint's img_size and patch_size, then call set_input_size()"
            )
    return renamed


def _create_ninformer(variant: str, pretrained: bool = False, **kwargs: Any) -> NiNformer:
    return build_backbone(NiNformer, variant, pretrained, checkpoint_filter_fn, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "fixed_input_size": True,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "bsd-3-clause",
        "origin_url": "https://github.com/Abdullah-88/NiNformer",
        "paper_name": "NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function",
        "paper_ids": "arXiv:2403.02411",
        **kwargs,
    }


_PHOTO = dict(num_classes=1000, input_size=(3, 224, 224), pool_size=(14, 14), crop_pct=0.875)

default_cfgs = generate_default_cfgs(
    {
        "ninformer_p4_32.untrained": _cfg(),
        "ninformer_p16_224.untrained": _cfg(**_PHOTO),
        "test_ninformer.untrained": _cfg(),
    }
)


@register_model
def test_ninformer(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """Smallest NiNformer, for tests; not a published model."""
    return _create_ninformer("test_ninformer", pretrained, **{**dict(patch_size=4, embed_dim=64), **kwargs})


@register_model
def ninformer_p4_32(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """NiNformer for 32 pixels, the model of the published CIFAR-10 script."""
    return _create_ninformer("ninformer_p4_32", pretrained, **{**dict(patch_size=4), **kwargs})


@register_model
def ninformer_p16_224(pretrained: bool = False, **kwargs: Any) -> NiNformer:
    """The same blocks for 224 pixels; not a published model."""
    return _create_ninformer("ninformer_p16_224", pretrained, **kwargs)
