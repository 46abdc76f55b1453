"""Top-1 of weights on a made-up validation set, in both layouts, and the column that only the whole set fills."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import visionattn
from visionattn import _files
from visionattn.cli import main
from visionattn.data.labelled_folder import LabelledFolder, read_labels
from visionattn.tasks import zoo
from visionattn.tasks.checkpoints import COLUMNS, sha256
from visionattn.tasks.progress import duration, tracked
from visionattn.tasks.verify import synsets, validation_images, verify, weights_of

ROOT = Path(__file__).parent.parent.parent
NAME = "biformer_t.in1k"
LABELS = (0, 1, 1, 417, 999)


def image(path, seed):
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (60, 50, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five images: in class folders of four of ImageNet's classes, and in one folder."""
    root, names = tmp_path_factory.mktemp("imagenet"), synsets()
    (root / "flat").mkdir()
    for i, label in enumerate(LABELS):
        folder = root / "folders" / "val" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image(folder / f"ILSVRC2012_val_{i:08d}.JPEG", i)
        shutil.copy(folder / f"ILSVRC2012_val_{i:08d}.JPEG", root / "flat")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of a small model that likes class 1."""
    torch.manual_seed(0)
    model = timm.create_model("test_biformer")
    model.head.fc.bias.data[1] = 100.0
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(model.state_dict(), path)
    return path


def test_classes_are_in_the_order_of_their_numbers():
    names = synsets()
    assert len(names) == 1000 and names == sorted(names) and names[0] == "n01440764"


@pytest.mark.slow
def test_part_of_the_set_is_measured_and_written_nowhere(pictures, weights, tmp_path, capsys):
    arguments = ["verify", "test_biformer", "--checkpoint", str(weights), "--folder", str(tmp_path / "checkpoints")]
    arguments += ["--workers", "0", "--output", str(tmp_path / "result.json")]
    main([*arguments, "--data", str(pictures / "folders")])
    text, result = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert "top-1 40.00 %" in text and "of 5 images" in text and "part of the validation set (50,000 images)" in text
    assert result["top1"] == pytest.approx(40.0) and result["images"] == 5 and not result["whole"]
    assert result["checkpoint_sha256"] == sha256(weights) and not (tmp_path / "checkpoints").exists()

    labels = tmp_path / "val.txt"
    labels.write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in enumerate(LABELS)))
    main([*arguments, "--data", str(pictures / "flat"), "--labels", str(labels)])
    again = json.loads((tmp_path / "result.json").read_text())
    assert again["top1"] == result["top1"] and again["top5"] == result["top5"] and again["images"] == 5


@pytest.mark.slow
def test_whole_set_fills_the_column(pictures, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("published.csv", "agreement.csv"):
        shutil.copy(ROOT / "checkpoints" / name, folder)
    shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "docs" / "benchmarks")
    pages = [zoo.MODELS_PAGE, "docs/families/biformer.md"]
    for page in ["README.md", *pages]:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"above\n{zoo.BEGIN}\nold\n{zoo.END}\nbelow\n")
    model = timm.create_model(NAME)
    model.head.fc.bias.data[1] = 100.0
    save_file(model.state_dict(), folder / "x.safetensors")
    monkeypatch.setattr(zoo, "IMAGES", 5)
    monkeypatch.setattr(visionattn, "list_models", lambda: ["biformer_t"])
    arguments = ["verify", NAME, "--folder", str(folder), "--data", str(pictures / "folders"), "--workers", "0"]

    main([*arguments, "--checkpoint", str(folder / "x.safetensors")])
    text = capsys.readouterr().out
    assert "published 81.4 %, difference -41.40 points" in text and "the index does not list these weights" in text
    assert "| 40.00 |" not in (tmp_path / zoo.MODELS_PAGE).read_text()

    values = dict.fromkeys(COLUMNS, "") | dict(name=NAME, file="x.safetensors", sha256=sha256(folder / "x.safetensors"))
    (folder / "index.csv").write_text(f"{','.join(COLUMNS)}\n{','.join(values.values())}\n")
    main(arguments)  # takes the file of the index
    text = capsys.readouterr().out
    assert "column" not in text and f"written: {folder / 'results' / (NAME + '.json')}" in text
    for page in pages:
        assert "| 40.00 |" in (tmp_path / page).read_text() and "below" in (tmp_path / page).read_text()

    (folder / "x.safetensors").write_bytes(b"other")
    with pytest.raises(SystemExit, match="SHA-256"):
        main(arguments)


# layouts


def test_labels_are_read_in_every_form(tmp_path):
    names, classes = ["a_1.JPEG", "b_2.JPEG"], ["n01440764", "n01443537", "n01484850"]
    forms = {
        "numbers": "a_1.JPEG 2\nb_2.JPEG 0\n",
        "names": "b_2 n01440764\na_1 n01484850\n",
        "lines": "n01484850\nn01440764\n",
        "kaggle": "ImageId,PredictionString\na_1,n01484850 85 1 499 272 n01484850 3 3 9 9\nb_2,n01440764 1 1 2 2 \n",
    }
    for form, text in forms.items():
        (tmp_path / form).write_text(text)
        assert read_labels(tmp_path / form, names, classes) == {"a_1": 2, "b_2": 0}, form
    wrong = {
        "1\n2\n": "numbers alone",
        "n01484850\n": "1 lines for 2 images",
        "a_1 n99999999\n": "none of the 3 classes",
        "a_1 3\n": "none of the 3 classes",
        "a_1 0 7\n": "has the line 'a_1 0 7'",
        "ImageId,PredictionString\na_1,n01484850 1 1 2 2\nb_2,\n": "no PredictionString for b_2; expected lines",
        "ImageId,LabelId\na_1,n01484850\n": "no PredictionString for a_1; expected lines",
    }
    for text, message in wrong.items():
        (tmp_path / "wrong").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(tmp_path / "wrong", names, classes)
    with pytest.raises(FileNotFoundError, match="no file of labels"):
        read_labels(tmp_path / "none", names, classes)


def test_wrong_folders_are_explained(pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match="give --labels FILE"):
        validation_images(pictures / "flat", 1000)
    with pytest.raises(ValueError, match="4 class folders, the model knows 10"):
        validation_images(pictures / "folders", 10)
    with pytest.raises(FileNotFoundError, match="no dataset folder"):
        validation_images(tmp_path / "none", 10)
    (tmp_path / "labels").write_text("x.png 0\n")
    with pytest.raises(FileNotFoundError, match="holds no image that"):
        LabelledFolder(tmp_path, tmp_path / "labels", ["a"])
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        LabelledFolder(tmp_path / "none", tmp_path / "labels", ["a"])
    image(tmp_path / "x.png", 0)
    source = LabelledFolder(tmp_path, tmp_path / "labels", ["a"])
    assert len(source) == 1 and source[0][1:] == (0, source.name(0)) and source[0][0].size == (50, 60)


def test_weights_come_from_the_index_the_hub_or_their_address(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file, **how: Path(file).write_text(url))
    cached = tmp_path / "checkpoints" / "biformer_t.in1k.pth"
    assert weights_of("biformer_t", tmp_path) == str(cached) and cached.read_text().startswith("http")
    with pytest.raises(ValueError, match="no weights are published for test_biformer"):
        weights_of("test_biformer", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"davit_t\.msft_in1k cannot be had.*--checkpoint"):
        weights_of("davit_t", tmp_path)  # the hub is not asked in tests
    with pytest.raises(ValueError, match="did you mean"):
        verify("biformer_x", tmp_path)


def test_folders_of_1000_other_names_are_refused(pictures, tmp_path):
    assert len(validation_images(pictures / "folders", 1000)) == 5
    for i in range(1000):
        (tmp_path / str(i)).mkdir()
    image(tmp_path / "7" / "x.png", 0)
    with pytest.raises(ValueError, match=r"first '0'; its folders must be named as the 1000 classes .*n01440764"):
        validation_images(tmp_path, 1000)
    shutil.copytree(pictures / "folders" / "val", tmp_path / "val")
    (tmp_path / "val" / ".thumbnails").mkdir()
    with pytest.raises(ValueError, match=r"1 classes that .* does not know, first '\.thumbnails'"):
        validation_images(tmp_path, 1000)


def test_path_of_the_set_may_hold_any_signs(pictures, weights, tmp_path):
    root = tmp_path / "it's {a}=set(2), [b]"
    shutil.copytree(pictures / "folders", root)
    found = verify("test_biformer", root, str(weights), tmp_path, overrides=["data.workers=0"])
    assert found["images"] == 5 and not found["whole"]


def test_published_weights_are_checked_by_the_index(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cfg, index = timm.models.get_pretrained_cfg("biformer_t"), tmp_path / "index.csv"
    cached = tmp_path / "checkpoints" / "biformer_t.in1k.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"other")
    index.write_text(f"name,source_sha256,source_url\n{NAME},{'0' * 64},{cfg.url}\n")
    monkeypatch.setattr(_files, "index_path", lambda: index)
    with pytest.raises(ValueError, match=r"biformer_t\.in1k\.pth has SHA-256 .*, checkpoints/index\.csv says 0000"):
        weights_of("biformer_t", tmp_path / "none")
    index.write_text(f"name,source_sha256,source_url\n{NAME},{sha256(cached)},{cfg.url}\n")
    assert weights_of("biformer_t", tmp_path / "none") == str(cached)


# progress


def test_progress_says_rate_and_time_left(caplog):
    batches = [
        dict(label=[0] * 4, skipped=[]),
        dict(label=[0] * 2, skipped=["x", "y"]),
        dict(label=[0] * 4, skipped=[]),
    ]
    with caplog.at_level(logging.INFO, logger="visionattn"):
        assert list(tracked(batches, 12, every=0.0)) == batches
    lines = [record.getMessage() for record in caplog.records if record.name == "visionattn"]
    assert len(lines) == 2 and lines[0].startswith("4 of 12 images, ") and lines[1].startswith("8 of 12 images, ")
    assert all(line.endswith(" 0:00 left") for line in lines)
    assert (duration(59.6), duration(125), duration(3723)) == ("1:00", "2:05", "1:02:03")
