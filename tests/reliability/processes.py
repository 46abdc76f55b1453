"""Processes to be killed, forked from one that has imported everything: an import takes longer than what they do."""

import multiprocessing
import os
import socket
import sys
import time

import numpy as np
from PIL import Image

from visionattn.cli import main
from visionattn.tasks.callbacks import EpochLines

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["visionattn.tasks.train", "visionattn.tasks.classification", "torch._dynamo"])
PATIENCE = 300  # seconds until something that should have happened long ago counts as failed
SMALL = [
    "data=folder",
    "data.workers=0",
    "data.batch_size=8",
    "model=test_biformer",
    "trainer.max_epochs=3",
    "trainer.accumulate_grad_batches=2",
    "task.ema_decay=0.5",
    "~logger.tensorboard",
]
# the epochs of one process are halved by two, so half the batch keeps the number of steps
TWO = ["trainer.devices=2", "+trainer.strategy=ddp", "data.batch_size=4"]
STEPS = 12  # of a whole such run: epochs times batches


def make_pictures(root, train=16, val=4):
    """A folder of two classes of noise, with so many pictures of each in the training and the validation split."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def _command(arguments, log, environment, steps):
    os.environ.update(OMP_NUM_THREADS="1", **environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["visionattn", *arguments]
    if steps is not None:
        after_batch = EpochLines.on_train_batch_end

        def tell(callback, *args):
            after_batch(callback, *args)
            steps.send(time.monotonic())

        EpochLines.on_train_batch_end = tell
    main(arguments)


def start(arguments, log, steps=None, **environment):
    """A process that runs ``visionattn`` and writes what it says to a file.

    Args:
        arguments: Of the command.
        log: The file.
        steps: A connection that is told the time of every batch that was trained.
        **environment: More variables.
    """
    process = FORKS.Process(target=_command, args=(arguments, str(log), environment, steps))
    process.start()
    return process


def finish(process, log):
    """Wait for the end of a process that must succeed."""
    process.join(PATIENCE)
    assert process.exitcode == 0, f"exit code {process.exitcode}: {log.read_text()}"


def training(data, folder, name, *changes):
    """Arguments of a small training run on a folder of pictures."""
    return ["train", *SMALL, f"data.root={data}", f"output_dir={folder}", f"name={name}", *changes]


def start_ranks(arguments, folder, steps=None):
    """Two processes with the variables by which torchrun tells each its rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    shared |= dict(LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
    return [
        start(arguments, folder / f"rank{rank}.log", told, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, told in enumerate((steps, None))
    ]
