"""From a source of images to reproducible batches."""

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from visionattn.data.randomness import seed_from, seeded

Batch = dict[str, Any]
ON_ERROR = ("raise", "skip")


class Samples(Dataset):
    """Transformed samples of a source, each under generators seeded by its key.

    A key is ``(epoch, position, i)``: image ``i`` as the ``position``-th of the epoch over all processes.

    Args:
        source: Images and labels (``ImageSource``), or what a subclass says.
        transform: PIL image to tensor ``[C, H, W]``, or what a subclass says.
        seed: Seed of the run.
        on_error: What an unreadable image does: ``"raise"``, or ``"skip"`` to report it and go on. A training set
            takes the next readable image instead; an evaluation set leaves the image out.
        replace: Whether a skipped image is replaced.

    Raises:
        ValueError: Another ``on_error``; and from iteration, an unreadable image with ``"raise"``.
    """

    def __init__(
        self,
        source: Any,
        transform: Callable[..., Any],
        seed: int = 0,
        on_error: str = "raise",
        replace: bool = True,
    ):
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error={on_error!r} must be one of {', '.join(ON_ERROR)}")
        self.source: Any = source
        self.transform: Any = transform
        self.seed = seed
        self.on_error, self.replace = on_error, replace
        self._set_epoch: Callable[[int], None] | None = getattr(source, "set_epoch", None)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int, int]) -> Batch:
        epoch, position, i = key
        if self._set_epoch:
            self._set_epoch(epoch)
        skipped = []
        for step in range(len(self) if self.replace else 1):
            j = (i + step) % len(self)
            try:
                return dict(**self._sample(j, seed_from(self.seed, epoch, position), skipped), skipped=skipped)
            except (ValueError, FileNotFoundError) as error:
                if self.on_error == "raise":
                    raise ValueError(f"{error} (or set data.on_error=skip)") from error
                skipped.append(str(error))
        if self.replace:
            raise ValueError(f"none of the {len(self)} images can be read; the first error: {skipped[0]}")
        return dict(skipped=skipped)

    def _sample(self, i: int, seed: int, skipped: list[str]) -> Batch:
        """Image ``i`` transformed under generators of ``seed``; ``skipped`` takes what else could not be read."""
        image, label, name = self.source[i]
        with seeded(seed):
            return dict(image=self.transform(image), label=label, name=name)


def collate(items: list[Batch]) -> Batch:
    """Join samples to ``image [B, C, H, W]``, ``label [B]`` and the lists ``name`` and ``skipped``."""
    kept = [item for item in items if "image" in item]
    return dict(
        image=torch.stack([item["image"] for item in kept]) if kept else torch.empty(0),
        label=torch.tensor([item["label"] for item in kept], dtype=torch.long),
        name=[item["name"] for item in kept],
        skipped=[note for item in items for note in item["skipped"]],
    )


def samples_of(source: Any, transform: Callable[..., Any], **kwargs: Any) -> Samples:
    """The samples of a source: ``Samples``, or the class that the source names as its ``samples_class``."""
    return getattr(source, "samples_class", Samples)(source, transform, **kwargs)


class EpochSampler(Sampler[tuple[int, int, Any]]):
    """Keys ``(epoch, position, i)`` of one process's share of an epoch; the order depends on (seed, epoch) alone.

    A source of images may have an order of its own, in which it is quicker to read: its method
    ``epoch_order(epoch, seed, rank, world_size)`` gives the images of one process, as many for each, and with the epoch
    None those of an unshuffled pass. Repeated augmentation then repeats images within a process.

    Args:
        dataset: Anything with a length, and maybe a ``source`` with ``epoch_order``.
        shuffle: Random order; otherwise each image once, in order.
        seed: Seed of the run.
        repeats: Repeated augmentation: each image that many times side by side, and as many fewer images an epoch.
        rank: Number of this process.
        world_size: Number of processes.
        samples: Keys of a shuffled epoch, which then goes on in the data where the one before stopped, pass after
            pass; None: one pass.

    Raises:
        ValueError: ``samples`` below 1, or of no data.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool,
        seed: int = 0,
        repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
        samples: int | None = None,
    ):
        if samples is not None and (samples < 1 or not len(dataset)):
            raise ValueError(f"an epoch of {samples} samples of {len(dataset)} images; expected at least 1 of both")
        self.samples = samples if shuffle else None
        self.shuffle, self.seed, self.repeats, self.rank, self.world_size = shuffle, seed, repeats, rank, world_size
        self.size = len(dataset)
        self.epoch = self.first = 0
        self.resumed: int | None = None
        share = dict(num_replicas=world_size, rank=rank)
        self.order: Any = None
        self.own: Any = getattr(getattr(dataset, "source", None), "epoch_order", None)
        if self.own is not None:
            self.length = len(self.own(0 if shuffle else None, seed, rank, world_size))
        elif shuffle and repeats > 1:
            # the sampler rounds an epoch down to its own multiple of 256 images, which would leave small sets empty
            whole = 256 if self.size >= 256 * world_size else 0
            self.order = RepeatAugSampler(dataset, **share, num_repeats=repeats, selected_round=whole)
        elif shuffle:
            self.order = DistributedSampler(dataset, **share, seed=seed)
        if self.own is None:
            self.length = len(range(rank, self.size, world_size)) if self.order is None else len(self.order)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose keys come next."""
        self.epoch = epoch

    def resume(self, epoch: int, first: int) -> None:
        """Choose the epoch, and in that one leave out the first keys, which a stopped run has seen.

        Args:
            epoch: The epoch.
            first: How many keys of this process are left out; later epochs are whole. The length stays the whole one's.
        """
        self.epoch = self.resumed = epoch
        self.first = first

    def __len__(self) -> int:
        return self.length if self.samples is None else self.samples

    def _pass(self, number: int) -> Iterable[Any]:
        """This process's share of a pass over the data."""
        if self.own is not None:
            images = self.own(number if self.shuffle else None, self.seed, self.rank, self.world_size)
            if not self.shuffle or self.repeats == 1:
                return images
            return islice((i for i in images for _ in range(self.repeats)), self.length)
        if self.order is None:
            return range(self.rank, self.size, self.world_size)
        # RepeatAugSampler knows no seed of its own
        self.order.set_epoch(seed_from(self.seed, number) % 2**32 if self.repeats > 1 else number)
        return [int(i) for i in self.order]

    def _stretch(self, samples: int) -> Iterator[Any]:
        """The epoch's part of all passes one after the other."""
        number, first = divmod(self.epoch * samples, self.length)
        while samples > 0:
            count = min(samples, self.length - first)
            yield from islice(self._pass(number), first, first + count)
            number, first, samples = number + 1, 0, samples - count

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        numbers = self._pass(self.epoch) if self.samples is None else self._stretch(self.samples)
        first = self.first if self.epoch == self.resumed else 0
        for position, i in enumerate(islice(numbers, first, None), first):
            yield self.epoch, position * self.world_size + self.rank, i
