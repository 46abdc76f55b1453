"""One of two processes that train together dies or hangs: the other ends and says so, and a restart goes on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from processes import FORKS, PATIENCE, TWO, finish, make_pictures, start_ranks, training

SECONDS = 60  # until the other process must have ended


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.slow
@pytest.mark.parametrize("dead", [1, pytest.param(0, marks=pytest.mark.thorough)])
def test_rank_that_dies_ends_the_other_and_a_restart_goes_on(pictures, tmp_path, dead):
    receiver, sender = FORKS.Pipe(duplex=False)
    ranks = start_ranks(training(pictures, tmp_path, "two", *TWO), tmp_path, sender)
    sender.close()
    try:
        for _ in range(6):  # into the second of three epochs
            assert receiver.poll(PATIENCE), (tmp_path / "rank0.log").read_text()
            receiver.recv()
        ranks[dead].kill()
        killed = time.monotonic()
        other = ranks[1 - dead]
        other.join(SECONDS)
        print(f"rank {1 - dead} ended {time.monotonic() - killed:.1f} s after rank {dead} with {other.exitcode}")
        assert other.exitcode not in (None, 0), (tmp_path / f"rank{1 - dead}.log").read_text()
    finally:
        for process in ranks:
            process.kill()
            process.join(PATIENCE)
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 0
    for rank, process in enumerate(start_ranks(training(pictures, tmp_path, "two", *TWO, "ckpt_path=last"), tmp_path)):
        finish(process, tmp_path / f"rank{rank}.log")
    assert torch.load(last, weights_only=True)["epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.thorough)])
def test_rank_that_hangs_ends_the_other_after_the_timeout(pictures, tmp_path, strategy):
    limits = [f"trainer.strategy={strategy}", "+trainer.timeout=10s", "task.ema_decay=null", "trainer.max_epochs=1000"]
    receiver, sender = FORKS.Pipe(duplex=False)
    ranks = start_ranks(training(pictures, tmp_path, "two", *TWO, *limits), tmp_path, sender)
    sender.close()
    try:
        for _ in range(6):
            assert receiver.poll(PATIENCE), (tmp_path / "rank0.log").read_text()
            receiver.recv()
        os.kill(ranks[1].pid, signal.SIGSTOP)
        stopped = time.monotonic()
        ranks[0].join(SECONDS)
        seconds, said = time.monotonic() - stopped, (tmp_path / "rank0.log").read_text()
        print(f"{strategy}: rank 0 ended {seconds:.1f} s after rank 1 hung with {ranks[0].exitcode}")
        assert ranks[0].exitcode == 1 and seconds > 5, said
        assert "error: process 0 of 2 lost another one" in said and "trainer.timeout=10s" in said
        assert "Traceback" not in said
    finally:
        for process in ranks:
            process.kill()
            process.join(PATIENCE)
    assert torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def processes_below(process):
    """Numbers of the processes of the command that a process started, directly or not."""
    found = []
    for child in map(int, Path(f"/proc/{process}/task/{process}/children").read_text().split()):
        with suppress(FileNotFoundError):  # it has ended since
            found += [child] if b"visionattn.cli" in Path(f"/proc/{child}/cmdline").read_bytes() else []
            found += processes_below(child)
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_launchers_end_when_a_rank_is_lost(pictures, tmp_path, launcher, number):
    modules = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"] if launcher == "torchrun" else []
    command = [sys.executable, "-m", *modules, "visionattn.cli"]
    command += training(pictures, tmp_path, "two", *TWO, "trainer.max_epochs=1000", "+trainer.timeout=30s")
    limit = SECONDS if number == signal.SIGKILL else 30 + SECONDS  # torchrun kills what SIGTERM did not end 30 s later
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = []
    try:
        deadline = time.monotonic() + PATIENCE
        while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert process.poll() is None, (tmp_path / "log").read_text()
        ranks = processes_below(process.pid)
        os.kill(max(ranks), number)
        killed = time.monotonic()
        assert process.wait(limit) != 0
        while any(os.path.exists(f"/proc/{pid}") for pid in ranks) and time.monotonic() < killed + limit:
            time.sleep(0.1)
        seconds = time.monotonic() - killed
        print(f"{launcher}, {number.name}: ended after {seconds:.1f} s with {process.returncode}")
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    finally:
        for pid in filter(lambda pid: os.path.exists(f"/proc/{pid}"), ranks):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
    assert torch.load(last, weights_only=True)["state_dict"]
