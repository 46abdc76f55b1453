"""Labelled images in tar shards, by number, in an order that is random but reads few shards at a time."""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
from PIL import Image

from visionattn.data.images import decode_image
from visionattn.data.randomness import seed_from
from visionattn.data.shard_cache import ShardCache, default_cache, is_url, retried
from visionattn.data.shards import INDEX, Index, parse_index, read_index

_LOG = logging.getLogger(__name__)
_OPEN_FILES = 32
_NAMES = dict(encoding="utf-8", errors="surrogatepass")  # surrogates stand for bytes of file names that are no UTF-8


class Shards:
    """Images in the tar shards of a folder or a URL.

    Args:
        root: Folder, or URL (``https://``, or any that fsspec knows), of the dataset.
        split: Sub-folder with ``index.json`` and the shards; ``""`` for none.
        in_chans: Channels that the images are converted to, 1 or 3.
        classes: Class names that the index must have; by default whatever it has.
        window: Shards whose images are mixed with each other in a random order.
        cache: Folder for shards fetched by URL; by default below the user's cache folder.
        cache_gb: Size of that folder in 10**9 bytes.

    Raises:
        FileNotFoundError: No folder, no index, or shards that it lists are missing.
        ValueError: A damaged index, or one of other shards or classes; a window below 1, or too large for the cache; a
            URL that does not answer.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "",
        in_chans: int = 3,
        classes: list[str] | None = None,
        window: int = 16,
        cache: str | Path | None = None,
        cache_gb: float = 100.0,
    ):
        if window < 1:
            raise ValueError(f"window={window}: expected at least 1 shard")
        self.place = "/".join(part for part in (str(root).rstrip("/"), split) if part)
        self.in_chans, self.window = in_chans, window
        self.cache: ShardCache | None = None
        if is_url(root):
            self.cache = ShardCache(self.place, Path(cache) if cache else default_cache(), cache_gb)
            url = f"{self.place}/{INDEX}"
            index = parse_index(retried(url, lambda stream: stream.read()), url)
            # one window in use and the next on its way
            if (need := 2 * window * max(shard.bytes for shard in index.shards) / 1e9) > cache_gb:
                raise ValueError(
                    f"data.cache_gb={cache_gb:g} cannot hold two windows of {window} shards ({need:.3g} x 10**9 "
                    "bytes); raise it or lower data.window"
                )
        else:
            index = read_index(Path(root, split))
        if classes is not None and index.classes != list(classes):
            raise ValueError(
                f"{self.place} has {len(index.classes)} classes ({', '.join(index.classes[:3])}, ...), training knows "
                f"{len(classes)} ({', '.join(classes[:3])}, ...); index both with the same --classes"
            )
        self.classes = index.classes
        self._keep(index)
        self._files = OrderedDict[int, int]()  # descriptors by shard, the latest last
        self._failed = dict[int, str]()
        self._share: tuple[int, int, int] | None = None  # seed, rank and number of ranks of the last order
        self._ahead: _Ahead | None = None
        self._epoch: int | None = None

    def _keep(self, index: Index) -> None:
        """The columns as arrays, which worker processes share as lists cannot."""
        self.shards = index.shards
        self.starts = np.cumsum([0, *map(len, index.shards)])
        join = lambda column: [value for shard in index.shards for value in getattr(shard, column)]  # noqa: E731
        self.names = np.array([name.encode(**_NAMES) for name in join("names")])
        self.labels = np.array(join("labels"), np.int32)
        self.offsets = np.array(join("offsets"), np.int64)
        self.sizes = np.array(join("sizes"), np.int64)
        for shard in self.shards:
            shard.names, shard.labels, shard.offsets, shard.sizes = [], [], [], []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": OrderedDict(), "_ahead": None}

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i, "right")) - 1

    def name(self, i: int) -> str:
        """Shard and member of image ``i``."""
        return f"{self.place}/{self.shards[self._shard(i)].name}:{self.names[i].decode(**_NAMES)}"

    def __getitem__(self, i: int) -> tuple[Image.Image, int, str]:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        name, size = self.name(i), int(self.sizes[i])
        content = os.pread(self._file(self._shard(i)), size, int(self.offsets[i]))
        if len(content) != size:
            raise ValueError(
                f"{name}: the shard ends after {len(content)} of {size} bytes; it is truncated, copy it anew"
            )
        return decode_image(content, name, self.in_chans), int(self.labels[i]), name

    def _file(self, number: int) -> int:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        shard = self.shards[number]
        if self.cache is None:
            self._files[number] = os.open(Path(self.place, shard.name), os.O_RDONLY)
        else:
            if self._ahead:
                self._ahead.reached(number)
            self._files[number] = self._fetched(number, self.cache)
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return self._files[number]

    def _fetched(self, number: int, cache: ShardCache) -> int:
        """Descriptor of a shard from the cache; what could not be fetched is not tried again in the same epoch."""
        if number in self._failed:
            raise ValueError(self._failed[number])
        while True:
            try:
                path = cache.get(self.shards[number])
            except (ValueError, FileNotFoundError) as error:
                self._failed[number] = str(error)
                raise
            try:
                return os.open(str(path), os.O_RDONLY)
            except FileNotFoundError:  # another process made room in between
                continue

    def epoch_order(self, epoch: int | None, seed: int, rank: int = 0, world_size: int = 1) -> Sequence[int]:
        """The images of one process's epoch, a function of the arguments alone.

        The shards are put in a random order and the images in them dealt to the processes in that order, a stretch of
        equal length for each: a process, and a host, reads only its part of the shards, and but for the first and the
        last whole ones. Within a stretch, windows of ``window`` shards are shuffled. To be of equal length, stretches
        may repeat up to ``world_size - 1`` images of the epoch's beginning.

        Args:
            epoch: Number of the epoch; None for every image once, in order, and of none twice.
            seed: Seed of the run.
            rank: Number of the process.
            world_size: Number of processes.

        Returns:
            Numbers of images, ``[ceil(images / world_size)]``; shorter stretches are possible without an epoch.

        Raises:
            ValueError: Fewer images than processes.
        """
        if len(self) < world_size:
            raise ValueError(f"{self.place} has {len(self)} images for {world_size} processes; use fewer processes")
        if epoch is None:
            return range(rank * len(self) // world_size, (rank + 1) * len(self) // world_size)
        self._share = seed, rank, world_size
        return np.concatenate(self._windows(epoch, seed, rank, world_size)).tolist()

    def _windows(self, epoch: int, seed: int, rank: int, world_size: int) -> list[np.ndarray]:
        shards = np.random.RandomState(seed_from(seed, epoch) % 2**32).permutation(len(self.shards))
        images = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in shards])
        length = -(-len(images) // world_size)
        stretch = images[np.arange(rank * length, (rank + 1) * length) % len(images)]
        changes = 1 + np.flatnonzero(np.diff(np.searchsorted(self.starts, stretch, "right")))
        windows = np.split(stretch, changes[self.window - 1 :: self.window])
        return [
            np.random.RandomState(seed_from(seed, epoch, rank, number) % 2**32).permutation(window)
            for number, window in enumerate(windows)
        ]

    def set_epoch(self, epoch: int) -> None:
        """Say in the reading process which epoch it reads.

        Shards are then fetched before they are needed, and those that could not be fetched before are tried again.
        """
        if self.cache is None or epoch == self._epoch:
            return
        self._epoch = epoch
        self._failed.clear()
        if self._share is None:
            return
        windows = self._windows(epoch, *self._share)
        if self._ahead:
            self._ahead.wanted.put(None)
        self._ahead = _Ahead(self, [np.unique(np.searchsorted(self.starts, w, "right") - 1).tolist() for w in windows])


class _Ahead:
    """Fetches the shards of the next window while the present one is read, in a thread of the reading process."""

    def __init__(self, source: Shards, windows: list[list[int]]):
        self.source, self.windows = source, windows
        self.window_of = {shard: number for number, window in enumerate(windows) for shard in window}
        self.asked = set[int]()
        self.wanted: Queue[int | None] = Queue()
        # a daemon, so that a loader that ends early need not wait for it
        threading.Thread(target=self._run, name="shards ahead", daemon=True).start()

    def reached(self, shard: int) -> None:
        """Ask for the window after the shard's."""
        number = self.window_of.get(shard)
        if number is None or number in self.asked:
            return
        self.asked.add(number)
        for following in (*self.windows[number], *(self.windows[number + 1] if number + 1 < len(self.windows) else ())):
            self.wanted.put(following)

    def _run(self) -> None:
        while (number := self.wanted.get()) is not None:
            shard = self.source.shards[number]
            try:
                self.source.cache.get(shard, wait=False)
            except (ValueError, OSError) as error:  # the reader meets the same, and says so
                _LOG.warning("fetching %s ahead failed: %s", shard.name, error)
