"""Layer norm: the definition by hand, and the Triton kernels (in the interpreter without a GPU) against float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch.utils.flop_counter import FlopCounterMode

from visionattn.ops import add_layer_norm, layer_norm, use_backend
from visionattn.ops._dispatch import autocast_dtype, launches
from visionattn.ops.norm import autograd

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no bfloat16
RELATIVE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
EPS = 1e-3


def given(lead, C, dtype, kind, layout="contiguous"):
    """Map, branch, weight and bias as leaves in ``kind``, of numbers that ``dtype`` has; and what goes in."""
    g = torch.Generator().manual_seed(1)
    leaves = []
    for shape in ((*lead, 3 * C), (*lead, 3 * C), (C,), (C,)):
        x = torch.randn(shape, generator=g, dtype=torch.float64) + 0.5
        x = x.to(DEVICE, dtype if len(shape) > 1 else torch.float32)
        wide = len(shape) > 1 or kind == torch.float64
        leaves.append(x.to(kind if wide else torch.float32).requires_grad_())
    views = {
        "contiguous": lambda x: x[..., :C].contiguous(),
        "slice": lambda x: x[..., C : 2 * C],
        "transposed": lambda x: x[..., :C].transpose(0, 1).contiguous().transpose(0, 1),
        "channels_first": lambda x: x[..., :C].movedim(-1, 0).contiguous().movedim(0, -1),
    }
    return leaves, [views[layout](x) for x in leaves[:2]] + leaves[2:]


def results(lead, C, dtype, kind, backend, layout="contiguous", add=True):
    leaves, (x, delta, weight, bias) = given(lead, C, dtype, kind, layout)
    with use_backend(backend):
        if add:
            total, out = add_layer_norm(x, delta, weight, bias, EPS)
        else:
            total, out = x, layer_norm(x, weight, bias, EPS)
        loss = (out.double().sin() + total.double().cos()).sum()
        wanted = leaves if add else [leaves[0], *leaves[2:]]
        grads = torch.autograd.grad(loss, wanted)
    return dict(zip(("sum", "out", *(f"grad {i}" for i in range(len(grads)))), (total, out, *grads), strict=True))


def compare(*args, **kwargs):
    lead, C, dtype = args
    expected = results(lead, C, dtype, torch.float64, "reference", **kwargs)
    actual = results(lead, C, dtype, dtype, "triton", **kwargs)
    for name in expected:
        assert_close(name, expected[name], actual[name], RELATIVE[dtype])


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_rows_have_mean_and_deviation_of_the_parameters(backend):
    x = torch.randn(3, 5, 48, device=DEVICE) * 7 + 3
    weight, bias = torch.full((48,), 2.0, device=DEVICE), torch.full((48,), -1.0, device=DEVICE)
    with use_backend(backend):
        out = layer_norm(x, weight, bias, 1e-12)
    assert_close("mean", torch.full((3, 5), -1.0), out.mean(-1), 1e-5)
    assert_close("deviation", torch.full((3, 5), 2.0), out.std(-1, correction=0), 1e-5)
    centred = x - x.mean(-1, keepdim=True)
    assert_close("out", 2 * centred / centred.square().mean(-1, keepdim=True).sqrt() - 1, out, 1e-5)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("lead, C", [((2, 1, 1), 10), ((2, 5, 7), 33), ((1, 9, 8), 64), ((70,), 96), ((3, 2), 200)])
def test_kernels_equal_float64(lead, C, add):
    compare(lead, C, torch.float32, add=add)


@pytest.mark.parametrize("layout", ["slice", "transposed", "channels_first"])
@pytest.mark.parametrize("add", [False, True])
def test_any_strides_go_in(layout, add):
    compare((2, 3, 5), 20, torch.float32, add=add, layout=layout)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("C", [33, 64])
def test_half_precision_is_close(C, dtype):
    compare((2, 5, 7), C, dtype)


def test_more_rows_than_programs_hold(monkeypatch):
    from visionattn.ops.norm import launch

    monkeypatch.setattr(launch, "PROGRAMS", 3)
    monkeypatch.setattr(launch, "TILE", 128)
    monkeypatch.setattr(launch, "_backward", launch.Plans())
    monkeypatch.setattr(launch, "_forward", launch.Plans())
    compare((37,), 40, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_norm_is_that_of_the_rounded_sum(dtype):
    _, (x, delta, weight, bias) = given((2, 5, 7), 64, dtype, dtype)
    with use_backend("triton"), torch.no_grad():
        total, out = add_layer_norm(x, delta, weight, bias, EPS)
        assert torch.equal(total, x + delta) and total.dtype == dtype
        assert torch.equal(out, layer_norm(total, weight, bias, EPS)) and out.dtype == dtype


def test_two_runs_are_equal():
    first, second = (results((3, 50), 40, torch.float32, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_results_that_nobody_uses_get_no_gradient():
    _, (x, delta, weight, bias) = given((2, 7), 16, torch.float32, torch.float32)
    with use_backend("triton"):
        total, out = add_layer_norm(x, delta, weight, bias, EPS)
        grads = torch.autograd.grad(total.sum(), (x, delta, weight), allow_unused=True, retain_graph=True)
        assert grads[2] is None and all(torch.equal(g, torch.ones_like(x)) for g in grads[:2])
        (expected,) = torch.autograd.grad(layer_norm(x + delta, weight, bias, EPS).cos().sum(), delta)
        assert_close("delta", expected, torch.autograd.grad(out.cos().sum(), delta)[0], 1e-6)


def test_frozen_parameters_change_no_gradient():
    _, (x, delta, weight, bias) = given((2, 7), 16, torch.float32, torch.float32)
    with use_backend("triton"):
        losses = [
            add_layer_norm(x, delta, w, b, EPS)[1].cos().sum()
            for w, b in ((weight, bias), (weight.detach(), bias.detach()))
        ]
    expected, actual = (torch.autograd.grad(loss, (x, delta)) for loss in losses)
    assert all(torch.equal(e, a) for e, a in zip(expected, actual, strict=True))


def test_second_derivative_is_refused():
    _, (x, _, weight, bias) = given((2, 7), 16, torch.float32, torch.float32)
    with use_backend("triton"):
        (grad,) = torch.autograd.grad(layer_norm(x, weight, bias).cos().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# which implementation runs


def test_autocast_sets_the_dtype():
    x = torch.zeros(2, 3)
    assert autocast_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(x) == torch.bfloat16
        assert autocast_dtype(x.half()) == torch.bfloat16
        assert autocast_dtype(x.double()) == torch.float64


def test_kernels_give_the_dtype_of_autocast():
    _, (x, delta, weight, bias) = given((2, 7), 16, torch.float32, torch.float32)
    with use_backend("triton"):
        expected = layer_norm(x, weight, bias, EPS)
        total, normed = add_layer_norm(x, delta, weight, bias, EPS)
        with torch.autocast(DEVICE, torch.float16):
            out, (half_total, half_normed) = (
                layer_norm(x, weight, bias, EPS),
                add_layer_norm(x, delta, weight, bias, EPS),
            )
    assert torch.equal(out, expected.half())
    assert torch.equal(half_total, total) and torch.equal(half_normed, normed.half())
    (grad,) = torch.autograd.grad(out.float().cos().sum(), x)
    assert grad.dtype == torch.float32 and grad.isfinite().all()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_other_backends_give_what_pytorch_gives(backend):
    _, (x, delta, weight, bias) = given((2, 5, 7), 24, torch.float32, torch.float32)
    with use_backend(backend):
        assert torch.equal(layer_norm(x, weight, bias, EPS), F.layer_norm(x, (24,), weight, bias, EPS))
        total, out = add_layer_norm(x, delta, weight, bias, EPS)
        assert torch.equal(total, x + delta)
        assert torch.equal(out, F.layer_norm(x + delta, (24,), weight, bias, EPS))


def count(monkeypatch):
    """Calls of the kernels from now on."""
    calls, run = [], autograd.layer_norm
    monkeypatch.setattr(autograd, "layer_norm", lambda *args: calls.append(args) or run(*args))
    return calls


def test_sizes_and_dtypes_without_a_kernel_are_left_to_pytorch(monkeypatch):
    calls = count(monkeypatch)
    for shape, dtype in (((2, 1025), torch.float32), ((0, 8), torch.float32), ((3, 8), torch.float64)):
        x, weight = torch.randn(shape, device=DEVICE).to(dtype), torch.rand(shape[1:], device=DEVICE).to(dtype)
        with use_backend("triton"):
            assert torch.equal(layer_norm(x, weight, weight), F.layer_norm(x, shape[1:], weight, weight))
    assert not calls
    with use_backend("triton"):
        layer_norm(torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE), torch.ones(8, device=DEVICE))
    assert len(calls) == 1


def test_whoever_watches_the_calls_sees_those_of_pytorch(monkeypatch):
    calls = count(monkeypatch)
    x, weight = torch.randn(2, 8, device=DEVICE), torch.ones(8, device=DEVICE)
    with use_backend("triton"):
        assert launches(x)
        with FlopCounterMode(display=False):
            layer_norm(x, weight, weight)
        torch.jit.trace(lambda x: layer_norm(x, weight, weight), x, check_trace=False)
        per_row = torch.func.vmap(lambda row: layer_norm(row, weight, weight))(x)
        slope = torch.func.grad(lambda x: layer_norm(x, weight, weight).cos().sum())(x)
        compiled = torch.compile(lambda x: layer_norm(x, weight, weight), fullgraph=True, backend="aot_eager")(x)
        assert not calls
    assert torch.equal(compiled, F.layer_norm(x, (8,), weight, weight))
    assert_close("rows", compiled, per_row, 1e-6)
    assert slope.shape == x.shape


CASES = {
    "weight": (lambda x, w: layer_norm(x, w[:3], w), r"weight and bias \[C\], got \(2, 4\), \(3,\), \(4,\)"),
    "bias": (lambda x, w: layer_norm(x, w, w[:3]), r"got \(2, 4\), \(4,\), \(3,\)"),
    "scalar": (lambda x, w: layer_norm(x[0, 0], w, w), r"x \[..., C\]"),
    "delta": (lambda x, w: add_layer_norm(x, x[:1], w, w), r"shape of x, got \(1, 4\), \(2, 4\)"),
    "sum": (lambda x, w: add_layer_norm(x, x, w[:3], w), r"add_layer_norm wants x.*\(3,\)"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument_is_named(name):
    call, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 4), torch.zeros(4))
