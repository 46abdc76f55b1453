"""The last checkpoint inside an epoch: every some steps or minutes, and where a signal or a limit ends the run."""

import math
import re
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what SLURM's --signal=USR1@90 sends
_UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_duration(value: Any) -> int | None:
    """Seconds of ``"90s"``, ``"30m"`` or ``"2h"``; None for anything else."""
    found = re.fullmatch(r"(\d+)([smh])", str(value))
    return int(found[1]) * _UNITS[found[2]] or None if found else None


def parse_interval(value: Any) -> tuple[int | None, float | None]:
    """Steps or seconds of ``checkpoint_every``: 500 steps, ``"30m"``, ``"2h"`` or ``"90s"``.

    Raises:
        ValueError: Anything else.
    """
    if value is None:
        return None, None
    if seconds := parse_duration(value):
        return None, float(seconds)
    if not re.fullmatch(r"0*[1-9]\d*", str(value)):
        raise ValueError(f"checkpoint_every={value} must be steps (500), minutes (30m), hours (2h), or null")
    return int(value), None


def parse_steps(value: Any) -> int:
    """Steps of ``trainer.max_steps``, in Lightning's notation: -1 for no limit, which null is here too.

    Raises:
        ValueError: Neither that nor a number of steps.
    """
    if value is None or value == -1:
        return -1
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"trainer.max_steps={value} must be a number of steps, or null for all of trainer.max_epochs")
    return value


def parse_limit(value: Any) -> float:
    """Seconds of ``trainer.max_time``: ``"90s"``, ``"2h"``, or Lightning's ``"DD:HH:MM:SS"``; infinite for null.

    Raises:
        ValueError: Anything else.
    """
    if value is None:
        return math.inf
    parts = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", str(value))
    days, hours, minutes, seconds = map(int, parts.groups()) if parts else (0, 0, 0, parse_duration(value) or 0)
    if limit := ((days * 24 + hours) * 60 + minutes) * 60 + seconds:
        return limit
    raise ValueError(f"trainer.max_time={value} must be like 90s, 30m, 2h or 01:12:00:00 (days first), or null")


def _steps_done(trainer: Any) -> bool:
    return 0 <= trainer.max_steps <= trainer.global_step


def _whole_epoch(trainer: Any) -> bool:
    """Whether an epoch that ends is a whole one: Lightning ends one that ``max_steps`` cut short like any other."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    return not _steps_done(trainer) or done >= trainer.num_training_batches


class _WholeEpochs(Callback):
    """Leaves out the end of an epoch that ``max_steps`` cut short.

    A checkpoint from there would go on with the next epoch, and there may be no score yet.
    """

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        if _whole_epoch(trainer):
            super().on_train_epoch_end(trainer, module)


class EpochCheckpoint(_WholeEpochs, ModelCheckpoint):
    """Lightning's checkpoint, at the end of whole epochs only; inside one ``LastCheckpoint`` writes it.

    Its file always has the same name, whatever stands there, and a run whose folder was moved knows its best score.
    Where there is no such file, as in the folder of a run that starts from another's checkpoint, no score is known.
    """

    def __init__(self, folder: Path, name: str, **options: Any):
        super().__init__(folder, name, save_on_train_epoch_end=True, enable_version_counter=False, **options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score if its file is here, with the names of files in this folder."""
        file = Path(str(self.dirpath), f"{self.filename}{self.FILE_EXTENSION}")
        if not file.is_file():
            return
        if state_dict["dirpath"] == self.dirpath:
            super().load_state_dict(state_dict)
        else:
            here = dict.fromkeys(("best_model_path", "kth_best_model_path"), str(file))
            scores = {str(file): score for score in state_dict["best_k_models"].values()}
            super().load_state_dict({**state_dict, **here, "best_k_models": scores, "dirpath": self.dirpath})


class EpochStopping(_WholeEpochs, EarlyStopping):
    """Lightning's early stopping, by the scores of whole epochs only, with the patience of the command."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score and how long ago it was."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """End a resumed run whose patience is over already."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
            rank_zero_info(
                f"patience={self.patience}: the last {self.wait_count} epochs had no better {self.monitor}, so the run "
                f"is over; a larger patience goes on with it"
            )


class LastCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` inside epochs, from where a resumed run goes on with the next batch.

    It is written behind a step of the optimizer only, since gradients that are not yet used are in no checkpoint; not
    where a validation follows, which the resumed run would leave out: what is due there is written after the next step.
    Behind the last batch of an epoch there is the checkpoint of the epoch's end, which serves as well, and from which
    on the steps or minutes are counted again. This callback stands behind the one that writes it.

    Where ``max_steps`` or ``max_time`` ends the run inside an epoch it is written too, so that a later run goes on
    there. Lightning counts the steps, but must not know of them before a checkpoint is loaded: it would take the end
    of an epoch for the middle of one.

    SIGTERM, SIGINT and SIGUSR1 write it too and end the run with the exit code 128 + the signal's number (SIGUSR1: that
    of SIGTERM); all processes stop at one step, whichever of them was told. A run whose last epoch is over ends as if
    nobody had told it. A second signal ends the run at once.

    Args:
        folder: The run's folder.
        every: See ``parse_interval``.
        max_steps: See ``parse_steps``.
        max_time: See ``parse_limit``; counted from the start of this process' training.

    Raises:
        ValueError: Another ``every``, ``max_steps`` or ``max_time``.
    """

    def __init__(self, folder: Path, every: Any = None, max_steps: Any = None, max_time: Any = None):
        self.folder, self.path = folder, folder / "checkpoints" / "last.ckpt"
        self.steps, self.seconds = parse_interval(every)
        self.max_steps, self.max_time, self.max_seconds = parse_steps(max_steps), max_time, parse_limit(max_time)
        self.signal = self.told = 0
        self.former: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Start the clock, limit the steps, and take the signals."""
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps
        self.step, self.time = trainer.global_step, time.monotonic()
        self.deadline = self.time + self.max_seconds
        try:
            # behind Lightning's own handlers, which end the process at once or at the end of the epoch
            self.former = {number: signal.signal(number, self._note) for number in _SIGNALS}
        except ValueError:  # outside the main thread nobody may take signals
            self.former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = int(signal.SIGTERM) if number == signal.SIGUSR1 else number
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self.former = {}

    def _agree(self, trainer: Any) -> tuple[int, bool, bool]:
        """The signal that any process got, and whether any one's clock says that a checkpoint is due, or the end."""
        now = time.monotonic()
        late, over = self.seconds is not None and now - self.time >= self.seconds, now >= self.deadline
        if trainer.world_size == 1:
            return self.signal, late, over
        # processes that disagree would wait for each other for ever
        told = torch.tensor([self.signal, int(late), int(over)], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        number, due, end = told.tolist()
        return number, bool(due), bool(end)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save if something asks for it and the run could go on from here."""
        done, interval, ends = batch_idx + 1, trainer.val_check_batch, _steps_done(trainer)
        last = done >= trainer.num_training_batches
        validated = isinstance(interval, int) and done % interval == 0 and not ends  # then this run still validates
        if last or validated or done % trainer.accumulate_grad_batches:
            return
        number, late, over = self._agree(trainer)
        if over and not ends:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
            ends = True
        due = self.steps is not None and trainer.global_step - self.step >= self.steps
        if not (number or late or due or ends):
            return
        trainer.save_checkpoint(self.path, weights_only=False)  # of a model: the state of the optimizer too
        self.step, self.time = trainer.global_step, time.monotonic()
        if number:
            self._exit(number, trainer, trainer.current_epoch + 1)
        if ends:
            self._say_limit(trainer, over)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Do what is due behind the last batch of an epoch, whose own checkpoint is written."""
        if not _whole_epoch(trainer):
            return
        self.step, self.time = trainer.global_step, time.monotonic()
        self.told, _, over = self._agree(trainer)
        if over and not self.told and not _steps_done(trainer) and trainer.current_epoch + 1 < trainer.max_epochs:
            trainer.fit_loop.epoch_loop.max_steps = trainer.global_step
            self._say_limit(trainer, over)

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        """End a run that was told to in the epoch before, whose figures have been logged meanwhile."""
        if self.told:
            self._exit(self.told, trainer, trainer.current_epoch)

    def _stopped(self, trainer: Any, epoch: int) -> str:
        return f"stopped in epoch {epoch} after step {trainer.global_step}, saved in {self.path}"

    def _exit(self, number: int, trainer: Any, epoch: int) -> NoReturn:
        name, stopped = signal.Signals(number).name, self._stopped(trainer, epoch)
        rank_zero_info(f"{name}: {stopped}; the same command with ckpt_path=last goes on from there")
        raise SystemExit(128 + number)

    def _say_limit(self, trainer: Any, over: bool) -> None:
        limit = f"max_time={self.max_time}" if over else f"max_steps={trainer.max_steps}"
        stopped = self._stopped(trainer, trainer.current_epoch + 1)
        rank_zero_info(f"trainer.{limit}: {stopped}; ckpt_path=last with a later limit goes on from there")

    def teardown(self, trainer: Any, module: Any, stage: str) -> None:
        """Give the signals back."""
        self._give_back()
