"""From a folder of images by class to tar shards."""

import io
import math
import os
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from visionattn.data.archives import Progress
from visionattn.data.datasets import ImageFolder
from visionattn.data.images import decode_image
from visionattn.data.pipeline import ON_ERROR
from visionattn.data.shards import Index, Shard, scan


def write_shards(
    root: str | Path,
    output: str | Path,
    splits: Sequence[str] = ("train", "val"),
    images: int = 1000,
    megabytes: float | None = None,
    seed: int = 0,
    workers: int = 4,
    on_error: str = "raise",
    progress: Progress | None = None,
) -> dict[str, Index]:
    """Pack ROOT/SPLIT/CLASS/IMAGE into ``OUTPUT/SPLIT/SPLIT-NUMBER.tar`` with an index.

    The images keep their bytes and are decoded once to see that they can be. They are shuffled over the whole split,
    for training later mixes only a few shards at a time. The same folder gives the same bytes. A split appears under
    its name when all of it is written.

    Args:
        root: As for ``ImageFolder``.
        output: Folder to write, which must have no folder of a split's name yet.
        splits: Sub-folders; the classes of the first are those of all.
        images: Images of a shard, at most.
        megabytes: Instead, about the size of a shard in 10**6 bytes.
        seed: Seed of the shuffling.
        workers: Shards written at the same time.
        on_error: ``"raise"``, or ``"skip"`` to leave unreadable images out and list them in ``skipped_images.txt``.
        progress: Told of each shard and each unreadable image.

    Returns:
        The index of each split.

    Raises:
        FileNotFoundError: No folder of a split, or no images in it.
        ValueError: There is an output already; an unreadable image; sizes below 1.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r} must be one of {', '.join(ON_ERROR)}")
    if images < 1 or workers < 1 or (megabytes is not None and megabytes <= 0):
        raise ValueError(f"images={images}, megabytes={megabytes}, workers={workers} must be positive")
    output = Path(output)
    if existing := [str(output / split) for split in splits if (output / split).exists()]:
        raise ValueError(f"{', '.join(existing)} exists already; remove it or choose another output")
    sources, classes = {}, None
    for split in splits:  # before hours of writing
        sources[split] = ImageFolder(root, split, classes=classes)
        classes = sources[split].classes
    output.mkdir(parents=True, exist_ok=True)
    indices = {}
    for split, source in sources.items():
        packer = _Packer(source, Path(root, split), on_error, progress)
        shards = _count(source, images, megabytes)
        parts = np.array_split(np.random.RandomState(seed).permutation(len(source)), shards)
        with tempfile.TemporaryDirectory(prefix=f".{split}.", dir=output) as temporary:
            target = Path(temporary, split)
            target.mkdir()
            indices[split] = packer.pack(parts, target, split, workers)
            target.rename(output / split)
    return indices


def _count(source: ImageFolder, images: int, megabytes: float | None) -> int:
    if megabytes is None:
        return math.ceil(len(source) / images)
    total = sum(os.path.getsize(path) for path, _ in source.samples)
    return min(len(source), math.ceil(total / (megabytes * 1e6)))


class _Packer:
    """Writes the shards of one split."""

    def __init__(self, source: ImageFolder, folder: Path, on_error: str, progress: Progress | None):
        self.source, self.folder, self.on_error = source, folder, on_error
        self.progress = progress or (lambda line: None)
        self.keys = self._keys()

    def _keys(self) -> list[str]:
        """Name of each image in the shards: its path without the ending, in which webdataset allows no further dot."""
        keys, taken = [], set[str]()
        for i, (path, _) in enumerate(self.source.samples):
            relative = Path(path).relative_to(self.folder)
            key = relative.with_name(relative.stem.replace(".", "_")).as_posix()
            if key in taken:  # a.png beside a.jpg
                key = f"{key}-{i}"
            taken.add(key)
            keys.append(key)
        return keys

    def pack(self, parts: list[np.ndarray], target: Path, split: str, workers: int) -> Index:
        """All shards and the index."""
        shards, skipped = list[Shard](), list[str]()
        with ThreadPoolExecutor(workers) as pool:  # decoding and hashing release the interpreter's lock
            names = [f"{split}-{number:06d}.tar" for number in range(len(parts))]
            try:
                for shard, notes in pool.map(self._write, parts, [target / name for name in names]):
                    shards.append(shard)
                    skipped += notes
                    self.progress(
                        f"{split} {len(shards)}/{len(parts)}: {len(shard)} images, {shard.bytes / 1e6:.1f} MB"
                    )
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        if skipped:
            text = "".join(note + "\n" for note in skipped)
            (target / "skipped_images.txt").write_text(text, encoding="utf-8", errors="surrogateescape")
        if not any(shards):
            raise ValueError(f"none of the {len(self.source)} images can be read; the first error: {skipped[0]}")
        index = Index(self.source.classes, shards)
        index.write(target)
        return index

    def _write(self, numbers: np.ndarray, path: Path) -> tuple[Shard, list[str]]:
        skipped = []
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for i in numbers.tolist():
                name, label = self.source.samples[i]
                content = Path(name).read_bytes()
                try:
                    decode_image(content, name)
                except ValueError as error:
                    if self.on_error == "raise":
                        raise ValueError(f"{error}, or leave such images out with --on-error skip") from error
                    skipped.append(str(error))
                    self.progress(f"left out: {error}")
                    continue
                _add(tar, f"{self.keys[i]}.cls", str(label).encode())
                _add(tar, self.keys[i] + Path(name).suffix.lower(), content)
        return scan(path), skipped


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without time or owner, so that the same images give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
