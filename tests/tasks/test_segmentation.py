"""Segmentation from training to masks, and its losses and schedules."""

import csv
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import assert_same_weights, checkpoint, inputs, train_run
from monai.losses import DiceLoss
from PIL import Image

from visionattn.cli import main
from visionattn.data.segmentation import IGNORE
from visionattn.tasks import segmentation_inference as inference
from visionattn.tasks.segmentation import LOSSES, MaskLoss, Segmentation
from visionattn.tasks.segmentation_baseline import baseline
from visionattn.tasks.segmentation_data import make_network
from visionattn.tasks.segmentation_inference import load_masker
from visionattn.tasks.training import learning_rate_factor

REFERENCE = Path(__file__).parent.parent / "reference" / "heads"
# a source that is none of the package's: who evaluates must name it again
OWN_SOURCE = "data.source._target_=segmentation_source.Squares"
SMALL = [
    "task=segmentation",
    "model=unet",
    "model.backbone=test_biformer",
    "+model.decoder_kwargs.decoder_channels=[16,16,8,8,8]",
    "~data.source",
    f"+{OWN_SOURCE}",
    "+data.source.count=${data.root}",
    "data.root=4",
    "+data.transform.recipe=default",
    "+data.transform.size=32",
    "data.batch_size=2",
    "data.workers=0",
    "trainer.max_epochs=2",
    "task.warmup_epochs=0",
    "task.ema_decay=0.5",
]


train = partial(train_run, SMALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), "a")


def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    half = train(tmp_path, "b", "trainer.max_epochs=1", "task.epochs=2")
    train(tmp_path, "b", "ckpt_path=last", "data.workers=1")  # which reads ahead
    assert_same_weights(run, half)


def test_stops_where_nothing_gets_better(tmp_path):
    still = "trainer.max_epochs=9", "task.lr=0", "task.warmup_lr=0", "task.min_lr=0", "task.ema_decay=null"
    stopped = train(tmp_path, "c", *still, "patience=2", "model.backbone=test_nat")
    assert checkpoint(stopped)["epoch"] < 8
    with pytest.raises(SystemExit, match="patience=0 must be a whole number of at least 1, or null"):
        train(tmp_path, "d", "patience=0")


@pytest.mark.parametrize("classes", [1, 3])
def test_validation_loss_is_the_loss_of_the_logits(classes):
    logits, mask = inputs((2, classes, 8, 9)).float(), inputs((2, 8, 9)).gt(0).long()
    loss = "bce_dice" if classes == 1 else "ce_dice"
    task = Segmentation(
        torch.nn.Identity(),
        classes,
        seed=0,
        loss=loss,
        aux_weight=1.0,
        freeze=[],
        window=None,
        flips=False,
        hparams={},
        epochs=1,
        opt="sgd",
        lr=0.1,
        weight_decay=0.0,
    )
    logged = {}
    task.log = lambda name, value, **_: logged.update({name: value})
    task.validation_step(dict(image=logits, mask=mask), 0)
    torch.testing.assert_close(logged["val/loss"], MaskLoss(loss, classes)(logits, mask), rtol=1e-4, atol=1e-5)


def test_best_by_the_loss(tmp_path):
    folder = train(tmp_path, "e", "trainer.max_epochs=3", "monitor=val/loss")
    with (folder / "logs" / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 3
    best = checkpoint(folder, "best")
    scores = [state["best_model_score"] for key, state in best["callbacks"].items() if "val/loss" in key]
    assert float(scores[0]) == pytest.approx(min(losses)) and losses[best["epoch"]] == min(losses)
    with pytest.raises(SystemExit, match="monitor=val/top1 must be one of val/dice, val/iou, val/loss"):
        train(tmp_path, "f", "monitor=val/top1")


def test_threshold_is_in_the_checkpoint(run):
    hparams = checkpoint(run)["hyper_parameters"]
    assert hparams["task"] == "segmentation"
    metrics = json.loads((run / "metrics.json").read_text())
    assert hparams["threshold"] == pytest.approx(metrics["val/threshold"])
    assert metrics["val/dice"] >= metrics["val/dice_at_half"]
    assert 0 < load_masker(run).threshold < 1


def test_eval_writes_table_and_pictures(run, capsys):
    main(["eval", str(run), OWN_SOURCE])
    assert "| square | hd95 (mm) |" in capsys.readouterr().out
    folder = run / "eval" / "val"
    result = json.loads((folder / "metrics.json").read_text())
    assert result["classes"]["square"]["images"] == 4
    for name in ("per_image.csv", "report.md", "pictures.png", "threshold.png", "learning.png"):
        assert (folder / name).stat().st_size > 100
    rows = (folder / "per_image.csv").read_text().splitlines()
    assert len(rows) == 5 and "patient 1" in rows[-1]


def test_one_grey_threshold_beside_the_run(run, capsys):
    main(["eval", str(run), OWN_SOURCE, "baseline=true"])
    assert re.search(r"One grey threshold .*: Dice 1.0000 mean over images", capsys.readouterr().out)


@pytest.mark.parametrize("bright", [True, False])
def test_grey_threshold_is_the_best_one(bright):
    mask = torch.zeros(2, 4, 5, dtype=torch.long)
    mask[:, 1:3], mask[0, 3, 3] = 1, IGNORE
    grey = torch.where(mask == 1, 0.5, 0.0) * (1 if bright else -1) + torch.linspace(0, 0.4, 40).view(2, 4, 5)
    grey[0, 3, 3] = 9.0  # without truth, and so without a say
    items = [
        dict(image=g.expand(3, 4, 5), mask=m, name=f"{i}", group="a")
        for i, (g, m) in enumerate(zip(grey, mask, strict=True))
    ]

    class Items(list):
        def __getitem__(self, key):
            return list.__getitem__(self, key[1])

    found = baseline(Items(items), Items(items))
    pixels, true = grey[mask != IGNORE], mask[mask != IGNORE] == 1
    scores = []
    for t in pixels.unique():
        predicted = pixels >= t if bright else pixels < t
        scores.append(float(2 * (predicted & true).sum() / (predicted.sum() + true.sum())))
    assert found["foreground"] == ("brighter" if bright else "darker")
    assert found["dice_of_all"] == pytest.approx(max(scores), abs=0.02)


def test_predict_writes_masks(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    main(["predict", "--run", str(run), str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--flips"])
    assert Image.open(tmp_path / "out" / "a_mask.png").size == (61, 40)
    assert Image.open(tmp_path / "out" / "a_overlay.png").mode == "RGB"
    with pytest.raises(SystemExit, match="no image at"):
        main(["predict", "--run", str(run), str(tmp_path / "b.png"), "--output", str(tmp_path / "out")])


def test_eval_takes_another_root_than_the_training(run, capsys):
    main(["eval", str(run), OWN_SOURCE, "data.root=3"])
    assert json.loads((run / "eval" / "val" / "metrics.json").read_text())["classes"]["square"]["images"] == 3


def test_predict_reads_at_full_depth_and_cuts_like_the_evaluation(run, tmp_path, monkeypatch):
    calls, find = [], inference.probabilities
    monkeypatch.setattr(inference, "probabilities", lambda *a, **k: calls.append((a[1], a[2], k)) or find(*a, **k))
    pixels = np.random.default_rng(0).integers(0, 4000, (40, 61), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    main(["predict", "--run", str(run), str(tmp_path / "a.tif"), "--output", str(tmp_path)])
    main(["predict", "--run", str(run), str(tmp_path / "a.tif"), "--output", str(tmp_path), "--window", "32"])
    assert len(calls[0][0].unique()) > 2000 and [call[1] for call in calls] == [None, 32]
    assert not calls[0][2]["flips"]


def test_large_files_are_cut_into_tiles_where_the_transform_allows(run, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "_LARGE", 1000)
    Image.fromarray(np.full((40, 61), 7, np.uint8)).save(tmp_path / "a.png")
    (target,) = inference.predict_masks(run, [str(tmp_path / "a.png")], tmp_path, window=32)
    assert tifffile.imread(target).shape == (40, 61)
    masker = load_masker(run)
    monkeypatch.setattr(inference, "load_masker", lambda run: masker)
    masker.transform["recipe"] = "herseg"
    with pytest.raises(ValueError, match="more than 1000 pixels.*needs whole images"):
        inference.predict_masks(run, [str(tmp_path / "a.png")], tmp_path)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "visionattn.heads.fsgnet.torch.hub.load",
        "visionattn.heads.fsgnet.Path",
        "visionattn.heads.nothing.X",
    ],
)
def test_checkpoints_name_nothing_but_networks(target):
    with pytest.raises(ValueError, match="is no network of visionattn.heads"):
        make_network({"_target_": target}, ["background", "x"], 3)


def test_networks_call_nothing_that_their_arguments_name():
    network = {"_target_": "visionattn.heads.herseg.HERSeg", "backbone": "test_lgvit"}
    with pytest.raises(ValueError, match=r"model\.\* has .*_target_"):
        make_network({**network, "decoder_kwargs": {"_target_": "builtins.dict"}}, ["background", "x"], 3)


def test_undefined_dice_is_no_number():
    task = Segmentation.__new__(Segmentation)
    logged = {}
    torch.nn.Module.__init__(task)
    task.num_classes, task.counts = 1, torch.zeros(19, 4, dtype=torch.float64)
    task.all_gather, task.log, task._hparams = lambda x: x, lambda name, value, **_: logged.update({name: value}), {}
    task._log_hyperparams, task._hparams_name = False, "hparams"
    task.on_validation_epoch_end()
    assert np.isnan(logged["val/dice"]) and np.isnan(logged["val/dice_at_half"])


@pytest.mark.parametrize(
    "change, message",
    [
        ("model.decoder=upernet data.batch_size=1", "needs two images in a batch"),
        ("task.loss=dice2", "loss='dice2' must be one of"),
        ("task.schedule=step", "schedule='step' must be one of"),
        ("task.freeze=[stage9]", "names no part"),
        ("model.decoder=unett", "unknown decoder"),
        ("model=biformer_nano", "is no network of visionattn.heads"),
        ("+model.base_c=16", "Segmenter has no argument base_c, .*leave out: '~model.base_c'"),
        ("+data.transform.hflipp=0.5", r"data\.\* has an unknown setting .*hflipp"),
    ],
)
def test_wrong_settings_end_with_one_line(change, message, tmp_path):
    changes = [c for c in SMALL if not (change == "model=biformer_nano" and "model" in c)]
    with pytest.raises(SystemExit, match=message):
        main(["train", *changes, f"output_dir={tmp_path}", *change.split()])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_loss_of_the_published_code():
    expected = np.load(REFERENCE / "segmentation_metrics.npz")["loss_fsgnet_dice_bce"][0]
    x = inputs((4, 1, 24, 32), 0)
    truth = (inputs((4, 1, 24, 32), 1) + x > 0.6)[:, 0].long()
    assert MaskLoss("bce_dice", 1)(x, truth).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dice_focal"])
@pytest.mark.parametrize("classes", [1, 3])
def test_loss_falls_and_knows_no_pixel_without_truth(name, classes):
    torch.manual_seed(0)
    mask = torch.randint(max(classes, 2), (2, 16, 16))
    mask[:, :3] = IGNORE
    logits = torch.randn(2, classes, 16, 16, requires_grad=True)
    loss = MaskLoss(name, classes)
    loss(logits, mask).backward()
    # soft skeletons look at their neighbours' zeros, but no logit without truth gets a gradient
    assert logits.grad[:, :, :3].abs().max() == 0 < logits.grad[:, :, 3:].abs().max()
    with torch.no_grad():
        assert loss(logits - 0.5 * logits.grad / logits.grad.abs().max(), mask) < loss(logits, mask)


def test_dice_is_monai_s():
    x, mask = torch.randn(2, 1, 8, 8), torch.randint(2, (2, 8, 8))
    expected = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(x, mask[:, None])
    assert MaskLoss("dice", 1)(x, mask).item() == pytest.approx(expected.item())


def test_published_schedules():
    cosine = [learning_rate_factor("cosine_cycles", e, 1020, 20, 10, 1.0) for e in (0, 10, 20, 70, 120)]
    assert cosine == pytest.approx([0, 0.5, 1, 0, 1])
    decay = [learning_rate_factor("exponential", e, 200, 0, 1, 0.98) for e in (0, 1, 1.5, 2)]
    assert decay == pytest.approx([1, 0.98, 0.98, 0.98**2])
