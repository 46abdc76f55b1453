"""Grad-CAM, effective receptive fields and attention distances, by their definitions on models made for it."""

import pytest
import timm
import torch
from torch import nn

import visionattn
from visionattn.explain import attention_distances, grad_cam, receptive_fields, record
from visionattn.heads.medusa import Medusa

SMALL = [name for name in visionattn.list_models("test_*") if name != "test_ninformer"]
# tokens, maps with the channels last, ordinary maps
TIMM = {
    "test_vit": dict(img_size=(64, 96)),
    "swin_tiny_patch4_window7_224": dict(
        img_size=(64, 96), window_size=2, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
    ),
    "test_efficientnet": {},
}


def made(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=3, **kwargs).eval()


class Corner(nn.Module):
    """Two channels, the means of the red and the green of 8 x 8 patches; class 0 likes red, class 1 green."""

    num_classes = num_features = 2

    def __init__(self):
        super().__init__()
        self.stage = nn.AvgPool2d(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.feature_info = [dict(num_chs=2, reduction=8, module="stage")]

    def forward(self, x):
        return self.stage(x[:, :2] * self.scale).mean((2, 3))


def test_class_activation_is_where_the_class_is():
    image = torch.zeros(1, 3, 32, 48)
    image[:, 0, :8, :8] = 1
    image[:, 1, 24:, 40:] = 1
    red, green = (grad_cam(Corner(), image, target) for target in (0, 1))
    assert red.heat.shape == (32, 48) and red.heat[:4, :4].min() > 0.9 and red.heat[16:].max() < 0.05
    assert green.heat[28:, 44:].min() > 0.9 and green.heat[:16].max() < 0.05
    assert red.layer == "stage" and red.probability == pytest.approx(0.5)


def test_network_around_a_backbone_has_the_last_map_of_the_backbone():
    model = Medusa("test_biformer", num_classes=3).eval()
    assert grad_cam(model, torch.randn(1, 3, 64, 64)).layer == "backbone.stages.3"


OWN = ("test_biformer", "test_overlock")  # the others are maps of the last stage like BiFormer's
OTHERS = [pytest.param(name, marks=pytest.mark.thorough) for name in SMALL if name not in OWN]


@pytest.mark.parametrize("name", [*OWN, *OTHERS, *TIMM])
def test_every_model_has_a_class_activation(name):
    model = made(name, **TIMM.get(name, {}))
    image = torch.randn(1, 3, 64, 96)
    found = [grad_cam(model, image, target) for target in range(3)]
    assert all(one.heat.shape == (64, 96) and one.heat.min() >= 0 for one in found)
    assert max(one.heat.max() for one in found) == pytest.approx(1, abs=1e-3)
    assert sum(one.probability for one in found) == pytest.approx(1, abs=1e-5)
    assert grad_cam(model, image).target == max(range(3), key=lambda i: found[i].probability)


def test_model_is_left_as_it_was():
    model = made("test_biformer").train()
    model.head.fc.weight.requires_grad_(False)
    model.stem[0].bias.grad = torch.ones_like(model.stem[0].bias)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    grad_cam(model, torch.randn(1, 3, 64, 64))
    receptive_fields(model, torch.randn(2, 3, 64, 64))
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    assert model.training and not model.head.fc.weight.requires_grad and model.stem[0].weight.requires_grad
    assert (model.stem[0].bias.grad == 1).all() and model.stem[0].weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_class_activation_errors():
    model, image = made("test_biformer"), torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="class 3: the model has the classes 0 to 2"):
        grad_cam(model, image, 3)
    with pytest.raises(ValueError, match="no layer 'stages.9.norm'; it has"):
        grad_cam(model, image, layer="stages.9.norm")
    with pytest.raises(ValueError, match="layer 'head.fc' gives .* no map"):
        grad_cam(model, image, layer="head.fc")
    with pytest.raises(ValueError, match="needs a classifier"):
        grad_cam(timm.create_model("test_biformer", num_classes=0, global_pool=""), image)


class Window(nn.Module):
    """A map that is the mean of the image over squares of ``side`` pixels around each."""

    def __init__(self, side):
        super().__init__()
        self.pool = nn.AvgPool2d(side, stride=1, padding=side // 2)

    def forward_intermediates(self, x, intermediates_only):
        return [self.pool(x)]


def test_receptive_field_of_a_mean_is_its_square():
    [found] = receptive_fields(Window(7), torch.randn(3, 2, 21, 31))
    expected = torch.zeros(21, 31, dtype=torch.float64)
    expected[7:14, 12:19] = 1 / 49
    torch.testing.assert_close(found.heat, expected)
    assert found.ratios[0.99] == pytest.approx(49 / (21 * 31)) and found.ratios[0.5] == pytest.approx(25 / (21 * 31))


def test_receptive_fields_of_backbones():
    *_, last = receptive_fields(made("test_activator"), torch.randn(2, 3, 64, 64))  # patches never meet
    assert last.ratios[0.99] <= 64 / 4096 and (last.heat > 0).sum() == 64
    assert (last.heat[32:40, 32:40] > 0).all()
    fields = receptive_fields(made("test_nat"), torch.randn(2, 3, 64, 64), batch=1)
    assert [field.stage for field in fields] == [1, 2, 3, 4]
    areas = [field.ratios[0.5] for field in fields]
    assert areas == sorted(areas) and areas[0] < 0.1
    assert all(field.heat.sum().item() == pytest.approx(1) for field in fields)


def test_receptive_field_errors():
    with pytest.raises(ValueError, match="has no forward_intermediates"):
        receptive_fields(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\]"):
        receptive_fields(Window(3), torch.zeros(0, 3, 8, 8))
    with pytest.raises(ValueError, match=r"shares=\(0,\)"):
        receptive_fields(Window(3), torch.zeros(1, 3, 8, 8), shares=(0,))


def test_attention_distance_of_known_weights():
    """With all scores alike a layer's distance is the mean over its window."""
    model = made("test_davit")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".attn.qkv." in key:
                parameter.zero_()
    with torch.no_grad(), record(model) as maps:
        model(torch.randn(1, 3, 64, 64))
    first = attention_distances(maps)[0]
    place = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    assert first.layer == "stages.0.blocks.0.0.attn" and first.stage == 1
    assert first.pixels.tolist() == pytest.approx([4 * torch.cdist(place, place).mean().item()], rel=1e-5)
    place = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    assert first.uniform == pytest.approx(4 * torch.cdist(place, place).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "name, layers", [("test_overlock", 6), ("test_lgvit", 3), ("test_litv2", 3), ("test_patnet", 1)]
)
def test_attention_distances_of_families(name, layers):
    model = made(name)
    with torch.no_grad(), record(model) as maps:
        model(torch.randn(1, 3, 52, 75))  # padded, or enlarged, maps
    found = attention_distances(maps)
    assert len(found) == layers == len({entry.layer for entry in found})
    for entry in found:
        assert (entry.pixels > 0).all() and entry.pixels.max() < 92 and 0 < entry.uniform < 92
