"""Rate and time left of what takes long: a bar on a terminal, a line now and then anywhere else."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")
_logger = logging.getLogger("visionattn")


class _Rate(ProgressColumn):
    """Items a second."""

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.0f}/s")


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def tracked(batches: Iterable[Item], total: int, what: str = "images", every: float = 30.0) -> Iterator[Item]:
    """The batches, with the progress of what they hold.

    Args:
        batches: Each counts as its ``len``, a dictionary as that of its ``label`` and ``skipped``.
        total: Sum of these.
        what: Name of what is counted.
        every: Seconds between the lines that are logged where standard error is no terminal.
    """
    if not sys.stderr.isatty():
        yield from _with_lines(batches, total, what, every)
        return
    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(what, total=total)
        for batch in batches:
            yield batch
            progress.advance(task, _count(batch))


def _with_lines(batches: Iterable[Item], total: int, what: str, every: float) -> Iterator[Item]:
    start = last = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done += _count(batch)
        now = time.perf_counter()
        if now - last >= every and done < total:
            last, rate = now, done / (now - start)
            left = duration((total - done) / rate)
            _logger.info("%d of %d %s, %.0f/s, %s left", done, total, what, rate, left)


def _count(batch: Any) -> int:
    if isinstance(batch, dict):
        return len(batch["label"]) + len(batch["skipped"])
    return len(batch) if isinstance(batch, Sized) else 1
