"""The operators that stand in for mmcv's compiled ones, against torchvision and PyTorch formulas, on every device."""

import sys
from importlib import util

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import visionattn.integrations.mm
from visionattn.integrations import _mm_operators

pytestmark = pytest.mark.mm
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def made_up_boxes(count, device, side=32.0):
    corners = torch.rand(count, 2, 2, device=device) * side
    return torch.cat((corners.amin(1), corners.amax(1) + 1), dim=1)


def overlap(first, second, offset):
    """Intersection over union of two boxes whose width is x2 - x1 + offset."""
    sides = [max(0.0, min(first[i + 2], second[i + 2]) - max(first[i], second[i]) + offset) for i in (0, 1)]
    areas = [(box[2] - box[0] + offset) * (box[3] - box[1] + offset) for box in (first, second)]
    both = sides[0] * sides[1]
    return both / (sum(areas) - both)


@pytest.mark.parametrize("offset", [0, 1])
def test_nms_keeps_what_the_definition_keeps(device, offset):
    from mmcv.ops import nms

    boxes, scores = made_up_boxes(60, device), torch.rand(60, device=device)
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(overlap(boxes[i].tolist(), boxes[j].tolist(), offset) <= 0.4 for j in kept):
            kept.append(i)
    found, index = nms(boxes, scores, 0.4, offset=offset)
    assert index.tolist() == kept
    assert torch.equal(found, torch.cat((boxes, scores[:, None]), dim=1)[index])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nms_takes_half_precision(device, dtype):
    from mmcv.ops import nms

    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 7], [16, 16, 24, 24]], dtype=dtype, device=device)
    scores = torch.tensor([0.5, 0.9, 0.7], dtype=dtype, device=device)
    assert nms(boxes, scores, 0.5)[1].tolist() == [1, 2]


def rois_and_maps(device, dtype):
    x = torch.randn(2, 3, 20, 24, dtype=dtype, device=device, requires_grad=True)
    image = torch.tensor([[0.0]] * 4 + [[1.0]] * 3, device=device)
    return x, torch.cat((image, made_up_boxes(7, device, side=60.0)), dim=1).to(dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("samples", [0, 2])
def test_roi_align_is_torchvisions(device, samples, aligned):
    from mmcv.ops import roi_align

    x, rois = rois_and_maps(device, torch.float32)
    weight = torch.randn(7, 3, 5, 4, device=device)
    expected = torchvision.ops.roi_align(x, rois, (5, 4), 0.25, samples, aligned)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x)
    actual = roi_align(x, rois, (5, 4), 0.25, samples, "avg", aligned)
    (grad,) = torch.autograd.grad((actual * weight).sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_roi_align_takes_half_precision(device, dtype):
    from mmcv.ops import roi_align

    x, rois = rois_and_maps(device, dtype)
    actual = roi_align(x, rois.float(), 4, 0.25)
    (grad,) = torch.autograd.grad(actual.sum(), x)
    expected = roi_align(x.detach().float(), rois.float(), 4, 0.25)
    assert actual.dtype == grad.dtype == dtype
    torch.testing.assert_close(actual.float(), expected, rtol=1e-2, atol=1e-2)


def focal_loss(logits, target, gamma, alpha):
    """By the definition, one class against the rest."""
    truth = F.one_hot(target, logits.shape[1] + 1)[:, :-1].to(logits.dtype)
    chance = logits.sigmoid()
    right = truth * chance + (1 - truth) * (1 - chance)
    share = truth * alpha + (1 - truth) * (1 - alpha)
    return -share * (1 - right) ** gamma * right.log()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_focal_loss_is_the_definition(device, reduction):
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.randn(12, 5, device=device, requires_grad=True)
    target = torch.randint(0, 6, (12,), device=device)  # 5 is background
    expected = focal_loss(logits, target, 2.0, 0.25)
    if reduction != "none":  # mmcv's mean is over rows
        expected = expected.sum() / (12 if reduction == "mean" else 1)
    weight = torch.randn_like(expected) if reduction == "none" else 1.0
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), logits)
    actual = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, reduction)
    (grad,) = torch.autograd.grad((actual * weight).sum(), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_focal_loss_takes_half_precision(device, dtype):
    from mmcv.ops import sigmoid_focal_loss

    logits = torch.randn(6, 4, dtype=dtype, device=device, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.arange(6, device=device) % 5, 2.0, 0.25, None, "sum")
    loss.backward()
    assert loss.dtype == logits.grad.dtype == dtype and logits.grad.isfinite().all()


def deformable_inputs(device, dtype=torch.float64):
    shapes = torch.tensor([[4, 5], [2, 3]], device=device)
    value = torch.randn(2, 26, 2, 4, dtype=dtype, device=device)
    places = torch.rand(2, 7, 2, 2, 3, 2, dtype=dtype, device=device) * 1.2 - 0.1
    weights = torch.rand(2, 7, 2, 2, 3, dtype=dtype, device=device)
    start = torch.tensor([0, 20], device=device)
    return [x.requires_grad_() for x in (value, places, weights)], shapes, start


def deformable_attention(value, shapes, places, weights):
    """Sum over levels and points of bilinear samples, one at a time, zero outside the level."""
    B, _, heads, width = value.shape
    out = value.new_zeros(B, places.shape[1], heads, width)
    begin = 0
    for level, (rows, columns) in enumerate(shapes.tolist()):
        plane = value[:, begin : begin + rows * columns].reshape(B, rows, columns, heads, width)
        plane = F.pad(plane, (0, 0, 0, 0, 1, 1, 1, 1))
        begin += rows * columns
        for point in range(places.shape[4]):
            x = places[:, :, :, level, point, 0] * columns + 0.5  # in the padded plane, centres at whole numbers
            y = places[:, :, :, level, point, 1] * rows + 0.5
            for dx, dy in ((0, 0), (0, 1), (1, 0), (1, 1)):
                column, row = x.floor() + dx, y.floor() + dy
                share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                batch = torch.arange(B, device=value.device)[:, None, None]
                head = torch.arange(heads, device=value.device)[None, None]
                sample = plane[batch, row.long().clamp(0, rows + 1), column.long().clamp(0, columns + 1), head]
                out = out + (share * weights[:, :, :, level, point])[..., None] * sample
    return out.flatten(2)


def test_deformable_attention_is_the_definition(device):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    inputs, shapes, start = deformable_inputs(device)
    expected = deformable_attention(inputs[0], shapes, *inputs[1:])
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs)
    actual = MultiScaleDeformableAttnFunction.apply(inputs[0], shapes, start, *inputs[1:], 64)
    grads = torch.autograd.grad((actual * weight).sum(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-6)


def test_deformable_attention_takes_half_precision(device):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    inputs, shapes, start = deformable_inputs(device, torch.float32)
    half = inputs[0].detach().half().requires_grad_()
    out = MultiScaleDeformableAttnFunction.apply(half, shapes, start, *inputs[1:], 64)
    out.sum().backward()
    assert out.dtype == half.grad.dtype == torch.float16


def test_layers_of_mmcv_run_under_autocast(device):
    from mmcv.ops import RoIAlign, batched_nms

    with torch.autocast(device, dtype=torch.bfloat16):
        maps = nn.Conv2d(3, 4, 3, padding=1).to(device)(torch.randn(1, 3, 16, 16, device=device))
        rois = torch.tensor([[0.0, 0.0, 0.0, 32.0, 24.0]], device=device)
        pooled = RoIAlign(7, 0.25)(maps, rois)
        boxes = made_up_boxes(9, device)
        settings = dict(type="nms", iou_threshold=0.5)
        kept, _ = batched_nms(boxes, torch.rand(9, device=device).bfloat16(), torch.arange(9, device=device), settings)
    assert pooled.dtype == torch.bfloat16 and len(kept) == 9


def test_what_is_not_supplied_says_so():
    from mmcv.ops import RoIAlign, soft_nms

    with pytest.raises(NotImplementedError, match=r"'softnms'.*compiled mmcv"):
        soft_nms(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([0.5]))
    with pytest.raises(NotImplementedError, match="pool_mode='avg'"):
        RoIAlign(2, pool_mode="max")(torch.zeros(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]))
    with pytest.raises(NotImplementedError, match="weights of classes"):
        sys.modules["mmcv._ext"].sigmoid_focal_loss_forward(
            torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), torch.ones(2), torch.zeros(1, 2), 2.0, 0.25
        )


def test_compiled_operators_are_left_alone(monkeypatch):
    from mmengine.utils.dl_utils import mmcv_full_available

    assert not mmcv_full_available()
    compiled = type(sys)("mmcv._ext")
    monkeypatch.setitem(sys.modules, "mmcv._ext", compiled)
    assert not _mm_operators.install() and sys.modules["mmcv._ext"] is compiled
    monkeypatch.delitem(sys.modules, "mmcv._ext")
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    assert not _mm_operators.install() and "mmcv._ext" not in sys.modules


@pytest.mark.parametrize("package, version", [("mmcv", "2.2.0"), ("mmengine", "0.9.0")])
def test_versions_that_do_not_fit_are_refused(package, version, monkeypatch):
    monkeypatch.setattr(sys.modules[package], "__version__", version)
    with pytest.raises(ImportError, match=rf"{package} {version}.*visionattn\[mm\]"):
        visionattn.integrations.mm.check_stack()


@pytest.mark.parametrize(
    "missing, message", [(["mmcv"], "needs mmcv"), (["mmseg", "mmdet"], "neither"), (["ftfy"], "imports ftfy")]
)
def test_missing_packages_are_named_with_the_extra(missing, message, monkeypatch):
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name in missing else find(name))
    with pytest.raises(ImportError, match=rf"{message}.*visionattn\[mm\]"):
        visionattn.integrations.mm.check_stack()
