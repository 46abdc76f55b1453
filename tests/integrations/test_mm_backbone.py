"""The backbone that mmseg and mmdet build: norms, frozen parts, weights from files, and checkpoints of mmengine."""

import copy
import os
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from helpers import load_reference, published_weights
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file
from timm.layers import LayerNorm2d
from torch import nn

from visionattn.integrations import _mm_checkpoints
from visionattn.integrations.mm import VisionAttn

pytestmark = pytest.mark.mm
IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)


def kinds(backbone):
    return [(type(norm), getattr(norm, "eps", None)) for norm in backbone.norms]


# what every map is normed by in the papers' own detectors and segmenters
@pytest.mark.parametrize(
    "name, norm",
    [
        ("test_biformer", (LayerNorm2d, 1e-6)),
        ("test_litv2", (LayerNorm2d, 1e-5)),
        ("test_davit", (LayerNorm2d, 1e-5)),
        ("test_overlock", (LayerNorm2d, 1e-6)),
        ("test_patnet", (nn.BatchNorm2d, 1e-5)),
        ("test_nat", (LayerNorm2d, 1e-5)),
        ("resnet10t", (nn.Identity, None)),
    ],
)
def test_maps_are_normed_as_published(name, norm):
    indices = (1, 2, 3, 4) if name == "resnet10t" else (0, 1, 2, 3)
    backbone = MODELS.build(dict(type="VisionAttn", model_name=name, out_indices=indices)).eval()
    assert kinds(backbone) == [norm] * 4
    maps, bare = backbone(IMAGE), backbone.body(IMAGE)
    assert isinstance(maps, tuple) and [x.shape[1] for x in maps] == backbone.channels
    for x, y, layer in zip(maps, bare, backbone.norms, strict=True):
        torch.testing.assert_close(x, layer(y))


def test_norms_can_be_chosen_and_left_out():
    backbone = VisionAttn("test_litv2", norm_indices=(1, 2, 3))
    assert kinds(backbone)[0] == (nn.Identity, None) and kinds(backbone)[1] == (LayerNorm2d, 1e-5)
    assert kinds(VisionAttn("test_litv2", out_norm=None)) == [(nn.Identity, None)] * 4
    assert kinds(VisionAttn("test_litv2", out_indices=(3,), out_norm="batch")) == [(nn.BatchNorm2d, 1e-5)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(model_name="biformer_x"), "unknown backbone 'biformer_x'; nearest: .*biformer_"),
        (dict(model_name="test_nat", out_norm="lair"), "unknown out_norm 'lair'; nearest: layer"),
        (dict(model_name="test_nat", out_indices=(0, 1), norm_indices=(2,)), "norm_indices"),
        (dict(model_name="test_nat", overview=True), "overview=True is for OverLoCK"),
        (dict(model_name="test_nat", frozen_stages=5), "frozen_stages=5: test_nat has 4 stages"),
        (dict(model_name="resnet10t", out_indices=(1,), frozen_stages=1), "resnet10t has 0 stages"),
        (dict(model_name="test_nat", pretrained=True, init_cfg=dict(type="Pretrained", checkpoint="a")), "twice"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionAttn(**arguments)


def test_overlock_adds_its_overview_to_the_last_map():
    plain = VisionAttn("test_overlock").eval()
    backbone = VisionAttn("test_overlock", overview=True).eval()
    backbone.load_state_dict(plain.state_dict(), strict=False)
    assert backbone.overview.scale.weight.allclose(torch.tensor(1e-5))
    backbone.overview.scale.weight.data.fill_(0.5)
    seen = []
    backbone.body.model.stages[2].overview.register_forward_hook(lambda module, args, out: seen.append(out))
    expected, maps = plain(IMAGE), backbone(IMAGE)
    torch.testing.assert_close(maps[:3], expected[:3])
    torch.testing.assert_close(copy.deepcopy(backbone)(IMAGE), maps)
    extra = backbone.overview.proj(backbone.overview.norm(seen[0])) * 0.5
    torch.testing.assert_close(maps[3] - expected[3], extra, rtol=1e-4, atol=1e-5)


def test_frozen_stages_and_batch_norms_stay_as_they_are():
    backbone = VisionAttn("test_patnet", frozen_stages=1, norm_eval=True).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    sum(x.square().mean() for x in backbone(torch.randn(4, 3, 64, 64))).backward()
    trained = {name for name, parameter in backbone.body.named_parameters() if parameter.requires_grad}
    assert trained and not [name for name in trained if name.startswith(("model.stem", "model.stages.0"))]
    changed = [key for key, value in backbone.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and all(key.startswith("norms.") for key in changed)  # the maps' own norms learn
    assert not backbone.body.model.stages[0].training and backbone.body.model.stages[1].training


def test_blocks_are_recomputed_on_demand():
    backbone = VisionAttn("test_davit", with_cp=True)
    assert all(stage.grad_checkpointing for stage in backbone.body.model.stages)


# weights from files


@pytest.fixture(scope="module")
def nat_mini():
    manifest, _ = load_reference("backbones/nat_mini")
    return {key: tensor.float() for key, tensor in published_weights(manifest).items()}


@pytest.fixture(scope="module")
def nat_mini_maps(nat_mini):
    overlay = dict(state_dict=dict(nat_mini))
    model = timm.create_model("nat_mini", features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    return model.eval()(IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model.pth", "detector.safetensors"])
def test_published_checkpoints_are_converted(kind, nat_mini, nat_mini_maps, tmp_path):
    path, prefix = tmp_path / kind, None
    if kind == "model.pth":
        torch.save(dict(model=nat_mini, epoch=300), path)
    else:
        prefix = "backbone."
        detector = {prefix + key: x.contiguous() for key, x in nat_mini.items()}
        save_file({"neck.weight": torch.zeros(1), **detector}, path)
    setting = dict(type="Pretrained", checkpoint=str(path), prefix=prefix)
    backbone = MODELS.build(dict(type="VisionAttn", model_name="nat_mini", out_norm=None, init_cfg=setting)).eval()
    backbone.init_weights()
    for actual, expected in zip(backbone(IMAGE), nat_mini_maps, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_weights_that_do_not_fit_are_named(nat_mini, tmp_path):
    weights = dict(nat_mini)
    del weights["levels.1.blocks.0.norm1.weight"]
    weights["surplus.weight"] = torch.zeros(2)
    weights["patch_embed.norm.weight"] = torch.zeros(7)
    torch.save(weights, tmp_path / "other.pth")
    backbone = VisionAttn("nat_mini", pretrained=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError) as error:
        backbone.init_weights()
    for part in (
        "other.pth does not fit nat_mini",
        "stages.1.blocks.0.norm1.weight",
        "surplus.weight",
        "stem.2.weight [7]",
    ):
        assert part in str(error.value)


def test_own_checkpoints_and_those_of_timm_are_taken(tmp_path):
    source = VisionAttn("test_davit").eval()
    source.norms[2].weight.data.fill_(3.0)
    torch.save({f"backbone.{key}": value for key, value in source.state_dict().items()}, tmp_path / "own.pth")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "own.pth"), prefix="backbone.")
    backbone = VisionAttn("test_davit", init_cfg=init_cfg).eval()
    backbone.init_weights()
    torch.testing.assert_close(backbone(IMAGE), source(IMAGE))
    resnet = timm.create_model("resnet10t").eval()
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    backbone = VisionAttn("resnet10t", out_indices=(1, 2, 3, 4), pretrained=str(tmp_path / "resnet.pth")).eval()
    backbone.init_weights()
    torch.testing.assert_close(backbone(IMAGE)[-1], resnet.forward_features(IMAGE))
    wrong = VisionAttn("test_nat", pretrained=str(tmp_path / "resnet.pth"))
    with pytest.raises(ValueError, match=r"resnet.pth does not fit test_nat"):
        wrong.init_weights()


def test_mmseg_finds_the_models_by_its_own_wrapper():
    from mmseg.registry import MODELS as SEGMENTERS
    from mmseg.utils import register_all_modules

    register_all_modules()
    setting = dict(type="TIMMBackbone", model_name="test_nat", pretrained=False, features_only=True)
    assert [x.shape[-1] for x in SEGMENTERS.build(setting)(IMAGE)] == [16, 8, 4, 2]


# checkpoints of mmengine


def test_what_mmengine_writes_is_read(tmp_path):
    history = HistoryBuffer()
    for value in (1.0, 3.0):
        history.update(value)
    written = dict(
        message_hub=dict(log_scalars=OrderedDict(loss=history), runtime_info=dict(best=np.float64(0.5), n=np.int64(3))),
        meta=dict(palette=np.arange(6, dtype=np.uint8).reshape(2, 3), names=np.array(["a"]), info=ConfigDict(a=(1,))),
    )
    torch.save(written, tmp_path / "iter_1.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "iter_1.pth")
    for name in ("iter_1.pth", "link.pth"):
        found = CheckpointLoader.load_checkpoint(str(tmp_path / name))
        assert found["message_hub"]["log_scalars"]["loss"].mean() == 2.0
        assert found["message_hub"]["runtime_info"] == dict(best=0.5, n=3)
        assert found["meta"]["palette"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert found["meta"]["names"].tolist() == ["a"] and found["meta"]["info"].a == (1,)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    "function, arguments",
    [(os.mkdir, ("made",)), (getattr, (OrderedDict, "clear")), (getattr, (HistoryBuffer, "__init__")), (eval, ("1",))],
    ids=["mkdir", "getattr-other", "getattr-init", "eval"],
)
def test_what_could_run_code_is_refused(function, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=Command(function, *arguments)), "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth was not unpickled.*add_safe_globals"):
        CheckpointLoader.load_checkpoint("bad.pth")
    assert not os.path.exists("made")


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pth"):
        CheckpointLoader.load_checkpoint(str(tmp_path / "none.pth"))
    for name in ("short.pth", "short.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04")
        with pytest.raises(ValueError, match=rf"short\.{name.split('.')[1]}"):
            CheckpointLoader.load_checkpoint(str(tmp_path / name))


def test_addresses_that_end_alike_are_kept_apart(tmp_path, monkeypatch):
    def download(url, path, **options):
        torch.save(dict(url=url), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    urls = ["https://a.example/x/model.pth", "http://b.example/model.pth?download=1"]
    for url in urls:
        assert CheckpointLoader.load_checkpoint(url) == dict(url=url)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert _mm_checkpoints.read_url(urls[0], model_dir=str(tmp_path / "checkpoints")) == dict(url=urls[0])
