"""Detection: COCO's scores, training, resuming, evaluation, prediction, and what it refuses."""

import json

import made_up_coco
import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.cli import main
from visionattn.tasks.config import compose
from visionattn.tasks.detection_baseline import baseline
from visionattn.tasks.detection_metrics import CocoScores
from visionattn.tasks.train import train
from visionattn.tasks.training import learning_rate_factor

SMALL = ["model.backbone=test_patnet", "model.channels=64", "model.min_size=64", "model.max_size=96"]
QUICK = ["trainer=cpu", "data.workers=0", "task.warmup_epochs=0", "data.batch_size=2"]


def truth(boxes, labels=None, crowd=None):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    return dict(
        boxes=boxes,
        labels=torch.tensor(labels or [1] * count),
        crowd=torch.tensor(crowd or [False] * count, dtype=torch.bool),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        masks=None,
        size=(100, 100),
    )


def found(rows):
    return dict(boxes=[r[0] for r in rows], scores=[r[1] for r in rows], labels=[r[2] for r in rows])


def test_scores_are_those_counted_by_hand():
    scores = CocoScores(["a", "b"])
    # boxes of results are left, top, width, height
    scores.add(5, truth([[0, 0, 20, 20], [50, 50, 70, 70]]), found([([0, 0, 20, 20], 0.9, 1), ([80, 0, 9, 9], 0.8, 1)]))
    # IoU 0.8: right at the thresholds 0.50 to 0.80, 7 of the 10
    scores.add(6, truth([[0, 0, 20, 20]]), found([([0, 0, 20, 16], 0.7, 1)]))
    result = scores.compute()["bbox"]
    # precision by recall: 1 up to 1/3; then right, wrong, right: 2/3 up to 2/3; nothing beyond. 101 places of recall
    low, high = (34 * 1 + 33 * 2 / 3) / 101, 34 / 101
    assert result["ap50"] == pytest.approx(low) and result["ap75"] == pytest.approx(low)
    assert result["ap"] == pytest.approx((7 * low + 3 * high) / 10)
    assert result["classes"]["a"] == dict(ap=pytest.approx(result["ap"]), ap50=pytest.approx(low))
    assert np.isnan(result["classes"]["b"]["ap"]) and np.isnan(result["ap_large"])


def test_crowds_count_neither_way_and_nothing_found_is_zero():
    scores = CocoScores(["a"])
    scores.add(0, truth([[0, 0, 20, 20], [50, 0, 99, 99]], crowd=[False, True]), found([([0, 0, 20, 20], 0.5, 1)]))
    assert scores.compute()["bbox"]["ap"] == pytest.approx(1)
    scores.add(1, truth([[50, 0, 99, 99]], crowd=[True]), found([([60, 9, 9, 9], 0.9, 1), ([70, 9, 9, 9], 0.8, 1)]))
    assert scores.compute()["bbox"]["ap"] == pytest.approx(1)
    empty = CocoScores(["a"])
    with pytest.raises(ValueError, match="no image to measure"):
        empty.compute()
    empty.add(0, truth([[0, 0, 20, 20]]), found([]))
    assert empty.compute()["bbox"]["ap"] == 0.0


def test_learning_rate_falls_at_the_milestones():
    factors = [learning_rate_factor("steps", p, 12, 0.5, 1, 0.1, (8, 11)) for p in (0.25, 1, 7.9, 8, 11, 12)]
    assert factors == [0.5, 1, 1, 0.1, pytest.approx(0.01), pytest.approx(0.01)]


@pytest.mark.slow
def test_archives_of_coco_become_a_trained_network_and_its_masks(tmp_path, capsys):
    root, run = tmp_path / "coco", tmp_path / "run"
    archives = made_up_coco.archives(tmp_path)
    main(["data", "prepare", "coco", *map(str, archives), "--output", str(root), "--partial"])
    assert "4 train, 3 val; train with data=coco" in capsys.readouterr().out
    where = [f"data.root={root}", f"output_dir={tmp_path}", "name=run"]
    quick = [*SMALL, *QUICK, "model.pretrained=false", "model.norm_eval=false", "trainer.max_epochs=1"]
    few = ["+model.detector_kwargs.box_score_thresh=0", "+model.detector_kwargs.box_detections_per_img=5"]
    main(["train", "experiment=detection/coco_mask_rcnn", *where, *quick, *few])
    main(["eval", str(run), "baseline=true"])
    result = json.loads((run / "eval" / "val" / "metrics.json").read_text())
    assert set(result["scores"]) == {"bbox", "segm"} and result["images"] == 3 and result["objects"] == 4
    assert 0 <= result["baseline"]["ap50"] <= 1
    rows = json.loads((run / "eval" / "val" / "detections.json").read_text())
    assert {row["category_id"] for row in rows} <= {3, 7} and all("segmentation" in row for row in rows)
    for name in ("report.md", "per_class.csv", "pictures.png", "learning.png"):
        assert (run / "eval" / "val" / name).stat().st_size > 0
    image = sorted((root / "val2017").iterdir())[0]
    capsys.readouterr()
    main(["predict", "--run", str(run), str(image), "--output", str(tmp_path / "found")])
    assert f"{image.stem}_objects.png" in capsys.readouterr().out
    assert Image.open(tmp_path / "found" / f"{image.stem}_objects.png").size == (80, 64)
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert rows[0]["file_name"] == str(image) and rows[0]["category"] in ("bar", "block")
    assert all(len(row["bbox"]) == 4 and row["image_id"] == 1 for row in rows)


@pytest.mark.slow
def test_a_resumed_run_ends_bit_equal_and_learns(tmp_path):
    root = made_up_coco.folder(tmp_path / "set")
    settings = [
        *SMALL,
        *QUICK,
        "model=fcos",
        "data=coco",
        "task=detection",
        f"data.root={root}",
        f"output_dir={tmp_path}",
    ]
    settings += ["model.min_size=null", "+model.convs=1", "data.transform.crop=64", "data.transform.color=0.2"]
    settings += ["task.lr=1e-3", "task.lr_batch=2", "task.milestones=[2]", "trainer.max_epochs=3"]
    settings += ["+model.detector_kwargs.score_thresh=0", "model.norm=group"]
    whole = train(compose([*settings, "name=whole"]))
    train(compose([*settings, "name=parts", "trainer.max_epochs=2", "task.epochs=3"]))
    train(compose([*settings, "name=parts", "ckpt_path=last"]))
    weights = [torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("whole", "parts")]
    for key, value in weights[0]["state_dict"].items():
        assert torch.equal(value, weights[1]["state_dict"][key]), key
    assert whole["lr"] == pytest.approx(1e-4) and whole["train/loss"] < 3


@pytest.mark.slow
def test_the_trees_train_and_are_evaluated(tmp_path, capsys, tree_package):
    few = ["data.workers=0", "trainer.max_epochs=1", "+trainer.limit_train_batches=2", "+trainer.limit_val_batches=2"]
    few += ["task.warmup_epochs=0", f"data.wheel={tree_package}"]
    main(["train", "experiment=embedded/trees", f"output_dir={tmp_path}", *few])
    main(["eval", str(tmp_path / "trees"), "data.val_split=test", "baseline=true"])
    assert "median boxes" in capsys.readouterr().out
    result = json.loads((tmp_path / "trees" / "eval" / "test" / "metrics.json").read_text())
    assert result["images"] == 15


@pytest.mark.parametrize(
    "changes, message",
    [
        (["model=mask_rcnn"], "set data.masks=true"),
        (["model=unet", "~model.decoder"], "Segmenter is no detector"),
        (["data=nuclei", "model=fcos"], "has no boxes"),
        (["model=fcos", "monitor=val/loss"], "must be one of val/ap, val/ap50"),
        (["model=fcos", "task.score=2"], "task.score=2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, changes, message):
    root = made_up_coco.folder(tmp_path / "set")
    nuclei = "data=nuclei" in changes
    fitting = [] if "model=unet" in changes else ["model.channels=64"]
    settings = ["data=coco", "task=detection", *QUICK, f"output_dir={tmp_path}", *changes, "model.backbone=test_patnet"]
    settings += [] if nuclei else [f"data.root={root}"]
    with pytest.raises(ValueError, match=message):
        train(compose([*settings, *fitting]))


def test_the_baseline_is_a_grid_of_median_boxes():
    class Two:
        def __len__(self):
            return 1

        def __getitem__(self, i):
            from visionattn.data.detection import Scene

            return Scene(
                np.zeros((9, 9, 3), np.uint8), [[0, 0, 25, 50], [0, 0, 25, 50], [0, 0, 90, 90]], [1, 1, 1], "x"
            )

    scores = CocoScores(["a"])
    scores.add(0, truth([[0, 0, 25, 50], [25, 50, 50, 100]]), found([]))
    result = baseline(Two(), scores)
    assert result["boxes"] == 8 and result["ar100"] == 1.0
