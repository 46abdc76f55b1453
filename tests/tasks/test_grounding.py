"""Answer grounding from training to masks, and its metrics."""

import csv
import json
import math
from functools import partial

import made_up_archives
import numpy as np
import pytest
import torch
from helpers import assert_same_weights, checkpoint, train_run
from PIL import Image

from visionattn.cli import main
from visionattn.tasks.grounding_data import prepare_questions, with_vocabulary
from visionattn.tasks.grounding_inference import load_grounder
from visionattn.tasks.grounding_metrics import iou, question_metrics, summarize

SMALL = [
    "experiment=embedded/grounding",
    "model.backbone=test_biformer",
    "data.source.count=4",
    "data.transform.size=64",
    "data.batch_size=4",
    "data.workers=0",
    "model.text.dim=8",
    "trainer.max_epochs=2",
    "task.ema_decay=0.5",
    "logger=files",
]


train = partial(train_run, SMALL)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs"), "a")


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 61, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


# metrics


def test_metrics_of_a_question():
    truth = torch.zeros(4, 4, dtype=torch.long)
    truth[:2, :2] = 1
    probability = torch.full((4, 4), 0.1)
    probability[:2, :3] = 0.6
    probability[0, 0] = 0.9
    found = question_metrics(probability, truth)
    assert found["iou"] == pytest.approx(4 / 6) and found["pointing"] == 1 and found["area"] == 0.25
    probability[3, 3] = 0.95
    assert question_metrics(probability, truth)["pointing"] == 0
    empty = question_metrics(torch.zeros(4, 4), torch.zeros(4, 4))
    assert empty["iou"] == 1 and math.isnan(empty["pointing"])
    assert iou(torch.ones(2, 2) > 0, torch.zeros(2, 2) > 0) == 0
    with pytest.raises(ValueError, match=r"got \[4, 4\], \[2, 2\]"):
        question_metrics(torch.zeros(4, 4), torch.zeros(2, 2))


def test_means_draw_whole_images():
    rows = [
        dict(iou=x, iou_shuffled=0.0, iou_whole_image=0.1, pointing=math.nan, group=g)
        for x, g in ((1, "a"), (0.5, "b"))
    ]
    result = summarize(rows)
    assert result["iou"]["mean"] == 0.75 and result["iou_at_0.75"]["mean"] == 0.5 and result["iou_at_0.5"]["mean"] == 1
    assert result["pointing"] == dict(mean=None, ci95=None, undefined=2)
    low, high = result["iou"]["ci95"]
    assert low == pytest.approx(0.5) and high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no question with a truth"):
        summarize([])


# runs


def test_resumed_run_equals_the_uninterrupted_one(run, tmp_path):
    half = train(tmp_path, "b", "trainer.max_epochs=1", "task.epochs=2")
    train(tmp_path, "b", "ckpt_path=last")
    assert_same_weights(run, half)


def test_memory_format_changes_no_more_than_rounding(run, tmp_path):
    other = train(tmp_path, "b", "task.channels_last=false")
    key = next(key for key, value in checkpoint(run)["state_dict"].items() if value.dim() == 4 and min(value.shape) > 1)
    arranged = [checkpoint(x)["state_dict"][key].is_contiguous(memory_format=torch.channels_last) for x in (run, other)]
    assert arranged == [True, False]
    losses = [json.loads((x / "metrics.json").read_text())["val/loss"] for x in (run, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_checkpoint_holds_the_words_of_the_training_questions(run):
    hparams = checkpoint(run)["hyper_parameters"]
    assert hparams["task"] == "grounding" and hparams["classes"] == ["background", "answer"]
    words = hparams["model"]["text"]["vocabulary"]
    assert words == sorted(words) and "the" in words
    metrics = json.loads((run / "metrics.json").read_text())
    assert 0 <= metrics["val/iou"] <= 1 and 0 <= metrics["val/pointing"] <= 1
    best = [
        state["monitor"] for key, state in checkpoint(run, "best")["callbacks"].items() if "best_model_score" in state
    ]
    assert "val/iou" in best
    assert load_grounder(run).model.text.number["the"] >= 2


def test_eval_writes_table_and_pictures(run, capsys):
    main(["eval", str(run), "data.val_split=test"])
    printed = capsys.readouterr().out
    for text in ("mean IoU with another question", "mean IoU of one of its objects at random", "the question names"):
        assert f"| {text} |" in printed
    folder = run / "eval" / "test"
    result = json.loads((folder / "metrics.json").read_text())
    assert result["questions"] == 8 and result["images"] == 4
    for name in ("report.md", "pictures.png", "learning.png"):
        assert (folder / name).stat().st_size > 100
    with (folder / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    kinds = result["iou_by_named"].values()
    assert sum(kind["questions"] for kind in kinds) == 8
    assert sum(kind["mean"] * kind["questions"] for kind in kinds) == pytest.approx(8 * result["iou"]["mean"])
    # four or five shapes of a scene, one of them asked for: of all of them it is a part
    assert 0 < result["iou_all_objects"]["mean"] < 0.5
    assert {float(row["iou_random_object"]) for row in rows} <= {0.0, 1.0}
    assert np.mean([float(row["iou"]) for row in rows]) == pytest.approx(result["iou"]["mean"])
    assert rows[0]["question"].endswith(("?", "e", "t")) and rows[0]["group"] == rows[1]["group"]


def test_predict_answers_a_question(run, image, tmp_path, capsys):
    args = ["predict", str(image), "--run", str(run), "--output", str(tmp_path / "out")]
    main([*args, "--question", "where is the purple shape?"])
    out = capsys.readouterr().out
    assert "never met, which all count as one unknown word: purple" in out and "a_mask.png" in out
    mask = np.asarray(Image.open(tmp_path / "out" / "a_mask.png"))
    assert mask.shape == (40, 61) and set(np.unique(mask)) <= {0, 255}
    assert Image.open(tmp_path / "out" / "a_overlay.png").size == (61, 40)
    for question, message in (
        ([], 'give it with --question "..."'),
        (["--question", "  "], "a question is empty"),
        (["--question", "red " * 65], "has 65 words, expected at most 64"),
    ):
        with pytest.raises(SystemExit, match=message):
            main([*args, *question])
    with pytest.raises(SystemExit, match="no image at"):
        main(["predict", str(tmp_path / "b.png"), "--run", str(run), "--question", "where?"])
    with pytest.raises(SystemExit, match="--task grounding needs --run"):
        main(["predict", str(image), "--model", "test_biformer", "--task", "grounding", "--question", "where?"])


def test_bad_settings_end_with_one_line(tmp_path, run):
    for changes, message in (
        (["monitor=val/dice"], "monitor=val/dice must be one of val/iou, val/loss"),
        (["model.text=null"], "model.text is missing"),
        (["model.text.max_words=2"], "expected at most 2; shorten it, or train with a larger model.text.max_words"),
        (["task.loss=nothing"], "loss='nothing' must be one of"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["train", *SMALL, f"output_dir={tmp_path}", "name=bad", *changes])
    with pytest.raises(ValueError, match="is no checkpoint of a grounding run"):
        path = tmp_path / "x.ckpt"
        torch.save(dict(hyper_parameters=dict(task="segmentation"), state_dict={"model.x": torch.zeros(1)}), path)
        load_grounder(path)


def test_images_of_both_splits_and_given_vocabularies():
    class Source:
        questions, groups = ["a"], ["one"]

    with pytest.raises(ValueError, match="1 images are in training and validation, first 'one'"):
        prepare_questions(None, Source(), Source())
    with pytest.raises(ValueError, match="list has no questions; choose data=questions"):
        prepare_questions(None, [], [])
    given = dict(text=dict(kind="words", vocabulary=["b"], min_count=1))
    assert with_vocabulary(given, ["a"])["text"] == dict(kind="words", vocabulary=["b"])


def test_archives_become_a_trained_network_and_its_masks(tmp_path, monkeypatch):
    monkeypatch.setattr(made_up_archives, "SHAPE", (32, 40))
    root, archives = tmp_path / "set", made_up_archives.vizwiz(tmp_path)
    main(["data", "prepare", "vizwiz", *map(str, archives), "--output", str(root)])
    two_steps = ["trainer=cpu", "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "data.batch_size=2"]
    small = ["model=sentence_attention", "model.backbone=test_biformer", "data.transform.size=64", "data.workers=0"]
    where = [f"data.root={root}", f"output_dir={tmp_path}", "name=run", "task.warmup_epochs=0"]
    main(["train", "experiment=grounding/vizwiz", *small, *two_steps, *where])
    main(["eval", str(tmp_path / "run")])
    result = json.loads((tmp_path / "run" / "eval" / "val" / "metrics.json").read_text())
    assert result["questions"] == 5 and result["iou_whole_image"]["mean"] == pytest.approx(0.5)
