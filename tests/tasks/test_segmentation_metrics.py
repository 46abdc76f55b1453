"""Metrics of masks: agreement with published code, fields of view, empty masks, intervals."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import inputs

from visionattn.data.segmentation import IGNORE
from visionattn.tasks.segmentation_metrics import METRICS, image_metrics, interval, summarize, write_results

REFERENCE = Path(__file__).parent.parent / "reference" / "heads"
NAMES = dict(f1="f1", acc="accuracy", sen="sensitivity", iou="iou", mcc="mcc", auc_true="auc")


@pytest.fixture
def square():
    truth = torch.zeros(16, 16, dtype=torch.long)
    truth[4:12, 4:12] = 1
    return truth


def test_values_of_the_published_code():
    expected = np.load(REFERENCE / "segmentation_metrics.npz")
    x = inputs((4, 1, 24, 32), 0)
    probability, truth = x.sigmoid(), (inputs((4, 1, 24, 32), 1) + x > 0.6).long()
    rows = [image_metrics(p[0], t[0]) for p, t in zip(probability, truth, strict=True)]
    for golden, name in NAMES.items():
        assert [row[name] for row in rows] == pytest.approx(expected[golden].tolist(), abs=1e-6), name
    tp, fp, fn, tn = (sum(row[key] for row in rows) for key in ("tp", "fp", "fn", "tn"))
    classes = [tn / (tn + fp + fn), tp / (tp + fp + fn)]
    assert classes == pytest.approx(expected["class_iou"].tolist(), abs=1e-6)


def test_nothing_outside_the_field_counts(square):
    probability = torch.rand(16, 16, generator=torch.Generator().manual_seed(0))
    square[:, 12:] = IGNORE
    other = probability.clone()
    other[:, 12:] = 1 - other[:, 12:]
    assert image_metrics(probability, square) == pytest.approx(image_metrics(other, square), nan_ok=True)
    assert image_metrics(probability, square)["accuracy"] == pytest.approx(
        ((probability > 0.5)[:, :12] == square[:, :12]).double().mean().item()
    )


def test_undefined_is_undefined(square):
    empty = torch.zeros(16, 16)
    both = image_metrics(empty, torch.zeros_like(square))
    undefined = {name for name in METRICS if math.isnan(both[name])}
    assert undefined == set(METRICS) - {"specificity", "accuracy"}
    missed = image_metrics(empty, square)
    assert missed["dice"] == 0 and math.isnan(missed["hd95"]) and math.isnan(missed["cldice"])
    rows = [dict(name=n, group=n, **row) for n, row in (("a", both), ("b", missed))]
    summary = summarize(rows)
    assert summary["per_image"]["dice"] == dict(mean=0.0, ci95=None, defined=1, undefined=1)
    assert summary["per_image"]["hd95"]["mean"] is None


def test_distances_are_in_millimetres_where_the_spacing_is_known(square):
    shifted = square.roll(3, 0).float()
    assert image_metrics(shifted, square)["hd95"] == pytest.approx(3)
    row = image_metrics(shifted, square, spacing=(0.5, 2.0))
    assert (row["hd95"], row["unit"]) == (pytest.approx(1.5), "mm")
    assert row["surface_dice"] == 1 > image_metrics(shifted, square, tolerance=1.0)["surface_dice"]
    with pytest.raises(ValueError, match="cannot be averaged"):
        summarize([dict(name="a", group="a", **image_metrics(shifted, square)), dict(name="b", group="b", **row)])


def test_intervals_draw_groups():
    values = [0.0, 0.0, 1.0, 1.0]
    low, high = interval(values, ["a", "a", "b", "b"])
    assert (low, high) == (0, 1)
    narrow = interval(values, ["a", "b", "c", "d"])
    assert narrow[0] >= 0 and narrow[1] <= 1
    assert interval(values, ["a"] * 4) is None
    steady = interval([0.5, 0.7] * 50, [str(i) for i in range(100)])
    assert 0.55 < steady[0] < 0.6 < steady[1] < 0.65


def test_wrong_input_is_named(square):
    with pytest.raises(ValueError, match=r"labels \[0, 1, 2\]"):
        image_metrics(torch.zeros(16, 16), square + square.roll(4, 0))
    with pytest.raises(ValueError, match="threshold=0 must"):
        image_metrics(torch.zeros(16, 16), square, threshold=0)
    with pytest.raises(ValueError, match="no image"):
        summarize([])


def test_files(tmp_path, square):
    rows = [dict(name="a", group="a", **image_metrics(torch.zeros(16, 16), square))]
    write_results(tmp_path, summarize(rows), rows)
    assert json.loads((tmp_path / "metrics.json").read_text())["images"] == 1
    with (tmp_path / "per_image.csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["hd95"] == "" and row["dice"] == "0.0"
