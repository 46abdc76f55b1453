"""kill -9 at random steps of a training: the resumed run ends with the same bytes as one that nobody killed."""

import random
import time

import pytest
import torch
from helpers import assert_same
from processes import FORKS, PATIENCE, STEPS, finish, make_pictures, start, training


def last(run):
    """What the last checkpoint of a run says of the training itself, not of files and seconds."""
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    parts = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters")
    return {part: content[part] for part in parts}


def kill(arguments, log, step, share):
    """Run a training and kill it after so many steps and a share of another one."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = start(arguments, log, sender)
    sender.close()
    try:
        times = [time.monotonic()]
        for _ in range(step):
            assert receiver.poll(PATIENCE), log.read_text()
            times.append(receiver.recv())
        time.sleep(share * (times[-1] - times[-2]) if step > 1 else 0)
    finally:
        process.kill()
        process.join(PATIENCE)
    assert process.exitcode == -9, f"exit code {process.exitcode}: {log.read_text()}"


def kill_and_resume(data, folder, name, step, share, *changes):
    """Kill a training, and run it to its end from what is left of it; whether that was a checkpoint."""
    log = folder / f"{name}.log"
    kill(training(data, folder, name), log, step, share)
    resume = ["ckpt_path=last"] if (folder / name / "checkpoints" / "last.ckpt").is_file() else ["overwrite=true"]
    finish(start(training(data, folder, name, *resume, *changes), log), log)
    assert not list((folder / name).rglob("*.part"))
    return resume == ["ckpt_path=last"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The last checkpoint of a training that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(training(pictures, folder, "whole"), folder / "log"), folder / "log")
    content = last(folder / "whole")
    assert content["epoch"] == 2  # of 0 to 2, whichever was the best
    return content


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(pictures, whole, tmp_path):
    assert kill_and_resume(pictures, tmp_path, "killed", 6, 0.5, "data.workers=1")
    assert_same(whole, last(tmp_path / "killed"))
    logs = sorted(path.name for path in (tmp_path / "killed" / "logs").glob("*.csv"))
    assert logs == ["metrics.csv", "metrics_before_1.csv"]  # nothing of the killed run's log is lost


@pytest.mark.thorough
def test_run_killed_at_twenty_random_steps_resumes_to_the_same_weights(pictures, whole, tmp_path):
    order, resumed = random.Random(20), 0
    for i in range(20):
        step, share = order.randrange(1, STEPS), order.random()
        resumed += kill_and_resume(pictures, tmp_path, f"killed{i}", step, share)
        assert_same(whole, last(tmp_path / f"killed{i}"), f"after {step} steps and {share:.2f}: ")
    print(f"20 kills, {resumed} of them resumed from a checkpoint, the others began anew")
    assert 0 < resumed < 20
