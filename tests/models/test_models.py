"""What holds for every backbone of the package."""

import csv
import math
from pathlib import Path

import pytest
import timm
import torch
from helpers import assert_close

import visionattn

NAMES = visionattn.list_models()
GOLDEN = {row["name"]: row for row in csv.DictReader((Path(__file__).parent / "golden.csv").open())}
EVERY_MODEL = pytest.mark.parametrize("name", NAMES)
ISOTROPIC = ("activator", "lgvit", "ninformer")
# from so many parameters on the smaller models of a family show the same
LARGE = {name for name, row in GOLDEN.items() if int(row["params"]) > 20e6}
_MARKED = [pytest.param(name, marks=[pytest.mark.thorough] if name in LARGE else []) for name in NAMES]
EVERY_MODEL_OR_ITS_FAMILY = pytest.mark.parametrize("name", _MARKED)
EVERY_PYRAMID_OR_ITS_FAMILY = pytest.mark.parametrize(
    "name", [p for p in _MARKED if not p.values[0].removeprefix("test_").startswith(ISOTROPIC)]
)


def size_of(name):
    """Height and width of a small image that the model takes."""
    cfg = timm.get_pretrained_cfg(name)
    return cfg.input_size[1:] if cfg.fixed_input_size else (64, 64)


@EVERY_MODEL
def test_initial_network_is_the_recorded_one(name):
    row = GOLDEN[name]
    model = timm.create_model(name).eval()
    shape = (1, 3, *size_of(name))
    with torch.no_grad():
        logits = model(torch.linspace(-1, 1, math.prod(shape)).reshape(shape))
    assert sum(p.numel() for p in model.parameters()) == int(row["params"])
    assert logits.square().mean().sqrt().item() == pytest.approx(float(row["logit_rms"]), rel=1e-4)


def test_golden_rows_belong_to_models():
    assert sorted(GOLDEN) == NAMES


@EVERY_PYRAMID_OR_ITS_FAMILY
def test_features_come_at_four_strides(name):
    model = timm.create_model(name, features_only=True)
    maps = model(torch.randn(2, 3, 65, 97))  # PATNet normalises one value per image, which takes two to train
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    sizes = [(17, 25), (9, 13), (5, 7), (3, 4)]
    floor = name == "biformer_stl" or "patnet" in name
    if floor or "litv2" in name:  # their patches drop what is left over of a map, the convolutions of the others pad
        sizes = [(16, 24) if floor else (17, 25), (8, 12), (4, 6), (2, 3)]
    assert [tuple(x.shape) for x in maps] == [
        (2, c, *s) for c, s in zip(model.feature_info.channels(), sizes, strict=True)
    ]


@EVERY_MODEL_OR_ITS_FAMILY
def test_features_can_be_chosen(name):
    model = timm.create_model(name, features_only=True, out_indices=(1, 3)).eval()
    whole = timm.create_model(name, features_only=True).eval()
    whole.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, *size_of(name))
    with torch.no_grad():
        expected = whole(x)
        for i, actual in zip((1, 3), model(x), strict=True):
            assert_close(f"map {i}", expected[i], actual, 1e-6)


@EVERY_MODEL_OR_ITS_FAMILY
def test_intermediates_end_in_the_features(name):
    model = timm.create_model(name).eval()
    x = torch.randn(1, 3, *size_of(name))
    with torch.no_grad():
        features = model.forward_features(x)
        final, maps = model.forward_intermediates(x, norm=True)
        (third,) = model.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)
    assert torch.equal(final, features) and torch.equal(maps[3], features) and torch.equal(maps[2], third)
    assert [x.shape[1] for x in maps] == [info["num_chs"] for info in model.feature_info]
    with torch.no_grad():
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        assert_close("logits", model(x), model.forward_head(features), 1e-6)


@EVERY_MODEL_OR_ITS_FAMILY
def test_layer_groups_cover_all_parameters(name):
    model = timm.create_model(name)
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse))
        assert sum(len(group) for group in groups.values()) == len(list(model.parameters()))
        blocks = sum(len(part.blocks) for part in model.modules() if hasattr(part, "blocks"))
        assert len(groups) > (4 if coarse else blocks)


def test_classifier_can_be_replaced():
    model = timm.create_model("test_biformer").double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and model.get_classifier().weight.dtype == torch.float64
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, model.num_features, 2, 2)
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7) and model.get_classifier().weight.dtype == torch.float64


def test_pruned_network_gives_the_same_maps():
    model = timm.create_model("test_biformer").eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([0, 2]) == [0, 2]
    actual = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    assert len(model.stages) == 3 and all(map(torch.equal, expected, actual))
    assert model.forward_features(x).shape[1] == model.num_features == 48


def test_unknown_output_format_is_named():
    with pytest.raises(ValueError, match=r"output_fmt='NLC'.*'NCHW'"):
        timm.create_model("test_biformer").forward_intermediates(torch.zeros(1, 3, 64, 64), output_fmt="NLC")


def test_model_can_be_scripted():
    model, x = timm.create_model("test_biformer").eval(), torch.randn(1, 3, 65, 97)
    assert_close("logits", model(x), torch.jit.script(model)(x), 1e-6)


def test_no_name_shadows_one_of_timm():
    theirs = vars(timm.models)  # its functions, which another registration leaves in place
    assert sum(name in theirs for name in timm.list_models()) > 500
    assert not [name for name in NAMES if name in theirs]
