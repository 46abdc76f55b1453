"""How the work of large and dilated depthwise convolutions is dealt out to the Triton kernels."""

from typing import Any

import triton
from torch import Tensor

from visionattn.ops._launch import Launch
from visionattn.ops.depthwise import kernels_large

WARPS = 4  # of a program
VALUES = 64  # of its tile in one row for each of them: two for a thread
WHOLE = 28  # rows of a map at most that one program takes alone
ROWS = (16, 14, 12, 10, 7, 5, 4)  # of a program's tile else
COLUMNS = (4, 3, 2)  # of a kernel in a thread of the weight gradient
LOADS = 84  # of such a thread at most in one tile: the compiler's time goes with their square
SUMS = 38  # of one channel in a thread of the weight gradient
PROGRAMS = 792  # of the weight gradient, all slices together: six for each of 132 processors
PARTIAL = 32 << 20  # bytes of their sums
SIZES = 64  # of maps that kernels are compiled for

_sizes: set[tuple[Any, ...]] = set()


def _compiled_for(*maps: Tensor) -> bool:
    """Whether the kernels may know row strides beforehand: for the first sizes of maps that come, since more than a few
    would cost more time to compile than they save. The numbers are the same.
    """
    size = tuple((x.shape[1:], x.stride()[1:]) for x in maps)
    if size not in _sizes and len(_sizes) < SIZES:
        _sizes.add(size)
    return size in _sizes


def _rows(height: int, side: int, dilation: int) -> int:
    """Rows of a tile: not many different numbers, since each is a kernel to compile, and the least work with them.

    That is one unit for a row of the result and half a one for a row of the map, which are ``side - 1`` more.
    """
    rows = triton.cdiv(height, dilation)
    if dilation == 1 and rows <= WHOLE:
        return rows
    return min(ROWS, key=lambda count: triton.cdiv(rows, count) * (3 * count + side - 1))


def _channels(C: int) -> int:
    """Channels of a tile: as many as can be with few beyond the last."""
    return min((64, 32, 16), key=lambda block: triton.cdiv(C, block) * block)


def order(weight: Tensor, flip: bool, first: int = 0) -> tuple[int, int]:
    """Where the first of the arranged values of a kernel lies and how far apart they are; ``flip`` goes backwards.

    They begin at ``first``.
    """
    C, taps = weight.shape[0], weight.shape[2] * weight.shape[3]
    return (first + (taps - 1) * C, -C) if flip else (first, C)


class _Sizes:
    """What both kernels are told about a map ``[B, H, W, C]`` and the division into tiles."""

    def __init__(self, x: Tensor, weight: Tensor, dilation: int, step: bool):
        B, H, W, C = x.shape
        side = weight.shape[2]
        rows, block_c = _rows(H, side, dilation), _channels(C)
        strips, self.slices = triton.cdiv(triton.cdiv(H, dilation), rows), triton.cdiv(C, block_c)
        self.strips, self.integers = strips * dilation, (B, H, W, C, strips, dilation)
        self.lanes = VALUES * WARPS // block_c
        self.programs = triton.cdiv(B * W, self.lanes) * self.strips
        self.constants = dict(
            KH=side,
            KW=weight.shape[3],
            STEP=x.stride(1) * dilation if step else 0,
            WHOLE=step and dilation == 1 and rows == H,
            FULL=H % (rows * dilation) == 0,
            EVEN=C % block_c == 0,
            ROWS=rows,
            BLOCK_C=block_c,
        )


def forward_plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    flip: bool,
    distance: int,
    dilation: int,
    first: int = 0,
    statistics: bool = False,
) -> Launch:
    """The launch of a convolution, see ``launch.forward_plan``; with ``statistics`` only sums are wanted."""
    _, H, _, C = x.shape
    sizes = _Sizes(x, weight, dilation, _compiled_for(x))
    other = x if residual is None else residual
    terms = 0 if bias is None else C, 0 if residual is None else H, int(statistics)
    integers = *x.stride()[:3], *other.stride()[:3], distance, *order(weight, flip, first), *sizes.integers, *terms
    constants = dict(sizes.constants, BLOCK_P=sizes.lanes)
    grid = (sizes.programs * sizes.slices,)
    return Launch(kernels_large.large_kernel, grid, integers, constants, num_warps=WARPS, num_stages=1)


def weight_grad_plan(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> tuple[Launch, int]:
    """The launch of a weight's gradient, see ``launch.weight_grad``, and how many sums it leaves of every value."""
    sizes = _Sizes(x, weight, dilation, _compiled_for(x, grad))
    kh, kw = weight.shape[2:]
    few = [n for n in COLUMNS if n <= kw and n * kh <= SUMS and n * sizes.constants["ROWS"] <= LOADS]
    columns = min(few, key=lambda n: triton.cdiv(kw, n) * n, default=1)
    blocks = triton.cdiv(kw, columns)
    block_d = 2 if blocks % 2 == 0 else 1
    block_p, blocks = sizes.lanes // block_d, blocks // block_d
    across = triton.cdiv(x.shape[0] * x.shape[2], block_p)
    room = PARTIAL // (4 * block_p * (kh * kw + 1) * x.shape[3])
    chunks = min(PROGRAMS // (sizes.slices * blocks), room) // sizes.strips
    share = triton.cdiv(across, max(1, chunks))
    programs = triton.cdiv(across, share) * sizes.strips
    integers = *x.stride()[:3], *grad.stride()[:3], *sizes.integers, across, share
    constants = dict(
        sizes.constants, G_STEP=grad.stride(1) * dilation if sizes.constants["STEP"] else 0, BIAS=bias is not None
    )
    constants["X_STEP"] = x.stride(2) * dilation if sizes.constants["STEP"] else 0
    constants.update(COLUMNS=columns, BLOCK_D=block_d, BLOCK_P=block_p)
    grid = (programs * sizes.slices * blocks,)
    launch = Launch(kernels_large.large_weight_grad_kernel, grid, integers, constants, num_warps=WARPS, num_stages=1)
    return launch, programs * block_p


def statistics_plan(x: Tensor, weight: Tensor, shift: Tensor, dilation: int, first: int) -> tuple[Launch, int]:
    """The launch that finds sums of a convolution's result plus a shift, and of the squares of that, without it.

    It takes the map, arranged weights, the shift, and the map twice more, which leaves the dtype of a result that is
    not stored: of the dtype of one it shares the kernel. The sums come last, float32 ``[programs, 2, C]``.

    Args:
        x: Map, ``[B, H, W, C]``, channels side by side.
        weight: ``[C, 1, kh, kw]``.
        shift: float32 ``[C]``.
        dilation: Distance of the kernel's values on the map.
        first: Where the arranged values of the kernel begin.

    Returns:
        The launch and the number of programs.
    """
    launch = forward_plan(x, weight, shift, None, False, x.shape[3], dilation, first, statistics=True)
    return launch, _Sizes(x, weight, dilation, False).programs
