"""Launching the Triton kernels of attention through a state: heads of a program, stretches of a map."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops._dispatch import KERNEL_DTYPES
from visionattn.ops._launch import Launch, Plans, channels_inside, layout
from visionattn.ops.state import kernels_state, kernels_state_grads

MAX_DIM, MAX_WIDE = 128, 64  # channels of a head; of one whose states a program holds in float32
COLUMNS = 32  # of a program, where heads are no wider
TILE = 2048  # values of a tensor that a program holds at once
PROGRAMS = 1056  # wanted, eight for each of 132 processors
STRETCH = 384  # pixels of a program that is linear, unless half of the programs would be missing
FINISH = 2048  # values that a program of the sum over stretches holds

_forward_plans, _backward_plans = Plans(), Plans()


def _extent(x: Tensor) -> int:
    """Offset of the last value of one image."""
    return sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))


def serves(query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None) -> bool:
    """Whether there are kernels for these tensors."""
    return (
        query.dtype in KERNEL_DTYPES
        and query.dtype == key.dtype == value.dtype
        and 2 <= query.shape[4] <= (MAX_DIM if query.dtype == torch.bfloat16 else MAX_WIDE)
        and (cos is None or query.shape[4] % 2 == 0)
        and query.numel() > 0
        and max(_extent(query), _extent(key), _extent(value), math.prod(query.shape[1:])) < 2**31
        # rows of all states are counted in 32 bits
        and query.shape[0] * query.shape[3] * query.shape[4] < 2**31
    )


def _heads_of_program(heads: int, width: int) -> int:
    """Heads side by side in a program: of those that leave the fewest columns empty, the most."""
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n * width <= COLUMNS] or [1]
    counts = [n for n in counts if n * width >= 16] or counts[-1:]  # a matrix product has at least 16
    return min(counts, key=lambda n: (triton.cdiv(heads, n) * n, -n))


class _Shape:
    """Sizes of a call, as the kernels want them."""

    def __init__(self, query: Tensor, rotated: bool, softmax: bool, backward: bool):
        self.B, H, self.W, self.heads, self.D = query.shape
        self.N, self.softmax = H * self.W, softmax
        self.padded = triton.next_power_of_2(self.D)
        self.columns = _heads_of_program(self.heads, self.padded) * self.padded
        # measured: without a softmax the forward pass gains by larger tiles, where heads are not narrow
        tile = TILE if softmax or backward or self.padded < 8 else 2 * TILE
        self.stages = 3 if backward and not softmax else 2
        rows = min(128, tile // self.columns, max(16, triton.next_power_of_2(self.N)))
        self.blocks = triton.cdiv(self.heads * self.padded, self.columns)
        splits = max(1, triton.cdiv(PROGRAMS, self.B * self.blocks))
        if not softmax:
            splits = max(triton.cdiv(splits, 2), min(splits, triton.cdiv(self.N, STRETCH)))
        splits = min(triton.cdiv(self.N, rows), splits)
        self.chunk = triton.cdiv(triton.cdiv(self.N, splits), rows) * rows
        self.splits = triton.cdiv(self.N, self.chunk)
        self.constants: dict[str, Any] = dict(
            D=self.D,
            DP=self.padded,
            BC=self.columns,
            BN=rows,
            SOFTMAX=softmax,
            ROTATED=rotated,
            HALF=query.dtype == torch.bfloat16,
            # float16 has no room for sums of gradients, so that its states stay float32
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )

    def prepare(self, kernel: Any, *tensors: Tensor) -> Launch:
        """A kernel that walks over pixels of ``tensors``, each ``[B, H, W, heads, d]``."""
        dense = self.padded == self.D and all(x.stride(3) == self.D or self.heads == 1 for x in tensors)
        constants = {name: (self.constants | {"DENSE": dense})[name] for name in kernel.arg_names[-9:]}
        strides = (s for x in tensors for s in x.stride()[:4])
        integers = (*strides, self.N, self.W, self.heads, self.splits, self.chunk, self.blocks)
        grid, wide = (self.B * self.splits * self.blocks,), self.columns > 64
        # states of wide heads take the shared memory that a pipeline of loads would
        return Launch(
            kernel, grid, integers, constants, num_warps=8 if wide else 4, num_stages=1 if wide else self.stages
        )

    def finish(self, mode: int) -> Launch:
        """The sum over stretches."""
        splits = min(16, triton.next_power_of_2(self.splits))
        total = self.B * self.heads * self.D
        rows = max(1, FINISH // (splits * self.padded))
        constants = dict(D=self.D, DP=self.padded, ROWS=rows, SPLITS=splits, MODE=mode)
        integers = self.heads * self.D, self.splits, total
        return Launch(kernels_state.finish_kernel, (triton.cdiv(total, rows),), integers, constants)

    def partials(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for the sums of stretches."""
        shape = self.B, self.splits, self.heads, self.D
        state = torch.empty((*shape, self.D), dtype=torch.float32, device=query.device)
        return state, state if self.softmax else torch.empty(shape, dtype=torch.float32, device=query.device)

    def states(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for a state and a mean."""
        state = torch.empty((self.B, self.heads, self.D, self.D), dtype=torch.float32, device=query.device)
        return state, state.new_empty(0 if self.softmax else state.shape[:3])

    def factor(self, scale: float) -> float:
        """By which sums over pixels are multiplied."""
        return scale if self.softmax else 1 / self.N


def _tables(query: Tensor, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor]:
    if cos is None or sin is None:
        return query, query
    return cos.float().contiguous(), sin.float().contiguous()


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``visionattn::state_attention`` on the device."""
    query, key, value = (channels_inside(x) for x in (query, key, value))
    name = layout(query), layout(key), layout(value), cos is None, softmax
    plan = _forward_plans.get(name)
    if plan is None:
        s = _Shape(query, cos is not None, softmax, False)
        collect, spread = (
            s.prepare(kernels_state.state_kernel, key, value),
            s.prepare(kernels_state.output_kernel, query),
        )
        plan = _forward_plans.keep(name, (s, collect, s.finish(int(softmax)), spread))
    s, collect, finish, spread = plan
    cosines, sines = _tables(query, cos, sin)
    (partial, sums), (state, norm) = s.partials(query), s.states(query)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    mean = state if softmax else norm
    collect(key, value, cosines, sines, partial, sums)
    finish(partial, sums, state, state, mean, s.factor(scale))
    spread(query, cosines, sines, state, mean, out, eps)
    return out, state, norm


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    state: Tensor,
    norm: Tensor,
    scale: float,
    eps: float,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``visionattn::state_attention_backward`` on the device."""
    query, key, value, grad_out = (channels_inside(x) for x in (query, key, value, grad_out))
    if _extent(grad_out) >= 2**31:
        grad_out = grad_out.contiguous()
    name = layout(query), layout(key), layout(value), layout(grad_out), cos is None, softmax
    plan = _backward_plans.get(name)
    if plan is None:
        s = _Shape(query, cos is not None, softmax, True)
        first = s.prepare(kernels_state_grads.query_grad_kernel, query, grad_out)
        second = s.prepare(kernels_state_grads.key_grad_kernel, key, value)
        plan = _backward_plans.keep(name, (s, first, s.finish(2 if softmax else 0), second))
    s, first, finish, second = plan
    cosines, sines = _tables(query, cos, sin)
    (partial, sums), (dstate, dnorm) = s.partials(query), s.states(query)
    dquery, dkey, dvalue = (torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(3))
    state = state.contiguous()
    mean, dmean = (state, dstate) if softmax else (norm.contiguous(), dnorm)
    first(query, grad_out, cosines, sines, state, mean, dquery, partial, sums, eps)
    finish(partial, sums, state, dstate, dmean, s.factor(scale))
    second(key, value, cosines, sines, dstate, dmean, dkey, dvalue)
    return dquery, dkey, dvalue
