"""Scanpaths from training to pictures, from every published layout."""

import csv
import json

import made_up_scanpaths
import numpy as np
import pytest
import torch
from helpers import assert_same_weights, checkpoint, train_run
from made_up_archives import picture
from omegaconf import OmegaConf

from visionattn.cli import main
from visionattn.data.scanpath import Scene
from visionattn.tasks.config import compose
from visionattn.tasks.hull_inference import is_simple
from visionattn.tasks.scanpath import Scanpath
from visionattn.tasks.scanpath_baselines import BASELINES
from visionattn.tasks.scanpath_data import make_network

SMALL = ["model.dim=16", "model.num_heads=2", "model.mlp_dim=16", "model.depths=[1,1]"]
QUICK = ["trainer=cpu", "data.workers=0", "data.batch_size=2", "trainer.max_epochs=2", "task.warmup_epochs=0"]


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    archives = made_up_scanpaths.amazon(folder, count=4)
    main(["data", "prepare", "amazon", *map(str, archives), "--output", str(folder / "set"), "--partial"])
    return folder / "set"


def train(books, folder, name, *changes):
    size = ["model.spp=2", "data.transform.crop=[20,20]", "task.samples=2"]
    settings = ["experiment=scanpath/amazon", f"data.root={books}", *QUICK, *SMALL, *size]
    return train_run(settings, folder, name, *changes)


@pytest.fixture(scope="module")
def run(books, tmp_path_factory):
    return train(books, tmp_path_factory.mktemp("runs"), "a", "monitor=val/sequence_score")


def test_resumed_run_equals_the_uninterrupted_one(books, run, tmp_path):
    half = train(books, tmp_path, "b", "trainer.max_epochs=1", "task.epochs=2")
    train(books, tmp_path, "b", "ckpt_path=last")
    assert_same_weights(run, half)


def test_best_checkpoint_by_delta_is_the_smallest(books, tmp_path):
    folder = train(books, tmp_path, "c", "trainer.max_epochs=3", "+trainer.limit_train_batches=1")
    with (folder / "logs" / "metrics.csv").open() as file:
        values = [float(row["val/delta"]) for row in csv.DictReader(file) if row["val/delta"]]
    best = checkpoint(folder, "best")
    scores = [s["best_model_score"] for s in best["callbacks"].values() if "best_model_score" in s]
    assert len(values) == 3 and float(scores[0]) == pytest.approx(min(values), rel=1e-4)


def test_eval_writes_table_and_pictures(run, capsys):
    main(["eval", str(run), "data.val_split=test", "data.source.by=scene", "--output", str(run / "out.json")])
    shown = capsys.readouterr().out
    for name in ("model, greedy", "model, sampled", *BASELINES, "viewers among themselves"):
        assert f"| {name} | 0." in shown or f"| {name} | 1." in shown
    folder = run / "eval" / "test"
    result = json.loads((folder / "metrics.json").read_text())
    assert result == json.loads((run / "out.json").read_text()) and result["fixations"] == 3 * result["scanpaths"]
    for name in ("per_scene.csv", "report.md", "pictures.png"):
        assert (folder / name).stat().st_size > 100
    viewers = result["methods"]["viewers among themselves"]
    assert viewers["sequence score"]["mean"] > 0.66  # the made-up viewers differ in their first fixation alone


def test_predict_draws_own_scenes(run, tmp_path, capsys):
    (tmp_path / "s.png").write_bytes(picture("s.png", shape=(60, 140)))
    boxes = [[0, 0, 20, 20], [100, 30, 130, 60]]
    (tmp_path / "boxes.json").write_text(json.dumps(dict(boxes=boxes, target=1)))
    (tmp_path / "scene.json").write_text(json.dumps(dict(image="s.png", boxes=boxes, fixations=[[[1, 1], [110, 40]]])))
    out = ["--output", str(tmp_path / "p.png")]
    main(["predict", "--run", str(run), str(tmp_path / "scene.json"), *out])
    assert "scene.json: objects " in capsys.readouterr().out and (tmp_path / "p.png").stat().st_size > 1000
    given = ["--boxes", str(tmp_path / "boxes.json"), str(tmp_path / "s.png"), *out]
    main(["predict", "--task", "scanpath", "--run", str(run), *given])
    assert "on the target" in capsys.readouterr().out
    for changed, message in (
        (dict(boxes=[]), "has no objects"),
        (dict(boxes=boxes, target=2), "the target 2 is none of the 2 objects"),
        (dict(boxes=boxes, fixations=[[]]), "without fixations"),
    ):
        (tmp_path / "boxes.json").write_text(json.dumps(changed))
        with pytest.raises(SystemExit, match=message):
            main(["predict", "--run", str(run), *given])
    with pytest.raises(SystemExit, match="give a scene as JSON, or an image with --boxes FILE"):
        main(["predict", "--run", str(run), str(tmp_path / "s.png"), *out])
    with pytest.raises(SystemExit, match="needs --run"):
        main(["predict", "--task", "scanpath", "--model", "biformer_s", str(tmp_path / "s.png")])


@pytest.mark.parametrize(
    "name, changes",
    [
        ("wine", ["model.spp=2", "data.transform.crop=[20,20]"]),
        ("cocosearch18", ["model.backbone=test_nat", "data.transform.size=[64,96]"]),
        ("mit1003", ["model.backbone=test_biformer", "data.transform.size=[64,64]"]),
    ],
)
def test_archives_become_a_trained_network(name, changes, tmp_path, capsys):
    data = {"wine": "shelves"}.get(name, name)
    archives = map(str, getattr(made_up_scanpaths, data)(tmp_path))
    main(["data", "prepare", data, *archives, "--output", str(tmp_path / "set")])
    where = [f"data.root={tmp_path / 'set'}", f"output_dir={tmp_path}", "name=run", "monitor=val/loss"]
    steps = ["trainer.max_epochs=1", "+trainer.limit_train_batches=2", "task.samples=0"]
    main(["train", f"experiment=scanpath/{name}", *where, *QUICK, *steps, *SMALL, *changes])
    main(["eval", str(tmp_path / "run")])
    methods = json.loads((tmp_path / "run" / "eval" / "val" / "metrics.json").read_text())["methods"]
    assert methods["model, greedy"]["sequence score"]["mean"] is not None
    assert "nearest neighbour" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["amazon", "wine", "yogurt"])
def test_experiment_can_be_made(name):
    config = compose([f"experiment=scanpath/{name}", "data.root=somewhere"])
    with torch.device("meta"):
        model = make_network(OmegaConf.to_container(config.model, resolve=True))
    settings = OmegaConf.to_container(config.task, resolve=True)
    settings = {k: v for k, v in settings.items() if k not in ("_target_", "lr_batch")}
    Scanpath(model, num_classes=1, seed=0, hparams=dict(max_length=3), **settings)
    assert (settings["opt"], settings["lr"], settings["decay"], config.data.batch_size) == ("adam", 1e-4, 1.0, 20)
    assert (config.monitor, config.patience, config.trainer.gradient_clip_val) == ("val/delta", 30, 1.0)


def test_settings_that_do_not_fit_are_named(books, tmp_path):
    for changes, message in (
        (["model=fpn"], "is no OAT; choose model=oat"),
        (["model.objects=image", "model.backbone=test_nat"], "model.objects=image, but data.transform.objects=crops"),
        (["data.transform.scale=x"], "expected crops or image, unit or minmax"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(
                [
                    "train",
                    "experiment=scanpath/amazon",
                    f"data.root={books}",
                    f"output_dir={tmp_path}",
                    *QUICK,
                    *changes,
                ]
            )


def test_baselines_end_on_the_target():
    image = np.full((30, 30, 3), 100, dtype=np.uint8)
    image[20:, 20:] = 255
    boxes = np.array([[c, r, c + 10, r + 10] for r in (0, 10, 20) for c in (0, 10, 20)], dtype=float)
    scene = Scene("x", image, boxes, boxes[:, :2], 8)
    found = {name: find(scene, np.random.default_rng(0), 3) for name, find in BASELINES.items()}
    assert found["saliency order"] == [8] == found["target at once"]
    assert found["nearest neighbour"][0] == 4 and all(path[-1] == 8 for path in found.values())
    free = Scene("x", image, boxes, boxes[:, :2], None)
    assert len(BASELINES["random order"](free, np.random.default_rng(0), 3)) == 3


def test_a_pointer_network_from_training_to_a_picture(tmp_path, capsys):
    small = ["data.source.count=256", "model.dim=8", "trainer.max_epochs=1", "+trainer.limit_train_batches=2"]
    main(["train", "experiment=embedded/convex_hull", *small, f"output_dir={tmp_path}", "name=h"])
    assert "val/exact" in capsys.readouterr().out
    main(["eval", str(tmp_path / "h"), "data.val_split=test"])
    assert "| 10 | no |" in capsys.readouterr().out
    (tmp_path / "p.json").write_text("[[0.1, 0.2], [0.9, 0.1], [0.5, 0.8], [0.5, 0.4]]")
    main(["predict", "--run", str(tmp_path / "h"), str(tmp_path / "p.json"), "--output", str(tmp_path / "h.png")])
    assert (tmp_path / "h.png").is_file()
    (tmp_path / "p.json").write_text("[[0.1, 0.2]]")
    with pytest.raises(SystemExit, match="at least three points"):
        main(["predict", "--run", str(tmp_path / "h"), str(tmp_path / "p.json")])


def test_crossing_sides_are_found():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
    assert is_simple(square) and not is_simple(square[[0, 2, 1, 3]]) and not is_simple(square[[0, 1, 0]])
