"""The neck and the prompt-free two-way mask decoder of HER-Seg on any map of stride 16.

A handful of learned tokens and the pixels of the map attend to each other; a small network turns a token into the
weights of a 1 x 1 convolution, whose output on the enlarged map is the mask. Unlike the released code it does not loop
over images, and position codes are projected once per batch: a linear layer of a sum is the sum of the linear layers.

Paper: HER-Seg, arXiv:2504.06205; the decoder is that of Segment Anything, arXiv:2304.02643, without prompts.
Code: https://github.com/xq141839/HER-Seg, ``model.py``, ``SAM/ecm_decoder.py``, ``SAM/transformer.py``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, register_notrace_module
from torch import Tensor, nn

from visionattn.layers import MapSequential, add_normalize, normalize, on_map, project
from visionattn.layers.channels_last import bare

MASK_TOKENS = ("first", "own")
PUBLISHED_MASKS = 3  # mask tokens of the published network, of which it shows the first


class TokenAttention(nn.Module):
    """Multi-head attention between two sequences that have position codes of their own.

    ``softmax((Wq (x + p)) (Wk (y + r))^T / sqrt(d)) Wv y`` per head, then an output projection.

    Args:
        dim: Channels of both sequences.
        num_heads: Attention heads.
        inner: Channels of the attention; ``num_heads`` must divide them.

    Shape:
        x: ``[B, N, dim]``.
        y: ``[B, M, dim]``.
        x_position: ``[1, N, dim]`` or None.
        y_position: ``[1, M, dim]`` or None.
        returns: ``[B, N, dim]``.
    """

    def __init__(self, dim: int, num_heads: int, inner: int, **dd: Any):
        super().__init__()
        if inner % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the {inner} channels of the attention")
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, inner, **dd)
        self.k_proj = nn.Linear(dim, inner, **dd)
        self.v_proj = nn.Linear(dim, inner, **dd)
        self.out_proj = nn.Linear(inner, dim, **dd)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    @staticmethod
    def _placed(layer: nn.Linear, x: Tensor, position: Tensor | None) -> Tensor:
        """``layer(x + position)`` without keeping the sum of the size of the map for the backward pass."""
        if position is None:
            return project(layer, x)
        if type(layer) is not nn.Linear or not bare(layer, x):  # an adapter or a hook must see the sum
            return layer(x + position)
        return project(layer, x) + F.linear(position, layer.weight)

    def forward(
        self, x: Tensor, y: Tensor, x_position: Tensor | None = None, y_position: Tensor | None = None
    ) -> Tensor:
        q = self._heads(self._placed(self.q_proj, x, x_position))
        k = self._heads(self._placed(self.k_proj, y, y_position))
        v = self._heads(project(self.v_proj, y))
        out = F.scaled_dot_product_attention(q, k, v)
        return project(self.out_proj, out.transpose(1, 2).flatten(2))


class TwoWayLayer(nn.Module):
    """Tokens attend to themselves and the pixels, pass an MLP, and the pixels attend to them; norms after residuals.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        mlp_dim: Hidden width of the tokens' MLP.
        first: Of the first layer: its self attention has neither position nor residual.

    Shape:
        tokens: ``[B, T, dim]``.
        image: ``[B, N, dim]``.
        token_position: ``[1, T, dim]``.
        image_position: ``[1, N, dim]``.
        returns: Tokens and image.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, first: bool, **dd: Any):
        super().__init__()
        self.first = first
        self.self_attn = TokenAttention(dim, num_heads, dim, **dd)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.token_to_image = TokenAttention(dim, num_heads, dim // 2, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_dim, **dd), nn.ReLU(), nn.Linear(mlp_dim, dim, **dd))
        self.norm3 = nn.LayerNorm(dim, **dd)
        self.image_to_token = TokenAttention(dim, num_heads, dim // 2, **dd)
        self.norm4 = nn.LayerNorm(dim, **dd)

    def forward(
        self, tokens: Tensor, image: Tensor, token_position: Tensor, image_position: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = normalize(self.norm1, self.self_attn(tokens, tokens))
        else:
            mixed = self.self_attn(tokens, tokens, token_position, token_position)
            tokens = add_normalize(self.norm1, tokens, mixed)[1]
        seen = self.token_to_image(tokens, image, token_position, image_position)
        tokens = add_normalize(self.norm2, tokens, seen)[1]
        tokens = add_normalize(self.norm3, tokens, self.mlp(tokens))[1]
        told = self.image_to_token(image, tokens, image_position, token_position)
        return tokens, add_normalize(self.norm4, image, told)[1]


class TwoWayTransformer(nn.Module):
    """Layers of two-way attention and a last look of the tokens at the pixels; shapes as in ``TwoWayLayer``."""

    def __init__(self, depth: int, dim: int, num_heads: int, mlp_dim: int, **dd: Any):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(dim, num_heads, mlp_dim, i == 0, **dd) for i in range(depth))
        self.final_attn = TokenAttention(dim, num_heads, dim // 2, **dd)
        self.norm_final = nn.LayerNorm(dim, **dd)

    def forward(self, tokens: Tensor, image: Tensor, image_position: Tensor) -> tuple[Tensor, Tensor]:
        position = tokens[:1]  # the initial tokens are alike for all images
        for layer in self.layers:
            tokens, image = layer(tokens, image, position, image_position)
        seen = self.final_attn(tokens, image, position, image_position)
        return add_normalize(self.norm_final, tokens, seen)[1], image


class FourierPosition(nn.Module):
    """Random Fourier features of the pixels' centres: with ``p`` in ``[0, 1]``, ``e = 2 pi (2 p - 1) G`` and
    ``[sin e, cos e]``; ``G`` is drawn once and kept with the weights."""

    matrix: Tensor

    def __init__(self, dim: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.register_buffer("matrix", torch.randn(2, dim // 2, device=device, dtype=dtype))

    def forward(self, height: int, width: int) -> Tensor:
        """Codes of the pixels in rows, ``[1, height * width, dim]``."""
        matrix = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32))
        kind: dict[str, Any] = dict(device=matrix.device, dtype=matrix.dtype)
        y = (torch.arange(height, **kind) + 0.5) / height * 2 - 1
        x = (torch.arange(width, **kind) + 0.5) / width * 2 - 1
        # products by hand: autocast would round a matrix product, and with it the phases
        angles = 2 * math.pi * (x[None, :, None] * matrix[0] + y[:, None, None] * matrix[1])
        return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(0, 1)[None].to(self.matrix.dtype)


def _hypernetwork(dim: int, **dd: Any) -> nn.Sequential:
    """A token to the weights of a mask over the ``dim / 8`` channels of the enlarged map."""
    wide, last = nn.Linear(dim, dim, **dd), nn.Linear(dim, dim // 8, **dd)
    return nn.Sequential(wide, nn.ReLU(), nn.Linear(dim, dim, **dd), nn.ReLU(), last)


@register_notrace_module
class MaskDecoder(nn.Module):
    """Neck, two-way transformer and enlargement: a map of any backbone to one mask per class at four times its size.

    Args:
        in_channels: Channels of the map.
        num_classes: Masks. The published network has one; more are an extension, one hypernetwork for each.
        mask_token: Which token the hypernetworks read: ``"first"``, all of them the one of an IoU estimate that does
            not exist, as published (its weights need that), or ``"own"``, each the token of its mask.
        dim: Channels of the decoder, a multiple of 16.
        depth: Layers of the two-way transformer.
        num_heads: Attention heads; must divide ``dim / 2``.
        mlp_dim: Hidden width of the tokens' MLPs.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, in_channels, h, w]``, any ``h`` and ``w``.
        returns: Logits, ``[B, num_classes, 4 h, 4 w]``, under autocast in its dtype.

    Raises:
        ValueError: No class, an unknown ``mask_token``, channels or heads that do not divide; in ``forward``, a map of
            other channels.

    Reference: HER-Seg, arXiv:2504.06205; code xq141839/HER-Seg, ``SAM/ecm_decoder.py``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int = 1,
        mask_token: str = "first",
        dim: int = 256,
        depth: int = 2,
        num_heads: int = 8,
        mlp_dim: int = 256,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"num_classes={num_classes} and in_channels={in_channels} must be at least 1")
        if mask_token not in MASK_TOKENS:
            raise ValueError(f"mask_token={mask_token!r} is not one of {', '.join(map(repr, MASK_TOKENS))}")
        if dim % 16 or (dim // 2) % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of 16, and num_heads={num_heads} divide its half")
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        self.in_channels, self.num_classes, self.mask_token = in_channels, num_classes, mask_token
        self.neck = MapSequential(
            nn.Conv2d(in_channels, dim, 1, bias=False, **dd),
            LayerNorm2d(dim, eps=1e-6, **dd),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False, **dd),
            LayerNorm2d(dim, eps=1e-6, **dd),
        )
        self.no_mask = nn.Parameter(torch.empty(1, dim, **dd))
        self.position = FourierPosition(dim, **dd)
        self.iou_token = nn.Parameter(torch.empty(1, dim, **dd))
        self.mask_tokens = nn.Parameter(torch.empty(max(PUBLISHED_MASKS, num_classes), dim, **dd))
        self.transformer = TwoWayTransformer(depth, dim, num_heads, mlp_dim, **dd)
        self.upscale1 = nn.ConvTranspose2d(dim, dim // 4, 2, stride=2, **dd)
        self.upscale_norm = LayerNorm2d(dim // 4, eps=1e-6, **dd)
        self.upscale2 = nn.ConvTranspose2d(dim // 4, dim // 8, 2, stride=2, **dd)
        self.hypernetworks = nn.ModuleList(_hypernetwork(dim, **dd) for _ in range(num_classes))
        for parameter in (self.no_mask, self.iou_token, self.mask_tokens):
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"MaskDecoder wants a map [B, {self.in_channels}, h, w], got shape {list(x.shape)}; "
                "create it with the in_channels of the backbone's level"
            )
        x = self.neck(x.contiguous(memory_format=torch.channels_last))
        height, width = x.shape[2], x.shape[3]
        image = x.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, dim], a view where channels are innermost
        image = image + self.no_mask.to(image.dtype)
        tokens = torch.cat((self.iou_token, self.mask_tokens))[None].expand(x.shape[0], -1, -1)
        tokens, image = self.transformer(tokens, image, self.position(height, width))
        y = image.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y = F.gelu(on_map(self.upscale_norm, self.upscale1(y)))
        y = F.gelu(self.upscale2(y))
        first = self.mask_token == "first"
        weights = [net(tokens[:, 0 if first else 1 + k]) for k, net in enumerate(self.hypernetworks)]
        masks = y.permute(0, 2, 3, 1).flatten(1, 2) @ torch.stack(weights, dim=-1)  # [B, 16 N, classes]
        return masks.transpose(1, 2).unflatten(2, (4 * height, 4 * width))
