"""Neighbourhood attention of a packed projection: one node against its parts."""

import pytest
import torch
from helpers import assert_close

from visionattn.layers import NeighborhoodAttention
from visionattn.ops import use_backend
from visionattn.ops.neighborhood import packed

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def layer(dtype=torch.float32, **kwargs):
    torch.manual_seed(1)
    module = NeighborhoodAttention(16, 2, **dict(kernel_size=3) | kwargs)
    torch.nn.init.normal_(module.rpb)
    return module.to(DEVICE, dtype)


def some(*size, dtype=torch.float32):
    torch.manual_seed(2)
    return torch.randn(2, *size, 16, device=DEVICE, dtype=dtype).requires_grad_()


def results(module, x, backend):
    with use_backend(backend):
        out = module(x)
        grads = torch.autograd.grad(out.double().sin().sum(), [p for p in (x, *module.parameters()) if p.requires_grad])
    return [out, *grads]


@pytest.fixture
def calls(monkeypatch):
    """Calls of the one-node form."""
    found, run = [], packed._PackedAttention.apply
    monkeypatch.setattr(packed._PackedAttention, "apply", lambda *args: found.append(args) or run(*args))
    return found


@pytest.mark.parametrize(
    "size, kwargs", [((6, 7), {}), ((8, 9), dict(dilation=2)), ((2, 5), {}), ((7, 7), dict(kernel_size=7))]
)
def test_equals_float64(calls, size, kwargs):
    narrow, wide = layer(**kwargs), layer(torch.float64, **kwargs)
    expected = results(wide, some(*size, dtype=torch.float64), "eager")
    assert not calls
    x = some(*size, dtype=torch.float64).detach().float().requires_grad_()
    actual = results(narrow, x, "triton")
    assert len(calls) == 1
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        assert_close(str(i), e, a, 2e-5)


@pytest.mark.parametrize("frozen", ["rpb", "qkv", "qkv.bias"])
def test_frozen_parts_change_no_gradient(calls, frozen):
    module, x = layer(), some(6, 6)
    full = dict(zip(["out", "x", *dict(module.named_parameters())], results(module, x, "triton"), strict=True))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    kept = [name for name, p in module.named_parameters() if p.requires_grad]
    actual = dict(zip(["out", "x", *kept], results(module, x, "triton"), strict=True))
    assert len(calls) == 2
    for name in actual:
        assert_close(name, full[name], actual[name], 1e-6)


def test_autocast_gives_its_dtype(calls):
    module, x = layer(), some(6, 6)
    expected = results(module, x, "triton")
    with torch.autocast(DEVICE, torch.float16):
        actual = results(module, x, "triton")
    assert len(calls) == 2 and actual[0].dtype == torch.float16
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        assert_close(str(i), e, a, 1e-2)


@pytest.mark.parametrize("changed", ["projection", "result"])
def test_what_is_changed_before_the_backward_pass_is_noticed(changed):
    qkv, bias = torch.randn(1, 6, 6, 48, device=DEVICE, requires_grad=True), torch.zeros(2, 5, 5, device=DEVICE)
    inner = qkv * 1.0
    with use_backend("triton"):
        out = packed.packed_attention(inner, bias, 2, [3, 3], [1, 1], 0.5)
    with torch.no_grad():
        (inner if changed == "projection" else out).mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_second_derivative_is_refused():
    module, x = layer(), some(6, 6)
    with use_backend("triton"):
        (grad,) = torch.autograd.grad(module(x).cos().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_gradients_of_any_strides_come_back():
    module, x = layer(), some(6, 6)
    grad = torch.randn(2, 6, 6, 16, device=DEVICE).transpose(1, 2)
    with use_backend("triton"):
        given = [torch.autograd.grad(module(x), x, g)[0] for g in (grad, grad.contiguous())]
    assert torch.equal(*given)


def test_without_a_gradient_or_a_kernel_the_parts_are_taken(calls):
    module, x = layer(), some(6, 6)
    with use_backend("triton"):
        with torch.no_grad():
            expected = module(x)
        module.requires_grad_(False)
        module(x.detach())
        layer(torch.float64)(x.double())
    with use_backend("eager"):
        assert_close("out", module(x), expected, 1e-6)
    assert not calls
