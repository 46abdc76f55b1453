"""Dual-gated linear attention: a normalised linear attention with a bottleneck before the values, and its block.

Paper: HER-Seg, arXiv:2504.06205. Code: https://github.com/xq141839/HER-Seg, ``SAM/LGViT.py``.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, register_notrace_module
from torch import Tensor, nn

from visionattn.layers.channels_last import add_normalize, convolve, normalize, project, transform
from visionattn.ops import state_attention


def _angles(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """The angles of ``rotary_table``, ``[H, W, C / 2]``, in float64: one of 100 is off by 4e-6 in float32."""
    count = channels // 4
    rates = torch.pow(10000.0, -torch.arange(count, device=device, dtype=torch.float64) / count)
    rows = torch.arange(height, device=device, dtype=torch.float64)[:, None, None] * rates
    columns = torch.arange(width, device=device, dtype=torch.float64)[None, :, None] * rates
    return torch.cat((rows.expand(-1, width, -1), columns.expand(height, -1, -1)), dim=-1)


def _table(height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = _angles(height, width, channels, device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=32)
def _kept_table(
    height: int, width: int, channels: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # training may use the table that an evaluation made
        return _table(height, width, channels, device, dtype)


def rotary_table(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotary angles of every pixel of a map.

    With ``K = C / 4`` rates ``10000 ** (-t / K)`` the angles of the pixel in row ``y`` and column ``x`` are
    ``[y * rates, x * rates]``, one per pair of consecutive channels. Tables are kept per size, device and dtype, but
    not where a compiler or a tracer follows: there they are computed as part of the graph.

    Args:
        x: Map, ``[B, H, W, C]``, ``C`` a multiple of 4.

    Returns:
        Two tables ``[H, W, C / 2]`` in float32, of a float64 map in float64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    followed = (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )
    return (_table if followed else _kept_table)(x.shape[1], x.shape[2], x.shape[3], x.device, dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x.flatten(3).unflatten(3, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).reshape(x.shape)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the operator does, for TorchScript, which knows neither keyword-only arguments nor kept tables."""
    dtype = q.dtype
    if dtype != torch.float64:  # sums over a map are in float32 at least
        q, k, v = q.float(), k.float(), v.float()
    cos, sin = _table(q.shape[1], q.shape[2], q.shape[3] * q.shape[4], q.device, q.dtype)
    q, k = F.elu(q) + 1.0, F.elu(k) + 1.0
    divisor = (q * k.mean(dim=[1, 2], keepdim=True)).sum(dim=-1, keepdim=True) + 1e-6
    state = torch.einsum("bhwnc,bhwnd->bncd", _rotated(k, cos, sin), v) / float(k.shape[1] * k.shape[2])
    return (torch.einsum("bhwnc,bncd->bhwnd", _rotated(q, cos, sin), state) / divisor).to(dtype)


@register_notrace_module  # a leaf for torch.fx: the operators' argument checks are not traceable
class DualGatedAttention(nn.Module):
    """Linear attention with a value bottleneck, a rotary position and a local position term.

    With ``q, k = elu(W u) + 1`` and ``v = W2 silu(W1 u)``, ``q~`` and ``k~`` turned by the angles of their pixels
    over all channels, and ``n`` pixels, a head gives at pixel ``i``

        ``q~_i . (1/n sum_j k~_j v_j^T) / (q_i . (1/n sum_j k_j) + 1e-6)``

    and a 3 x 3 depthwise convolution of ``v`` is added to the merged heads. The denominator is taken before the
    rotation, which keeps it positive. There is no output projection.

    Args:
        dim: Channels ``C``, a multiple of 4.
        num_heads: Attention heads; must divide ``dim``.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, H, W, C]``, any ``H`` and ``W``.
        rotation: Cosine and sine tables ``[H, W, C / 2]`` in the place of those of ``rotary_table``.
        returns: ``[B, H, W, C]``.

    Raises:
        ValueError: Channels that 4 or the heads do not divide.

    Reference: HER-Seg, arXiv:2504.06205; code xq141839/HER-Seg, ``SAM/LGViT.py``.
    """

    def __init__(self, dim: int, num_heads: int, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        if dim % 4 or num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"dim={dim} must be a multiple of 4, for the rotary position, and of num_heads={num_heads}; "
                "choose another width or number of heads"
            )
        self.num_heads = num_heads
        self.qk = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.v_reduce = nn.Linear(dim, dim // 4, device=device, dtype=dtype)
        self.v_expand = nn.Linear(dim // 4, dim, device=device, dtype=dtype)
        self.lepe = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self._forward_modules(x) if torch.jit.is_scripting() else self._forward(x, rotation)

    @torch.jit.unused
    def _forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        heads = (self.num_heads, x.shape[3] // self.num_heads)
        q, k = project(self.qk, x).chunk(2, dim=-1)
        v = project(self.v_expand, F.silu(project(self.v_reduce, x)))
        rotation = rotary_table(x) if rotation is None else rotation
        out = state_attention(
            q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads), mode="linear", rotation=rotation
        )
        return convolve(self.lepe, v, residual=out.flatten(3))

    def _forward_modules(self, x: Tensor) -> Tensor:
        """The same with every module called, for TorchScript."""
        heads = (self.num_heads, x.shape[3] // self.num_heads)
        q, k = self.qk(x).chunk(2, dim=-1)
        v = self.v_expand(F.silu(self.v_reduce(x)))
        out = _plain_attention(q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads))
        return out.flatten(3) + self.lepe(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@register_notrace_module
class DualGatedBlock(nn.Module):
    """``x + W (attention(u) * silu(W' u))`` with ``u = norm(x)``, then an MLP with a residual.

    Args:
        dim: Channels ``C``, a multiple of 4.
        num_heads: Attention heads; must divide ``dim``.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        drop_path: Rate of stochastic depth of both branches.
        channels_first: Take and give ``[B, C, H, W]``, as the stages of the models do.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        x: ``[B, H, W, C]``, any ``H`` and ``W``.
        rotation: As for ``DualGatedAttention``.
        returns: ``[B, H, W, C]``.

    Raises:
        ValueError: Channels that 4 or the heads do not divide.

    Reference: HER-Seg, arXiv:2504.06205; code xq141839/HER-Seg, ``SAM/LGViT.py``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        channels_first: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.channels_first = channels_first
        self.norm1 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.gate = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.attn = DualGatedAttention(dim, num_heads, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), device=device, dtype=dtype)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if self.channels_first:
            x = x.permute(0, 2, 3, 1)
        x = self._forward_modules(x) if torch.jit.is_scripting() else self._forward(x, rotation)
        return x.permute(0, 3, 1, 2) if self.channels_first else x

    @torch.jit.unused
    def _forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        normed = normalize(self.norm1, x)
        gated = self.attn(normed, rotation) * F.silu(project(self.gate, normed))
        x, normed = add_normalize(self.norm2, x, self.drop_path(project(self.proj, gated)))
        return x + self.drop_path(transform(self.mlp, normed))

    def _forward_modules(self, x: Tensor) -> Tensor:
        """The same with every module called, for TorchScript."""
        normed = self.norm1(x)
        x = x + self.drop_path(self.proj(self.attn(normed) * F.silu(self.gate(normed))))
        return x + self.drop_path(self.mlp(self.norm2(x)))
