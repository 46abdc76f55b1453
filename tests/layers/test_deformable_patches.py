"""Deformable patches against torchvision's operator and the published patch merging."""

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference, published_weights, renamed
from torchvision.ops import deform_conv2d

from visionattn.layers import DeformablePatches
from visionattn.models.litv2 import deformable_merging

RENAME = {"dconv.": "0.", "norm_layer.": "1."}


def test_merging_equals_published_module():
    manifest, stored = load_reference("layers/litv2_dtm")
    args = manifest["hyperparameters"]
    layer = deformable_merging(args["dim"], args["out_dim"]).double().eval()
    layer.load_state_dict(published_weights(manifest, RENAME), strict=False)  # the count of batches is not there
    x = inputs(manifest["input"]["shape"]).requires_grad_()
    out = layer(x.transpose(1, 2).unflatten(2, args["input_resolution"])).flatten(2).transpose(1, 2)
    out.backward(inputs(out.shape, 1000))
    assert_golden("out", stored.pop("out"), out[..., ::2])
    assert_golden("grad_input", stored.pop("grad_input"), x.grad[..., ::2])
    assert len(stored) == len(list(layer.parameters()))
    for key, expected in stored.items():
        assert_golden(key, expected, layer.get_parameter(renamed(key.removeprefix("grad_param."), RENAME)).grad[::4])


def make(side, spread):
    """A layer whose offsets are about ``spread`` pixels."""
    layer = DeformablePatches(6, 5, side).double()
    torch.nn.init.normal_(layer.conv_offset.weight, std=spread / (6 * side * side) ** 0.5)
    return layer


@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])  # up to far outside the map
@pytest.mark.parametrize("side, size", [(2, (8, 10)), (2, (9, 13)), (2, (2, 3)), (3, (11, 9)), (1, (4, 1))])
def test_layer_equals_deformable_convolution(side, size, spread):
    layer, x = make(side, spread), torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    expected = deform_conv2d(x, layer.conv_offset(x), layer.weight, layer.bias, stride=side)
    cotangent = torch.randn_like(expected)
    wanted = (x, *layer.parameters())
    out = layer(x)
    assert_close("out", expected, out, 1e-12)
    theirs = torch.autograd.grad(expected, wanted, cotangent)
    for i, (expected, grad) in enumerate(zip(theirs, torch.autograd.grad(out, wanted, cotangent), strict=True)):
        assert_close(f"gradient {i}", expected, grad, 1e-11)


def test_new_layer_is_an_ordinary_convolution():
    layer, x = DeformablePatches(6, 5), torch.randn(2, 6, 9, 56)
    ordinary = torch.nn.functional.conv2d(x, layer.weight, layer.bias, stride=2)
    assert_close("out", ordinary, layer(x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_are_precise_in_short_dtypes(dtype):
    layer, x = DeformablePatches(4, 3).to(dtype), torch.randn(1, 4, 4, 600, dtype=dtype)
    torch.nn.init.constant_(layer.conv_offset.bias, 0.25)
    wide = DeformablePatches(4, 3)
    wide.load_state_dict(layer.state_dict())
    out = layer(x)
    assert out.dtype == dtype
    assert_close("out", wide(x.float()), out, 1e-2)
    with torch.autocast("cpu", dtype):
        out = wide(x.float())
    assert out.dtype == dtype
    assert_close("out under autocast", wide(x.float()), out, 1e-2)


def test_small_map_is_named():
    with pytest.raises(ValueError, match=r"a map of 1x7 holds no patch of 2x2; use a larger image"):
        DeformablePatches(4, 3)(torch.zeros(1, 4, 1, 7))
