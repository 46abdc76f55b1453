"""Tar shards as the library webdataset lays them out, and the index that gives random access to them.

A shard is an uncompressed tar file in which the members ``KEY.cls`` (the label's number) and ``KEY.jpg`` make a
sample. The index beside the shards says where each image lies in them, so that a sample is one read at a known place:
any order, any number of readers, no state. (webdataset 1.0 reads shards as streams only; ``wids``, its indexed reader,
is no part of it any more.) Nothing is ever unpickled, and shards with members that need it are refused.
"""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from visionattn.data.archives import Progress, digest
from visionattn.data.datasets import EXTENSIONS

INDEX = "index.json"
FORMAT = 1
_PICKLED = ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz")  # numpy's files may hold pickles too
_BLOCK = 512  # bytes, of tar files
_COLUMNS = dict(names=str, labels=int, offsets=int, sizes=int)
_LARGEST = 2**63  # bytes; the columns become arrays of 64 bits
_UNNAMED = 100_000  # classes that labels alone may make


@dataclass
class Shard:
    """A tar file and where its images are.

    Args:
        name: File name, without folder.
        bytes: Size of the file.
        sha256: Digest of the file, in hexadecimal.
        names: Member of each image.
        labels: Class of each image.
        offsets: First byte of each image in the file.
        sizes: Bytes of each image.
    """

    name: str
    bytes: int
    sha256: str
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class Index:
    """Classes and shards of one split."""

    classes: list[str]
    shards: list[Shard]

    def write(self, folder: Path) -> None:
        """Write ``index.json`` under a temporary name and rename it."""
        shards = [vars(shard) for shard in self.shards]
        text = json.dumps(dict(format=FORMAT, classes=self.classes, shards=shards), separators=(",", ":"))
        temporary = folder / f".{INDEX}.{os.getpid()}.part"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / INDEX)


def parse_index(text: str | bytes, where: str) -> Index:
    """The index from its JSON, checked.

    Args:
        text: Content of the file.
        where: Path or URL that errors name.

    Raises:
        ValueError: Not such a file, of another format, or with entries that cannot be.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        index = Index([str(name) for name in content["classes"]], [Shard(**shard) for shard in content["shards"]])
        for shard in index.shards:
            _check_entries(shard, len(index.classes))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{where} is no index of shards, or damaged ({error}); write it anew with: visionattn data index FOLDER"
        ) from error
    if not any(index.shards):
        raise ValueError(f"{where} lists no images; expected shards with KEY.cls and KEY.jpg, .png or .webp")
    return index


def _check_entries(shard: Shard, classes: int) -> None:
    name = shard.name
    # the name becomes a path on this machine, and the index may come from anywhere
    if not re.fullmatch(r"[\w][\w.\-+=@]*\.tar", name):
        raise ValueError(f"{name!r} is no name of a shard")
    if not re.fullmatch(r"[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"{name} has no SHA-256")
    if type(shard.bytes) is not int or not 0 < shard.bytes < _LARGEST:
        raise ValueError(f"{name} has a size of {shard.bytes!r} bytes")
    for column, kind in _COLUMNS.items():
        values = getattr(shard, column)
        if not isinstance(values, list) or not set(map(type, values)) <= {kind}:  # bool is no int here
            raise ValueError(f"{name} has {column} that are no list of {kind.__name__}")
    if len({len(getattr(shard, column)) for column in _COLUMNS}) != 1:
        raise ValueError(f"{name} has columns of different lengths")
    for offset, size in zip(shard.offsets, shard.sizes, strict=True):
        if not 0 <= offset <= offset + size <= shard.bytes:
            raise ValueError(f"{name} has an image at bytes {offset} to {offset + size} of {shard.bytes}")
    if shard.labels and not 0 <= min(shard.labels) <= max(shard.labels) < classes:
        raise ValueError(f"{name} has labels {min(shard.labels)} to {max(shard.labels)} for {classes} classes")


def _complete_index(folder: Path) -> Index:
    """The index of the shards in a folder, all of which are there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of shards {folder}; expected ROOT/SPLIT/{INDEX}, set data.root to ROOT")
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {INDEX}; write it with: visionattn data index {folder}")
    index = parse_index(path.read_bytes(), str(path))
    present = set(os.listdir(folder))
    if missing := [shard.name for shard in index.shards if shard.name not in present]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(index.shards)} shards of {path} are missing, first {missing[0]}; copy them "
            f"there, or index those that are: visionattn data index {folder}"
        )
    return index


def _refuse_differing(folder: Path, shards: list[Shard]) -> None:
    """Refuse shards, if any, that are not those of the index."""
    if shards:
        sizes = [f"{s.name} ({(folder / s.name).stat().st_size} bytes, the index says {s.bytes})" for s in shards]
        raise ValueError(
            f"{len(shards)} shards of {folder} are not as indexed: {', '.join(sizes)}; copy them anew, or if they are "
            f"the right ones: visionattn data index {folder}"
        )


def read_index(folder: Path) -> Index:
    """The index of the shards in a folder.

    Raises:
        FileNotFoundError: No folder, no index, or a shard that it lists is missing.
        ValueError: A damaged index, or shards of another size than it says, all named.
    """
    index = _complete_index(folder)
    _refuse_differing(folder, [s for s in index.shards if (folder / s.name).stat().st_size != s.bytes])
    return index


def _samples(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Key and members by extension of each sample; members of one key lie side by side."""
    key, members = None, dict[str, tarfile.TarInfo]()
    for member in tar:
        tar.members = []  # tarfile would keep them all
        if member.isdir():
            continue
        parts = PurePosixPath(member.name)
        stem, _, extension = parts.name.partition(".")
        extension = extension.lower()
        if not member.isreg() or member.sparse is not None:
            raise ValueError(f"{path} holds {member.name!r}, which is no plain file; pack the files themselves")
        if extension.rpartition(".")[2] in _PICKLED:
            raise ValueError(f"{path} holds {member.name!r}, which may run code when it is read; do not use this shard")
        if (found := str(parts.with_name(stem))) != key:
            if key is not None:
                yield key, members
            key, members = found, {}
        if extension in members:
            raise ValueError(f"{path} holds {member.name!r} twice")
        members[extension] = member
    if key is not None:
        yield key, members


def _label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], numbers: dict[str, int]) -> int:
    """A sample's class, from ``.cls`` (number or name) or the ``label`` of ``.json``."""
    found: Any
    if "cls" in members:
        found = tar.extractfile(members["cls"]).read().decode().strip()
    elif "json" in members:
        found = json.loads(tar.extractfile(members["json"]).read())["label"]
    else:
        raise ValueError(f"has no label, only {', '.join(members)}; expected .cls, or .json with a label")
    if found in numbers:
        return numbers[found]
    if not re.fullmatch(r"\d+", str(found)):
        raise ValueError(f"has the label {found!r}; expected a number, or a name among those of --classes")
    return int(found)


def scan(path: Path, classes: Sequence[str] = ()) -> Shard:
    """Read a shard's table of contents and its digest.

    Args:
        path: Uncompressed tar file.
        classes: Names that labels may be given by.

    Raises:
        ValueError: Truncated, compressed, with samples that lack image or label, or with members that would have to be
            unpickled; names the file and the sample.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    shard = Shard(path.name, path.stat().st_size, digest(path))
    try:
        with tarfile.open(path, "r:") as tar:
            for key, members in _samples(tar, path):
                pictures = [name for name in members if f".{name}" in EXTENSIONS]
                if len(pictures) != 1:
                    raise ValueError(f"{path}: sample {key} has {len(pictures)} images ({', '.join(members)})")
                try:
                    shard.labels.append(_label(tar, members, numbers))
                except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
                    raise ValueError(f"{path}: sample {key} {error}") from error
                picture = members[pictures[0]]
                shard.names.append(picture.name)
                shard.offsets.append(picture.offset_data)
                shard.sizes.append(picture.size)
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} ({shard.bytes} bytes) is no whole uncompressed tar file: {error}") from error
    with path.open("rb") as file:  # tarfile takes whatever it does not understand for the end
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(f"{path} ({shard.bytes} bytes) is truncated or damaged at byte {end}; copy it anew")
    return shard


def index_shards(
    folder: str | Path, classes: Sequence[str] = (), workers: int = 4, progress: Progress | None = None
) -> Index:
    """Write the index of shards that something else made.

    Args:
        folder: Folder of ``*.tar``.
        classes: Names in label order; by default the numbers.
        workers: Shards read at the same time.
        progress: Told of each shard.

    Returns:
        The index, which is then in the folder as ``index.json``.

    Raises:
        FileNotFoundError: No folder, or no shards in it.
        ValueError: As in ``scan``; or labels beyond ``classes``, or without those beyond 100,000 and the images.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of shards {folder}")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"{folder} has no *.tar; compressed shards are to be unpacked first (gunzip)")
    shards = []
    with ThreadPoolExecutor(workers) as pool:
        for shard in pool.map(lambda path: scan(path, classes), paths):
            shards.append(shard)
            if progress:
                progress(f"{len(shards)}/{len(paths)} {shard.name}: {len(shard)} images")
    largest = max((label for shard in shards for label in shard.labels), default=-1)
    if classes and largest >= len(classes):
        raise ValueError(f"{folder} has the label {largest}, but only {len(classes)} classes were named")
    if not classes and largest >= max(_UNNAMED, sum(map(len, shards))):
        raise ValueError(
            f"{folder} has the label {largest}, too large to count the classes by; name them with --classes FILE, or "
            "repair the .cls of that image"
        )
    index = Index(list(classes) or [str(number) for number in range(largest + 1)], shards)
    for shard in shards:
        _check_entries(shard, len(index.classes))
    index.write(folder)
    return index


def check_shards(folder: str | Path, workers: int = 4, progress: Progress | None = None) -> Index:
    """Compare all shards with their index.

    Raises:
        FileNotFoundError: As in ``read_index``.
        ValueError: A damaged index, or shards of another content, all named.
    """
    folder = Path(folder)
    index, wrong = _complete_index(folder), list[Shard]()
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda shard: digest(folder / shard.name), index.shards)
        for number, (shard, sha256) in enumerate(zip(index.shards, found, strict=True), start=1):
            same = sha256 == shard.sha256
            if not same:
                wrong.append(shard)
            if progress:
                progress(f"{number}/{len(index.shards)} {shard.name}: {'as indexed' if same else 'DIFFERS'}")
    _refuse_differing(folder, wrong)
    return index
