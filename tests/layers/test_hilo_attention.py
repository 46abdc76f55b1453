"""HiLo attention against the published module, and what must hold for any weights."""

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights

from visionattn.layers import HiLoAttention, WindowAttention

RENAME = {"l_": "low_", "h_": "high_"}
SPLITS = [f"hilo_h{heads}_a{alpha}" for heads in (2, 4) for alpha in ("00", "05", "09", "10")]


@pytest.mark.parametrize("name", [*SPLITS, "hilo_h4_ws1", "hilo_h4_a05_ws2_pad", "hilo_h4_a05_ws4_pad"])
def test_layer_equals_published_module(name):
    manifest, stored = load_reference(f"layers/{name}")
    args = manifest["hyperparameters"]
    layer = HiLoAttention(args["dim"], args["num_heads"], args["window_size"], args["alpha"], args["qkv_bias"]).double()
    assert (layer.high_heads, layer.low_heads) == (args["hifi_heads"], args["lofi_heads"])
    layer.load_state_dict(published_weights(manifest, RENAME))
    given = manifest["input"]
    x = inputs(given["shape"], given["seed"]).requires_grad_()
    out = layer(x.unflatten(1, (given["H"], given["W"]))).flatten(1, 2)
    out.backward(inputs(out.shape, given["seed"] + 1000))
    assert_golden("out", stored.pop("out"), out[..., ::2])
    assert_golden("grad_input", stored.pop("grad_input"), x.grad[..., ::2])
    grads = {key: p.grad[::4] for key, p in layer.named_parameters()}
    expected = {key.removeprefix("grad_param."): grad for key, grad in stored.items()}
    for old, new in RENAME.items():
        expected = {new + key.removeprefix(old) if key.startswith(old) else key: g for key, g in expected.items()}
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        assert_golden(key, expected[key], grad)


def test_high_frequency_heads_alone_are_window_attention():
    layer, windows = HiLoAttention(16, 4, window_size=3, alpha=0.0), WindowAttention(16, 4, window_size=3)
    windows.qkv.load_state_dict(layer.high_qkv.state_dict())
    windows.proj.load_state_dict(layer.high_proj.state_dict())
    x = torch.randn(2, 7, 8, 16)
    assert_close("out", windows(x), layer(x), 1e-6)


def test_window_of_one_is_attention_to_the_whole_map():
    layer, whole = HiLoAttention(16, 4, window_size=1, alpha=0.25), WindowAttention(16, 4, window_size=6)
    whole.qkv.weight.data = torch.cat((layer.low_q.weight.data, layer.low_kv.weight.data))
    whole.qkv.bias.data = torch.cat((layer.low_q.bias.data, layer.low_kv.bias.data))
    whole.proj.load_state_dict(layer.low_proj.state_dict())
    x = torch.randn(2, 6, 6, 16)
    assert_close("out", whole(x), layer(x), 1e-6)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(num_heads=3), "num_heads=3 must divide dim=16"),
        (dict(window_size=0), "window_size=0 be positive"),
        (dict(alpha=1.1), r"alpha=1.1 must lie in \[0, 1\]"),
        (dict(alpha=-0.1), r"alpha=-0.1 must lie in \[0, 1\]"),
        (dict(alpha=float("nan")), r"alpha=nan must lie in \[0, 1\]"),
    ],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HiLoAttention(**{"dim": 16, "num_heads": 4, **kwargs})
