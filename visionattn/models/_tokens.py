"""What the isotropic token-MLP backbones share: patches, a block, published keys, and timm's methods over them."""

from typing import Any

from timm.layers import DropPath, LayerNorm, PatchEmbed, register_notrace_module
from torch import Tensor, nn

from visionattn.models._pyramid import PyramidBackbone, PyramidStage
from visionattn.models._weights import rename_keys
from visionattn.ops import pad_to_multiple


@register_notrace_module  # a leaf for torch.fx: sizes are compared
class PatchStem(PatchEmbed):
    """Square patches without overlap, ``[B, C_in, H, W]`` to ``[B, dim, H / patch_size, W / patch_size]``.

    Args:
        in_chans: Channels of the image.
        dim: Channels of the map.
        patch_size: Side of a patch in pixels.
        img_size: The only size taken; None for any, completed to whole patches by zeros at the bottom and right.

    Raises:
        ValueError: A ``patch_size`` below 1; in ``forward``, images of another size than ``img_size``.
    """

    def __init__(
        self, in_chans: int, dim: int, patch_size: int, img_size: int | tuple[int, int] | None = None, **dd: Any
    ):
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size} must be a positive number of pixels")
        super().__init__(img_size, patch_size, in_chans, dim, flatten=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if self.img_size is not None:
            height, width = self.img_size
            if x.shape[2] != height or x.shape[3] != width:
                raise ValueError(
                    f"the model takes images of {height}x{width} pixels, got {x.shape[2]}x{x.shape[3]}; resize them, "
                    "or create the model with img_size=, or call set_input_size(img_size=...) and train it anew"
                )
        x = pad_to_multiple(x.permute(0, 2, 3, 1), self.patch_size[0])
        return self.proj(x.permute(0, 3, 1, 2))


class SharedNormBlock(nn.Module):
    """A gating unit and an MLP, each with a residual and behind one and the same norm; ``[B, C, H, W]`` in and out.

    Args:
        dim: Channels.
        unit: Gating unit, ``[B, H, W, C]`` to the same.
        mlp: MLP over channels; None for a block of the unit alone.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, unit: nn.Module, mlp: nn.Module | None, drop_path: float = 0.0, **dd: Any):
        super().__init__()
        self.norm = LayerNorm(dim, eps=1e-5, **dd)
        self.unit = unit
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.unit(self.norm(x)))
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm(x)))
        return x.permute(0, 3, 1, 2)


class TokenBackbone(PyramidBackbone):
    """Base of the backbones that stay at the stride of their patches: a pyramid with one stage per block, all alike.

    All maps are ``[B, C, H / patch_size, W / patch_size]``. There is no final norm.

    Args:
        stem: The patches.
        rows: For each stage the modules it runs, ``[B, C, H, W]`` to the same.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: Pooling before the classifier.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        stem: PatchStem,
        rows: list[list[nn.Module]],
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        **dd: Any,
    ):
        super().__init__()
        self.stem = stem
        stages: list[nn.Module] = [PyramidStage(nn.Identity(), row) for row in rows]
        dims = (stem.proj.out_channels,) * len(rows)
        self.finish(stages, nn.Identity(), dims, stem.proj.in_channels, num_classes, global_pool, drop_rate, **dd)
        self._set_reductions()

    def _set_reductions(self) -> None:
        for info in self.feature_info:
            info["reduction"] = self.stem.feat_ratio()


def block_rates(drop_path_rate: float, depth: int) -> list[float]:
    """Stochastic depth of each block, growing linearly from 0.

    Raises:
        ValueError: A ``depth`` below 1.
    """
    if depth < 1:
        raise ValueError(f"depth={depth}: the model needs at least one block")
    return [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]


def rename_published(state_dict: dict[str, Any], unit_keys: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Our names for a published checkpoint of the family; keys of our own pass unchanged.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        unit_keys: Patterns and replacements for the gating unit.

    Returns:
        The state dict under our names.
    """
    names = (
        (r"^patcher\.", "stem.proj."),
        (r"^model\.(\d+)\.", r"stages.\1.blocks.0."),
        (r"\.ffn\.net\.0\.", ".mlp.fc1."),
        (r"\.ffn\.net\.3\.", ".mlp.fc2."),
        (r"^classifier\.", "head.fc."),
        *unit_keys,
    )
    return rename_keys(state_dict, names)
