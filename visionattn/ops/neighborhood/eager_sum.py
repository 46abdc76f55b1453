"""``visionattn::neighborhood_sum``, the neighbourhood operator with given weights, for every device.

A tile's weights are scattered into a matrix of its queries and keys, and the sum is a matrix product.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visionattn.ops._dispatch import launcher, register_autocast, use_triton
from visionattn.ops.neighborhood.arguments import check_sum
from visionattn.ops.neighborhood.eager import _add, _plan, _put, _Step, _steps, _take
from visionattn.ops.neighborhood.tiles import slots


def _parts(logits: Tensor, value: Tensor, kernel_sizes: Sequence[int]) -> Iterator[tuple[int, slice, slice, slice]]:
    """For each kernel its side, and its taps, channels' heads and entries of the bias."""
    groups, tap, head, entry = logits.shape[2], 0, 0, 0
    for k in kernel_sizes:
        yield k, slice(tap, tap + k * k), slice(head, head + groups), slice(entry, entry + (2 * k - 1) ** 2)
        tap, head, entry = tap + k * k, head + groups, entry + (2 * k - 1) ** 2


def _walk(logits: Tensor, value: Tensor, k: int) -> Iterator[tuple[_Step, Tensor, Tensor, Tensor]]:
    """Steps, with the slots of their taps."""
    B, H, W, _, d = value.shape
    itemsize = torch.promote_types(value.dtype, torch.float32).itemsize
    limit = B * H * W * (2 * d + k * k) * value.element_size() / itemsize
    classes, units = _plan((H, W), (k, k), (1, 1), (4, 2, 1), limit, d)
    before = None
    for step in _steps(classes, B, units):
        if step.kind is not before:
            before, found = step.kind, slots(step.kind, (k, k), value.device)
        yield step, *found


def _weights(taps: Tensor, bias: Tensor | None, step: _Step, relative: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of a step ``[b, n, groups, queries, taps]`` from the map ``[B, H, W, groups, taps]``."""
    weights = _take(taps, step, "query", dtype)
    return weights if bias is None else weights + bias.to(dtype)[:, relative]


def _dense(p: Tensor, slot: Tensor, step: _Step) -> Tensor:
    """Weights of taps to weights of keys, ``[b, n, groups, queries, keys]``."""
    dense = p.new_zeros((*p.shape[:-1], step.kind.rows.keys * step.kind.columns.keys))
    return dense.scatter_(-1, slot.expand(p.shape), p)


@torch.library.custom_op("visionattn::neighborhood_sum", mutates_args=())
def neighborhood_sum(
    logits: Tensor, value: Tensor, bias: Tensor | None, kernel_sizes: Sequence[int], softmax: bool
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, W, kernels * groups, d]`` and log-sum-exp ``[B, kernels, groups, H, W]`` (0 without softmax)."""
    check_sum(logits, value, kernel_sizes, table=bias)
    if use_triton(value) and launcher("neighborhood", "launch_sum").serves(logits, value, bias, kernel_sizes):
        return launcher("neighborhood", "launch_sum").forward(logits, value, bias, kernel_sizes, softmax)
    B, H, W = value.shape[:3]
    dtype = torch.promote_types(value.dtype, torch.float32)
    out = value.new_empty(value.shape)
    lse = value.new_zeros((B, len(kernel_sizes), logits.shape[2], H, W), dtype=dtype)
    for n, (k, tap, head, entry) in enumerate(_parts(logits, value, kernel_sizes)):
        taps = logits[:, tap].permute(0, 3, 4, 2, 1)
        table = None if bias is None else bias[:, entry]
        sums = lse[:, n].permute(0, 2, 3, 1).unsqueeze(-1)
        for step, slot, relative, _ in _walk(logits, value, k):
            p = _weights(taps, table, step, relative, dtype)
            if softmax:
                total = p.logsumexp(dim=-1, keepdim=True)
                p = (p - total).exp_()
                _put(sums, step, total)
            _put(out[:, :, :, head], step, _dense(p, slot, step) @ _take(value[:, :, :, head], step, "key", dtype))
    return out, lse


@neighborhood_sum.register_fake
def _(
    logits: Tensor, value: Tensor, bias: Tensor | None, kernel_sizes: Sequence[int], softmax: bool
) -> tuple[Tensor, Tensor]:
    B, H, W = value.shape[:3]
    dtype = torch.promote_types(value.dtype, torch.float32)
    return value.new_empty(value.shape), value.new_empty((B, len(kernel_sizes), logits.shape[2], H, W), dtype=dtype)


@torch.library.custom_op("visionattn::neighborhood_sum_backward", mutates_args=())
def neighborhood_sum_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_sizes: Sequence[int],
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of logits, value and bias (empty without one)."""
    if use_triton(value) and launcher("neighborhood", "launch_sum").serves(logits, value, bias, kernel_sizes):
        return launcher("neighborhood", "launch_sum").backward(
            grad_out, grad_lse, logits, value, bias, out, lse, kernel_sizes, softmax
        )
    dtype = lse.dtype
    dlogits = torch.empty_like(logits)
    dv = torch.zeros_like(value, dtype=dtype)
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=dtype, device=bias.device)
    for n, (k, tap, head, entry) in enumerate(_parts(logits, value, kernel_sizes)):
        taps, dtaps = (x[:, tap].permute(0, 3, 4, 2, 1) for x in (logits, dlogits))
        sums, dsums = (x[:, n].permute(0, 2, 3, 1).unsqueeze(-1) for x in (lse, grad_lse))
        table = None if bias is None else bias[:, entry]
        for step, slot, relative, stale in _walk(logits, value, k):
            p = _weights(taps, table, step, relative, dtype)
            if softmax:
                p = p.sub_(_take(sums, step, "query", dtype)).exp_()
            # queries that an earlier tile has count there
            go = _take(grad_out[:, :, :, head], step, "query", dtype).masked_fill(stale[:, None], 0.0)
            dense = go @ _take(value[:, :, :, head], step, "key", dtype).transpose(3, 4)
            ds = dense.gather(-1, slot.expand(p.shape))
            del dense
            if softmax:
                glse = _take(dsums, step, "query", dtype).masked_fill(stale[:, None], 0.0)
                ds = ds.sub_((ds * p).sum(dim=-1, keepdim=True) - glse).mul_(p)
            _add(dv[:, :, :, head], step, _dense(p, slot, step).transpose(3, 4) @ go)
            _put(dtaps, step, ds)
            if dbias is not None:
                dbias[:, entry].index_add_(1, relative.flatten(), ds.sum(dim=(0, 1)).flatten(1))
    db = value.new_empty(0) if dbias is None or bias is None else dbias.to(bias.dtype)
    return dlogits, dv.to(value.dtype), db


@neighborhood_sum_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel_sizes: Sequence[int],
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    db = value.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return torch.empty_like(logits), torch.empty_like(value), db


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, value, bias, ctx.kernel_sizes, ctx.softmax = inputs
    ctx.save_for_backward(logits, value, bias, *output)


def _vjp(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a checkpointed block recomputes them and then lets go
    bias = saved[2]
    *grads, db = neighborhood_sum_backward(grad_out, grad_lse, *saved, ctx.kernel_sizes, ctx.softmax)
    return *grads, None if bias is None else db, None, None


neighborhood_sum.register_autograd(_vjp, setup_context=_setup)
register_autocast(neighborhood_sum, tensors=2)


@register_flop_formula(torch.ops.visionattn.neighborhood_sum)
def _flops(logits: Any, value: Any, bias: Any, kernel_sizes: Any, softmax: Any, out_shape: Any = None) -> int:
    """A multiply-add for every tap and channel."""
    return 2 * math.prod(value) // len(kernel_sizes) * sum(k * k for k in kernel_sizes)


@register_flop_formula(torch.ops.visionattn.neighborhood_sum_backward)
def _backward_flops(
    grad_out: Any, grad_lse: Any, logits: Any, value: Any, bias: Any, out: Any, lse: Any,
    kernel_sizes: Any, softmax: Any, out_shape: Any = None,
) -> int:  # fmt: skip
    """The gradients of weights and values."""
    return 2 * _flops(logits, value, bias, kernel_sizes, softmax)
