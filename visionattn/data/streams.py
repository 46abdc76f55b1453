"""Hugging Face ``datasets`` read as a stream: sets that are too large to be downloaded, or that are somewhere else.

Each process of a training reads one stream and numbers its rows before anything is decoded; the rows travel to the
loader's workers as the keys of the samples, so that order and augmentation are the same for any number of workers. A
position inside an epoch is found again by reading up to it without decoding.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from PIL import Image

from visionattn.data.images import decode_image, read_image
from visionattn.data.pipeline import Batch, Samples
from visionattn.data.randomness import seed_from

_WHERE, _NUMBER = "__source__", "__number__"


class StreamSamples(Samples):
    """Transformed samples of rows that come with the keys: ``(epoch, position, row)``.

    An unreadable image of a training set is replaced by the next readable one of its batch.
    """

    def __getitem__(self, key: tuple[int, int, Any]) -> Batch:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[tuple[int, int, Any]]) -> list[Batch]:
        """The samples of a batch; the data loader calls this rather than ``__getitem__``."""
        items = []
        for number, (epoch, position, _) in enumerate(keys):
            skipped: list[str] = []
            for step in range(len(keys) if self.replace else 1):
                row = keys[(number + step) % len(keys)][2]
                try:
                    sample = self._sample(row, seed_from(self.seed, epoch, position), skipped)
                except ValueError as error:
                    if self.on_error == "raise":
                        raise ValueError(f"{error} (or set data.on_error=skip)") from error
                    skipped.append(str(error))
                else:
                    items.append(dict(**sample, skipped=skipped))
                    break
            else:
                if self.replace:
                    raise ValueError(
                        f"none of a batch of {len(keys)} images can be read; the first error: {skipped[0]}"
                    )
                items.append(dict(skipped=skipped))
        return items


class _Rows:
    """The rows of one process's epoch; read anew by each iteration."""

    def __init__(self, stream: Any, count: int, place: str, wrap: bool):
        self.stream, self.count, self.place, self.wrap = stream, count, place, wrap

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Any]]:
        passes = chain(self.stream, self.stream) if self.wrap else self.stream
        number = -1
        for number, row in enumerate(islice(passes, self.count)):
            yield {**row, _WHERE: self.place, _NUMBER: number}
        if number + 1 < self.count:
            raise ValueError(
                f"{self.place} ended after {number + 1} of {self.count} images; give data.samples the "
                "numbers there are, or leave it out to have them counted"
            )


class HuggingFaceStream:
    """A set that ``datasets.load_dataset(path, streaming=True)`` opens: a name on the Hub, or a folder of files.

    Args:
        path: Name of the set, or a folder (Parquet files, or images by class).
        split: Name of the split.
        in_chans: Channels that the images are converted to, 1 or 3.
        image_column: Column of images.
        label_column: Column of labels.
        classes: Class names in label order, for labels that are plain numbers or these names; by default those of the
            set.
        samples: Images by split; by default what the set says of itself, or as many as reading the labels counts.
        buffer: Images among which each next one is drawn at random, in memory undecoded.

    Raises:
        ImportError: The package ``datasets`` is not installed.
        FileNotFoundError: No set, or no such split.
        ValueError: The columns are missing, the classes are unknown, or there is no image.
    """

    samples_class = StreamSamples

    def __init__(
        self,
        path: str,
        split: str = "train",
        in_chans: int = 3,
        image_column: str = "image",
        label_column: str = "label",
        classes: list[str] | None = None,
        samples: dict[str, int] | None = None,
        buffer: int = 10000,
    ):
        try:
            import datasets
        except ImportError as error:
            raise ImportError('data=hf_stream needs the package datasets: pip install "visionattn[shards]"') from error
        if buffer < 1:
            raise ValueError(f"buffer={buffer}: expected at least 1 image")
        self.place, self.in_chans, self.buffer = f"{path}/{split}", in_chans, buffer
        self.image_column, self.label_column = image_column, label_column
        splits = _load(path)
        if split not in splits:
            raise FileNotFoundError(
                f"{path} has no split {split!r}, only {', '.join(splits)}; set data.train_split and data.val_split"
            )
        data = splits[split]
        features = data.features or data._resolve_features().features
        if missing := [column for column in (image_column, label_column) if column not in features]:
            raise ValueError(
                f"{path} has no column {missing[0]!r}, only {', '.join(features)}; set data.image_column and "
                "data.label_column"
            )
        named = getattr(features[label_column], "names", None)
        if classes is None and named is None:
            raise ValueError(f"the labels of {path} have no names; give them in label order: data.classes=[cat,dog]")
        self.classes = list(classes or named)
        if named is not None and list(named) != self.classes:
            raise ValueError(f"data.classes names {len(self.classes)} classes other than the {len(named)} of {path}")
        self.numbers = {name: number for number, name in enumerate(self.classes)}
        data = data.select_columns([image_column, label_column])
        self.data = data.cast_column(image_column, datasets.Image(decode=False))
        self.size = samples[split] if samples and split in samples else _count(data, split, label_column)
        if self.size < 1:
            raise ValueError(f"{self.place} has {self.size} images; expected at least 1")

    def __len__(self) -> int:
        return self.size

    def epoch_order(self, epoch: int | None, seed: int, rank: int = 0, world_size: int = 1) -> _Rows:
        """The undecoded rows of one process's epoch, a function of the arguments alone.

        Files are dealt to the processes where their number is a multiple of the processes; otherwise each process reads
        all and keeps every ``world_size``-th row. A process whose files have fewer rows than its share goes on with the
        first of them; one whose files have more leaves out the last.

        Args:
            epoch: Number of the epoch; None for every row once, in the order of the files.
            seed: Seed of the run.
            rank: Number of the process.
            world_size: Number of processes.

        Returns:
            ``ceil(images / world_size)`` rows for each process; without an epoch, the last ones may have one less.

        Raises:
            ValueError: Fewer images than processes; and from iteration, fewer than ``len`` says.
        """
        if self.size < world_size:
            raise ValueError(f"{self.place} has {self.size} images for {world_size} processes; use fewer processes")
        if epoch is None:
            rows = _EachNth(self.data, rank, world_size)
            return _Rows(rows, len(range(rank, self.size, world_size)), self.place, wrap=False)
        from datasets.distributed import split_dataset_by_node

        data = self.data.shuffle(seed=seed_from(seed, epoch) % 2**32, buffer_size=self.buffer)
        share = split_dataset_by_node(data, rank=rank, world_size=world_size) if world_size > 1 else data
        return _Rows(share, -(-self.size // world_size), self.place, wrap=world_size > 1)

    def __getitem__(self, row: dict[str, Any]) -> tuple[Image.Image, int, str]:
        found, label = row[self.image_column] or {}, row[self.label_column]
        name = found.get("path") or f"{row[_WHERE]}[{row[_NUMBER]}]"
        number = self.numbers.get(label) if isinstance(label, str) else label
        # bool is an int: a column of them has the classes 0 and 1
        if not isinstance(number, int) or not 0 <= number < len(self.classes):
            raise ValueError(
                f"{name} has the label {label!r}, there are {len(self.classes)} classes "
                f"({', '.join(self.classes[:3])}, ...); expected the number or the name of one"
            )
        if found.get("bytes") is None and Path(name).is_file():
            return read_image(name, self.in_chans), int(number), name
        return decode_image(found.get("bytes") or b"", name, self.in_chans), int(number), name


class _EachNth:
    """Every ``step``-th row of a stream from ``start`` on; read anew by each iteration."""

    def __init__(self, stream: Any, start: int, step: int):
        self.stream, self.start, self.step = stream, start, step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return islice(self.stream, self.start, None, self.step)


def _load(path: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, streaming=True)
    except (FileNotFoundError, ValueError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"no set {path} that the package datasets can open ({type(error).__name__}: {error}); set data.path to its "
            "name or to a folder of Parquet files or of images by class"
        ) from error


def _count(data: Any, split: str, column: str) -> int:
    """Images of a split: as the set's own description says, or counted by reading the labels."""
    known = (data.info.splits or {}).get(split)
    if known is not None and known.num_examples:
        return int(known.num_examples)
    return sum(1 for _ in data.select_columns([column]))
