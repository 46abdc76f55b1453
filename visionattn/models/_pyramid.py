"""What timm asks of a hierarchical backbone beyond its architecture."""

from typing import Any

import torch
from timm.layers import ClassifierHead, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn


@register_notrace_function
def check_image(x: Tensor, in_chans: int, min_size: int = 1) -> Tensor:
    """Refuse a batch whose shape is not ``[B, in_chans, H, W]`` before a convolution does so less clearly."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f"the model takes images [B, {in_chans}, H, W], got shape {list(x.shape)}; "
            "for other channels create it with in_chans="
        )
    if x.shape[2] < min_size or x.shape[3] < min_size:
        raise ValueError(
            f"the model takes images of at least {min_size} x {min_size} pixels, got {x.shape[2]} x {x.shape[3]}; "
            "enlarge or pad them"
        )
    return x


class PyramidStage(nn.Module):
    """A downsampling layer and a row of blocks, ``[B, C_in, H, W]`` to ``[B, C_out, H', W']``.

    Args:
        downsample: First layer of the stage; ``nn.Identity()`` after a stem.
        blocks: The blocks, each ``[B, C_out, H', W']`` to the same.
    """

    grad_checkpointing: bool

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class PyramidBackbone(nn.Module):
    """Base of the four-stage backbones: ``stem``, ``stages``, ``norm``, ``head``, and timm's methods over them.

    A subclass builds ``self.stem`` and calls ``finish`` with its stages.
    """

    def finish(
        self,
        stages: list[nn.Module],
        norm: nn.Module,
        embed_dims: tuple[int, ...],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        head: nn.Module | None = None,
        min_size: int = 1,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add stages, final norm and classifier, and the attributes that timm reads.

        Args:
            stages: Modules ``[B, C, H, W]`` to ``[B, embed_dims[i], H', W']`` at strides 4, 8, 16, 32.
            norm: Norm of the last map.
            embed_dims: Channels of each stage.
            in_chans: Channels of the image.
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: Pooling before the classifier as in timm, ``""`` for none.
            drop_rate: Dropout before the classifier.
            head: A classifier of timm's kinds in the place of pooling and a linear layer.
            min_size: Side of the smallest image in pixels.
            device: Device of the classifier.
            dtype: Dtype of the classifier.
        """
        self.in_chans = in_chans
        self.min_size = min_size
        self.num_classes = num_classes
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.feature_info = [
            dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}") for i, dim in enumerate(embed_dims)
        ]
        self.num_features = embed_dims[-1]
        self.head = head or ClassifierHead(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, device=device, dtype=dtype
        )
        self.head_hidden_size = self._pre_logits_width()

    @torch.jit.ignore
    def _pre_logits_width(self) -> int:
        return getattr(self.head, "hidden_size", None) or self.head.in_features * self.head.global_pool.feat_mult()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise learning rates: stem, then stages (``coarse``) or single blocks."""
        fine = [
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(stem=r"^stem", blocks=r"^stages\.(\d+)" if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        for module in self.modules():
            if hasattr(module, "grad_checkpointing"):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer (``nn.Identity`` without classes)."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Classes; 0 leaves the classifier out.
            global_pool: Other pooling; the present one by default.
        """
        parameter = next(self.parameters())  # the head may have none left that tells device and dtype
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head.to(device=parameter.device, dtype=parameter.dtype)
        self.head_hidden_size = self._pre_logits_width()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Run the backbone and collect the outputs of its stages.

        Args:
            x: Images, ``[B, in_chans, H, W]``.
            indices: Stages to collect: all by default, the last n for an int.
            norm: Apply the final norm to the last stage's map.
            stop_early: Skip the stages after the last one collected.
            output_fmt: Only ``"NCHW"``.
            intermediates_only: Return only the list.

        Returns:
            The final map ``[B, C, H/32, W/32]`` and the list of ``[B, C_i, H_i, W_i]``.

        Raises:
            ValueError: Another ``output_fmt``, or images of another shape.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r} is not offered; maps come as 'NCHW'")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        maps = self.stage_maps(x, max_index + 1 if stop_early else len(self.stages))
        last, final = len(self.feature_info) - 1, maps[-1]
        if len(maps) > last and (norm or not intermediates_only):
            final = self.norm(final)
        intermediates = [final if norm and i == last else maps[i] for i in range(len(maps)) if i in take_indices]
        return intermediates if intermediates_only else (final, intermediates)

    def stage_maps(self, x: Tensor, count: int) -> list[Tensor]:
        """Images ``[B, in_chans, H, W]`` to the outputs of the first ``count`` stages."""
        x, maps = self.stem(check_image(x, self.in_chans, self.min_size)), []
        for stage in self.stages[:count]:
            x = stage(x)
            maps.append(x)
        return maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the wanted intermediates do not need.

        Args:
            indices: Stages to keep, as in ``forward_intermediates``.
            prune_norm: Also drop the final norm.
            prune_head: Also drop the classifier; done anyway when stages go.

        Returns:
            The kept indices, counted from the first stage.
        """
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shorter = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shorter:
            self.norm = nn.Identity()  # it fits the last stage only
        if shorter:
            self.num_features = self.feature_info[max_index]["num_chs"]
            self.head = ClassifierHead(self.num_features, 0, pool_type="").train(self.training)
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to the normalised last map ``[B, C, H/32, W/32]``."""
        x = self.stem(check_image(x, self.in_chans, self.min_size))
        x = self.stages(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Last map to logits ``[B, num_classes]``, or to the pooled features with ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
