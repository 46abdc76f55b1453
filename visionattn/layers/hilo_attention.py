"""HiLo attention: some heads look at small windows, the others at a pooled map."""

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from visionattn.layers.windows import multi_head_attention
from visionattn.ops import crop, join_windows, pad_to_multiple, split_windows


@register_notrace_module  # a leaf for torch.fx: the operators' argument checks are not traceable
class HiLoAttention(nn.Module):
    """Multi-head attention split by frequency.

    The high-frequency heads (Hi-Fi) attend within windows of ``window_size`` that do not overlap. The low-frequency
    heads (Lo-Fi) attend from every pixel to the means of these windows. Each kind has its own projections; the output
    holds the channels of Hi-Fi, then those of Lo-Fi.

    A map that ``window_size`` does not divide is padded with zeros at the bottom and right. As in the published
    detection model these pixels are ordinary ones: they carry the projection's bias, are attended to in their windows
    and count in the means; the output is cropped.

    Args:
        dim: Channels ``C``.
        num_heads: Attention heads; must divide ``dim``.
        window_size: Side of a window in pixels; with 1 all heads are Lo-Fi, which is attention to the whole map.
        alpha: Share of Lo-Fi heads, in ``[0, 1]``; ``num_heads * alpha`` is rounded down.
        qkv_bias: With biases in the input projections.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, H, W, C]``, any ``H`` and ``W``.
        returns: ``[B, H, W, C]``.

    Raises:
        ValueError: Heads that do not divide the channels, a window below 1, or ``alpha`` outside ``[0, 1]``.

    Reference: LITv2, arXiv:2205.13213, section 3.2; code ziplab/LITv2, ``hilo.py``, and for the padding
        ``detection/mmdet/models/backbones/litv2.py``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if dim % num_heads or window_size < 1:
            raise ValueError(f"num_heads={num_heads} must divide dim={dim}, and window_size={window_size} be positive")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha} must lie in [0, 1]; it is the share of heads that see the pooled map")
        self.window_size = window_size
        self.low_heads = num_heads if window_size == 1 else int(num_heads * alpha)
        self.high_heads = num_heads - self.low_heads
        low_dim, high_dim = (heads * (dim // num_heads) for heads in (self.low_heads, self.high_heads))
        self.high_qkv = self.high_proj = self.low_q = self.low_kv = self.low_proj = None
        if high_dim:
            self.high_qkv = nn.Linear(dim, 3 * high_dim, bias=qkv_bias, device=device, dtype=dtype)
            self.high_proj = nn.Linear(high_dim, high_dim, device=device, dtype=dtype)
        if low_dim:
            self.low_q = nn.Linear(dim, low_dim, bias=qkv_bias, device=device, dtype=dtype)
            self.low_kv = nn.Linear(dim, 2 * low_dim, bias=qkv_bias, device=device, dtype=dtype)
            self.low_proj = nn.Linear(low_dim, low_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        padded = pad_to_multiple(x, self.window_size)
        parts: list[Tensor] = []
        if self.high_qkv is not None and self.high_proj is not None:
            q, k, v = split_windows(self.high_qkv(padded), self.window_size).chunk(3, dim=-1)
            high = multi_head_attention(q, k, v, self.high_heads)
            high = join_windows(high, self.window_size, padded.shape[0], padded.shape[1], padded.shape[2])
            parts.append(self.high_proj(crop(high, x.shape[1], x.shape[2])))
        if self.low_q is not None and self.low_kv is not None and self.low_proj is not None:
            pooled = F.avg_pool2d(padded.permute(0, 3, 1, 2), self.window_size).permute(0, 2, 3, 1)
            k, v = self.low_kv(pooled.flatten(1, 2)).chunk(2, dim=-1)
            q = self.low_q(x)
            low = multi_head_attention(q.flatten(1, 2), k, v, self.low_heads)
            parts.append(self.low_proj(low.view(q.shape)))
        return torch.cat(parts, dim=-1)

    def extra_repr(self) -> str:
        return f"high_heads={self.high_heads}, low_heads={self.low_heads}, window_size={self.window_size}"
