"""The attention-guided filter against the published one, a direct sum, and itself in lower precision."""

import pytest
import torch
from helpers import assert_close, assert_golden, inputs, load_reference

from visionattn.layers.guided_filter import AttentionGuidedFilter, box_mean, window_pixels
from visionattn.ops import use_backend


def stored_inputs():
    manifest, stored = load_reference("heads/fsgnet_guided_filter")
    given = {
        key: inputs(manifest["input"][key]["shape"], manifest["input"][key]["seed"])
        for key in ("hr_x", "lr_x", "lr_y", "attention")
    }
    given["attention"] = given["attention"].sigmoid()
    return list(given.values()), stored


def test_equals_published_filter():
    given, stored = stored_inputs()
    assert_golden("output", stored["output"], AttentionGuidedFilter(per="batch")(*given))
    # box sums are means times the pixels of the clipped window
    pixels = window_pixels(given[1], 2)
    assert_golden("box", stored["boxfilter_lr_x"], box_mean(given[1], 2) * pixels)


def windows(x):
    """Sums over clipped windows of 5, one by one."""
    out = torch.zeros_like(x)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            out[..., i, j] = x[..., max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3].sum(dim=(2, 3))
    return out


def test_equals_sums_over_windows():
    guide, coarse = torch.randn(2, 2, 3, 6, 7, dtype=torch.float64)
    attention = torch.rand(2, 1, 6, 7, dtype=torch.float64)
    # two pixels with attention, so that the "variance" of one image is negative somewhere
    attention[0], guide[0] = 0, 0
    attention[0, :, 2, 2], guide[0, :, 2, 2] = 1, 1
    attention[0, :, 2, 3], guide[0, :, 2, 3] = 0.1, 5
    a = attention + 1e-12
    n, t = windows(torch.ones_like(a)), a / a.sum(dim=(1, 2, 3), keepdim=True)
    share, mean_coarse, mean_guide = (windows(x) / n for x in (t * a * guide, a * coarse, a * guide))
    variance = windows(a**2 * guide**2) / n - n * share * mean_guide
    assert variance.min() < -1e-3
    slope = (windows(a**2 * guide * coarse) / n - n * share * mean_coarse) / (variance.abs() + 0.01)
    offset = (mean_coarse - slope * mean_guide) / (windows(a) / n)
    expected = windows(slope) / n * guide + windows(offset) / n
    assert_close("filter", expected, AttentionGuidedFilter()(guide, guide, coarse, attention), 1e-11)


def test_an_image_by_itself_is_the_published_filter_of_one():
    given, stored = stored_inputs()
    each = [AttentionGuidedFilter(per="batch")(*(x[i : i + 1] for x in given)) for i in range(2)]
    assert_close("image", torch.cat(each), AttentionGuidedFilter()(*given), 1e-12)
    assert (stored["output"] - torch.cat(each)).abs().max() > 1e-4


def test_gradients_are_those_of_finite_differences():
    given = [inputs(shape, i).requires_grad_() for i, shape in enumerate([(1, 2, 8, 9), *[(1, 2, 6, 6)] * 2])]
    attention = inputs((1, 1, 6, 6), 3).sigmoid().requires_grad_()
    assert torch.autograd.gradcheck(AttentionGuidedFilter(), (*given, attention))


@pytest.mark.parametrize("kind", ["random", "constant", "faint attention"])
def test_float32_is_accurate(kind):
    guide, coarse = (torch.randn(2, 4, 24, 24, dtype=torch.float64) for _ in range(2))
    attention = torch.rand(2, 1, 24, 24, dtype=torch.float64)
    if kind == "constant":
        guide, coarse = 3 + 1e-4 * guide, 1 + 1e-4 * coarse
    if kind == "faint attention":
        attention = attention * 1e-8
    large = torch.nn.functional.interpolate(guide, scale_factor=2, mode="bilinear", align_corners=True)
    expected = AttentionGuidedFilter()(large, guide, coarse, attention)
    single = [x.float() for x in (large, guide, coarse, attention)]
    assert_close(kind, expected, AttentionGuidedFilter(dtype=torch.float32)(*single), 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_give_the_same(autocast):
    pytest.importorskip("triton")
    device, results = "cuda" if torch.cuda.is_available() else "cpu", []
    given = [x.float().to(device, memory_format=torch.channels_last) for x in stored_inputs()[0]]
    for backend in ("eager", "triton"):
        leaves = [x.detach().requires_grad_() for x in given]
        with use_backend(backend), torch.autocast(device, torch.bfloat16, enabled=autocast):
            out = AttentionGuidedFilter(dtype=torch.float32)(*leaves)
            results.append([out, *torch.autograd.grad(out.sin().sum(), leaves)])
    for expected, actual in zip(*results, strict=True):
        assert_close("output or gradient", expected, actual, 1e-5)


def test_precision_is_kept_under_autocast():
    given = [x.bfloat16() for x in stored_inputs()[0]]
    expected = AttentionGuidedFilter(dtype=torch.float32)(*(x.float() for x in given))
    with torch.autocast("cpu", torch.bfloat16):
        out = AttentionGuidedFilter()(*given)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())
    single = [x.float() for x in given]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(AttentionGuidedFilter()(*single), expected)
    assert not torch.equal(AttentionGuidedFilter()(*single), expected)  # in float64 otherwise


def test_arguments_and_shapes_are_checked():
    for kwargs, message in (
        (dict(radius=0), "radius=0"),
        (dict(eps=0.0), "eps=0.0"),
        (dict(per="pixel"), "per='pixel'"),
        (dict(dtype=torch.bfloat16), "dtype=torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            AttentionGuidedFilter(**kwargs)
    x, a = torch.zeros(1, 2, 8, 8), torch.zeros(1, 1, 8, 8)
    run = AttentionGuidedFilter()
    with pytest.raises(ValueError, match="5 x 8: both sides must exceed the window of 5"):
        run(x, x[:, :, :5], x[:, :, :5], a[:, :, :5])
    with pytest.raises(ValueError, match="attention is"):
        run(x, x, x, x)
    with pytest.raises(ValueError, match="coarse is"):
        run(x, x, x[..., 1:], a)
    with pytest.raises(ValueError, match="guide is"):
        run(x[:, :1], x, x, a)
