"""Shards by URL: fetched whole into a folder of this host, once for all processes on it."""

import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from visionattn.data.shards import Shard

_LOG = logging.getLogger(__name__)
_TRIES = 4
_WAIT = 1.0  # seconds before the second try, twice as long before each further one
_TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20  # bytes
_OWN = re.compile(r"[0-9a-f]{16}-.+\.tar")  # names that ``ShardCache.path`` gives


def is_url(root: str | Path) -> bool:
    """Whether a root is to be fetched: ``https://...``, ``s3://...`` and the like."""
    return "://" in str(root)


def default_cache() -> Path:
    """Where fetched shards go unless ``data.cache`` says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "visionattn", "shards")


def _open(url: str) -> Any:
    """A stream of the bytes of a URL."""
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=_TIMEOUT)
    import fsspec

    try:
        return fsspec.open(url, "rb").open()
    except ImportError as error:
        raise ValueError(f"{url} needs a further package: {error}") from error


def retried(url: str, use: Callable[[IO[bytes]], Any]) -> Any:
    """What ``use`` makes of the bytes of a URL; broken connections are tried again.

    Args:
        url: Address of the file.
        use: Takes the stream; an ``OSError`` or ``ValueError`` of it counts as a broken connection.

    Raises:
        FileNotFoundError: The server has no such file.
        ValueError: It does not answer, or what it sends is not what is expected.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            with _open(url) as stream:
                return use(stream)
        except (OSError, ValueError, http.client.HTTPException) as error:
            status = getattr(error, "code", None)
            if status in (404, 410) or isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"there is no {url} ({error}); check data.root and the index") from error
            if attempt == _TRIES or status in (400, 401, 403):
                raise ValueError(f"cannot fetch {url} (tried {attempt} times): {error}") from error
            _LOG.warning("fetching %s failed (%s); trying again", url, error)
            time.sleep(_WAIT * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


class ShardCache:
    """A folder of shards fetched by URL, kept below a size.

    A shard gets its name when its size and SHA-256 have proved right. A lock lets one process of the host fetch while
    the others wait for it. Beyond the size the shards that were opened longest ago go first; a process that still reads
    such a file keeps it open, and one that comes later fetches it again. Files of other names in the folder stay and do
    not count.

    Args:
        root: URL that the names of shards are below.
        folder: Folder of the cache.
        gigabytes: Size in 10**9 bytes.
    """

    def __init__(self, root: str, folder: Path, gigabytes: float):
        self.root, self.folder, self.limit = root.rstrip("/"), folder, gigabytes * 1e9

    def path(self, shard: Shard) -> Path:
        """Where a shard is, or will be; shards of one name but other content do not meet."""
        return self.folder / f"{shard.sha256[:16]}-{shard.name}"

    def get(self, shard: Shard, wait: bool = True) -> Path | None:
        """The shard's file, fetched if need be.

        Args:
            shard: From the index.
            wait: Wait for a process that is fetching it; otherwise None then.

        Raises:
            FileNotFoundError: The server has no such file.
            ValueError: It does not answer, or the file is not the one of the index.
        """
        path = self.path(shard)
        if self._use(path):
            return path
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
                if not self._use(path):
                    self._fetch(shard, path)
                    self._use(path)
                    self._shrink(path)
        except Timeout:
            return None
        return path

    @staticmethod
    def _use(path: Path) -> bool:
        """Whether the file is there; notes that it was wanted."""
        try:
            os.utime(path, ns=(time.time_ns(), time.time_ns()))  # the file system's own clock is coarser
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, shard: Shard, path: Path) -> None:
        temporary = path.with_name(path.name + ".part")

        def save(stream: IO[bytes]) -> None:
            sha256, size = hashlib.sha256(), 0
            with temporary.open("wb") as file:
                while chunk := stream.read(_CHUNK):
                    file.write(chunk)
                    sha256.update(chunk)
                    size += len(chunk)
            if size != shard.bytes:
                raise ValueError(f"got {size} of the {shard.bytes} bytes of the index")
            if sha256.hexdigest() != shard.sha256:
                raise ValueError(f"SHA-256 is {sha256.hexdigest()}, the index says {shard.sha256}")

        try:
            if (free := shutil.disk_usage(self.folder).free) < shard.bytes:
                raise ValueError(
                    f"{self.folder} has {free} bytes left, {shard.name} needs {shard.bytes}; set data.cache"
                )
            retried(f"{self.root}/{shard.name}", save)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _shrink(self, kept: Path) -> None:
        """Remove the shards wanted longest ago until the rest is below the limit."""
        files = []
        for path in self.folder.glob("*.tar"):
            if not _OWN.fullmatch(path.name):  # the user's
                continue
            try:
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            except FileNotFoundError:  # another process removed it
                continue
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            if path != kept:
                path.unlink(missing_ok=True)
                total -= size
