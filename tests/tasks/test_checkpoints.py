"""Converted checkpoints, their index, and the table of models."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import timm
import torch

import visionattn
from visionattn.cli import main
from visionattn.tasks import zoo
from visionattn.tasks.checkpoints import convert_checkpoint, read_index, sha256, verify_checkpoint

ROOT = Path(__file__).parent.parent.parent
NAME = "test_biformer.untrained"
# our names to those of the published code, the other way round than the checkpoint filter
OFFICIAL = (
    ("stem.", "downsample_layers.0."),
    ("stages.1.downsample", "downsample_layers.1"),
    ("stages.2.downsample", "downsample_layers.2"),
    ("stages.3.downsample", "downsample_layers.3"),
    (".blocks.", "."),
    (".attn.qkv.", ".attn.qkv.qkv."),
    (".attn.proj.", ".attn.wo."),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."),
    ("head.fc.", "head."),
)


def official(model, dtype=torch.float32):
    weights = {}
    for key, tensor in model.state_dict().items():
        own = key
        for ours, theirs in OFFICIAL:
            key = key.replace(ours, theirs)
        if own.startswith("stages.3"):  # the dense stage names its layers otherwise
            key = key.replace(".attn.qkv.qkv.", ".attn.qkv.").replace(".attn.wo.", ".attn.proj.")
        weights[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return {"model": weights, "epoch": 299}


@pytest.fixture
def model():
    torch.manual_seed(4)
    return timm.create_model("test_biformer").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_converted_file_is_the_official_one(model, tmp_path, dtype, capsys):
    content = official(model, dtype)
    assert any(key.startswith("downsample_layers.") for key in content["model"])
    torch.save(content, tmp_path / "official.pth")
    folder = tmp_path / "checkpoints"
    main(["convert", NAME, str(tmp_path / "official.pth"), "--folder", str(folder), "--url", "https://example.org/x"])
    path = folder / f"{NAME}.safetensors"
    assert str(path) in capsys.readouterr().out
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    both = [
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), dtype=kept).eval()
        for file in (path, tmp_path / "official.pth")
    ]
    x = torch.randn(1, 3, 64, 64, dtype=kept)
    with torch.no_grad():
        assert torch.equal(both[0](x), both[1](x))
    row = verify_checkpoint(path)
    assert row["sha256"] == sha256(path) and row["source_sha256"] == sha256(tmp_path / "official.pth")
    assert row["license"] == "mit" and row["source_url"] == "https://example.org/x" and int(row["bytes"]) > 1e5
    assert sorted(p.name for p in folder.iterdir()) == ["index.csv", path.name]


def test_second_conversion_replaces_the_row(model, tmp_path):
    for value in (1.0, 2.0):
        model.head.fc.bias.data.fill_(value)
        torch.save(official(model), tmp_path / "official.pth")
        path = convert_checkpoint("test_biformer", tmp_path / "official.pth", tmp_path)
    assert list(read_index(tmp_path)) == [NAME]
    assert verify_checkpoint(path)["source_sha256"] == sha256(tmp_path / "official.pth")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="SHA-256"):
        verify_checkpoint(path)
    with pytest.raises(ValueError, match="no row for"):
        verify_checkpoint(tmp_path / "official.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        verify_checkpoint(tmp_path / "nothing.safetensors")


class Malicious:
    def __reduce__(self):
        return os.putenv, ("VISIONATTN_TEST_CONVERT", "ran")


@pytest.mark.parametrize("fault", ["missing", "truncated", "text", "other", "classes", "malicious"])
def test_wrong_file_leaves_nothing(model, tmp_path, fault):
    path, folder = tmp_path / "official.pth", tmp_path / "checkpoints"
    torch.save(official(model), path)
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif fault == "text":
        path.write_text("not a checkpoint")
    elif fault == "other":
        torch.save(timm.create_model("biformer_nano").state_dict(), path)
    elif fault == "classes":
        torch.save(official(timm.create_model("test_biformer", num_classes=21)), path)
    else:
        path.write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(SystemExit, match=r"\[21, 64\]" if fault == "classes" else "official.pth"):
        main(["convert", NAME, str(path), "--folder", str(folder)])
    assert not list(folder.glob("*"))


@pytest.mark.thorough
def test_pages_show_the_present_table():
    for path, text in zoo.pages_with_table(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"run python tools/update_zoo_table.py ({path.name})"


@pytest.fixture
def folder(tmp_path):
    """A folder with a good result for one model."""
    for name in ("published.csv", "index.csv", "agreement.csv"):
        shutil.copy(ROOT / "checkpoints" / name, tmp_path)
    columns = (tmp_path / "index.csv").read_text().splitlines()[0]
    (tmp_path / "index.csv").write_text(f"{columns}\nbiformer_t.in1k,x.safetensors,aa,1,1,x.pth,bb,,mit\n")
    return tmp_path


GOOD = dict(name="biformer_t.in1k", images=50000, classes=1000, skipped=0, checkpoint_sha256="aa", top1=81.37)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 81.37),
        ({"checkpoint_sha256": "bb"}, 81.37),
        ({"checkpoint_sha256": "cc"}, None),
        ({"checkpoint_sha256": None}, None),
        ({"images": 49999}, None),
        ({"classes": 100}, None),
        ({"skipped": 1}, None),
        ({"name": "biformer_s.in1k"}, None),
    ],
)
def test_only_a_whole_run_of_the_listed_weights_verifies(folder, change, expected, monkeypatch):
    (folder / "results").mkdir()
    (folder / "results" / "biformer_t.in1k.json").write_text(json.dumps({**GOOD, **change}))
    assert zoo.verified_top1("biformer_t.in1k", folder) == expected
    assert zoo.verified_top1("biformer_b.in1k", folder) is None
    monkeypatch.setattr(visionattn, "list_models", lambda: ["biformer_b", "biformer_t", "test_biformer"])
    table = zoo.zoo_table(folder)
    assert ("| 81.37 |" in table) == (expected is not None)
    assert table.count(zoo.NOT_RUN) == (2 if expected is None else 1)
    assert "test_biformer" not in table


def test_speeds_are_of_the_fastest_run_that_was_not_compiled(tmp_path):
    path = tmp_path / "models.csv"
    columns = "model", "mode", "height", "width", "compile", "cuda_graph", "images_per_s", "peak_gib"
    rows = [
        ("a", "training", 224, 224, "", False, 100, 3),
        ("a", "training", 224, 224, "", True, 1200, 4.04),
        ("a", "training", 224, 224, "default", False, 9999, 5),
        ("a:folded", "inference", 224, 224, "", False, 2000, 1),
        ("a", "inference", 384, 384, "", True, 5000, 1),
        ("a", "features", 224, 224, "", True, 5000, 1),
    ]
    path.write_text("\n".join(",".join(map(str, row)) for row in (columns, *rows)) + "\n")
    expected = {"images/s, training": "1,200", "GiB of training": "4.0", "images/s, inference": "2,000 *"}
    assert zoo.measured_speeds(path) == {"a": expected}
    more = tmp_path / "zoo.csv"
    rows = [("b", "inference", 224, 224, "", False, 70, 1), ("a", "training", 224, 224, "", True, 9000, 1)]
    more.write_text("\n".join(",".join(map(str, row)) for row in (columns, *rows)) + "\n")
    assert zoo.measured_speeds(path, more) == {"a": expected, "b": {"images/s, inference": "70 * †"}}


def test_families_are_summed_up():
    rows = [
        {"family": "nat", "model": "`nat_t`", "parameters": "27.9 M", "top-1 published": "[83.2](x)"},
        {"family": "nat", "model": "`nat_b`", "parameters": "89.8 M", "top-1 published": "[84.3](x)"},
        {"family": "nat", "model": "", "parameters": "89.8 M", "top-1 published": "-"},
        {"family": "own", "model": "`own`", "parameters": "1.0 M", "top-1 published": "-"},
    ]
    lines = zoo.family_table(rows).splitlines()[2:]
    assert lines[0] == "| [nat](docs/families/nat.md) | `nat_t`, `nat_b` | 27.9 to 89.8 M | 84.3 |"
    assert lines[1].endswith("| `own` | 1 to 1 M | - |")


def test_page_without_markers_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(visionattn, "list_models", lambda: ["biformer_t"])
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "docs" / "benchmarks")
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ValueError, match=r"README\.md must hold the markers"):
        zoo.pages_with_table(tmp_path)
