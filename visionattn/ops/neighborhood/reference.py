"""The definition of the neighbourhood operators in plain PyTorch: gather every window, then a dense softmax.

Sums run in ``promote_types(dtype, float32)``. Memory grows with the size of the windows; ``eager.py`` computes the same
without that.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def windows(
    length: int, kernel: int, dilation: int, device: torch.device | None = None, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Window of every position of one axis.

    Position ``i`` is member ``i // dilation`` of group ``i % dilation``. Of that group, ``stride`` neighbours share a
    window: ``kernel`` members around the one in their middle (the last member, where they are too few to have it),
    moved inward at the borders. All of them lie in it.

    Returns:
        Positions of the members ``[length, kernel]``, and their offsets to the member itself plus ``kernel - 1``, in
        ``[0, 2 * kernel - 2]``: the index into a table of relative positions.
    """
    i = torch.arange(length, device=device)
    if dilation == stride == 1:  # the same in a third of the operators, which exported graphs consist of
        members = (i - kernel // 2).clamp(min=0, max=length - kernel)[:, None] + torch.arange(kernel, device=device)
        return members, members - i[:, None] + kernel - 1
    group, member = i % dilation, i // dilation
    size = (length - group + dilation - 1) // dilation
    leader = torch.minimum(member // stride * stride + stride // 2, size - 1)
    start = torch.minimum((leader - kernel // 2).clamp(min=0), size - kernel)
    members = start[:, None] + torch.arange(kernel, device=device)
    return members * dilation + group[:, None], members - member[:, None] + kernel - 1


def _gather(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``[B, H, W, heads, d]`` to the windows ``[B, H, W, heads, taps, d]``, taps row by row."""
    y, x_ = rows[:, None, :, None], columns[None, :, None, :]
    return x[:, y, x_].flatten(3, 4).transpose(3, 4)


def _bias(bias: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Table ``[heads, 2kh - 1, 2kw - 1]`` to ``[H, W, heads, taps]``."""
    entries = bias[:, rows[:, None, :, None], columns[None, :, None, :]]
    return entries.flatten(3, 4).permute(1, 2, 0, 3)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    scale: float,
    stride: Sequence[int] = (1, 1),
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, W, heads, head_dim]`` and log-sum-exp ``[B, heads, H, W]``."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    (rows, rel_rows), (columns, rel_columns) = (
        windows(query.shape[i + 1], kernel_size[i], dilation[i], query.device, stride[i]) for i in range(2)
    )
    q, k, v = query.to(dtype), _gather(key.to(dtype), rows, columns), _gather(value.to(dtype), rows, columns)
    scores = (k @ (scale * q)[..., None]).squeeze(-1)  # [B, H, W, heads, taps]
    if bias is not None:
        scores = scores + _bias(bias.to(dtype), rel_rows, rel_columns)
    out = (scores.softmax(dim=-1)[..., None, :] @ v).squeeze(-2)
    return out.to(query.dtype).contiguous(), scores.logsumexp(dim=-1).permute(0, 3, 1, 2).contiguous()


def neighborhood_sum(
    logits: Tensor, value: Tensor, bias: Tensor | None, kernel_sizes: Sequence[int], softmax: bool
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, W, kernels * groups, d]`` and log-sum-exp ``[B, kernels, groups, H, W]`` (0 without softmax)."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    groups, outs, sums = logits.shape[2], [], []
    taps = logits.to(dtype).split([k * k for k in kernel_sizes], dim=1)
    tables = None if bias is None else bias.to(dtype).split([(2 * k - 1) ** 2 for k in kernel_sizes], dim=1)
    for n, k in enumerate(kernel_sizes):
        (rows, rel_rows), (columns, rel_columns) = (windows(value.shape[i + 1], k, 1, value.device) for i in range(2))
        weights = taps[n].permute(0, 3, 4, 2, 1)  # [B, H, W, groups, taps]
        if tables is not None:
            weights = weights + _bias(tables[n].unflatten(1, (2 * k - 1, 2 * k - 1)), rel_rows, rel_columns)
        sums.append(weights.logsumexp(dim=-1) if softmax else weights.new_zeros(weights.shape[:-1]))
        v = _gather(value[:, :, :, n * groups : (n + 1) * groups].to(dtype), rows, columns)
        outs.append(((weights.softmax(dim=-1) if softmax else weights)[..., None, :] @ v).squeeze(-2))
    lse = torch.stack(sums, 1).permute(0, 1, 4, 2, 3)  # [B, kernels, groups, H, W]
    return torch.cat(outs, 3).to(value.dtype).contiguous(), lse.contiguous()
