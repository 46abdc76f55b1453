"""The Triton kernels of the neighbourhood sum, without a GPU in Triton's interpreter, against the float64 reference."""

import itertools
import math
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from visionattn.ops import neighborhood_sum, use_backend

pytest.importorskip("triton")
OPS = torch.ops.visionattn
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter has no bfloat16
RELATIVE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DRAWN, PIXELS = (80, 2500) if CUDA else (12, 40)


class Case(NamedTuple):
    """One call."""

    size: tuple[int, int, int]  # images, height, width
    groups: int
    d: int
    kernels: tuple[int, ...]
    softmax: bool = True
    bias: bool = True
    dtype: torch.dtype = torch.float32
    layout: str = "groups_first"
    scale: float = 1.0  # of the logits

    def __str__(self) -> str:
        words = (
            f"{self.dtype}".removeprefix("torch."),
            "x".join(map(str, self.size)),
            f"{self.groups}x{self.d}",
            "k" + "+".join(map(str, self.kernels)),
            self.layout,
            *(["bias"] if self.bias else []),
            *([] if self.softmax else ["raw"]),
        )
        return "-".join(words)


SMALL = dict(
    whole_rows=Case((2, 4, 9), 1, 8, (3,)),
    one_pixel_of_freedom=Case((1, 6, 6), 1, 16, (5,)),
    whole_map=Case((1, 5, 5), 1, 14, (3, 5)),
    single_row_tiles=Case((1, 3, 20), 1, 10, (3,)),
    columns=Case((1, 3, 35), 1, 5, (3,)),
    wide_groups=Case((1, 3, 4), 1, 70, (3,)),
    kernel_of_one=Case((2, 3, 3), 1, 4, (1, 3)),
    single_channel=Case((1, 4, 3), 3, 1, (3,)),
)
LARGE = dict(
    stage_3=Case((3, 14, 14), 8, 16, (5, 13)),
    stage_4=Case((3, 7, 7), 12, 14, (5, 7)),
    stage_3_at_512=Case((2, 32, 32), 8, 16, (5, 13)),
    stage_4_at_512=Case((2, 16, 16), 12, 14, (5, 7)),
    wide_map=Case((1, 21, 83), 2, 10, (5, 17)),
    widest_kernel=Case((1, 26, 41), 1, 36, (25, 19)),
)
CASES = SMALL | (LARGE if CUDA else {})


def lay_out(logits: Tensor, value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same numbers otherwise in memory, logits ``[B, taps, groups, H, W]`` and value ``[B, H, W, heads, d]``."""
    match layout:
        case "groups_first":  # as OverLoCK's product of matrices gives them
            logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
        case "channels_last":
            logits = logits.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        case "sliced":
            logits = torch.full((2, *logits.shape), math.nan).to(logits)[1].copy_(logits)
            packed = torch.full((*value.shape[:3], 3, *value.shape[3:]), math.nan).to(value)
            value = packed[:, :, :, 1].copy_(value)
        case "channels_first":  # of the values
            value = value.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
        case "unaligned":
            logits = torch.full((logits.numel() + 3,), math.nan).to(logits)[3:].view(logits.shape).copy_(logits)
            value = torch.full((value.numel() + 1,), math.nan).to(value)[1:].view(value.shape).copy_(value)
        case "images_inside":
            logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
        case "expanded":
            logits = logits[:1, :, :1].expand_as(logits)
    return logits, value


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor]]:
    """Logits, value, table and gradients of output and log-sum-exp, in the case's dtype."""
    (B, H, W), groups, kernels = case.size, case.groups, case.kernels
    logits = case.scale * torch.randn(B, sum(k * k for k in kernels), groups, H, W)
    value = torch.randn(B, H, W, len(kernels) * groups, case.d)
    bias = torch.randn(groups, sum((2 * k - 1) ** 2 for k in kernels)) if case.bias else None
    grads = torch.randn(value.shape), torch.randn(B, len(kernels), groups, H, W)
    logits, value = lay_out(logits.to(DEVICE, case.dtype), value.to(DEVICE, case.dtype), case.layout)
    return (
        logits,
        value,
        None if bias is None else bias.to(DEVICE),
        (grads[0].to(DEVICE, case.dtype), grads[1].to(DEVICE)),
    )


def run(given: tuple[Any, ...], case: Case, backend: str, kind: torch.dtype | None = None) -> dict[str, Tensor]:
    """Results and gradients of the registered operator by name, in ``kind`` or as given."""
    tensors = [x if x is None or kind is None else x.to(kind) for x in given[:3]]
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    with use_backend(backend):
        if backend == "reference":
            from visionattn.ops.neighborhood import reference

            out, lse = reference.neighborhood_sum(*leaves, case.kernels, case.softmax)
        else:
            out, lse = OPS.neighborhood_sum(*leaves, list(case.kernels), case.softmax)
        results = (out, lse) if case.softmax else (out,)
        wanted = [x for x in leaves if x is not None]
        grads = torch.autograd.grad(results, wanted, [g.to(x) for g, x in zip(given[3], results, strict=False)])
    return dict(zip(("out", "lse"), (out.detach(), lse.detach()), strict=True)) | dict(
        zip(("dlogits", "dvalue", "dbias"), grads, strict=False)
    )


def compare(case: Case, relative: float | None = None, repeat: bool = CUDA) -> None:
    given = inputs(case)
    actual = run(given, case, "triton")
    again = run(given, case, "triton") if repeat else actual
    expected = run(given, case, "reference", torch.float64)
    for label, exact in expected.items():
        x = actual[label]
        assert x.shape == exact.shape
        assert not x.isnan().any(), f"{label} has NaN"
        assert torch.equal(x, again[label]), f"{label} differs from run to run"
        error, unit = (t.square().mean().sqrt().item() for t in (x.double() - exact, exact))
        if label == "lse":  # an error of it is a relative one of all weights
            unit = max(unit, 1.0)
        if label == "dbias":  # the sum of numbers that are rounded as the gradient of the logits, and may cancel
            unit = max(unit, expected["dlogits"].square().mean().sqrt().item() * math.prod(case.size) ** 0.5)
        bound = (relative or RELATIVE[case.dtype]) * unit
        assert error <= bound, f"{label}: RMS error {error:.2e} of {unit:.2e}, {error / (unit or 1e-300):.1e} of it"


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_reference(name):
    compare(CASES[name])


def test_two_runs_are_equal():
    compare(CASES["whole_rows"]._replace(dtype=torch.float16), repeat=True)


@pytest.mark.parametrize("name, bias", [("whole_map", True), ("kernel_of_one", False)])
def test_weights_as_they_are(name, bias):
    compare(CASES[name]._replace(bias=bias, softmax=False))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["whole_rows", "wide_groups", "kernel_of_one"])
def test_half_precision_is_close(name, dtype):
    compare(CASES[name]._replace(dtype=dtype))


@pytest.mark.parametrize(
    "layout", ["plain", "channels_last", "sliced", "channels_first", "unaligned", "images_inside", "expanded"]
)
def test_any_layout_of_memory_works(layout):
    compare(Case((2, 3, 4), 2, 5, (3,), layout=layout))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_logits_beyond_the_range_of_exponentials(dtype):
    # scores of hundreds carry an absolute error that the exponential turns into a relative one
    case = Case((1, 4, 3), 1, 4, (3,), dtype=dtype, scale=80.0)
    compare(case, 10 * RELATIVE[dtype])
    given = inputs(case._replace(scale=1.0))
    for offset in (-300.0, 300.0):  # of all logits: sums too small and too large for float32
        moved = (given[0] + offset).to(dtype), *given[1:]
        expected, actual = run(moved, case, "reference", torch.float64), run(moved, case, "triton")
        error = (actual["out"].double() - expected["out"]).square().mean().sqrt()
        assert error <= 10 * RELATIVE[dtype] * expected["out"].std()
        assert torch.allclose(actual["lse"].double(), expected["lse"], rtol=1e-5)


def test_public_operator_goes_the_same_way_with_tables_of_its_own():
    case = CASES["kernel_of_one"]
    logits, value, bias, (grad, _) = inputs(case)
    sides = [2 * k - 1 for k in case.kernels]
    tables = [
        t.reshape(case.groups, n, n).detach().requires_grad_()
        for t, n in zip(bias.split([n * n for n in sides], 1), sides, strict=True)
    ]
    leaves = [logits.detach().requires_grad_(), value.detach().requires_grad_(), *tables]
    with use_backend("triton"):
        out = neighborhood_sum(leaves[0], leaves[1], list(case.kernels), tables)
        grads = torch.autograd.grad(out, leaves, grad)
        with torch.no_grad():
            assert torch.equal(neighborhood_sum(leaves[0], leaves[1], list(case.kernels), tables), out)
        with torch.autocast(DEVICE, torch.float16):
            assert neighborhood_sum(leaves[0], leaves[1], list(case.kernels), tables).dtype == torch.float16
        assert torch.equal(OPS.neighborhood_sum(logits, value, bias, list(case.kernels), True)[0], out)
    with use_backend("reference"):
        exact = [x.detach().double().requires_grad_() for x in leaves]
        out = neighborhood_sum(exact[0], exact[1], list(case.kernels), exact[2:])
        for label, a, b in zip("lvbt", grads, torch.autograd.grad(out, exact, grad.double()), strict=True):
            assert (a - b).square().mean().sqrt() <= 2e-5 * max(b.std(correction=0).item(), 1.0), label


def test_operator_is_registered_properly():
    logits, value, bias, _ = inputs(Case((1, 3, 3), 1, 3, (3,)))
    leaves = [x.detach().requires_grad_() for x in (logits, value, bias)]
    with use_backend("triton"):
        torch.library.opcheck(OPS.neighborhood_sum, (*leaves, [3], True))


def test_float64_and_wide_groups_take_the_eager_form():
    compare(CASES["single_channel"]._replace(d=130))
    case = CASES["single_channel"]
    given = tuple(x.double() for x in inputs(case)[:3])
    grads = torch.randn(given[1].shape).to(given[1]), torch.randn(1, 1, 3, 4, 3).to(given[1])
    actual, expected = (run((*given, grads), case, backend) for backend in ("triton", "reference"))
    assert all(torch.allclose(actual[label], expected[label], rtol=1e-10) for label in expected)


def test_search_finds_tiles_that_work(monkeypatch, caplog):
    from visionattn.ops import _tiles
    from visionattn.ops.neighborhood import launch_sum

    monkeypatch.setenv("VISIONATTN_AUTOTUNE", "1")
    if not CUDA:  # the interpreter's times mean nothing: take the last candidate
        order = itertools.count()
        monkeypatch.setattr(launch_sum, "searching", lambda device: True)
        monkeypatch.setattr(_tiles, "milliseconds", lambda run: (run(), -next(order))[1])
    plans = launch_sum._forward_plans, launch_sum._backward_plans
    for plan in plans:
        plan.clear()
    with caplog.at_level("INFO", logger="visionattn"):
        compare(Case((1, 3, 3), 1, 4, (3,)))
    for plan in plans:
        plan.clear()
    assert sum("fastest of" in message for message in caplog.messages) == 2


def draw(number: int) -> Case:
    rng = random.Random(number)
    H, W = (rng.randint(1, 44 if CUDA else 6) for _ in range(2))
    if number % 4 == 0:  # columns
        H, W = rng.randint(1, 30 if CUDA else 2), rng.randint(33, 70 if CUDA else 36)
    odd = list(range(1, min(H, W, 19 if CUDA else 5) + 1, 2))
    kernels = tuple(rng.choice(odd) for _ in range(rng.randint(1, 3 if CUDA else 2)))
    return Case(
        (max(1, min(rng.randint(1, 5), PIXELS // (H * W))), H, W),
        rng.randint(1, 6) if CUDA else 1,
        rng.choice([1, 3, 8, 10, 14, 16, 16, 24, 36, 64, 90, 128] if CUDA else [1, 6, 16, 36]),
        kernels,
        rng.random() < 0.8,
        rng.random() < 0.7,
        [torch.float32, *HALF][number % (1 + len(HALF))],
        rng.choice(["groups_first", "groups_first", "plain", "channels_last", "sliced", "channels_first", "unaligned"]),
        rng.choice([1.0, 1.0, 0.1, 5.0]),
    )


@pytest.mark.parametrize("case", [pytest.param(draw(n), id=f"{n}-{draw(n)}") for n in range(DRAWN)])
def test_drawn_cases_equal_reference(case):
    compare(case, RELATIVE[case.dtype] * (2 if case.scale > 1 else 1))


@pytest.mark.parametrize("kind", ["expanded", "far apart", "sliced"])
def test_gradients_of_any_layout_work(kind, monkeypatch):
    from visionattn.ops.neighborhood import launch_sum

    case = Case((2, 3, 4), 2, 5, (3,))
    given = inputs(case)
    grad, glse = given[3]
    if kind == "expanded":
        grad = grad[..., :1].expand_as(grad)
    elif kind == "far apart":
        monkeypatch.setattr(launch_sum, "_extent", lambda x: 2**31)
        grad = grad.permute(4, 1, 2, 3, 0).contiguous().permute(4, 1, 2, 3, 0)
    else:
        grad = torch.stack([grad, grad], -1)[..., 0]
    with use_backend("triton"):
        lse, out = (x.detach() for x in reversed(OPS.neighborhood_sum(*given[:3], [3], True)))
        rest = *given[:3], out, lse
        actual = launch_sum.backward(grad, glse, *rest, [3], True)
        expected = launch_sum.backward(grad.contiguous(), glse, *rest, [3], True)
        turned = lse.transpose(3, 4).contiguous().transpose(3, 4)
        assert torch.equal(launch_sum.backward(grad, glse, *rest[:-1], turned, [3], True)[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("frozen", ["logits", "value", "bias"])
def test_gradients_are_those_asked_for(frozen):
    logits, value, bias, (grad, _) = inputs(Case((1, 3, 4), 1, 5, (3,)))
    tensors = dict(logits=logits, value=value, bias=bias.view(1, 5, 5))
    found = []
    for name in (frozen, None):
        leaves = {key: x.detach().requires_grad_(key != name) for key, x in tensors.items()}
        with use_backend("triton"):
            neighborhood_sum(leaves["logits"], leaves["value"], [3], [leaves["bias"]]).backward(grad)
        found.append({key: x.grad for key, x in leaves.items()})
    assert {key for key, grad in found[0].items() if grad is None} == {frozen}
    assert all(torch.equal(grad, found[1][key]) for key, grad in found[0].items() if grad is not None)
