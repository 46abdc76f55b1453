"""The context-mixing convolution against a form written from the paper's steps, one matrix at a time."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close

from visionattn.layers import ContextMixing
from visionattn.ops import neighborhood_sum


def mixing(kernel_size=7, small_kernel=5, **kwargs):
    torch.manual_seed(0)
    layer = ContextMixing(32, 16, 2, kernel_size, small_kernel, **kwargs).double().eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def maps(height, width, batch=2):
    torch.manual_seed(1)
    return [torch.randn(batch, c, height, width, dtype=torch.float64, requires_grad=True) for c in (32, 32, 16)]


def stepwise(layer, value, query, context):
    """Affinities first, then the 1 x 1 convolution over the regions; sizes in plain integers."""
    size = value.shape[2:]
    side, short = layer.kernel_size, min(size)
    if short < side:
        larger = [n * side // short for n in size]
        value, query, context = (
            F.interpolate(x, size=larger, mode="bilinear", align_corners=False) for x in (value, query, context)
        )
    groups = layer.groups
    q, k = (x.flatten(2).unflatten(1, (groups, -1)) for x in (layer.query(query), layer.key(context)))
    affinity = (q * (32 // groups) ** -0.5).transpose(2, 3) @ k  # [B, groups, H*W, 49]
    logits = F.conv2d(affinity.permute(0, 3, 1, 2), layer.taps.weight[:, :, None, None], layer.taps.bias)
    out = neighborhood_sum(
        logits.unflatten(3, value.shape[2:]),
        value.permute(0, 2, 3, 1).unflatten(3, (2 * groups, -1)),
        [layer.small_kernel, side],
        [layer.bias_small, layer.bias_large],
    )
    return F.adaptive_avg_pool2d(out.flatten(3).permute(0, 3, 1, 2), size)


@pytest.mark.parametrize("size", [(14, 14), (7, 9), (5, 6), (3, 8), (10, 4), (1, 2)])
def test_layer_equals_the_steps(size):
    layer, given = mixing(), maps(*size)
    wanted = [*given, *layer.parameters()]
    outputs = [layer(*given), stepwise(layer, *given)]
    grads = [torch.autograd.grad(out.square().sum(), wanted) for out in outputs]
    assert_close("output", outputs[1], outputs[0], 1e-12)
    for i, (actual, expected) in enumerate(zip(*grads, strict=True)):
        assert_close(f"gradient {i}", expected, actual, 1e-11)


@pytest.mark.parametrize("size", [(8, 8), (4, 6)])
def test_scripted_equals_eager(size):
    layer, given = mixing(), maps(*size)
    assert_close("output", layer(*given), torch.jit.script(layer)(*given), 1e-14)


def test_exported_with_free_sizes_equals_eager_on_both_sides_of_the_kernel():
    layer, free = mixing(), torch.export.Dim.DYNAMIC
    program = torch.export.export(layer, tuple(maps(9, 12)), dynamic_shapes=({0: free, 2: free, 3: free},) * 3)
    for size in ((7, 7), (5, 6), (12, 3), (20, 9)):
        given = maps(*size, batch=3)
        assert_close(f"output at {size}", layer(*given), program.module()(*given), 1e-14)


def test_empty_batch_gives_an_empty_map():
    assert mixing()(*maps(5, 8, batch=0)).shape == (0, 32, 5, 8)


@pytest.mark.parametrize(
    "args, message",
    [
        ((32, 16, 3, 7), r"num_heads=3: 4 \* num_heads must divide dim=32"),
        ((32, 16, 2, 8), "small_kernel=5 and kernel_size=8 must be odd"),
        ((32, 16, 2, 7, 4), "small_kernel=4 and kernel_size=7 must be odd"),
        ((32, 16, 2, 3), "small_kernel=5 must be at most kernel_size=3"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ContextMixing(*args)
