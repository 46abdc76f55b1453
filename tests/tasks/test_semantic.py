"""Semantic segmentation: archives to labels, scores against a brute force, resume, windows."""

import json
import math
from functools import partial

import made_up_scenes
import numpy as np
import pytest
import torch
from helpers import assert_same_weights, checkpoint, train_run
from PIL import Image
from torch import nn
from torch.nn import functional as F

from visionattn.cli import main
from visionattn.data.segmentation import IGNORE
from visionattn.data.semantic_layouts import LAYOUTS
from visionattn.heads.segmenter import Segmenter
from visionattn.tasks.semantic import best_labels, class_scores, confusion_matrix, pixel_loss, set_scores
from visionattn.tasks.semantic_inference import load_labeller
from visionattn.tasks.training import learning_rate_factor

TINY = ["model.backbone=test_patnet", "model.pretrained=false", "data.workers=0", "data.batch_size=2"]
TINY += ["data.epoch_steps=2", "data.transform.size=64", "data.transform.short_side=48"]
TINY += ["trainer=cpu", "trainer.max_epochs=1", "trainer.log_every_n_steps=1"]
UPERNET = ["experiment=ade20k/upernet", "model.aux_channels=8", "model.decoder_kwargs.decoder_channels=16", *TINY]
FPN = ["experiment=ade20k/semantic_fpn", "+model.decoder_kwargs.decoder_pyramid_channels=32", *TINY]
FPN += ["+model.decoder_kwargs.decoder_segmentation_channels=32"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folder of a prepared set by its name."""

    def prepare(name):
        root = folder / name
        if not root.exists():
            archives = getattr(made_up_scenes, name)(folder)
            main(["data", "prepare", name, *map(str, archives), "--output", str(root), "--partial"])
        return root

    folder = tmp_path_factory.mktemp("sets")
    return prepare


@pytest.mark.parametrize(
    "name, settings, window",
    [("ade20k", UPERNET, []), ("cityscapes", FPN, ["task.window=48"]), ("coco_stuff", FPN, ["task.flips=true"])],
)
def test_archives_become_a_trained_network_and_its_labels(name, settings, window, sets, tmp_path, capsys):
    root = sets(name)
    assert f"6 train, 2 val; train with data={name} data.root={root}" in capsys.readouterr().out
    run = train_run([*settings, f"data={name}", f"data.root={root}", *window], tmp_path, "run")
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["val/miou"] <= metrics["val/macc"] <= 1 and 0 <= metrics["val/aacc"] <= 1
    main(["eval", str(run)])
    printed = capsys.readouterr().out
    found = json.loads((run / "eval" / "val" / "metrics.json").read_text())
    assert found["images"] == 2 and found["miou"] == pytest.approx(metrics["val/miou"], abs=1e-6)
    layout = LAYOUTS[name]
    assert list(found["classes"]) == list(layout.classes) and f"| {layout.classes[0]} |" in printed
    assert found["classes"][layout.classes[0]]["pixels"] > 0 == found["classes"][layout.classes[3]]["pixels"]
    lines = (run / "eval" / "val" / "confusion.csv").read_text().splitlines()
    assert len(lines) == len(layout.classes) + 1
    assert {path.name for path in (run / "eval" / "val").iterdir()} == {
        *("metrics.json", "per_class.csv", "confusion.csv", "report.md", "pictures.png", "learning.png")
    }
    image = sorted((root / "images" / "val").iterdir())[1]
    main(["predict", "--run", str(run), str(image), "--output", str(tmp_path / "labels")])
    with Image.open(image) as original, Image.open(tmp_path / "labels" / f"{image.stem}_labels.png") as picture:
        assert picture.mode == "P" and picture.size == original.size
        labels = np.asarray(picture)
        assert labels.max() < len(layout.classes)
        assert (np.asarray(picture.convert("RGB"))[0, 0] == layout.palette[labels[0, 0]]).all()
    assert (tmp_path / "labels" / f"{image.stem}_overlay.png").is_file()


def brute_force(truths, found, classes):
    """IoU, accuracy and their means by one mask for every class."""
    truth, guess = (np.concatenate([x.ravel() for x in xs]) for xs in (truths, found))
    truth, guess = truth[truth != IGNORE], guess[truth != IGNORE]
    iou, accuracy = [], []
    for k in range(classes):
        a, b = truth == k, guess == k
        iou.append((a & b).sum() / (a | b).sum() if (a | b).any() else math.nan)
        accuracy.append((a & b).sum() / a.sum() if a.any() else math.nan)
    return iou, accuracy, dict(miou=np.nanmean(iou), macc=np.nanmean(accuracy), aacc=(truth == guess).mean())


def test_scores_equal_a_brute_force_with_ignored_pixels_and_absent_classes():
    rng, classes = np.random.default_rng(0), 150
    # 0 to 99 occur; 100 to 119 are found only; the others nowhere
    truths = [rng.integers(0, 100, shape) for shape in ((30, 40), (25, 60), (50, 50))]
    found = [np.where(rng.random(t.shape) < 0.6, t, rng.integers(0, 120, t.shape)) for t in truths]
    for truth in truths:
        truth[rng.random(truth.shape) < 0.2] = IGNORE
    truths[0][:] = IGNORE
    matrix = confusion_matrix(classes)
    for truth, guess in zip(truths, found, strict=True):
        matrix.update(torch.from_numpy(guess)[None], torch.from_numpy(truth)[None])
    scores = set_scores(matrix.compute())
    iou, accuracy, means = brute_force(truths, found, classes)
    np.testing.assert_allclose(scores["iou"].numpy(), iou, rtol=0, atol=1e-12)
    np.testing.assert_allclose(scores["accuracy"].numpy(), accuracy, rtol=0, atol=1e-12)
    assert np.isnan(iou[120:]).all() and np.isnan(accuracy[100:]).all() and not np.isnan(iou[:120]).any()
    for name, value in means.items():
        assert scores[name] == pytest.approx(value, abs=1e-12)


def test_labels_of_chunks_are_those_of_all_classes():
    scores = torch.randn(2, 37, 9, 7)
    scores[:, 20] = scores[:, 3]  # equal ones: the first
    for size in ((9, 7), (31, 20), (5, 4)):
        whole = F.interpolate(scores, size, mode="bilinear", align_corners=False) if size != (9, 7) else scores
        assert torch.equal(best_labels(scores, size), whole.argmax(1))


class Pointwise(nn.Module):
    """Logits of a pixel from the pixel and its left neighbour."""

    def forward(self, x):
        left = F.pad(x, (1, 0))[..., :-1]
        return torch.cat([x[:, :1], left[:, 1:2], -x[:, 2:]], 1)


def test_windows_and_mirror_images():
    model, images = Pointwise(), torch.randn(1, 3, 40, 70)
    windows = class_scores(model, images, window=32)
    whole = class_scores(model, images)
    assert torch.allclose(windows[:, [0, 2]], whole[:, [0, 2]], atol=1e-6)
    assert not torch.allclose(windows[:, 1], whole[:, 1])  # at the left border of a window
    expected = (model(images).softmax(1) + model(images.flip(-1)).softmax(1).flip(-1)) / 2
    assert torch.equal(class_scores(model, images, flips=True), expected)
    for wrong in (dict(window=0), dict(window=8, overlap=1.0)):
        with pytest.raises(ValueError, match="window=0 must be|overlap=1.0 must lie"):
            class_scores(model, images, **wrong)


def test_loss_counts_no_ignored_pixel():
    logits, mask = torch.randn(2, 5, 6, 7, requires_grad=True), torch.randint(5, (2, 6, 7))
    mask[0, :3] = IGNORE
    counted = mask != IGNORE
    expected = F.cross_entropy(logits.movedim(1, -1)[counted], mask[counted])
    assert pixel_loss(logits, mask).item() == pytest.approx(expected.item(), rel=1e-6)
    nothing = pixel_loss(logits, torch.full_like(mask, IGNORE))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()


def test_poly_goes_down_to_nothing_behind_the_warm_up():
    factors = [learning_rate_factor("poly", t, 10, 2, 1, 1.0, power=0.9) for t in (0, 1, 2, 6, 10)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5**0.9, 0])


def test_auxiliary_head_is_for_training_only():
    model = Segmenter("test_biformer", "fpn", num_classes=4, aux_channels=8)
    x = torch.randn(2, 3, 50, 70)
    main_output, aux = model(x)
    assert main_output.shape == aux.shape == (2, 4, 50, 70)
    aux.sum().backward()
    learning = [[p.grad is not None for p in part.parameters()] for part in (model.net.encoder, model.net.decoder)]
    assert any(learning[0]) and not all(learning[0]) and not any(learning[1])  # all but the last stage
    assert model.eval()(x).shape == (2, 4, 50, 70)
    with pytest.raises(ValueError, match="aux_channels are not for the decoder dpt"):
        Segmenter("test_biformer", "dpt", aux_channels=8)


@pytest.fixture(scope="module")
def short(sets, tmp_path_factory):
    """Settings of a run of 2 epochs of 4 steps, each more than one pass of 6 images, and that run."""
    settings = [*FPN, f"data.root={sets('ade20k')}", "data.epoch_steps=4", "task.ema_decay=0.5", "trainer.max_epochs=2"]
    train = partial(train_run, settings)
    return train, train(tmp_path_factory.mktemp("runs"), "whole")


def test_resumed_run_equals_the_uninterrupted_one(short, tmp_path):
    train, whole = short
    half = train(tmp_path, "half", "trainer.max_epochs=1", "task.epochs=2")
    train(tmp_path, "half", "ckpt_path=last", "data.workers=1")
    assert_same_weights(whole, half)
    assert checkpoint(whole)["global_step"] == 8


def test_rate_falls_with_every_step_of_all_epochs(short):
    _, whole = short
    group = checkpoint(whole)["optimizer_states"][0]["param_groups"][0]
    assert group["lr"] == 0  # behind the last of 8 steps


def test_max_steps_ends_a_run_with_a_checkpoint(short, tmp_path):
    train, _ = short
    run = train(tmp_path, "six", "+trainer.max_steps=6")
    last = checkpoint(run)
    assert last["global_step"] == 6
    labeller = load_labeller(run)
    assert len(labeller.classes) == len(labeller.palette) == 150


def test_wrong_combinations_are_named(short, sets, tmp_path):
    train, whole = short
    refused = {
        "this data wants task=semantic": ["task=segmentation", f"data.root={sets('ade20k')}"],
        "needs two images in a batch": ["model=upernet", "data.batch_size=1"],
        "monitor=val/dice must be one of val/miou": ["monitor=val/dice"],
    }
    for message, changes in refused.items():
        with pytest.raises(SystemExit, match=message):
            train(tmp_path, "no", *changes)
    with pytest.raises(SystemExit, match="the model was trained on"):
        main(["eval", str(whole), "data.source.name=cityscapes", f"data.root={sets('cityscapes')}"])
