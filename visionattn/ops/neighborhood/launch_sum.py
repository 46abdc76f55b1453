"""Launching the Triton kernels of the neighbourhood sum: how a map is cut into tiles, and what is prepared once."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops._dispatch import KERNEL_DTYPES
from visionattn.ops._launch import Launch, Plans, layout
from visionattn.ops._tiles import Search, Tile, searching
from visionattn.ops.neighborhood import kernels_sum, kernels_sum_grads

MAX_KERNEL, MAX_CHANNELS = 25, 128  # taps of a row are registers of a lane, and tiles have at least 8 columns
ROW = 32  # longest row of a map that one tile takes whole
FIXED_PIXELS = 1024  # maps up to this size have kernels of their own, with the distance of taps in the instructions
PROGRAMS = 1056  # of the sum over images: eight for each of 132 processors

_forward_plans, _backward_plans = Plans(), Plans()


def _extent(x: Tensor) -> int:
    """Offset of the last value of one image."""
    return sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:], strict=True))


def serves(logits: Tensor, value: Tensor, bias: Tensor | None, kernels: Sequence[int]) -> bool:
    """Whether there is a kernel for these tensors."""
    return (
        logits.dtype in KERNEL_DTYPES
        and value.dtype in KERNEL_DTYPES
        and (bias is None or bias.dtype in KERNEL_DTYPES)
        and value.shape[4] <= MAX_CHANNELS
        and len(kernels) > 0
        and max(kernels) <= MAX_KERNEL
        and value.numel() > 0
        and logits.numel() > 0
        and max(_extent(logits), _extent(value), math.prod(logits.shape[1:]), math.prod(value.shape[1:])) < 2**31
    )


def _shape_of_tile(H: int, W: int, kernel: int, pixels: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most ``pixels``: whole rows of small maps, else as wide as 32 keys allow."""
    if min(ROW, pixels) >= W:
        return min(H, pixels // W), W
    width = 16 if 16 + kernel - 1 <= ROW else 8
    return min(H, pixels // width), width


def _work(H: int, W: int, largest: int, kernel: int, pixels: int) -> int:
    """Lanes times rows of keys that all tiles of a map walk over."""
    height, width = _shape_of_tile(H, W, largest, pixels)
    starts = [min(max(y - kernel // 2, 0), H - kernel) for y in range(H)]
    rows = sum(starts[min(y + height, H) - 1] + kernel - starts[y] for y in range(0, H, height))
    return pixels * triton.cdiv(W, width) * rows


def _units(x: Tensor) -> tuple[tuple[int, ...], int]:
    """Strides of a map of heads, all but the last divided by a power of two, and that."""
    unit = next(n for n in (8, 4, 2, 1) if not any(s % n for s in x.stride()[:4]))
    return (*(s // unit for s in x.stride()[:4]), x.stride(4)), unit


def _in_pairs(logits: Tensor) -> bool:
    """Whether neighbouring pixels of a row may be loaded two at once: they are side by side and aligned."""
    steps = (*logits.stride()[:4], logits.shape[4])
    return logits.data_ptr() % 16 == 0 and logits.stride(4) == 1 and not any(n % 2 for n in steps)


class _Shape:
    """Sizes of a call, as the kernels want them."""

    def __init__(self, logits: Tensor, value: Tensor, bias: Tensor | None, kernels: Sequence[int], softmax: bool):
        self.B, self.H, self.W, self.heads, self.D = value.shape
        self.groups, self.kernels = logits.shape[2], tuple(kernels)
        self.entries = sum((2 * k - 1) ** 2 for k in kernels)
        self.largest = max(kernels)
        self.logits = logits.stride()
        self.value, v_unit = _units(value)
        self.fixed = self.H * self.W <= FIXED_PIXELS
        # a warp's registers hold a tile; exact products need more of them, and so do channels that are masked
        most = 64 if self.D % 16 == 0 and value.dtype != torch.float32 else 32
        self.block_d = min(most if self.W <= ROW else most // 2, max(16, triton.next_power_of_2(self.D)))
        self.parts = triton.cdiv(self.D, self.block_d)
        self.units = self.B * len(kernels) * self.groups
        self.device = value.device
        self.pairs = _in_pairs(logits)
        self.constants: dict[str, Any] = dict(
            KERNELS=self.kernels,
            D=self.D,
            BLOCK_D=self.block_d,
            L_ST=self.fixed_step(logits),
            V_UNIT=v_unit,
            BIAS=bias is not None,
            SOFTMAX=softmax,
            # float16 has no room for exponentials of unshifted scores
            EXACT=value.dtype == torch.float16,
            PRECISION="ieee" if value.dtype == torch.float32 else "tf32",
        )

    def fixed_step(self, logits: Tensor) -> int:
        """Distance of two taps if the kernel is to be compiled for it, else 0."""
        return logits.stride(1) if self.fixed else 0

    def tile(self, kernel: str) -> Tile:
        """Queries and warps of a program: those that cost the fewest instructions."""
        return min(self.tiles(kernel), key=lambda tile: (self.cost(tile), tile.rows))

    def tiles(self, kernel: str) -> list[Tile]:
        """Queries and warps that a kernel may have: a lane for each query or for two."""
        found = [Tile(rows, 0, rows // 32, 1) for rows in (32, 64, 128)]
        if kernel == "sum_forward" and self.block_d == 16:  # the others gain nothing, or lack the registers
            found.append(Tile(64, 0, 1, 1))
        return found

    def cost(self, tile: Tile) -> float:
        """Instructions of all programs of an image and group, for a row of keys as the compiler's output has them."""
        each = 1.0 if tile.rows == 32 * tile.warps else 0.85
        return each * sum((117 + 8 * k) * _work(self.H, self.W, self.largest, k, tile.rows) for k in self.kernels)

    def tuned(self, kernel: str, prepare: Callable[[Tile], Launch]) -> Callable[..., None]:
        """The launch with the tile of the rule, or a search among others."""
        tile = self.tile(kernel)
        if searching(self.device):
            found = [t._replace(registers=r) for t in (tile, *self.tiles(kernel)) for r in (None, 64, 80, 96, 128)]
            return Search(kernel, list(dict.fromkeys(found)), prepare)
        return prepare(tile)

    def prepare(self, kernel: Any, programs: int, integers: tuple[int, ...], tile: Tile, **constants: Any) -> Launch:
        values = {name: x for name, x in (self.constants | constants).items() if name in kernel.arg_names}
        values = {name: values[name] for name in kernel.arg_names if name in values}
        return Launch(kernel, (programs,), integers, values, tile.warps, tile.stages, tile.registers)

    def by_query(self, tile: Tile) -> tuple[int, dict[str, Any]]:
        """Tiles of a map and the constants of a kernel whose programs hold queries."""
        height, width = _shape_of_tile(self.H, self.W, self.largest, tile.rows)
        whole = width == self.W
        moves = [min(self.W - k, self.W - 1 if whole else width - 1) for k in self.kernels]
        spans = [self.W if whole else min(self.W, move + k) for move, k in zip(moves, self.kernels, strict=True)]
        constants = dict(
            TH=height,
            TW=width,
            BM=tile.rows,
            ROWS=whole,
            PAIRS=self.pairs and whole and tile.rows > 32 * tile.warps,
            KX=tuple(max(16, triton.next_power_of_2(span)) for span in spans),
            BITS=tuple(move.bit_length() for move in moves),
        )
        return triton.cdiv(self.H, height) * triton.cdiv(self.W, width), constants

    def by_key(self, whole: bool) -> tuple[int, dict[str, Any]]:
        """Stretches of a map's rows for programs that hold keys, and their constants."""
        keys = max(16, triton.next_power_of_2(self.W)) if whole else ROW
        moves = [self.W - k if whole else keys + k - 2 for k in self.kernels]
        constants = dict(KEYS=keys, KEY_BITS=tuple(move.bit_length() for move in moves))
        return self.H * triton.cdiv(self.W, keys), constants

    def sizes(self, *counts: int) -> tuple[int, ...]:
        return self.H, self.W, self.groups, self.entries, *counts


def _plan_forward(s: _Shape) -> Callable[..., None]:
    def prepare(tile: Tile) -> Launch:
        count, constants = s.by_query(tile)
        integers = (*s.logits, *s.value, *s.sizes(count))
        return s.prepare(kernels_sum.sum_forward_kernel, count * s.parts * s.units, integers, tile, **constants)

    return s.tuned("sum_forward", prepare)


def forward(
    logits: Tensor, value: Tensor, bias: Tensor | None, kernels: Sequence[int], softmax: bool
) -> tuple[Tensor, Tensor]:
    """``visionattn::neighborhood_sum`` on the device."""
    table = logits if bias is None else bias.contiguous()
    kind = None if bias is None else bias.dtype
    name = layout(logits), layout(value), kind, tuple(kernels), softmax, logits.data_ptr() % 16 == 0
    run = _forward_plans.get(name)
    if run is None:
        run = _forward_plans.keep(name, _plan_forward(_Shape(logits, value, bias, kernels, softmax)))
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    B, H, W = value.shape[:3]
    lse = torch.empty((B, len(kernels), logits.shape[2], H, W), dtype=torch.float32, device=value.device)
    run(logits, value, table, out, lse)
    return out, lse


def _plan_bias_grad(s: _Shape, grad: Tensor) -> Callable[[Tensor, Tensor], None]:
    """Sum of a gradient of logits over images, then over the pixels that an entry of the table serves."""
    numbers = grad.numel() // s.B
    blocks = triton.cdiv(numbers, 1024)
    images = triton.cdiv(s.B, min(s.B, max(1, PROGRAMS // blocks)))
    chunks = triton.cdiv(s.B, images)
    add = Launch(
        kernels_sum_grads.sum_images_kernel, (blocks, chunks), (grad.stride(0), s.B, images, numbers), dict(BLOCK=1024)
    )
    block = min(256, max(32, triton.next_power_of_2(s.H * s.W)))
    fold = Launch(
        kernels_sum_grads.sum_bias_grad_kernel,
        (s.entries, s.groups),
        (*grad.stride()[1:], s.H, s.W, chunks, numbers, s.entries),
        dict(KERNELS=s.kernels, BLOCK=block),
        num_warps=max(1, block // 128),
    )

    def run(grad: Tensor, table: Tensor) -> None:
        partial = torch.empty((chunks, numbers), dtype=torch.float32, device=grad.device)
        add(grad, partial)
        fold(partial, table)

    return run


def _plan_backward(s: _Shape, grads: tuple[Tensor, ...], lse_grad: bool) -> Callable[..., None]:
    """Gradients of logits and value; ``grads`` are those of output, logits and value."""
    (grad_out, g_unit), (dvalue, n_unit) = _units(grads[0]), _units(grads[2])

    def prepare(tile: Tile) -> Launch:
        count, constants = s.by_query(tile)
        stretches, more = s.by_key(constants["ROWS"])
        integers = (*s.logits, *s.value, *grad_out, *grads[1].stride(), *dvalue, *s.sizes(count, stretches))
        return s.prepare(
            kernels_sum_grads.sum_grads_kernel, (count + stretches * s.parts) * s.units, integers, tile,
            T_ST=s.fixed_step(grads[1]), G_UNIT=g_unit, N_UNIT=n_unit, LSE_GRAD=lse_grad, **constants, **more,
        )  # fmt: skip

    return s.tuned("sum_grads", prepare)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    logits: Tensor,
    value: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernels: Sequence[int],
    softmax: bool,
    bias_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``visionattn::neighborhood_sum_backward`` on the device; the bias' gradient is empty unless ``bias_grad``."""
    dlogits, dvalue = torch.empty_like(logits), torch.empty_like(value)
    table, bias_grad = logits if bias is None else bias.contiguous(), bias_grad and bias is not None
    dbias = torch.empty_like(table) if bias_grad else value.new_empty(0)
    # images one after the other, as the sum over them wants it; nearly always they are
    apart = dlogits.shape[0] == 1 or dlogits.stride(0) * dlogits.shape[0] == dlogits.numel()
    dl = dlogits if apart else torch.empty_like(logits, memory_format=torch.contiguous_format)
    lse_grad, kind = grad_lse is not None, None if bias is None else bias.dtype
    if not grad_out.is_contiguous() and (grad_out.stride(-1) == 0 or _extent(grad_out) >= 2**31):
        grad_out = grad_out.contiguous()  # expanded, as of a sum, or out of reach
    name = layout(logits), layout(value), layout(grad_out), kind, tuple(kernels), softmax, lse_grad
    plan = _backward_plans.get(name)
    if plan is None:
        s = _Shape(logits, value, bias, kernels, softmax)
        fold = None if bias is None else _plan_bias_grad(s, dl)
        plan = _backward_plans.keep(name, (_plan_backward(s, (grad_out, dl, dvalue), lse_grad), fold))
    run, fold = plan
    lse = lse.contiguous()
    dlse = lse if grad_lse is None else grad_lse.contiguous()
    run(logits, value, table, out.contiguous(), lse, grad_out, dlse, torch.empty_like(lse), dl, dvalue)
    if fold is not None and bias_grad:
        fold(dl, dbias)
    return dlogits if apart else dlogits.copy_(dl), dvalue, dbias
