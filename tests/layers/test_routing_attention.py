"""Bi-level routing attention against the published module, and what must hold for any weights."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights, renamed

from visionattn.layers import RoutingAttention, routing_attention

RENAME = {"qkv.qkv": "qkv", "wo.": "proj."}


def run_reference(name, monkeypatch):
    """Manifest, stored tensors, the layer after a backward pass, its input and output, and the table it chose."""
    manifest, stored = load_reference(f"layers/{name}")
    args = manifest["hyperparameters"]
    layer = RoutingAttention(args["dim"], args["num_heads"], args["n_win"], args["topk"]).double()
    layer.load_state_dict(published_weights(manifest, RENAME))
    tables, attend = [], routing_attention.routed_attention

    def record(query, key, value, index, *rest, **kwargs):
        tables.append(index)
        return attend(query, key, value, index, *rest, **kwargs)

    monkeypatch.setattr(routing_attention, "routed_attention", record)
    x = inputs(**manifest["input"]).requires_grad_()
    out = layer(x)
    out.backward(inputs(out.shape, manifest["input"]["seed"] + 1000))
    return stored, layer, x, out, tables[0]


@pytest.mark.parametrize("name", ["bra_topk1", "bra_topk4", "bra_topk16", "bra_topk4_autopad"])
def test_layer_equals_published_module(name, monkeypatch):
    stored, layer, x, out, table = run_reference(name, monkeypatch)
    assert torch.equal(table[:, 0], stored["r_idx"].int())
    assert_golden("out", stored["out"], out[..., ::4])
    assert_golden("grad_input", stored["grad_input"], x.grad[..., ::4])
    grads = {key.removeprefix("grad_param."): grad for key, grad in stored.items() if key.startswith("grad_param.")}
    assert len(grads) == len(list(layer.parameters()))
    for key, grad in grads.items():
        assert_golden(key, grad, layer.get_parameter(renamed(key, RENAME)).grad[::4])


def make(topk, dim=8, num_heads=2, num_regions=3):
    layer = RoutingAttention(dim, num_heads, num_regions, topk).double()
    torch.nn.init.zeros_(layer.lepe.weight)
    torch.nn.init.normal_(layer.qkv.weight)
    return layer


def swap_regions(x, order, side):
    """The map with its ``side`` x ``side`` regions in another order."""
    B, H, W, C = x.shape
    regions = x.view(B, side, H // side, side, W // side, C).transpose(2, 3).flatten(1, 2)[:, order]
    return regions.unflatten(1, (side, side)).transpose(2, 3).reshape(x.shape)


@pytest.mark.parametrize("topk", [2, 9])
def test_swapped_regions_swap_the_output(topk):
    layer, x, order = make(topk), torch.randn(2, 6, 9, 8, dtype=torch.float64), torch.randperm(9)
    assert_close("out", swap_regions(layer(x), order, 3), layer(swap_regions(x, order, 3)), 1e-13)


def test_all_regions_equal_full_attention():
    layer, x = make(topk=9), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    q, k, v = (y.view(2, 54, 2, 4).transpose(1, 2) for y in layer.qkv(x).chunk(3, dim=-1))
    full = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).reshape(x.shape)
    assert_close("out", layer.proj(full + layer.lepe.bias), layer(x), 1e-13)


def test_fewer_regions_leave_other_pixels_out():
    layer, x = make(topk=1), torch.randn(1, 6, 9, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0, 0, 0, 0], x)
    assert 1 <= (grad.abs().sum(-1) > 0).sum() <= 2 * 6  # its own pixel at most, and one region of 2 x 3


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 6), (13, 4)])
def test_any_size_gives_gradients_to_all_parameters(size):
    layer = RoutingAttention(8, 2, num_regions=4, topk=3)
    x = torch.randn(2, *size, 8, requires_grad=True)
    out = layer(x)
    out.square().sum().backward()
    assert out.shape == x.shape
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (x, *layer.parameters()))


def test_padding_equals_a_padded_input():
    layer, x = RoutingAttention(8, 2, num_regions=4, topk=3).double(), torch.randn(2, 5, 7, 8, dtype=torch.float64)
    assert_close("out", layer(F.pad(x, (0, 0, 0, 1, 0, 3)))[:, :5, :7], layer(x), 1e-14)


def test_routing_carries_no_gradient():
    layer, x = make(topk=1), torch.randn(1, 6, 6, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(layer, [x.requires_grad_()], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype):
    layer, x = RoutingAttention(16, 2, num_regions=2, topk=4), torch.randn(2, 8, 8, 16)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        assert_close("autocast", expected, layer(x), 2e-2)
    actual = layer.to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert_close("weights in half", expected, actual, 2e-2)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(dim=10, num_heads=4), "num_heads=4 must divide dim=10"),
        (dict(dim=8, num_regions=3, topk=10), r"topk=10 must lie in \[1, 9\].*lower topk or raise num_regions"),
        (dict(dim=8, topk=0), r"topk=0 must lie in \[1, 49\]"),
        (dict(dim=8, num_regions=0), "num_regions"),
        (dict(dim=8, lepe_kernel=4), "lepe_kernel=4 must be odd"),
    ],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RoutingAttention(**kwargs)
