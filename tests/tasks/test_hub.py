"""Models that go to a folder or the hub and come back."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import timm.models._hub as timm_hub
import torch
import untrained_runs
from timm.models import save_for_hf
from torch import nn

from visionattn._writing import SavingError
from visionattn.cli import main
from visionattn.tasks import hub
from visionattn.tasks.cards import card, card_text, papers
from visionattn.tasks.export import Exportable, Settings, export, from_name, from_run
from visionattn.tasks.networks import make_classifier


def same_outputs(first, second, channels, size=64):
    x = torch.randn(2, channels, size, size)
    with torch.no_grad():
        return torch.equal(first.eval()(x), second.eval()(x))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("test_biformer", {}),
        ("test_biformer", dict(num_classes=7, in_chans=1)),
        ("test_davit", dict(num_classes=3, in_chans=4)),
        ("test_overlock", dict(num_classes=5)),
        ("test_patnet", dict(in_chans=2)),
        ("test_litv2", dict(num_classes=4)),
        ("test_dinat", dict(num_classes=4)),
    ],
)
def test_timm_round_trip_through_a_folder(name, kwargs, tmp_path):
    model = timm.create_model(name, **kwargs)
    described = {}
    if "in_chans" in kwargs:  # timm 1.0.29 records neither
        size = (kwargs["in_chans"], *model.pretrained_cfg["input_size"][1:])
        args = dict(in_chans=kwargs["in_chans"])
        described = dict(model_args=args, model_config=dict(pretrained_cfg=dict(input_size=size)))
    save_for_hf(model, tmp_path, safe_serialization=True, **described)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert again.num_classes == model.num_classes
    assert same_outputs(model, again, kwargs.get("in_chans", 3))


def test_run_becomes_a_folder_that_timm_loads(tmp_path, capsys):
    run = untrained_runs.classification_run(tmp_path / "run", drop_path_rate=0.1)
    folder = tmp_path / "out" / "model"
    main(["export", "--run", str(run), "--format", "hub", "--license", "cc0-1.0", "--output", str(folder)])
    assert f"local-dir:{folder}" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == sorted(hub.FILES)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same_outputs(from_run(run).model, model, 1)
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["input_size"]) == (1, 48, 48) and [*data["mean"], *data["std"]] == [0.4, 0.3]
    text = (folder / "README.md").read_text()
    assert "license: cc0-1.0" in text and "top-1 62.50 % (validation split, last epoch)" in text
    assert "validation loss 0.9000" in text and "arXiv:2303.08810" in text and "Published" not in text
    (run / "eval.json").write_text(json.dumps(dict(top1=60.0, top5=100.0, images=40, split="val")))
    assert "top-1 60.00 % (40 images of the split val, best checkpoint)" in card_text(card(from_run(run), run), "x")


def test_weights_that_a_run_began_with_are_not_of_the_model(tmp_path):
    begun = dict(pretrained_cfg_overlay=dict(file="start.pth"), pretrained_cfg="untrained", checkpoint_path="")
    run = untrained_runs.classification_run(tmp_path / "run", in_chans=3, cache_dir="x", drop_path_rate=0.1, **begun)
    hub.save_folder(from_run(run), tmp_path / "model", run)
    assert from_run(run).arguments == dict(drop_path_rate=0.1)
    assert same_outputs(from_run(run).model, timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True), 3)


def test_run_of_a_network_around_a_backbone_is_refused(tmp_path):
    model = dict(_target_="visionattn.heads.medusa.Medusa", backbone="test_resnet", body_dim=8, body_size=16)
    network = make_classifier(model, 3, 1)
    data = timm.data.resolve_model_data_config(network) | dict(input_size=[1, 64, 64], mean=[0.4], std=[0.3])
    hparams = dict(classes=["a", "b", "c"], in_chans=1, model=model, data=data)
    run = untrained_runs.save_run(tmp_path / "run", hparams, network)
    with pytest.raises(SystemExit, match="Medusa test_resnet is no classifier that timm knows"):
        main(["export", "--run", str(run), "--format", "hub", "--output", str(tmp_path / "model")])
    export(from_run(run), Settings("safetensors"), tmp_path / "weights.safetensors")  # under its own keys


def test_place_that_takes_no_folder_is_named(tmp_path):
    network = from_name("test_biformer", random_weights=True)
    (tmp_path / "file").touch()
    for folder in (Path("/proc/model"), tmp_path / "file" / "model"):
        with pytest.raises(SavingError, match=f"cannot write {folder}: "):
            hub.save_folder(network, folder)


def test_folder_is_replaced_only_by_a_model_that_loads(tmp_path, monkeypatch):
    network, folder = from_name("test_biformer", random_weights=True), tmp_path / "model"
    hub.save_folder(network, folder)
    before = (folder / "model.safetensors").read_bytes()
    (folder / "notes.txt").write_text("mine")
    other = from_name("test_biformer", random_weights=True)

    def corrupt(model, target, **options):
        save_for_hf(timm.create_model("test_biformer"), target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "save_for_hf", corrupt)
        with pytest.raises(ValueError, match="loads again differs"):
            hub.save_folder(other, folder)
    assert (folder / "model.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["model"]
    hub.save_folder(other, folder)
    assert (folder / "model.safetensors").read_bytes() != before and (folder / "notes.txt").is_file()


class NotThere(timm_hub.EntryNotFoundError):
    """The answer 404, without a response to build it from."""

    def __init__(self, message):
        Exception.__init__(self, message)


class Hub:
    """What timm asks of huggingface_hub, kept in a folder instead of sent."""

    def __init__(self, folder):
        self.folder, self.asked = folder, {}

    def __call__(self, **options):
        return self

    def create_repo(self, repo_id, **options):
        self.asked |= dict(repo_id=repo_id, private=options["private"])
        return type("Url", (str,), dict(repo_id=repo_id))(f"https://hub/{repo_id}")

    def file_exists(self, **options):
        return False

    def get_hf_file_metadata(self, **options):
        raise NotThere("README.md")

    def upload_folder(self, folder_path, **options):
        shutil.copytree(folder_path, self.folder)
        return "https://hub/commit/1"


@pytest.fixture
def pushed(tmp_path, monkeypatch):
    """A hub that keeps what is uploaded."""
    server = Hub(tmp_path / "uploaded")
    monkeypatch.setattr(timm_hub, "HfApi", server, raising=False)
    for name in ("create_repo", "upload_folder", "get_hf_file_metadata"):  # older timm calls functions
        monkeypatch.setattr(timm_hub, name, getattr(server, name), raising=False)
    return server


def test_push_uploads_what_timm_loads(tmp_path, pushed, capsys):
    run = untrained_runs.classification_run(tmp_path / "run")
    main(["export", "--run", str(run), "--format", "hub", "--push", "someone/owls", "--private"])
    assert "uploaded: https://hub/commit/1" in capsys.readouterr().out
    assert pushed.asked == dict(repo_id="someone/owls", private=True)
    names = {path.name for path in pushed.folder.iterdir()}
    assert names == set(hub.FILES)  # no pickle
    model = timm.create_model(f"local-dir:{pushed.folder}", pretrained=True)
    assert same_outputs(from_run(run).model, model, 1)
    assert "license: other" in (pushed.folder / "README.md").read_text()


def test_card_of_published_weights_reads_the_tables():
    network = from_name("biformer_t", random_weights=True)
    network.weights = "published"
    text = card_text(card(network), "biformer_t")
    assert "license: mit" in text and "81.4 % (ImageNet-1K, https://github.com/rayleizhu/BiFormer)" in text
    assert (
        "**Verified top-1:** not run" in text and "**Parameters (M):** 13.14" in text and "**MACs (G):** 2.216" in text
    )
    assert "8478 images/s (batch 128, 224 x 224, bf16; NVIDIA H100 80GB HBM3" in text
    assert "title = {BiFormer: Vision Transformer with Bi-Level Routing Attention}" in text
    network.weights = "random"
    text = card_text(card(network), "biformer_t")
    assert "license: other" in text and "random weights" in text and "81.4" not in text


def test_every_family_names_its_paper():
    names = ("biformer_s", "davit_t", "litv2_s", "nat_t", "overlock_t", "patnet_s", "activator_p4_32", "lgvit_d24")
    for name in names:
        found = papers(name)
        assert found is not None and "arXiv:" in found[0] and "https://github.com/" in found[1], name
    assert papers("resnet18") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_nat", "--random-weights"], "needs --output FOLDER"),
        (["test_nat", "--random-weights", "--push", "owls"], "expected OWNER/NAME"),
        (["test_nat", "--random-weights", "--push", "a/b", "--size", "64"], "leave out --dynamic, --size"),
    ],
)
def test_wrong_command_for_the_hub_is_explained(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(["export", "--format", "hub", *arguments])


def test_network_that_timm_does_not_know_is_refused(tmp_path):
    masks = Exportable("unet", "segmentation", nn.Identity(), ["a", "b"], 3, (64, 64), False, {})
    with pytest.raises(ValueError, match="no classifier that timm knows"):
        hub.save_folder(masks, tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        hub.save_folder(from_name("test_nat", random_weights=True), Path(tmp_path, "file"))
