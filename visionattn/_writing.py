"""Files that are never seen half written, whatever happens to the process, the machine or the disk meanwhile."""

import contextlib
import errno
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# the last where a folder above exists but takes none
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOENT)
_ABANDONED_SECONDS = 24 * 3600  # age of another host's temporary file that nobody can still be writing


class SavingError(OSError):
    """A file could not be written; what stood in its place before is intact."""


def _saving_error(path: Path, error: OSError, needed: int | None) -> SavingError:
    need = f", {needed / 1e6:.1f} MB needed" if needed is not None else ""
    remedy = "check the disk"
    if error.errno in _NO_SPACE:
        with contextlib.suppress(OSError):
            need += f", {shutil.disk_usage(path.parent).free / 1e6:.1f} MB free"
        remedy = "free some space or a quota, or write to another disk"
    elif error.errno in _FORBIDDEN:
        remedy = "write to a folder that this user may write to"
    found = SavingError(
        f"cannot write {path}: {error.strerror or error}{need}; a file that stood there before is intact; {remedy}"
    )
    found.errno = error.errno
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _concerns(error: OSError, path: Path) -> bool:
    """Whether an error is of ``path``, of a folder above, or of a temporary file or folder beside it."""
    if not isinstance(error.filename, str | os.PathLike):
        return True
    file, path = (Path(os.path.abspath(place)) for place in (error.filename, path))
    if path.is_relative_to(file):
        return True
    beside = file.relative_to(path.parent).parts[0] if file.is_relative_to(path.parent) else ""
    return beside.lstrip(".").startswith(path.name.lstrip("."))


@contextmanager
def saving(path: Path, needed: int | None = None) -> Iterator[None]:
    """Say of errors of the system in the block that ``path`` could not be written, but of those of files elsewhere.

    Args:
        path: The file or folder.
        needed: Bytes that it takes, for the message.

    Raises:
        SavingError: A full or read-only disk, a folder without permission, a path that is no folder.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, SavingError) or error.errno is None:  # without a number it is a message of our own
            raise
        if error.errno not in _NO_SPACE and not _concerns(error, path):
            raise
        raise _saving_error(path, error, needed) from error


@contextmanager
def replaced(path: Path, needed: int | None = None) -> Iterator[Path]:
    """A temporary file that takes the place of ``path`` when the block ends without an error.

    The content reaches the disk before the name does, so that not even a machine that fails leaves half a file. After
    an error the temporary file is gone; after a kill it stays for ``remove_stale``.

    Args:
        path: The file; its folder is made if need be.
        needed: Bytes that it takes, for the message.

    Yields:
        Where to write.

    Raises:
        SavingError: A full or read-only disk, a folder without permission, a path that is no folder.
    """
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    with saving(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # some file systems sync no folders
            _sync(path.parent)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return process != os.getpid()


def remove_stale(folder: Path) -> list[Path]:
    """Remove the temporary files that processes left which were killed while writing.

    Those of living processes stay, those of other hosts for a day.

    Args:
        folder: Where ``replaced`` wrote; need not exist.

    Returns:
        What was removed.
    """
    removed = []
    for path in sorted(folder.glob("*.part")):
        owner, _, process = path.name.removesuffix(".part").rpartition(".")
        if not process.isdigit():
            continue
        if owner.endswith(f".{socket.gethostname()}"):
            abandoned = not _alive(int(process))
        else:
            abandoned = time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        if abandoned:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
