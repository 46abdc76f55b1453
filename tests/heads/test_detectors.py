"""Detectors: every kind on a backbone of the package, any size, images without objects, other backbones' maps."""

import re
from pathlib import Path

import pytest
import timm
import torch

from visionattn.heads.detection import DETECTORS, Detector, FeaturePyramid

DOCS = Path(__file__).parents[2] / "docs" / "detection.md"


def scenes():
    images = [torch.rand(3, 70, 97), torch.rand(3, 64, 50)]
    masks = torch.zeros(1, 70, 97, dtype=torch.uint8)
    masks[:, 8:50, 5:60] = 1
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    nothing["masks"] = torch.zeros(0, 64, 50, dtype=torch.uint8)
    return images, [dict(boxes=torch.tensor([[5.0, 8, 60, 50]]), labels=torch.tensor([2]), masks=masks), nothing]


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_learns_and_detects_at_any_size(detector):
    torch.manual_seed(0)
    few = {} if detector in ("retinanet", "fcos") else dict(box_detections_per_img=3, box_score_thresh=0.0)
    few = few or dict(detections_per_img=3, score_thresh=0.0)
    model = Detector("test_biformer", detector, num_classes=2, channels=64, min_size=None, detector_kwargs=few)
    images, targets = scenes()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        results = model(images)
    for image, found in zip(images, results, strict=True):
        assert len(found["boxes"]) == 3 and set(found["labels"].tolist()) <= {1, 2}
        assert (found["boxes"] >= 0).all() and (found["boxes"][:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
        if detector == "mask_rcnn":
            assert found["masks"].shape == (3, 1, *image.shape[1:])


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_batch_without_any_object_has_a_finite_gradient(detector):
    torch.manual_seed(0)
    model = Detector("test_patnet", detector, num_classes=2, channels=64, min_size=None)
    images, targets = scenes()
    sum(model(images[1:] * 2, targets[1:] * 2).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_resizing_gives_boxes_in_the_images_own_pixels():
    torch.manual_seed(0)
    model = Detector("test_patnet", "fcos", channels=64, min_size=96, max_size=128).eval()
    model.net.score_thresh = 0.0
    seen = []
    model.net.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        (found,) = model([torch.rand(3, 40, 80)])
    assert seen[0][-2:] == (64, 128)  # 128 x 64: the longer side is the limit
    assert found["boxes"][:, 0::2].max() <= 80 and found["boxes"][:, 1::2].max() <= 40


def test_maps_with_channels_last_are_turned():
    small = dict(strict_img_size=False, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    pyramid = FeaturePyramid("swin_tiny_patch4_window7_224", channels=32, coarser="pool", **small).eval()
    assert pyramid.channels_last and pyramid.strides == [4, 8, 16, 32, 64]
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = pyramid(x)
        direct = pyramid.fpn({str(i): y.permute(0, 3, 1, 2) for i, y in enumerate(pyramid.body(x))})
    shapes = [tuple(y.shape) for y in maps.values()]
    assert shapes == [(1, 32, 16, 24), (1, 32, 8, 12), (1, 32, 4, 6), (1, 32, 2, 3), (1, 32, 1, 2)]
    assert all(torch.allclose(maps[key], direct[key], atol=1e-5) for key in maps)


def test_a_backbone_of_three_maps_has_a_pyramid_of_three():
    assert timm.create_model("levit_conv_128s", features_only=True).feature_info.reduction() == [16, 32, 64]
    assert FeaturePyramid("levit_conv_128s", channels=32).strides == [16, 32]
    assert FeaturePyramid("levit_conv_128s", (16, 32, 64), channels=32).strides == [16, 32, 64]
    assert FeaturePyramid("test_davit", (8, 16, 32), channels=32, coarser="p6p7").strides == [8, 16, 32, 64, 128]


def test_grey_images_are_normalized_with_the_mean_of_the_colours():
    model = Detector("test_biformer", "fcos", in_chans=1, channels=64, min_size=None)
    assert model.net.transform.image_mean == [pytest.approx((0.485 + 0.456 + 0.406) / 3)]
    model([torch.rand(1, 64, 64)], [dict(boxes=torch.tensor([[2.0, 2, 9, 9]]), labels=torch.tensor([1]))])


def test_frozen_statistics_stay():
    model = Detector("resnet18", "retinanet", num_classes=2, channels=32, min_size=None, norm_eval=True).train()
    before = model.net.backbone.body.bn1.running_mean.clone()
    images, targets = scenes()
    model(images, targets)
    assert torch.equal(model.net.backbone.body.bn1.running_mean, before)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(detector="retina"), "unknown detector 'retina'; nearest: retinanet"),
        (dict(backbone="biformer_x"), "unknown backbone 'biformer_x'; nearest: .*biformer_s"),
        (dict(backbone="test_lgvit"), "strides \\[16, 16, 16, 16\\]; a feature pyramid needs"),
        (dict(backbone="vit_tiny_patch16_224"), "a feature pyramid needs two or more different"),
        (dict(strides=(8, 64)), "strides=\\[8, 64\\] must ascend and be among \\[4, 8, 16, 32\\]"),
        (dict(detector="fcos", channels=48), "channels=48: FCOS"),
        (dict(num_classes=0), "num_classes=0"),
        (dict(convs=5), "convs=5"),
        (dict(coarser="p8"), "coarser='p8'"),
        (dict(detector_kwargs=dict(no_such=1)), "RetinaNet has no argument no_such"),
        (dict(backbone_kwargs=dict(no_such=1)), "gives no feature maps"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Detector(**{**dict(backbone="test_biformer", channels=32), **arguments})


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"wants images \[3, H, W\], got \[1, 8, 8\]"):
        Detector("test_patnet", channels=32).eval()([torch.zeros(1, 8, 8)])


def test_the_documented_use_in_torchvision_works():
    (snippet,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(snippet, names)
    assert set(names["losses"]) == {"classification", "bbox_regression"}
    assert set(names["found"]) == {"boxes", "labels", "scores"}
