"""kill -9 at random times while a checkpoint is written: what is there afterwards is the old one or the new one."""

import random
import time

import pytest
import torch
from processes import FORKS, PATIENCE

from visionattn._writing import remove_stale
from visionattn.tasks.saving import DurableCheckpointIO

NUMBERS = 2_500_000  # float32: a checkpoint of 10 MB


def plain_save(checkpoint, path):
    torch.save(checkpoint, path)


def save_forever(path, number, durable, told):
    torch.set_num_threads(1)
    save = DurableCheckpointIO().save_checkpoint if durable else plain_save
    while True:
        number += 1
        save({"number": number, "state_dict": {"x": torch.full((NUMBERS,), float(number))}}, path)
        told.send(number)


def read(path):
    """Number of a checkpoint, which it must be completely."""
    content = torch.load(path, weights_only=True)
    number, x = content["number"], content["state_dict"]["x"]
    assert x.shape == (NUMBERS,) and bool((x == number).all())
    return number


def kill_one(path, number, durable, share):
    """Kill one process that saves, the share of a save after a save; number of the last save that it finished."""
    receiver, sender = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=save_forever, args=(path, number, durable, sender))
    process.start()
    sender.close()
    try:
        times = []
        for _ in range(2):
            assert receiver.poll(PATIENCE)
            number = receiver.recv()
            times.append(time.monotonic())
        # the second interval's length is the best guess of the next one's
        deadline = times[1] + share * (times[1] - times[0])
        while time.monotonic() < deadline:
            pass
    finally:
        process.kill()
        process.join(PATIENCE)
    while True:
        try:
            number = receiver.recv()
        except EOFError:
            return number


def kill_saves(folder, kills, durable=True):
    """Kill that many; number of kills that came inside a write, and of those that left no whole checkpoint."""
    path, number, inside, broken = folder / "last.ckpt", 0, 0, 0
    order = random.Random(kills)
    for _ in range(kills):
        number = kill_one(path, number, durable, order.random())
        inside += bool(list(folder.glob("*.part")))
        try:
            found = read(path)
        except Exception:  # torch raises a dozen types for damaged files
            broken += 1
            continue
        assert found in (number, number + 1)
        number = found
        remove_stale(folder)
        assert [p.name for p in folder.iterdir()] == ["last.ckpt"]
    return inside, broken


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.thorough)])
def test_killed_save_leaves_the_old_or_the_new_checkpoint(tmp_path, kills):
    inside, broken = kill_saves(tmp_path, kills)
    print(f"{kills} kills, {inside} inside a write, {broken} without a whole checkpoint")
    assert broken == 0 and (inside or kills < 100)


def test_kills_find_a_writer_that_is_not_atomic(tmp_path):
    assert kill_saves(tmp_path, 6, durable=False)[1] > 0
