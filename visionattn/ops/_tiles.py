"""Tile sizes of a kernel, and the search for them.

With ``VISIONATTN_AUTOTUNE=1`` in the environment the first call of every shape tries a handful of tiles on its own
tensors (a second or two of compilation each), keeps the fastest for the rest of the process, and reports it to the
logger ``visionattn``.
"""

import logging
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

AGREE = 2e-2  # difference of two tiles' results over the largest of them

logger = logging.getLogger("visionattn")


class Tile(NamedTuple):
    """Rows and columns of a program's tile of scores, its warps, stages of its loads, and most registers a thread."""

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None


def milliseconds(run: Callable[[], None]) -> float:
    """Time of a launch on the device."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


def _agree(expected: list[Tensor], actual: list[Tensor]) -> bool:
    """Whether results differ by no more than roundings in another order do."""
    for x, y in zip(expected, actual, strict=True):
        x, y = x.float(), y.float()
        size = x.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        if not torch.allclose(x, y, rtol=0.0, atol=AGREE * size, equal_nan=True):
            return False
    return True


class Search:
    """Stands for a ``Launch``: the first call times that of every tile, later ones take the fastest.

    A tile whose results are not those of the first one, by a compiler's mistake, is passed over.
    """

    def __init__(self, kernel: str, tiles: list[Any], prepare: Callable[[Any], Callable[..., None]]):
        self._kernel, self._tiles, self._prepare = kernel, tiles, prepare
        self._best: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        """Launch with ``args``; kernels write only results, so that running several does no harm."""
        if self._best is None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():  # no place for measuring
                self._prepare(self._tiles[0])(*args)
                return
            self._best = self._search(args)
        self._best(*args)

    def _search(self, args: tuple[Any, ...]) -> Callable[..., None]:
        found: list[tuple[float, Any, Callable[..., None]]] = []
        written = [x for x in args if torch.is_tensor(x) and x.is_floating_point() and x.numel() > 0]
        expected: list[Tensor] = []
        with torch.cuda.device(args[0].device if args[0].is_cuda else -1):
            for tile in self._tiles:
                try:
                    launch = self._prepare(tile)
                    launch(*args)
                    if expected and not _agree(expected, written):
                        logger.warning("%s: %s gives other results; passed over", self._kernel, tile)
                        continue
                    expected = expected or [x.clone() for x in written]
                    found.append((milliseconds(partial(launch, *args)), tile, launch))
                except Exception as error:  # too large for a grid, for this GPU, or for its compiler
                    logger.info("%s: %s does not work: %s", self._kernel, tile, error)
        if not found:
            raise RuntimeError(f"no tile of {len(self._tiles)} works for {self._kernel}; unset VISIONATTN_AUTOTUNE")
        time, tile, launch = min(found, key=lambda entry: entry[0])
        first, usual = found[0][:2]
        report = "%s: fastest of %d is %s, %.4f ms; %s takes %.4f"
        logger.info(report, self._kernel, len(found), tile, time, usual, first)
        return launch


def searching(device: torch.device) -> bool:
    """Whether tiles are to be searched for."""
    return os.environ.get("VISIONATTN_AUTOTUNE") == "1" and device.type == "cuda"
