"""Attention of a packed projection with the enhancement of its values: one node against its parts."""

import pytest
import torch
from helpers import assert_close
from torch.utils.flop_counter import FlopCounterMode

from visionattn.layers import RoutingAttention
from visionattn.ops import use_backend
from visionattn.ops.routing import packed

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(dtype=torch.float32, topk=2, **kwargs):
    torch.manual_seed(1)
    return RoutingAttention(16, 2, 2, topk, **kwargs).to(DEVICE, dtype)


def results(module, x, backend, wanted=None):
    with use_backend(backend):
        out = module(x)
        wanted = [p for p in (x, *module.parameters()) if p.requires_grad] if wanted is None else wanted
        return [out, *torch.autograd.grad((out.double().sin()).sum(), wanted)]


@pytest.fixture
def calls(monkeypatch):
    """Calls of the one-node form."""
    found, run = [], packed._PackedAttention.apply
    monkeypatch.setattr(packed._PackedAttention, "apply", lambda *args: found.append(args) or run(*args))
    return found


@pytest.mark.parametrize("topk, size", [(1, (4, 4)), (1, (8, 8)), (2, (4, 6)), (2, (5, 7)), (3, (8, 8))])
def test_equals_float64(calls, topk, size):
    x = torch.randn(2, *size, 16, device=DEVICE, dtype=torch.float64)
    narrow, wide = layer(topk=topk), layer(torch.float64, topk)
    wide.load_state_dict(narrow.state_dict())
    expected = results(wide, x.clone().requires_grad_(), "eager")
    assert not calls
    actual = results(narrow, x.float().requires_grad_(), "triton")
    assert len(calls) == 1
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        assert_close(str(i), e, a, 2e-5)


@pytest.mark.parametrize("frozen", ["lepe", "qkv", "lepe.weight", "lepe.bias"])
def test_frozen_parts_change_no_gradient(calls, frozen):
    module, x = layer(), torch.randn(2, 4, 4, 16, device=DEVICE).requires_grad_()
    full = dict(zip(["out", "x", *dict(module.named_parameters())], results(module, x, "triton"), strict=True))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    kept = [name for name, p in module.named_parameters() if p.requires_grad]
    actual = dict(zip(["out", "x", *kept], results(module, x, "triton"), strict=True))
    assert len(calls) == 2
    assert all(torch.equal(full[name], actual[name]) for name in actual)


def test_gradients_of_any_strides_come_back():
    module, x = layer(), torch.randn(2, 4, 4, 16, device=DEVICE).requires_grad_()
    grad = torch.randn(2, 4, 4, 16, device=DEVICE).transpose(1, 2)
    with use_backend("triton"):
        given = [torch.autograd.grad(module(x), x, g)[0] for g in (grad, grad.contiguous())]
    assert torch.equal(*given)


def test_autocast_gives_its_dtype(calls):
    module, x = layer(), torch.randn(2, 4, 4, 16, device=DEVICE).requires_grad_()
    expected = results(module, x, "triton")
    with torch.autocast(DEVICE, torch.float16):
        actual = results(module, x, "triton")
    assert len(calls) == 2 and actual[0].dtype == torch.float16
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        assert_close(str(i), e, a, 1e-2)


def test_second_derivative_is_refused():
    module, x = layer(), torch.randn(2, 4, 4, 16, device=DEVICE).requires_grad_()
    with use_backend("triton"):
        (grad,) = torch.autograd.grad(module(x).cos().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_whoever_watches_and_every_other_convolution_takes_the_parts(calls):
    x = torch.randn(2, 4, 4, 16, device=DEVICE).requires_grad_()
    hooked, seen = layer(), []
    hooked.lepe.register_forward_hook(lambda *_: seen.append(1))
    with use_backend("triton"):
        hooked(x)
        with FlopCounterMode(display=False):
            layer()(x)
        with torch.no_grad():
            layer()(x)
        layer().double()(x.double())
    assert seen and not calls
