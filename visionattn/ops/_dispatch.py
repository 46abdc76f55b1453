"""Which implementation of an operator runs.

``auto`` takes the Triton kernels for tensors on a GPU and PyTorch's own operators elsewhere, ``triton`` the kernels
wherever the tensors are (on a CPU that needs Triton's interpreter, TRITON_INTERPRET=1), ``eager`` never them.
``reference`` takes the plain gather form of ``reference.py``, which is slow and memory hungry but short enough to be
read as the definition.
The choice comes from the environment variable ``VISIONATTN_BACKEND`` and can be changed for a block of code.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "eager", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the Triton kernels serve


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}={name!r} is not a backend of this version; use one of {', '.join(BACKENDS)}")
    return name


_backend = _checked(os.environ.get("VISIONATTN_BACKEND", "auto"), "VISIONATTN_BACKEND")


def backend() -> str:
    """Name of the backend in force, one of ``BACKENDS``."""
    return _backend


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use another backend inside a ``with`` block (process-wide: not meant for several threads at once).

    Raises:
        ValueError: ``name`` is not one of ``BACKENDS``.
    """
    global _backend
    previous, _backend = _backend, _checked(name, "backend")
    try:
        yield
    finally:
        _backend = previous


def use_reference() -> bool:
    """Whether the plain form must run: on request, or because ONNX knows only PyTorch's own operators."""
    return _backend == "reference" or torch.onnx.is_in_onnx_export()


_HAS_TRITON = find_spec("triton") is not None


def use_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernels must run for ``x``, if there are any for its shape and dtype."""
    return _backend == "triton" or (_backend == "auto" and x.is_cuda and _HAS_TRITON)


def launches(x: torch.Tensor) -> bool:
    """Whether a kernel for ``x`` may be launched here and now, without PyTorch's dispatcher.

    Not where something watches or transforms the calls: a compiler, a tracer, ``torch.func``, a dispatch mode, or
    forward-mode differentiation, whose tangents kernels do not carry.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and use_triton(x)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a ``backward`` method: a second derivative is an error, and costs nothing where none is asked for.

    PyTorch's ``once_differentiable`` gives constants where the incoming gradient is one, as that of a sum is, so that
    a penalty on a gradient would quietly lose its share; here these cannot be differentiated either.
    """

    def run(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            given = backward(ctx, *grads)
        found: list[Any] = [None if x is None else x.detach().requires_grad_() for x in given]
        message = b"trying to differentiate twice a function that was marked with @once_differentiable"
        return torch._C._functions.DelayedError(message, len(found))(*found)

    return run


@cache
def launcher(family: str, name: str = "launch") -> ModuleType:
    """``launch.py`` of a family of operators, imported when a kernel is to run: it needs Triton."""
    return import_module(f"visionattn.ops.{family}.{name}")


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast wants an operator on ``x``: ``x.dtype`` where it is off, or for float64."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def result_dtype(x: torch.Tensor, *others: torch.Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of ``x`` promoted with the others."""
    if torch.is_autocast_enabled(x.device.type):
        return autocast_dtype(x)
    dtype = x.dtype
    for y in others:
        if y.dtype != dtype:
            dtype = torch.promote_types(dtype, y.dtype)
    return dtype


def learns(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient of one of them may be wanted."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def register_autocast(op: Any, tensors: int) -> None:
    """Under autocast run ``op`` with its first tensors in the dtype that is set at call time; float64 stays.

    ``register_autocast`` of PyTorch's custom operators takes a dtype that is fixed beforehand.

    Args:
        op: A ``torch.library.custom_op``.
        tensors: How many leading arguments are cast.
    """

    def rule(device: str) -> Callable[..., Any]:
        def cast_and_call(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [x if x.dtype == torch.float64 else x.to(dtype) for x in args[:tensors]]
            with torch.autocast(device, enabled=False):
                return op(*cast, *args[tensors:])

        return cast_and_call

    for device in ("cpu", "cuda"):
        torch.library.impl(op._qualname, f"Autocast{device.upper()}", rule(device))
