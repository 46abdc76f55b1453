"""What is checked of a file of weights before it is read: its digest, and what its archive would unpack to."""

import csv
import hashlib
import re
import zipfile
from pathlib import Path


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(path: Path) -> dict[str, dict[str, str]]:
    """Rows of an ``index.csv`` of converted checkpoints by name; none if there is no such file."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def index_path() -> Path:
    """The index of converted checkpoints: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "checkpoints" / "index.csv"
    return inside if inside.is_file() else package.parent / "checkpoints" / "index.csv"


def known_digest(name: str, address: str) -> str | None:
    """SHA-256 that the index states for the published file of a model, or None.

    Args:
        name: timm's identifier with the tag, for example ``biformer_s.in1k``.
        address: Where the file is fetched from; a row of another address says nothing about it.
    """
    row = read_index(index_path()).get(name)
    return row["source_sha256"] if row and row["source_url"] == address else None


def check_digest_text(text: str, where: str) -> str:
    """A SHA-256 in lower case.

    Raises:
        ValueError: Anything but 64 hexadecimal digits.
    """
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise ValueError(f"{where} {text!r} is no SHA-256; expected 64 hexadecimal digits, as sha256sum prints them")
    return text.lower()


def verify_sha256(path: str | Path, expected: str, origin: str) -> None:
    """Refuse a file that is not the expected one; it stays where it is.

    Args:
        path: File.
        expected: Its SHA-256.
        origin: For the message: who says so.

    Raises:
        ValueError: The file has another digest.
    """
    if (found := sha256(path)) != expected:
        raise ValueError(
            f"{path} has SHA-256 {found}, {origin} says {expected}; it was not read: remove it to download it again, "
            "or get the file from a source you trust"
        )


def check_archive(path: str | Path) -> None:
    """Refuse a zip archive that unpacks to more than it holds; ``torch.save`` never compresses.

    Raises:
        ValueError: Compressed or overlapping entries.
    """
    path = Path(path)
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what makes PyTorch read a zip archive
            return
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # damaged: the reader of checkpoints says so
    if unpacked > (size := path.stat().st_size):
        raise ValueError(
            f"{path} has {size} bytes and would unpack to {unpacked}; checkpoints are not compressed, so it was not "
            "read"
        )
