"""The zoo's own attention as a block on the deepest map of a decoder."""

from typing import Any

from timm.layers import Mlp
from torch import Tensor, nn

from visionattn.layers import NeighborhoodAttention, RoutingAttention

ATTENTIONS = ("routed", "neighborhood")
HEAD_DIM = 32


class BottleneckAttention(nn.Module):
    """A transformer block: ``x += attention(norm(x)); x += mlp(norm(x))``.

    Args:
        dim: Channels.
        attention: ``"routed"`` (``RoutingAttention``) or ``"neighborhood"`` (``NeighborhoodAttention``).
        num_heads: Attention heads; by default of 32 channels each, or one where 32 does not divide them.
        kwargs: Further arguments of the attention layer.

    Shape:
        x: ``[B, dim, H, W]``; returns the same.

    Raises:
        ValueError: Another ``attention``.
    """

    def __init__(self, dim: int, attention: str, num_heads: int | None = None, **kwargs: Any):
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} must be one of {', '.join(ATTENTIONS)}, or None for no block")
        heads = num_heads or (dim // HEAD_DIM if dim % HEAD_DIM == 0 else 1)
        layer = RoutingAttention if attention == "routed" else NeighborhoodAttention
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = layer(dim, heads, **kwargs)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)
