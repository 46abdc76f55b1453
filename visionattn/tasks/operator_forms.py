"""What the benchmark of operators knows of each: shapes, forms of the computation, exact results, floors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops import routed_attention, use_backend

COPY_RATE, EXP_RATE = 3.0e12, 3.7e12  # bytes and exponentials a second of an H100, for the floors
# RMS, of the standard deviation
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-10}
PEER_FACTOR = 2.5  # peers round more often
OURS, EAGER, DENSE, FLEX = "visionattn", "eager", "dense SDPA", "flex_attention"
_EXACT_NUMBERS = 2**27  # of the inputs that are brought to float64 at once
Pair = tuple[float | str, float | str]


class Data(NamedTuple):
    """Tensors of a call.

    ``batched`` and ``shared`` are differentiated. The former have images first, as have ``weights``, the gradient of
    the output, and ``table``, which says what is attended to.
    """

    batched: tuple[Tensor, ...]
    weights: Tensor
    shared: tuple[Tensor, ...] = ()
    table: Tensor | None = None

    def leaves(self) -> tuple[Tensor, ...]:
        """All that gradients are taken for."""
        return (*self.batched, *self.shared)

    def exact(self, images: slice) -> "Data":
        """Some images in float64."""
        batched = tuple(x[images].detach().double().requires_grad_() for x in self.batched)
        shared = tuple(x.detach().double().requires_grad_() for x in self.shared)
        table = None if self.table is None else self.table[images].contiguous()
        return Data(batched, self.weights[images].double(), shared, table)


class Prepared(NamedTuple):
    """A form of an operator at work on given tensors.

    ``attend`` of ``inputs`` is what is timed; ``inputs`` are made beforehand, in the layout that the form likes best,
    and ``restore`` brings its output to ``[B, H, W, heads, head_dim]`` where the form leaves it in another one.
    """

    inputs: list[Tensor]
    attend: Callable[..., Tensor]
    restore: Callable[[Tensor], Tensor] = lambda out: out


def _nothing_missing() -> str:
    return ""


def _any_shape(shape: Any) -> bool:
    return True


class Form(NamedTuple):
    """A way to compute an operator, or what stands in for it.

    ``exact`` is what it should give, from tensors in float64, and is compared for the first ``images`` (None: all).
    ``backend`` is set while it is checked and timed. Where ``missing()`` has a reason the form is left out, and at
    shapes that it does not ``fit``, being no way to compute them. A fault of one that is ``ours`` ends the run.
    """

    prepare: Callable[[Data, Any], Prepared]
    exact: Callable[[Data, Any], Tensor]
    ours: bool = False
    images: int | None = None
    backend: str | None = None
    missing: Callable[[], str] = _nothing_missing
    fits: Callable[[Any], bool] = _any_shape


class Operator(NamedTuple):
    """An operator of this package and its peers.

    ``sets`` makes shapes by name for each set of them, ``inputs`` the tensors of a shape, dtype and device. ``floors``
    gives least milliseconds, and ``published`` those of published code on an H100 in bfloat16: forward, and forward and
    backward, by form and shape.
    """

    sets: dict[str, Callable[[], dict[str, Any]]]
    forms: dict[str, Form]
    inputs: Callable[[Any, torch.dtype, str], Data]
    floors: Callable[[Any, int], tuple[float, float]]
    published: dict[str, dict[str, Pair]]


def generator(device: str) -> torch.Generator:
    """A generator of its own: a capture that fails leaves the default one unusable."""
    return torch.Generator(device).manual_seed(0)


def floors_ms(forward: int, backward: int, exponentials: int) -> tuple[float, float]:
    """Least milliseconds of forward, and of forward and backward.

    Args:
        forward: Bytes that it must read and write.
        backward: Bytes that backward must.
        exponentials: That each of the two computes.
    """
    exps = exponentials / EXP_RATE
    first = max(forward / COPY_RATE, exps)
    return 1e3 * first, 1e3 * (first + max(backward / COPY_RATE, exps))


def attention_floors_ms(size: int, exponentials: int) -> tuple[float, float]:
    """Least milliseconds of an attention whose query, key, value and output have ``size`` bytes each.

    Forward reads three of them and writes one; backward reads five and writes three.
    """
    return floors_ms(4 * size, 8 * size, exponentials)


def output(prepare: Callable[[Data, Any], Prepared]) -> Callable[[Data, Any], Tensor]:
    """What a form computes, as the ``exact`` of itself and of its peers."""

    def exact(data: Data, shape: Any) -> Tensor:
        prepared = prepare(data, shape)
        return prepared.restore(prepared.attend(*prepared.inputs))

    return exact


def dense_form(data: Data, shape: Any) -> Prepared:
    """Attention to the whole map by PyTorch's fused kernel, on slices of ``[B, H, W, 3, heads, head_dim]``."""
    packed = data.batched[0]
    inputs = [x.flatten(1, 2).transpose(1, 2) for x in packed.unbind(3)]
    return Prepared(
        inputs, F.scaled_dot_product_attention, lambda out: out.transpose(1, 2).unflatten(1, packed.shape[1:3])
    )


def dense_exact(data: Data, shape: Any) -> Tensor:
    """What ``dense_form`` computes: one region that holds the whole map."""
    packed = data.batched[0]
    index = torch.zeros(len(packed), 1, 1, 1, dtype=torch.int32, device=packed.device)
    height, width = packed.shape[1:3]
    query, key, value = packed.unbind(3)
    return routed_attention(query, key, value, index, (height, width))[0]


DENSE_FORM = Form(dense_form, dense_exact, images=1)  # every image takes the same way, and float64 is slow


def _error(result: Tensor | None, exact: Tensor | None) -> float:
    """RMS in standard deviations; what only one of them has is as wrong as can be."""
    if result is None or exact is None:
        return 0.0 if result is exact else float("inf")
    return ((result.double() - exact).square().mean().sqrt() / exact.std()).item()


def check(name: str, form: Form, prepared: Prepared, data: Data, shape: Any) -> float:
    """Largest RMS error of output and gradients against float64, in standard deviations.

    Args:
        name: Of the form, for the message.
        form: The form.
        prepared: The form at work on ``data``.
        data: What ``Operator.inputs`` made.
        shape: The shape that it was made for.

    Raises:
        ValueError: It is above the tolerance: a wrong result is not worth timing.
    """
    leaves, count = data.leaves(), len(data.batched)
    out = prepared.restore(prepared.attend(*prepared.inputs))
    out, *grads = out, *torch.autograd.grad(out, leaves, data.weights, allow_unused=True)
    images = min(form.images or len(out), len(out))
    step = max(1, _EXACT_NUMBERS // sum(x[0].numel() for x in data.batched))
    sums: list[Tensor | None] = [None] * len(data.shared)
    errors = []
    for first in range(0, images, step):
        part = slice(first, min(first + step, images))
        exact = data.exact(part)
        with use_backend("eager"):
            exact_out = form.exact(exact, shape)
            exact_grads = torch.autograd.grad(exact_out, exact.leaves(), exact.weights, allow_unused=True)
        errors.append(_error(out[part], exact_out))
        for mine, theirs in zip(grads[:count], exact_grads[:count], strict=True):
            errors.append(_error(None if mine is None else mine[part], theirs))
        for i, theirs in enumerate(exact_grads[count:]):
            before = sums[i]
            sums[i] = theirs if before is None or theirs is None else before + theirs
    errors += [_error(mine, theirs) for mine, theirs in zip(grads[count:], sums, strict=True)]
    error = torch.tensor(errors).max().item()  # unlike Python's it keeps a NaN
    allowed = TOLERANCES[data.weights.dtype] * (1 if form.ours else PEER_FACTOR)
    if not error <= allowed:
        raise ValueError(
            f"{name}, {shape}: error {error:.1e} of the standard deviation, allowed {allowed:.3g}; not timed"
        )
    return error
