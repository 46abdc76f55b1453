"""Evaluation and prediction from the command line, with runs and with plain weights."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from visionattn.cli import main
from visionattn.data.datasets import EmbeddedDigits
from visionattn.tasks.inference import load_run

SHORT = ["+trainer.limit_train_batches=4", "+trainer.limit_val_batches=2", "data.workers=0", "trainer=cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run with averaged weights."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = ["experiment=digits", "model=test_biformer", "trainer.max_epochs=1", "data.batch_size=16"]
    averaged = ["task.ema_decay=0.5", "task.ema_eval=true", "trainer.accumulate_grad_batches=2"]
    main(["train", *overrides, *averaged, *SHORT[:2], f"output_dir={folder}", "name=run"])
    return folder / "run"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Five validation images of 1000 class folders' first two, so that ImageNet's classifier fits."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for i in range(1000):
            (root / split / f"n{i:04d}").mkdir(parents=True)
        for i in (0, 1, 1, 700, 999):
            for side in (1, 40):
                image = Image.fromarray(rng.randint(0, 255, (side, side, 3), dtype=np.uint8))
                image.save(root / split / f"n{i:04d}" / f"{side}.png")
    return root


def evaluated(capsys, *arguments):
    capsys.readouterr()
    main(["eval", *map(str, arguments)])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_run_is_evaluated_with_the_weights_it_validated(run, capsys):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["hyper_parameters"]["classes"] == [str(digit) for digit in range(10)]
    weights = content["state_dict"]
    key = "head.fc.weight"
    assert not torch.equal(weights[f"model.{key}"], weights[f"ema.module.{key}"])
    assert torch.equal(load_run(run).model.state_dict()[key], weights[f"ema.module.{key}"])
    assert torch.equal(load_run(run, averaged=False).model.state_dict()[key], weights[f"model.{key}"])

    result = evaluated(capsys, run, "data.batch_size=200")
    assert result["images"] == 1000 and 0 <= result["top1"] <= result["top5"] <= 100
    assert json.loads((run / "eval.json").read_text()) == result
    trained = evaluated(capsys, run, "--weights", "trained", "data.batch_size=200")
    assert trained["top1"] != result["top1"]
    # what Lightning counted over the first two batches, from the same weights
    classifier, digits = load_run(run), EmbeddedDigits("val")
    transform = timm.data.create_transform(**classifier.data_config)
    with torch.no_grad():
        logits = classifier.model(torch.stack([transform(digits[i][0]) for i in range(32)]))
    right = (logits.argmax(1).numpy() == digits.labels[:32]).mean()
    assert json.loads((run / "metrics.json").read_text())["val/top1"] == pytest.approx(right)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [("data.no_such=1", "no_such"), ("data=folder", "single values"), ("seed", "one RUN")],
)
def test_wrong_change_is_refused(run, change, message):
    with pytest.raises(SystemExit, match=message):
        main(["eval", str(run), change])


@pytest.mark.slow
def test_run_without_averaged_weights_says_so(run, tmp_path):
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if k.startswith("model.")}
    torch.save(content, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="no averaged weights"):
        load_run(tmp_path / "plain.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        load_run(tmp_path / "broken.ckpt")


@pytest.mark.slow
def test_plain_weights_are_evaluated_on_a_folder(pictures, tmp_path, capsys):
    torch.manual_seed(3)
    model = timm.create_model("test_biformer").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    output = tmp_path / "results" / "test.json"
    arguments = ["--model", "test_biformer", "--checkpoint", tmp_path / "weights.pth", "--output", output]
    result = evaluated(capsys, *arguments, f"data.root={pictures}", "data.workers=0")
    assert result["name"] == "test_biformer.untrained" and result["images"] == 8 and result["classes"] == 1000
    assert json.loads(output.read_text()) == result

    transform = timm.data.create_transform(**resolve_model_data_config(model))
    right = []
    for path in sorted((pictures / "val").rglob("*.png")):
        with torch.no_grad():
            right.append(int(path.parent.name[1:]) in model(transform(Image.open(path))[None])[0].topk(5).indices)
    assert result["top5"] == pytest.approx(100 * sum(right) / len(right))
    with pytest.raises(SystemExit, match="give either one RUN"):
        main(["eval"])


@pytest.mark.slow
def test_weights_of_other_classes_are_refused(tmp_path):
    torch.save(timm.create_model("test_biformer", num_classes=7).state_dict(), tmp_path / "seven.pth")
    arguments = ["eval", "--model", "test_biformer", "--checkpoint", str(tmp_path / "seven.pth"), "data=digits"]
    with pytest.raises(SystemExit, match=r"\[7, 64\].*\[10, 64\]"):
        main(arguments)


@pytest.mark.slow
def test_pictures_are_classified_and_drawn(run, tmp_path, capsys):
    Image.new("L", (40, 30), 200).save(tmp_path / "x.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    picture = tmp_path / "out" / "picture.png"
    main(["predict", str(tmp_path / "x.png"), str(tmp_path / "dot.png"), "--run", str(run), "--output", str(picture)])
    assert Image.open(picture).size[0] > 100 and [p.name for p in picture.parent.iterdir()] == ["picture.png"]
    assert capsys.readouterr().out.count("%") == 10
    for path, message in (("missing.png", "no image at"), ("text.png", "cannot read image")):
        (tmp_path / "text.png").write_text("not a picture")
        with pytest.raises(SystemExit, match=message):
            main(["predict", str(tmp_path / path), "--run", str(run), "--output", str(picture)])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_stop_a_run_or_are_listed(pictures, tmp_path, workers):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("CMYK" if i else "P", (1 + 20 * i, 1)).save(root / split / name / f"{i}.tif")
        (root / split / "cat" / "empty.png").write_bytes(b"")
        (root / split / "dog" / "text.jpg").write_text("not a picture")
    arguments = ["train", "model=test_biformer", "trainer.max_epochs=1", "data.batch_size=4", f"data.root={root}"]
    arguments += [f"data.workers={workers}", f"output_dir={tmp_path}", "name=bad"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    text = str(stop.value)
    assert "cannot read image" in text and "on_error=skip" in text and "\n" not in text
    assert not list((tmp_path / "bad").rglob("*.ckpt"))
    main([*arguments, "data.on_error=skip"])
    listed = (tmp_path / "bad" / "skipped_images.txt").read_text().splitlines()
    assert len(listed) == 4
    for split in ("train", "val"):
        for name in ("empty.png", "text.jpg"):
            assert any(f"{split}/" in line and name in line for line in listed)


@pytest.mark.slow
def test_loggers_are_a_choice(tmp_path):
    arguments = ["train", "experiment=digits", "model=test_biformer", "trainer.max_epochs=1", *SHORT[:2]]
    main([*arguments, f"output_dir={tmp_path}", "name=files"])
    assert (tmp_path / "files" / "logs" / "metrics.csv").is_file() and list((tmp_path / "files").rglob("events*"))
    main([*arguments, f"output_dir={tmp_path}", "name=csv", "~logger.tensorboard"])
    assert (tmp_path / "csv" / "logs" / "metrics.csv").is_file() and not list((tmp_path / "csv").rglob("events*"))
