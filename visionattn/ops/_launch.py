"""Launching Triton kernels with little host time."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from visionattn.ops import kernels_sums


class Launch:
    """One kernel with everything that does not change between calls of the same shapes, strides and dtypes.

    Triton's launcher looks at every argument of every call to find the binary that serves it, which takes longer than
    many of the kernels run. Here the first call does that; later ones go straight to the binary, if the tensors are
    aligned like those of the first call.

    Args:
        kernel: A ``triton.jit`` function whose parameters are tensors and floats first, then integers, then constants.
        grid: Programs along up to three axes.
        integers: The integer arguments.
        constants: Values of the ``tl.constexpr`` parameters.
        num_warps: Warps of a program.
        num_stages: Stages of the pipeline of loads.
        registers: Most registers of a thread; more programs fit on a processor with fewer.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        integers: tuple[int, ...] = (),
        constants: dict[str, Any] | None = None,
        num_warps: int = 4,
        num_stages: int = 2,
        registers: int | None = None,
    ):
        constants = constants or {}
        self._kernel, self._integers = kernel, integers
        self._grid = (*grid, 1, 1)[:3]
        self._options = dict(constants, num_warps=num_warps, num_stages=num_stages)
        if registers is not None:
            self._options["maxnreg"] = registers
        names = kernel.arg_names[-len(constants) :] if constants else []
        self._tail = (*integers, *(constants[name] for name in names))
        self._ready: tuple[Any, ...] = ()  # alignment, function that launches the binary, its first arguments

    def __call__(self, *args: Any) -> None:
        """Launch on the current stream of the first tensor's device, with tensors and floats in the kernel's order."""
        device = args[0].get_device()  # -1 in the interpreter
        if device >= 0 and device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._launch(device, args)
        else:
            self._launch(device, args)

    def _launch(self, device: int, args: tuple[Any, ...]) -> None:
        bits = 0
        values: list[Any] = []  # addresses as numbers spare the launcher a look at each tensor
        for x in args:
            if isinstance(x, Tensor):
                address = x.data_ptr()
                bits |= address
                values.append(address)
            else:
                values.append(float(x))  # of an integer Triton would make a constant
        alignment = sum(1 << i for i, x in enumerate(values) if type(x) is int and x & 15) if bits & 15 else 0
        ready = self._ready  # read once: another thread may replace it
        if ready and ready[0] == alignment and not _watched():
            stream = torch._C._cuda_getCurrentRawStream(device)
            ready[1](*self._grid, stream, *ready[2], *values, *self._tail)
            return
        args = tuple(x if isinstance(x, Tensor) else float(x) for x in args)
        compiled = self._kernel[self._grid](*args, *self._integers, **self._options)
        if isinstance(compiled, triton.compiler.CompiledKernel):  # the interpreter returns nothing
            # what Triton's own launch passes on, without the hooks of its profiler
            head = compiled.function, compiled.packed_metadata, None, None, None
            self._ready = alignment, compiled.run, head


_RUNTIME = triton.knobs.runtime


def _watched() -> bool:
    """Whether Triton's profiler wants to see launches."""
    hook = _RUNTIME.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Plans(dict[Any, Any]):
    """Prepared launches by call signature, at most ``limit``: a map of ever new sizes must not fill the memory."""

    def __init__(self, limit: int = 512):
        super().__init__()
        self._limit = limit

    def keep(self, key: Any, plan: Any) -> Any:
        """Remember ``plan``, forgetting the oldest if there are too many, and return it."""
        if len(self) >= self._limit:
            self.pop(next(iter(self)), None)
        self[key] = plan
        return plan


def layout(x: Tensor) -> tuple[Any, ...]:
    """What of a tensor a prepared launch depends on, alignment aside."""
    return x.shape, x.stride(), x.dtype, x.device


def channels_inside(x: Tensor) -> Tensor:
    """``x`` itself where the values of its last axis lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_apart(x: Tensor) -> tuple[Tensor, int]:
    """``x`` itself, or as ``[N, C]``: a view where its rows are equally far apart, else a copy; and how far that is."""
    if x.is_contiguous():
        return x, x.shape[-1]
    x = x.reshape(-1, x.shape[-1])
    return (x, x.stride(0)) if x.stride(1) == 1 else (x.contiguous(), x.shape[1])


def slice_width(C: int) -> int:
    """Columns of a program of those that share ``C`` columns; slices that come out even need no mask."""
    width = math.gcd(C, 128)
    return width if width >= 32 else min(128, triton.next_power_of_2(C))


_sums, _folds = Plans(), Plans()


def fold_plan(programs: int, width: int) -> Launch:
    """The launch that adds up ``[programs, width]``, always in the same order."""
    constants = dict(BLOCK_N=128, BLOCK_C=32)
    return Launch(kernels_sums.sum_kernel, (1, triton.cdiv(width, 32)), (programs, width, 0, 1), constants)


def fold_programs(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums ``[width]`` in ``dtype`` of what the programs of a kernel found, float32 ``[programs, width]``.

    The order of summation is always the same.
    """
    key = partial.shape, dtype, partial.device
    launch = _folds.get(key) or _folds.keep(key, fold_plan(*partial.shape))
    out = torch.empty(partial.shape[1], dtype=dtype, device=partial.device)
    launch(partial, out, out)
    return out


def sum_programs(partial: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight and a bias from the sums that the programs of a kernel found.

    Args:
        partial: float32 ``[programs, taps + 1, C]``; the last row is that of the bias.
        weight: The weight, ``[C, ...]`` with ``taps`` values a channel.
        bias: The bias ``[C]``, if its gradient is wanted.

    Returns:
        Both gradients, in shape and dtype of their parameters. The order of summation is always the same.
    """
    programs, rows, C = partial.shape
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = None if bias is None else torch.empty_like(bias)
    key = partial.shape, weight.dtype, None if bias is None else bias.dtype, partial.device
    launch = _sums.get(key)
    if launch is None:
        integers, constants = (programs, C, rows - 1, int(bias is not None)), dict(BLOCK_N=128, BLOCK_C=32)
        grid = rows - (bias is None), triton.cdiv(C, 32)  # without a bias nobody may have written its row
        launch = _sums.keep(key, Launch(kernels_sums.sum_kernel, grid, integers, constants))
    launch(partial, dweight, dweight if dbias is None else dbias)
    return dweight, dbias
