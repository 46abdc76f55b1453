"""The kernels of attention through a state against the float64 definition; without a GPU in Triton's interpreter.

Every drawn case is a function of its number, so the name of a failed test is enough to repeat it.
"""

import random

import pytest
import torch

from visionattn.ops import state_attention, use_backend
from visionattn.ops._dispatch import launcher

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CASES = 120 if CUDA else 6
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if CUDA else [torch.float32, torch.float16]
RELATIVE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # of the standard deviation, RMS
MODES = ["linear", "rotated", "channel_softmax"]


def laid_out(B, H, W, heads, d, dtype, layout):
    """Query, key and value in some memory layout."""
    if layout == "packed":
        return [x.to(DEVICE) for x in torch.randn(B, H, W, 3, heads, d).to(dtype).unbind(3)]
    if layout == "heads_first":
        return [torch.randn(B, heads, H, W, d).to(DEVICE, dtype).permute(0, 2, 3, 1, 4) for _ in range(3)]
    if layout == "channels_first":
        return [torch.randn(B, heads, d, H, W).to(DEVICE, dtype).permute(0, 3, 4, 1, 2) for _ in range(3)]
    return [torch.randn(B, H, W, heads, d).to(DEVICE, dtype) for _ in range(3)]


def options(mode, H, W, channels):
    if mode == "channel_softmax":  # scores of about 1: of the gradient of a saturated softmax only rounding is left
        return dict(mode=mode, scale=(H * W) ** -0.5)
    if mode == "linear":
        return dict(mode=mode)
    angle = torch.randn(H, W, channels // 2)
    return dict(mode="linear", rotation=(angle.cos().to(DEVICE), angle.sin().to(DEVICE)))


def results(backend, inputs, grad, kwargs, dtype):
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    with use_backend(backend):
        out = state_attention(*leaves, **kwargs)
    return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]


def check(shape, mode, dtype, layout="plain"):
    _, H, W, heads, d = shape
    inputs, kwargs = laid_out(*shape, dtype, layout), options(mode, H, W, heads * d)
    grad = torch.randn(shape).to(DEVICE, dtype)
    expected = results("reference", inputs, grad, kwargs, torch.float64)
    actual = results("triton", inputs, grad, kwargs, dtype)
    for name, x, y in zip(("out", "query", "key", "value"), expected, actual, strict=True):
        assert y.dtype == dtype
        error = (x - y).square().mean().sqrt() / x.square().mean().sqrt().clamp(min=1e-30)
        assert error < RELATIVE[dtype], f"{name}: {error}"
    return actual, results("triton", inputs, grad, kwargs, dtype)


# several heads in a program, stretches that end within a tile, channels beside the heads' own, wide heads
SHAPES = [(2, 12, 12, 6, 4), (1, 7, 13, 5, 8), (1, 9, 9, 3, 16), (1, 5, 7, 3, 12), (1, 4, 5, 1, 64)]
# every shape in every dtype where that is quick
TYPED = [(shape, kind) for i, shape in enumerate(SHAPES) for kind in (DTYPES if CUDA else [DTYPES[i % 2]])]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "dtype"), TYPED, ids=str)
def test_kernels_give_the_definition_and_the_same_bits_twice(shape, mode, dtype):
    for x, y in zip(*check(shape, mode, dtype, "packed"), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("number", range(CASES))
def test_drawn_cases(number):
    rng = random.Random(number)
    torch.manual_seed(number)
    most = 70 if CUDA else 9
    H, W, heads = rng.randint(1, most), rng.randint(1, most), rng.randint(1, 9)
    mode, dtype = MODES[number % 3], rng.choice(DTYPES)
    d = rng.choice([2, 4, 6, 8, 10, 16, 24, 32, 64, 40] if mode == "rotated" else [2, 3, 4, 7, 8, 16, 31, 32, 64, 50])
    layout = rng.choice(["plain", "packed", "heads_first", "channels_first"])
    check((rng.randint(1, 3), H, W, heads, d), mode, dtype, layout)


@pytest.mark.parametrize("mode", MODES)
def test_programs_walk_over_several_tiles(mode, monkeypatch):
    module = launcher("state")
    monkeypatch.setattr(module, "PROGRAMS", 1)
    for name in ("_forward_plans", "_backward_plans"):
        monkeypatch.setattr(module, name, type(getattr(module, name))())
    check((1, 13, 11, 2, 16), mode, torch.float32)
    plans = [*module._forward_plans.values(), *module._backward_plans.values()]
    assert [plan[0].splits for plan in plans] == [1] * len(plans) and plans


@pytest.mark.parametrize("mode", ["linear", "channel_softmax"])
def test_more_stretches_than_are_added_at_once(mode):
    check((1, 33, 33, 2, 16), mode, torch.float32)


def test_gradient_of_a_sum_is_not_in_memory():
    inputs = [x.requires_grad_() for x in laid_out(1, 5, 5, 2, 8, torch.float32, "plain")]
    grads = []
    for name in ("reference", "triton"):
        with use_backend(name):
            grads.append(torch.autograd.grad(state_attention(*inputs).sum(), inputs))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_odd_heads_with_a_rotation_take_pytorchs_operators():
    inputs, kwargs = laid_out(1, 3, 4, 2, 3, torch.float32, "plain"), options("rotated", 3, 4, 6)
    grad = torch.randn(1, 3, 4, 2, 3, device=DEVICE)
    for x, y in zip(*(results(b, inputs, grad, kwargs, torch.float32) for b in ("eager", "triton")), strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(not CUDA, reason="the interpreter has no bfloat16 products")
@pytest.mark.parametrize("mode", MODES)
def test_widest_heads(mode):
    for x, y in zip(*check((2, 20, 13, 2, 128), mode, torch.bfloat16), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("place", [0, 1])
def test_a_number_that_is_none_is_seen(place):
    inputs = laid_out(1, 3, 4, 2, 16, torch.float32, "plain")
    inputs[place][0, 1, 1, 0, 3] = float("nan")
    with use_backend("triton"):
        assert state_attention(*inputs)[0, 1, 1, 0].isnan().all()
