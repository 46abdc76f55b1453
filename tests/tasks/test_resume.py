"""Runs that end inside an epoch and go on with the next batch, equal to the last bit."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same

from visionattn.cli import main
from visionattn.tasks import stopping
from visionattn.tasks.callbacks import TIMINGS
from visionattn.tasks.stopping import LastCheckpoint, parse_interval, parse_limit, parse_steps

# five batches in groups of two: the last group of an epoch is an incomplete one
ARGUMENTS = [
    "train",
    "experiment=digits",
    "model=test_biformer",
    "trainer.max_epochs=2",
    "+trainer.limit_train_batches=5",
    "+trainer.limit_val_batches=1",
    "data.batch_size=8",
    "trainer.accumulate_grad_batches=2",
    "task.ema_decay=0.5",
]


def content(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_run(one, other):
    a, b = content(one), content(other)
    for key in ("epoch", "global_step", "state_dict", "optimizer_states", "loops"):
        assert_same(a[key], b[key], key)
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (one, other)]
    first, second = ({k: v for k, v in values.items() if k not in TIMINGS} for values in metrics)
    assert first == second


def stop_at(monkeypatch, epoch, batch, number=signal.SIGTERM):
    def kill(self, trainer, module, *args):
        if (trainer.current_epoch, args[1]) == (epoch, batch):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", kill)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    main([*ARGUMENTS, "data.workers=0", f"output_dir={folder}", "name=x"])
    return folder / "x"


@pytest.mark.parametrize(
    ("workers", "later", "epoch", "batch", "saved"),
    [
        pytest.param(0, 0, 0, 1, 2, marks=pytest.mark.thorough),
        pytest.param(1, 2, 1, 2, 4, marks=pytest.mark.slow),  # told between two steps: saved after the second
        pytest.param(2, 0, 0, 4, 5, marks=pytest.mark.thorough),  # told in an epoch's last step: saved at its end
        pytest.param(0, 1, 1, 0, 2, marks=pytest.mark.thorough),
    ],
)
def test_stopped_run_goes_on_with_the_next_batch(tmp_path, whole, monkeypatch, workers, later, epoch, batch, saved):
    place = [f"output_dir={tmp_path}", "name=x"]
    with monkeypatch.context() as patch:
        stop_at(patch, epoch, batch)
        with pytest.raises(SystemExit) as stopped:
            main([*ARGUMENTS, f"data.workers={workers}", *place])
    assert stopped.value.code == 143
    steps = content(tmp_path / "x")["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert steps["processed"] == saved
    main([*ARGUMENTS, f"data.workers={later}", *place, "ckpt_path=last"])
    assert_same_run(whole, tmp_path / "x")


def test_run_with_more_steps_goes_on_where_the_former_limit_was(tmp_path, whole):
    """Three steps an epoch: limits inside the first, at its end, again the same, and inside the second; then none."""
    checkpoints = tmp_path / "x" / "checkpoints"
    for workers, steps, position, best in ((0, 1, 2, False), (1, 3, 5, True), (0, 3, 5, True), (1, 4, 2, True)):
        limit = ["patience=9", f"+trainer.max_steps={steps}", f"data.workers={workers}", "ckpt_path=auto"]
        main([*ARGUMENTS, f"output_dir={tmp_path}", "name=x", *limit])
        last = content(tmp_path / "x")
        assert last["global_step"] == steps
        assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] == position
        assert (checkpoints / "best.ckpt").exists() == best  # of whole epochs, which alone have scores
    main([*ARGUMENTS, f"output_dir={tmp_path}", "name=x", "patience=9", "data.workers=0", "ckpt_path=last"])
    assert_same_run(whole, tmp_path / "x")


def test_run_goes_on_where_its_time_was_over(tmp_path, whole, monkeypatch):
    place = [f"output_dir={tmp_path}", "name=x", "data.workers=0"]
    clock = itertools.count()  # each look takes a second
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        main([*ARGUMENTS, *place, "+trainer.max_time=2s"])
    last = content(tmp_path / "x")
    assert 0 < last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"] < 5
    assert not (tmp_path / "x" / "checkpoints" / "best.ckpt").exists()
    main([*ARGUMENTS, *place, "ckpt_path=last"])
    assert_same_run(whole, tmp_path / "x")


def test_checkpoints_between_change_nothing_and_other_batches_are_refused(tmp_path, whole, monkeypatch):
    place = [f"output_dir={tmp_path}", "name=x", "data.workers=0"]
    main([*ARGUMENTS, *place, "checkpoint_every=1"])
    assert_same_run(whole, tmp_path / "x")
    with monkeypatch.context() as patch:
        stop_at(patch, 0, 1, signal.SIGINT)
        with pytest.raises(SystemExit) as stopped:
            main([*ARGUMENTS, *place, "overwrite=true"])
    assert stopped.value.code == 130
    with pytest.raises(SystemExit, match=r"data.batch_size 8, now 4"):
        main([*ARGUMENTS, *place, "ckpt_path=last", "data.batch_size=4"])


@pytest.mark.slow
def test_terminated_process_says_how_to_go_on(tmp_path):
    command = [sys.executable, "-m", "visionattn.cli", *ARGUMENTS, f"output_dir={tmp_path}", "name=x"]
    command += ["data.workers=1", "trainer.max_epochs=500", "checkpoint_every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    ) as run:
        seen = next(line for line in run.stderr if "epoch 1/500" in line)
        os.killpg(run.pid, signal.SIGTERM)  # the workers too, as a scheduler does
        rest = run.stderr.read()
        assert run.wait(120) == 143, seen + rest
    assert "SIGTERM: stopped in epoch" in rest and "ckpt_path=last" in rest and "Traceback" not in rest
    assert content(tmp_path / "x")["global_step"] > 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, (None, None)), (500, (500, None)), ("90s", (None, 90)), ("30m", (None, 1800)), ("2h", (None, 7200))],
)
def test_intervals(value, expected):
    assert parse_interval(value) == expected


@pytest.mark.parametrize("value", [0, "-3", "often", "1.5h", "0m", 2.5])
def test_other_intervals_are_named(value):
    with pytest.raises(ValueError, match="checkpoint_every="):
        parse_interval(value)


def test_limits_of_time():
    assert [parse_limit(value) for value in (None, "2h", "01:00:00:05")] == [math.inf, 7200, 86405]
    for value in (0, "soon", "00:00:00:00", "1:2", {"hours": 1}):
        with pytest.raises(ValueError, match="trainer.max_time="):
            parse_limit(value)


def test_limits_of_steps():
    assert [parse_steps(value) for value in (None, -1, 7)] == [-1, -1, 7]
    for value in (0, -2, "many", 1.5):
        with pytest.raises(ValueError, match=f"trainer.max_steps={value}"):
            parse_steps(value)
