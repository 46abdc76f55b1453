"""Unpacking what a user downloaded, without letting an archive write anywhere else."""

import gzip
import hashlib
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

Progress = Callable[[str], None]
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archives: Sequence[Path], folder: Path, progress: Progress | None = None) -> list[Path]:
    """Unpack zip, tar (gz, bz2, xz) and gz files, archives inside them too, each to a folder of its own.

    An archive may also be a folder that was unpacked already; it is read where it is.

    Args:
        archives: Files.
        folder: Where to.
        progress: Told of each file.

    Returns:
        The folders with the contents.

    Raises:
        FileNotFoundError: An archive is missing.
        ValueError: An archive is damaged, of an unknown kind, or holds a path that leads out of its folder.
    """
    folders = []
    for number, archive in enumerate(archives):
        if archive.is_dir():
            folders.append(archive)
            continue
        if not archive.is_file():
            raise FileNotFoundError(f"no archive {archive}; give the files as downloaded")
        if progress:
            progress(f"unpacking {archive.name}")
        target = folder / str(number)
        _unpack_one(archive, target, depth=0)
        folders.append(target)
    return folders


def _unpack_one(archive: Path, target: Path, depth: int) -> None:
    target.mkdir(parents=True)
    name = archive.name.lower()
    try:
        if name.endswith(".zip"):
            with zipfile.ZipFile(archive) as zipped:
                for member in zipped.namelist():
                    _check_member(member, archive)
                zipped.extractall(target)
        elif name.endswith(_TAR):
            with tarfile.open(archive) as tar:
                for entry in tar.getmembers():
                    _check_member(entry.name, archive)
                tar.extractall(target, filter="data")
        elif name.endswith(".gz"):
            with gzip.open(archive) as source, (target / archive.name[:-3]).open("wb") as sink:
                shutil.copyfileobj(source, sink)
        else:
            raise ValueError(f"{archive} is no archive of a known kind; expected .zip, .tar, .tar.gz, .tgz or .gz")
    except (zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, zlib.error, RuntimeError) as error:
        raise ValueError(f"cannot unpack {archive} ({archive.stat().st_size} bytes): {error}; load it anew") from error
    for inner in sorted(target.rglob("*")):
        if not inner.is_file() or inner.name.startswith(".") or not inner.name.lower().endswith((".zip", ".gz", *_TAR)):
            continue
        if depth == 3:
            raise ValueError(f"{archive} holds archives in archives, more than 3 deep; unpack it by hand")
        content = inner.with_name(inner.name + ".content")
        _unpack_one(inner, content, depth + 1)
        if not inner.name.lower().endswith((".zip", *_TAR)):
            # a single compressed file belongs where it was
            (content / inner.stem).rename(inner.with_suffix(""))
            content.rmdir()
        inner.unlink()


def _check_member(member: str, archive: Path) -> None:
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise ValueError(f"{archive} holds the path {member!r}, which leads out of its folder; do not use this archive")


@contextmanager
def unpacked(
    archives: Iterable[str | Path], output: str | Path, progress: Progress | None = None
) -> Iterator[tuple[list[Path], Path, dict[str, str]]]:
    """The contents of archives, and a folder that appears as ``output`` when the block ends without an error.

    Args:
        archives: The files as downloaded (zip, tar, tar.gz, gz), or folders of their contents.
        output: Folder to write, which must not exist yet.
        progress: Told in words what is being done.

    Yields:
        Folders of the contents; the folder to fill, which does not exist yet; SHA-256 of the archives by their names.

    Raises:
        FileNotFoundError: An archive is missing.
        FileExistsError: There is something at ``output``.
        ValueError: No archive, or damaged ones.
    """
    paths, output = [Path(archive) for archive in archives], Path(output)
    if not paths:
        raise ValueError("there are no archives; give the files as downloaded")
    if output.exists():
        raise FileExistsError(f"{output} exists already; remove it or choose another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    # beside the output, so that it can be renamed
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folders = unpack(paths, Path(temporary, "archives"), progress)
        target = Path(temporary, "dataset")
        yield folders, target, {path.name: digest(path) for path in paths if path.is_file()}
        target.rename(output)
