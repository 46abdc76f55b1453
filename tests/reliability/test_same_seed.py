"""Two runs with one seed: the same bytes, but for times and paths."""

import csv
import json

import pytest
from helpers import assert_same, checkpoint
from processes import TWO, finish, make_pictures, start, start_ranks, training

from visionattn.cli import main
from visionattn.tasks.callbacks import TIMINGS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def assert_same_bytes(one, other):
    for which in ("best", "last"):
        contents = [checkpoint(run, which) for run in (one, other)]
        assert contents[0]["global_step"] > 0
        for content in contents:
            del content["callbacks"]  # paths
            content["epoch_so_far"] = {k: v for k, v in content["epoch_so_far"].items() if k not in TIMINGS}
        assert_same(*contents, which)
    rows = [list(csv.DictReader((run / "logs" / "metrics.csv").open())) for run in (one, other)]
    scores = [json.loads((run / "metrics.json").read_text()) for run in (one, other)]
    for figures in (*rows[0], *rows[1], *scores):
        for name in TIMINGS:
            figures.pop(name, None)
    assert len(rows[0]) > 1 and rows[0] == rows[1] and scores[0] == scores[1]


@pytest.mark.slow
def test_two_runs_with_workers_are_equal(pictures, tmp_path):
    changes = ["data.workers=2", "trainer.max_epochs=2"]
    main(training(pictures, tmp_path, "one", *changes))
    log = tmp_path / "log"
    finish(start(training(pictures, tmp_path, "other", *changes), log), log)  # with hashes of strings of its own
    assert_same_bytes(tmp_path / "one", tmp_path / "other")


@pytest.mark.thorough
def test_two_runs_of_two_processes_are_equal(pictures, tmp_path):
    for name in ("one", "other"):
        ranks = start_ranks(training(pictures, tmp_path, name, *TWO, "data.workers=1"), tmp_path)
        for rank, process in enumerate(ranks):
            finish(process, tmp_path / f"rank{rank}.log")
    assert_same_bytes(tmp_path / "one", tmp_path / "other")
