"""Window and neighbourhood attention as modules, against the published modules and full attention."""

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights

from visionattn.layers import NeighborhoodAttention, WindowAttention, multi_head_attention, windows
from visionattn.ops import use_backend


def test_window_attention_equals_published():
    manifest, stored = load_reference("layers/davit_window_attention")
    layer = WindowAttention(64, 2, 7).double()
    layer.load_state_dict(published_weights(manifest))
    x = inputs(**manifest["input"]).requires_grad_()
    out = layer(x.unflatten(1, (7, 7))).flatten(1, 2)
    (out * inputs(out.shape, 1)).sum().backward()
    assert_golden("output", stored["output"], out[:, ::3, ::2])
    assert_golden("dx", stored["dx"], x.grad[:, ::3, ::2])


@pytest.mark.parametrize("case, size, dilation, step", [("pad_5x9", (5, 9), 1, 1), ("d2_15x23", (15, 23), 2, 4)])
def test_neighborhood_attention_equals_published(case, size, dilation, step):
    manifest, stored = load_reference("layers/nat_attention_module")
    layer = NeighborhoodAttention(64, 2, 7, dilation).double()
    layer.load_state_dict(published_weights(manifest))
    assert_golden(case, stored[case], layer(inputs((1, *size, 64), 0))[..., ::step])


@pytest.mark.parametrize("make", [lambda: WindowAttention(12, 3, 5), lambda: NeighborhoodAttention(12, 3, 5)])
def test_window_of_the_whole_map_is_full_attention(make):
    layer, x = make().double(), torch.randn(2, 5, 5, 12, dtype=torch.float64)
    q, k, v = layer.qkv(x.flatten(1, 2)).chunk(3, dim=-1)
    expected = layer.proj(multi_head_attention(q, k, v, 3)).view(2, 5, 5, 12)
    assert_close("output", expected, layer(x), 1e-12)


@pytest.mark.parametrize("side", [4, 7])
def test_kernels_read_windows_where_they_lie(where_kernels_run, watch, side):
    pytest.importorskip("triton")
    layer, x = WindowAttention(16, 2, side), torch.randn(2, 9, 7, 16)
    weight = torch.randn(2, 9, 7, 16)
    x.requires_grad_()

    def results(backend, dtype):
        with use_backend(backend):
            out = layer.to(dtype)(x.to(dtype))
            return [out, *torch.autograd.grad((out * weight).sum(), [x, *layer.parameters()])]

    expected = results("eager", torch.float64)
    cut = watch(windows, "split_windows")
    actual = results("triton", torch.float32)
    assert not cut
    for i, (e, a) in enumerate(zip(expected, actual, strict=True)):
        assert_close(str(i), e, a, 2e-5)
    with use_backend("triton"), torch.no_grad():
        assert_close("inference", expected[0], layer(x), 2e-5)


def test_windows_do_not_see_each_other():
    layer, x = WindowAttention(8, 2, 4), torch.randn(1, 8, 8, 8)
    changed = x.clone()
    changed[:, :4, :4] = 0
    same = layer(x) == layer(changed)
    assert same[:, 4:].all() and same[:, :, 4:].all() and not same[:, :4, :4].all()


def test_padding_is_attended_to_with_the_bias_of_the_projection():
    layer, x = WindowAttention(8, 2, 4).double(), torch.randn(1, 6, 7, 8, dtype=torch.float64)
    whole = torch.zeros(1, 8, 8, 8, dtype=torch.float64)
    whole[:, :6, :7] = x
    assert_close("output", layer(whole)[:, :6, :7], layer(x), 1e-12)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: WindowAttention(10, 3), "num_heads=3 must divide dim=10"),
        (lambda: WindowAttention(12, 3, 0), "window_size=0"),
        (lambda: NeighborhoodAttention(10, 3), "num_heads=3 must divide dim=10"),
        (lambda: NeighborhoodAttention(12, 3, 6), "kernel_size=6 must be odd, for example 7"),
        (lambda: NeighborhoodAttention(12, 3, 7, 0), "dilation=0 must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
