"""Runs that end inside an epoch and go on with the next batch, equal to the last bit."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same

from visionattn.cli import main
from visionattn.tasks import stopping
from visionattn.tasks.callbacks import TIMINGS
from visionattn.tasks.comparison import read_epochs
from visionattn.tasks.config import compose
from visionattn.tasks.resuming import goes_on, starting_point
from visionattn.tasks.stopping import EpochCheckpoint, LastCheckpoint, parse_interval, parse_limit, parse_steps
from visionattn.tasks.training import Training

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
    settings = (tmp_path / "x" / "config.yaml").read_text()
    with pytest.raises(SystemExit, match=r"data.batch_size 8, now 4"):
        main([*ARGUMENTS, *place, "ckpt_path=last", "data.batch_size=4"])
    assert (tmp_path / "x" / "config.yaml").read_text() == settings


# one batch an epoch, whose averaged weights never move: every epoch scores the same, so the first is the best
SINGLE = [
    *("train", "experiment=digits", "model=test_nat", "~model.n_win", "~model.topks", "~logger.tensorboard"),
    *("trainer.max_epochs=3", "+trainer.limit_train_batches=1", "+trainer.limit_val_batches=1"),
    *("data.batch_size=8", "data.workers=0", "task.ema_decay=1.0", "task.ema_eval=true"),
]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    main([*SINGLE, f"output_dir={folder}", "name=x"])
    return folder / "x"


def epochs_done(run):
    return content(run)["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]


def test_signal_in_an_epoch_of_one_batch_ends_the_run_at_its_end(tmp_path, single, monkeypatch, capsys):
    place = [f"output_dir={tmp_path}", "name=x"]
    with monkeypatch.context() as patch:
        stop_at(patch, 1, 0)
        with pytest.raises(SystemExit) as stopped:
            main([*SINGLE, *place])
    assert stopped.value.code == 143 and epochs_done(tmp_path / "x") == 2
    rows = read_epochs(tmp_path / "x" / "logs" / "metrics.csv")
    assert len(rows) == 2 and all("train/loss" in row for row in rows)  # the last epoch is logged too
    with monkeypatch.context() as patch:
        stop_at(patch, 2, 0)  # nothing is left to stop
        main([*SINGLE, *place, "ckpt_path=last"])
    assert_same_run(single, tmp_path / "x")


def test_time_is_over_at_the_end_of_an_epoch_of_one_group(tmp_path, single, monkeypatch):
    place = [f"output_dir={tmp_path}", "name=x", "trainer.accumulate_grad_batches=4", "task.lr_batch=2048"]
    clock = itertools.count()  # each look takes a second
    with monkeypatch.context() as patch:
        patch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        main([*SINGLE, *place, "+trainer.max_time=1s"])
    assert epochs_done(tmp_path / "x") == 1
    assert [row["epoch"] for row in read_epochs(tmp_path / "x" / "logs" / "metrics.csv")] == [0]
    main([*SINGLE, *place, "ckpt_path=last"])
    assert_same_run(single, tmp_path / "x")


def test_run_goes_on_in_another_folder_with_its_best_score(tmp_path, single):
    shutil.copytree(single, tmp_path / "moved")
    main([*SINGLE, f"output_dir={tmp_path}", "name=moved", "trainer.max_epochs=4", "ckpt_path=last"])
    checkpoints = tmp_path / "moved" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(checkpoints / "best.ckpt", weights_only=True)["epoch"] == 0  # the others were no better
    assert epochs_done(tmp_path / "moved") == 4
    # a run of its own that starts from there has no best checkpoint yet
    start = f"ckpt_path={single / 'checkpoints' / 'last.ckpt'}"
    main([*SINGLE, f"output_dir={tmp_path}", "name=new", "trainer.max_epochs=4", start, "monitor=val/loss"])
    assert torch.load(tmp_path / "new" / "checkpoints" / "best.ckpt", weights_only=True)["epoch"] == 3


def test_best_checkpoint_keeps_its_name_where_its_score_is_lost(tmp_path, single):
    shutil.copytree(single, tmp_path / "x")
    last = tmp_path / "x" / "checkpoints" / "last.ckpt"
    saved = content(tmp_path / "x")
    del saved["callbacks"][next(key for key in saved["callbacks"] if "'monitor': 'val/top1'" in key)]
    torch.save(saved, last)
    main([*SINGLE, f"output_dir={tmp_path}", "name=x", "trainer.max_epochs=4", "ckpt_path=last"])
    assert sorted(path.name for path in last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    assert torch.load(last.with_name("best.ckpt"), weights_only=True)["epoch"] == 3


def test_run_that_was_killed_between_its_first_checkpoints_goes_on(tmp_path, single):
    shutil.copytree(single, tmp_path / "x")
    (tmp_path / "x" / "checkpoints" / "last.ckpt").unlink()  # the best is of the first epoch
    main([*SINGLE, f"output_dir={tmp_path}", "name=x", "ckpt_path=auto"])
    assert len(read_epochs(tmp_path / "x" / "logs" / "metrics.csv")) == 2
    assert_same_run(single, tmp_path / "x")


def test_patience_of_the_command_counts_in_a_resumed_run(tmp_path, capsys):
    place = [f"output_dir={tmp_path}", "name=x", "ckpt_path=auto", "trainer.max_epochs=4"]
    main([*SINGLE, *place, "patience=1"])
    last = tmp_path / "x" / "checkpoints" / "last.ckpt"
    assert epochs_done(tmp_path / "x") == 2
    former = last.read_bytes()
    main([*SINGLE, *place, "patience=1"])  # queued again
    assert last.read_bytes() == former
    main([*SINGLE, *place, "patience=2"])
    assert epochs_done(tmp_path / "x") == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model=test_davit"], "model.model_name=test_nat, now test_davit"),
        (["+model.mlp_ratio=2"], "model.mlp_ratio=None, now 2"),
        (["task.ema_decay=null"], "with averaged weights, now without"),
        (["task.opt=sgd"], "task.opt=adamw, now sgd"),
        (["task.weight_decay=0.1"], r"task.weight_decay=0.05, now 0.1"),
        (["trainer.max_epochs=1"], "after 3 epochs, more than trainer.max_epochs=1; set it to 3"),
        (["monitor=val/loss"], "monitor=val/top1, now monitor=val/loss"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_before_anything_changes(single, changes, message):
    files = {path: path.read_bytes() for path in single.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match=message) as refused:
        main([*SINGLE, f"output_dir={single.parent}", "name=x", "ckpt_path=last", *changes])
    assert refused.value.code.startswith("error: ") and "\n" not in refused.value.code
    assert {path: path.read_bytes() for path in single.rglob("*") if path.is_file()} == files


def test_checkpoint_of_other_trained_parameters_is_refused(single, monkeypatch):
    make = Training.make_optimizer

    def frozen(task):
        next(task.model.parameters()).requires_grad_(False)
        return make(task)

    monkeypatch.setattr(Training, "make_optimizer", frozen)
    with pytest.raises(SystemExit, match="other groups of parameters, as frozen ones"):
        main([*SINGLE, f"output_dir={single.parent}", "name=x", "ckpt_path=last"])


@pytest.mark.parametrize(
    ("files", "starts"),
    [
        (["checkpoints/best.ckpt"], False),
        (["checkpoints/epoch=3.ckpt"], False),
        (["run.json", "metrics.json"], False),
        (["logs/mine.txt"], False),  # written by something else
        (["tensorboard/events/x"], False),
        (["run.json", "logs/metrics.csv", "checkpoints/last.ckpt.here.1.part"], True),  # ended before its first one
        (["other.txt"], True),
    ],
)
def test_new_run_asks_before_it_overwrites(tmp_path, files, starts):
    for name in files:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text("precious")
    (tmp_path / "other.ckpt").write_text("of another run")
    for ckpt_path in ("null", tmp_path / "other.ckpt"):
        config = compose([*SINGLE[1:], f"output_dir={tmp_path}", "name=x", f"ckpt_path={ckpt_path}"])
        if starts:
            starting_point(config, tmp_path / "x")
            continue
        with pytest.raises(ValueError, match=rf"{files[-1]}.*overwrite=true"):
            starting_point(config, tmp_path / "x")
        config.overwrite = True
        path = starting_point(config, tmp_path / "x")
        assert not goes_on(path, tmp_path / "x")  # so that the folder is emptied


def test_queued_run_goes_on_from_what_is_there(tmp_path):
    config = compose([*SINGLE[1:], f"output_dir={tmp_path}", "name=x", "ckpt_path=auto"])
    folder = tmp_path / "x"
    assert starting_point(config, folder) is None
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("best.ckpt", "last.ckpt"):  # killed between the two, in the first epoch
        (folder / "checkpoints" / name).touch()
        assert starting_point(config, folder) == folder / "checkpoints" / name


def test_folder_of_checkpoints_may_lie_on_another_disk(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "scratch" / "last.ckpt").touch()
    for ckpt_path in ("last", "auto", tmp_path / "scratch" / "last.ckpt"):
        config = compose([*SINGLE[1:], f"output_dir={tmp_path}", "name=x", f"ckpt_path={ckpt_path}", "overwrite=true"])
        assert goes_on(starting_point(config, tmp_path / "x"), tmp_path / "x") == (ckpt_path in ("last", "auto"))


def test_score_of_a_file_that_is_gone_is_not_the_best(tmp_path):
    found = EpochCheckpoint(tmp_path, "best", monitor="val/top1", mode="max")
    path, score = str(tmp_path / "best.ckpt"), torch.tensor(0.9)
    state = dict(monitor="val/top1", best_model_score=score, best_model_path=path, current_score=score)
    state |= dict(dirpath=str(tmp_path), best_k_models={path: score}, kth_best_model_path=path, kth_value=score)
    state["last_model_path"] = ""
    found.load_state_dict(state)
    assert found.best_model_score is None and not found.best_k_models
    Path(path).touch()
    found.load_state_dict(state)
    assert found.best_model_score == score and found.best_k_models == {path: score}


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
