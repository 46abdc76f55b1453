"""Sentence Attention Blocks: an image and a question to the mask of the region that supports the answer.

Paper: Sentence Attention Blocks for Answer Grounding, arXiv:2309.11593 (its abstract was read). Code:
khoshsirat/embedding-attention-blocks at commit 1d9268c, ``model.py``.

Departures: any timm backbone with two maps or more, text encoders as parts of the network, no in-place changes, and the
backbone's own normalisation of the image unless ``image_norm=True``. See ``docs/grounding.md``.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.heads._backbones import create_backbone
from visionattn.heads._published import fill, read_published
from visionattn.heads.text import create_text_encoder

PUBLISHED_TEXT_DIM = 384
"""Length of the published sentence embeddings (all-MiniLM-L6-v2)."""
_HEAD = ("sentence_attentions.", "merge_blocks.", "classifier.")
# parts of efficientnet_pytorch's blocks and timm's names: of blocks that expand, and of those that do not
_PARTS = {
    "_expand_conv": ("conv_pw", None),
    "_bn0": ("bn1", None),
    "_depthwise_conv": ("conv_dw", "conv_dw"),
    "_bn1": ("bn2", "bn1"),
    "_se_reduce": ("se.conv_reduce", "se.conv_reduce"),
    "_se_expand": ("se.conv_expand", "se.conv_expand"),
    "_project_conv": ("conv_pwl", "conv_pw"),
    "_bn2": ("bn3", "bn2"),
}


class SentenceAttention(nn.Module):
    """Weighs a map's channels by a softmax over channels that is computed from the sentence alone.

    Args:
        text_dim: Length D of the sentence embedding.
        channels: Channels C of the map.
        expansion: Width of the hidden layer over D; published 4.

    Shape:
        x: ``[B, C, H, W]``.
        text: ``[B, D]``.
        returns: ``[B, C, H, W]``. The weights sum to 1, so values become about C times smaller.
    """

    def __init__(self, text_dim: int, channels: int, expansion: int = 4):
        super().__init__()
        hidden = text_dim * expansion
        layers = nn.Linear(text_dim, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        self.attention = nn.Sequential(*layers, nn.Softmax(-1))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return x * self.attention(text).to(x.dtype)[:, :, None, None]


class MergeBlock(nn.Module):
    """Adds a coarser map to a finer one: ``ReLU(fine + resize(BN(conv1x1(coarse))))``.

    Args:
        coarse: Channels of the coarser map.
        fine: Channels of the finer map.

    Shape:
        fine: ``[B, fine, H, W]``.
        coarse: ``[B, coarse, h, w]``.
        returns: ``[B, fine, H, W]``.
    """

    def __init__(self, coarse: int, fine: int):
        super().__init__()
        self.low_res_conv = nn.Sequential(nn.Conv2d(coarse, fine, 1, bias=False), nn.BatchNorm2d(fine))

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        return (fine + _resize(self.low_res_conv(coarse), fine.shape[2:])).relu()


class SentenceDecoder(nn.Module):
    """The head: a sentence attention on every map, merging from coarse to fine, dropout and a 1x1 convolution.

    Args:
        channels: Channels of the maps, from fine to coarse; two at least.
        text_dim: Length D of the sentence embedding.
        num_classes: Channels K of the logits.
        dropout: On the finest merged map; published 0.5.
        expansion: As for ``SentenceAttention``.

    Shape:
        maps: ``[B, C_i, H_i, W_i]``, from fine to coarse.
        text: ``[B, D]``.
        returns: Logits ``[B, K, H_1, W_1]`` at the size of the finest map.

    Raises:
        ValueError: Fewer than two maps, no class, or a dropout outside [0, 1); in ``forward`` another number of maps
            or text of another shape.
    """

    def __init__(
        self, channels: Sequence[int], text_dim: int, num_classes: int = 1, dropout: float = 0.5, expansion: int = 4
    ):
        super().__init__()
        if len(channels) < 2 or num_classes < 1 or not 0 <= dropout < 1 or text_dim < 1:
            raise ValueError(
                f"channels={list(channels)}, text_dim={text_dim}, num_classes={num_classes}, dropout={dropout}: at "
                "least two maps, one number of text and one class are needed, and a dropout in [0, 1)"
            )
        self.text_dim = text_dim
        self.sentence_attentions = nn.ModuleList([SentenceAttention(text_dim, c, expansion) for c in channels])
        pairs = zip(channels[1:], channels[:-1], strict=True)
        self.merge_blocks = nn.ModuleList([MergeBlock(coarse, fine) for coarse, fine in pairs])
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels[0], num_classes, 1)

    def forward(self, maps: Sequence[Tensor], text: Tensor) -> Tensor:
        count = len(self.sentence_attentions)
        if len(maps) != count or text.shape != (len(maps[0]), self.text_dim):
            raise ValueError(
                f"SentenceDecoder wants {count} maps and text [{len(maps[0])}, {self.text_dim}], got {len(maps)} maps "
                f"and text {list(text.shape)}"
            )
        weighed = [attention(x, text) for attention, x in zip(self.sentence_attentions, maps, strict=True)]
        merged = weighed[-1]
        for i in range(count - 2, -1, -1):
            merged = self.merge_blocks[i](weighed[i], merged)
        return self.classifier(self.dropout(merged))


class SentenceAttentionNet(nn.Module):
    """Sentence Attention Blocks on a timm backbone.

    Args:
        backbone: A name in timm; the published one is ``tf_efficientnet_b7``.
        in_chans: Channels of the image.
        num_classes: Channels K of the logits; 1 is the mask of the answer.
        pretrained: Load the backbone's weights.
        text: Arguments of ``create_text_encoder``, for example ``dict(kind="words", vocabulary=[...])``; None for a
            network that takes sentence embeddings only.
        text_dim: Length of the embeddings where there is no encoder.
        dropout: As for ``SentenceDecoder``.
        expansion: As for ``SentenceAttention``.
        image_norm: Normalise each channel of an image over its pixels first, with running statistics in evaluation, as
            the published network does. The image should then not be normalised otherwise.
        backbone_kwargs: Arguments of the backbone, for example ``dict(drop_path_rate=0.1)``.

    Shape:
        x: Images ``[B, in_chans, H, W]``.
        text: Sentence embeddings ``[B, D]``, or B strings for the text encoder.
        returns: Logits ``[B, K, H, W]``.

    Raises:
        ValueError: An unknown backbone or one with a single map, arguments that the parts refuse; in ``forward``,
            images of another shape, another number of questions, strings without an encoder, or questions that the
            encoder refuses (empty, too long).
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b7",
        in_chans: int = 3,
        num_classes: int = 1,
        pretrained: bool = False,
        text: dict[str, Any] | None = None,
        text_dim: int = PUBLISHED_TEXT_DIM,
        dropout: float = 0.5,
        expansion: int = 4,
        image_norm: bool = False,
        backbone_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.text = create_text_encoder(**text) if text is not None else None
        self.init_norm = nn.InstanceNorm2d(in_chans, track_running_stats=True) if image_norm else nn.Identity()
        kwargs = {**(backbone_kwargs or {}), "in_chans": in_chans, "features_only": True, "pretrained": pretrained}
        self.backbone = create_backbone(backbone, **kwargs)
        dim = self.text.dim if self.text is not None else text_dim
        channels = self.backbone.feature_info.channels()
        self.decoder = SentenceDecoder(channels, dim, num_classes, dropout, expansion)

    def forward(self, x: Tensor, text: Tensor | Sequence[str]) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"SentenceAttentionNet takes images [B, {self.in_chans}, H, W], got {list(x.shape)}")
        if not isinstance(text, Tensor):
            if self.text is None:
                raise ValueError("this network has no text encoder; give embeddings, or create it with text=dict(...)")
            if isinstance(text, str) or len(text) != len(x):
                got = "one string" if isinstance(text, str) else f"{len(text)} of them"
                raise ValueError(f"{len(x)} images want a list of {len(x)} questions, got {got}")
            text = self.text(list(text))
        return _resize(self.decoder(self.backbone(self.init_norm(x)), text), x.shape[2:])

    def load_published(self, path: str | Path) -> "SentenceAttentionNet":
        """Load a checkpoint with the published names, head and EfficientNet backbone.

        Args:
            path: ``.pth`` or ``.safetensors`` of a state dict; ``init_norm`` counts only with ``image_norm=True``.

        Returns:
            The network itself.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is damaged, holds more than tensors, or is of another network.
        """
        weights = {}
        for key, tensor in read_published(path).items():
            if key.startswith(_HEAD):
                weights[f"decoder.{key}"] = tensor
            elif key.startswith("backbone."):
                weights[f"backbone.{efficientnet_key(key.removeprefix('backbone.'), self.backbone)}"] = tensor
            elif not key.startswith("init_norm.") or isinstance(self.init_norm, nn.InstanceNorm2d):
                weights[key] = tensor
        fill(self, weights, path, "backbone, text_dim, num_classes and image_norm", optional="text.")
        return self

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the backbone wants without weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else set()
        return {f"backbone.{name}" for name in names}


def efficientnet_key(key: str, backbone: nn.Module) -> str:
    """The name in timm's EfficientNet of a tensor that efficientnet_pytorch names ``key``; others stay as they are.

    Args:
        key: For example ``_blocks.3._depthwise_conv.weight``.
        backbone: timm's network, whose depths turn the number of a block into stage and block.
    """
    for old, new in (("_conv_stem.", "conv_stem."), ("_bn0.", "bn1.")):
        if key.startswith(old):
            return new + key.removeprefix(old)
    match = re.match(r"_blocks\.(\d+)\.(\w+)\.(\w+)$", key)
    if not match or match[2] not in _PARTS or not hasattr(backbone, "blocks"):
        return key
    blocks: Any = backbone.blocks
    number, stages = int(match[1]), list(blocks)
    for i, stage in enumerate(stages):
        if number < len(stage):
            expands = hasattr(stage[number], "conv_pwl")
            return f"blocks.{i}.{number}.{_PARTS[match[2]][0 if expands else 1]}.{match[3]}"
        number -= len(stage)
    return key


def _resize(x: Tensor, size: Any) -> Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
