"""Routed regions of a position, and heat maps over pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

import visionattn
from visionattn.explain import overlay, record, routed_regions
from visionattn.layers import RoutingAttention
from visionattn.ops import use_backend


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return visionattn.create_model("test_biformer", in_chans=1, num_classes=3).double().eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(1, 1, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_regions_are_those_that_the_output_depends_on(model, image):
    """Gradients of the attention's own output at the query reach exactly the pixels of the listed regions."""
    found = routed_regions(model, image, (41, 13))
    assert [(r.layer, r.stage) for r in found] == [(f"stages.{i}.blocks.0.attn", i + 1) for i in range(4)]
    attn = model.stages[0].blocks[0].attn
    with record(model) as maps, torch.no_grad():
        model(image)
    x = maps.calls[0].inputs[0].clone().requires_grad_()  # [1, 16, 24, C]
    local = attn.lepe.weight.detach().clone()
    with torch.no_grad():
        attn.lepe.weight.zero_()  # leaves what comes by attention
    try:
        attn(x)[0, 13 // 4, 41 // 4].sum().backward()
    finally:
        with torch.no_grad():
            attn.lepe.weight.copy_(local)
    reached = x.grad[0].abs().sum(-1) > 1e-14  # [16, 24], regions of 4 x 6
    reached = reached.repeat_interleave(4, 0).repeat_interleave(4, 1)
    mask = found[0].mask > 0
    query = torch.zeros_like(mask)
    x0, y0, x1, y1 = found[0].query
    query[y0:y1, x0:x1] = True
    assert (x0, y0, x1, y1) == (24, 0, 48, 16)
    assert torch.equal(reached & ~query, mask & ~query)  # at the query itself the query vector has a gradient too
    assert len(found[0].regions) == 1 and len(found[1].regions) == 4 and found[3].regions == ((0, 0, 96, 64),)


def test_mask_is_the_attention_of_the_position(model, image):
    """By the definition: softmax of the query with the keys of the listed regions, mean over heads."""
    found = routed_regions(model, image, (41, 13))[1]
    attn = model.stages[1].blocks[0].attn
    with record(model) as maps, torch.no_grad():
        model(image)
        q, k, _ = attn.qkv(maps.calls[1].inputs[0]).chunk(3, dim=-1)  # map of 8 x 12, regions of 2 x 3
    inside = torch.zeros(8, 12, dtype=torch.bool)
    for x0, y0, x1, y1 in found.regions:
        inside[y0 // 8 : y1 // 8, x0 // 8 : x1 // 8] = True
    assert inside.sum() == 4 * 6
    heads = []
    for i in range(2):
        part = slice(16 * i, 16 * i + 16)
        scores = attn.scale * (k[0, :, :, part] @ q[0, 13 // 8, 41 // 8, part])
        heads.append(scores.masked_fill(~inside, float("-inf")).flatten().softmax(0).view(8, 12))
    expected = torch.stack(heads).mean(0).repeat_interleave(8, 0).repeat_interleave(8, 1) / 64
    torch.testing.assert_close(found.mask, expected, rtol=1e-10, atol=1e-14)
    assert found.mask.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_recomputed_output_is_the_models(model, image, name):
    with use_backend(name), record(model) as maps, torch.no_grad():
        model(image)
    assert len(maps.attention()) == 4
    assert max(attention.error() for attention in maps.attention()) < 1e-12


@pytest.mark.parametrize("size", [(33, 70), (45, 31), (8, 9)])
def test_any_size_of_image(model, size):
    image = torch.randn(1, 1, *size, dtype=torch.float64)
    for found in routed_regions(model, image, (size[1] - 1, size[0] - 1)):
        x0, y0, x1, y1 = found.query
        assert 0 <= x0 < x1 == size[1] and 0 <= y0 < y1 == size[0]
        assert found.mask.shape == size and 0 <= found.mask.sum() <= 1 + 1e-9
        outside = found.mask.clone()
        for x0, y0, x1, y1 in found.regions:
            outside[y0:y1, x0:x1] = 0
        assert not outside.any()


def test_mode_and_hooks_are_restored(model, image):
    model.train()
    try:
        routed_regions(model, image, (0, 0))
        with record(model), pytest.raises(ValueError, match="call model.eval"):
            model(image)
        assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    finally:
        model.eval()


def test_errors_say_what_to_do(model, image):
    with pytest.raises(ValueError, match=r"\(96, 5\) lies outside the image of 96 x 64 pixels; x must be in \[0, 95\]"):
        routed_regions(model, image, (96, 5))
    with pytest.raises(ValueError, match="expected x and y in pixels"):
        routed_regions(model, image, "middle")
    with pytest.raises(ValueError, match=r"one image \[1, C, H, W\], got shape \[2, 1, 64, 96\]"):
        routed_regions(model, image.expand(2, -1, -1, -1), (0, 0))
    with pytest.raises(ValueError, match="NAT has no routed attention"):
        routed_regions(visionattn.create_model("test_nat"), torch.zeros(1, 3, 64, 64), (0, 0))
    with record(model) as maps, pytest.raises(ValueError, match="call the model inside"):
        maps.attention()
    with pytest.raises(ValueError, match="compiled or scripted"), record(torch.compile(model)):
        pass


def test_overlay_colours_the_warm_place():
    heat = torch.zeros(40, 60)
    heat[10:20, 30:40] = 0.02
    picture = overlay(Image.new("RGB", (60, 40), (90, 90, 90)), heat)
    pixels = np.asarray(picture).astype(int)
    assert picture.size == (60, 40) and picture.mode == "RGB"
    assert (pixels[0, 0] == 90).all()  # cold places stay as they are
    assert np.ptp(pixels[15, 35]) > 60 and (pixels[15, 35] == pixels[11, 31]).all()


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3), (3, 40, 60), (1, 40, 60)])
def test_overlay_takes_arrays_and_tensors(shape):
    for picture in (np.full(shape, 0.5), np.full(shape, 128, np.uint8), torch.full(shape, 0.5)):
        assert overlay(picture, np.ones((10, 15))).size == (60, 40)


def test_overlay_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="undo the normalisation first"):
        overlay(np.full((4, 4, 3), 2.1), np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"shape \[H, W\], got \[1, 4, 4\]"):
        overlay(np.ones((4, 4)), np.ones((1, 4, 4)))
    with pytest.raises(ValueError, match="not negative"):
        overlay(np.ones((4, 4)), -np.ones((4, 4)))
    with pytest.raises(ValueError, match=r"expected a picture .* got shape \[5, 4, 4\]"):
        overlay(np.ones((5, 4, 4)), np.ones((4, 4)))


def test_layer_names_are_those_of_the_model(model, image):
    modules = dict(model.named_modules())
    routed = [r.layer for r in routed_regions(model, image, (3, 3)) if isinstance(modules[r.layer], RoutingAttention)]
    assert len(routed) == 3
