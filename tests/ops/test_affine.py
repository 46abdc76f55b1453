"""Sums of scaled maps: the Triton kernels (in the interpreter without a GPU) against float64."""

import pytest
import torch
from helpers import assert_close

from visionattn.ops import affine_add, affine_join, use_backend
from visionattn.ops._dispatch import launches
from visionattn.ops.affine import autograd

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]  # the interpreter has no bfloat16
RELATIVE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
LAYOUTS = {
    "contiguous": lambda x, C: x[..., :C].contiguous(),
    "slice": lambda x, C: x[..., 2 : 2 + C],
    "transposed": lambda x, C: x[..., :C].transpose(1, 2).contiguous().transpose(1, 2),
    "channels_first": lambda x, C: x[..., :C].movedim(-1, 0).contiguous().movedim(0, -1),
}


def given(lead, C, K, dtype, kind, layout="contiguous"):
    """Two maps and four parameters as leaves in ``kind``, of numbers that ``dtype`` has; and what goes in."""
    g, leaves = torch.Generator().manual_seed(1), []
    for shape in ((*lead, C + 5), (*lead, K + 5), (K,), (K,), (K,), (K,)):
        x = torch.randn(shape, generator=g, dtype=torch.float64) + 0.5
        wide = len(shape) > 1 or kind == torch.float64
        leaves.append(x.to(DEVICE, dtype if len(shape) > 1 else torch.float32).to(kind if wide else torch.float32))
    leaves = [x.requires_grad_() for x in leaves]
    return leaves, [LAYOUTS[layout](leaves[0], C), LAYOUTS[layout](leaves[1], K), *leaves[2:]]


def results(lead, C, K, dtype, kind, backend, layout="contiguous", keep=False, frozen=False):
    leaves, (x, y, weight, bias, y_weight, y_bias) = given(lead, C, K, dtype, kind, layout)
    parameters = [weight, bias, y_weight, y_bias]
    if frozen:
        parameters, leaves = [p.detach() for p in parameters], leaves[:2]
    numbers = (torch.arange(lead[0], device=DEVICE) % 2).to(dtype).to(kind) if keep else None
    with use_backend(backend), torch.autocast(DEVICE, dtype, enabled=kind == dtype in HALF):
        if C == K:
            leaves = leaves[:4]
            out = affine_add(x, *parameters[:2], y, numbers, 1.25)
        else:
            out = affine_join(x, y, *parameters)
    loss = (out.double().sin() + 0.1 * out.double()).sum()
    grads = torch.autograd.grad(loss, leaves)
    if kind != torch.float64:
        assert out.dtype == dtype and [g.dtype for g in grads] == [x.dtype for x in leaves]
    return {"out": out, **{f"grad {i}": g for i, g in enumerate(grads)}}


def compare(*args, **kwargs):
    dtype = args[3]
    expected = results(*args, torch.float64, "reference", **kwargs)
    actual = results(*args, dtype, "triton", **kwargs)
    for name in expected:
        assert_close(name, expected[name], actual[name], RELATIVE[dtype])


SIZES = [((2, 1, 1), 10, 10), ((3, 5, 7), 33, 33), ((1, 9, 8), 64, 64), ((70,), 96, 96), ((3, 2), 200, 200)]
SIZES += [((2, 5, 7), 48, 16), ((1, 3), 33, 1), ((2, 9, 8), 160, 32), ((7,), 11, 10)]


@pytest.mark.parametrize("lead, C, K", SIZES)
def test_kernels_equal_float64(lead, C, K):
    compare(lead, C, K, torch.float32)


@pytest.mark.parametrize("lead, C", [((4, 5, 7), 33), ((3, 50), 64), ((5,), 10)])
def test_images_are_dropped(lead, C):
    compare(lead, C, C, torch.float32, keep=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("C", [20, 28])
def test_any_strides_go_in(layout, C):
    compare((2, 3, 5), C, 20, torch.float32, layout=layout)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("C, keep", [(48, True), (80, False)])
def test_half_precision_is_that_of_autocast(dtype, C, keep):
    compare((2, 5, 7), C, 48, dtype, keep=keep)


@pytest.mark.parametrize("C", [16, 24])
def test_frozen_parameters_change_no_gradient(C):
    compare((2, 7), C, 16, torch.float32, frozen=True)


def test_more_rows_than_programs_hold(monkeypatch):
    from visionattn.ops.affine import launch

    monkeypatch.setattr(launch, "PROGRAMS", 3)
    monkeypatch.setattr(launch, "TILE", 128)
    monkeypatch.setattr(launch, "_backward", launch.Plans())
    monkeypatch.setattr(launch, "_forward", launch.Plans())
    compare((37, 2), 40, 40, torch.float32, keep=True)
    compare((37, 2), 60, 40, torch.float32)


@pytest.mark.parametrize("C", [40, 50])
def test_two_runs_are_equal(C):
    first, second = (results((3, 50), C, 40, torch.float32, torch.float32, "triton") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_second_derivative_is_refused():
    _, (x, y, weight, bias, *_) = given((2, 7), 16, 16, torch.float32, torch.float32)
    with use_backend("triton"):
        (grad,) = torch.autograd.grad(affine_add(x, weight, bias, y).cos().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_other_backends_give_what_pytorch_gives():
    _, (x, y, *p) = given((2, 5, 7), 16, 16, torch.float32, torch.float32)
    with use_backend("eager"):
        assert torch.equal(affine_add(x, p[0], p[1], y), torch.addcmul(p[1], x, p[0]) + y)
        joined = affine_join(torch.cat((y, x), -1), y, *p)
    assert torch.equal(joined, torch.cat((y, torch.addcmul(p[1], x, p[0]) + torch.addcmul(p[3], y, p[2])), -1))


def test_whoever_watches_the_calls_sees_those_of_pytorch(monkeypatch):
    calls, run = [], autograd.affine
    monkeypatch.setattr(autograd, "affine", lambda *args: calls.append(args) or run(*args))
    _, (x, y, weight, bias, *_) = given((2, 7), 16, 16, torch.float32, torch.float32)
    with use_backend("triton"):
        assert launches(x)
        torch.func.grad(lambda x: affine_add(x, weight, bias, y).cos().sum())(x)
        torch.func.vmap(lambda x, y: affine_add(x, weight, bias, y))(x[:, None], y[:, None])
        torch.compile(lambda x: affine_add(x, weight, bias, y), fullgraph=True, backend="aot_eager")(x)
        for double in (
            [t.double() for t in (x, weight, bias, y)],
            [t[:0] if t.dim() > 1 else t for t in (x, weight, bias, y)],
        ):
            affine_add(*double)
        assert not calls
        affine_add(x, weight, bias, y)
    assert len(calls) == 1


CASES = {
    "weight": lambda x, w: affine_add(x, w[:3], w, x),
    "delta": lambda x, w: affine_add(x, w, w, x[:1]),
    "keep": lambda x, w: affine_add(x, w, w, x, w),
    "row": lambda x, w: affine_add(x[0], w, w, x[0]),
    "wide": lambda x, w: affine_join(x[..., :2], x, w, w, w, w),
    "parameter": lambda x, w: affine_join(x, x, w, w, w, w[:3]),
    "images": lambda x, w: affine_join(x, x[:1], w, w, w, w),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument_is_named(name):
    with pytest.raises(ValueError, match=r"affine_(add|join) wants x.*, got"):
        CASES[name](torch.zeros(2, 4), torch.zeros(4))
