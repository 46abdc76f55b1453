"""Results of benchmarks as rows: a CSV file that only grows, a Markdown table, and where and with what they arose."""

import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import visionattn

ORIGIN = ("device", "torch", "triton", "timm", "python", "visionattn", "commit", "date")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    root = Path(visionattn.__file__).parent.parent
    if not (root / ".git").exists():  # or git would answer for whatever checkout an installed package lies in
        return "unknown"
    try:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def origin(device: str) -> dict[str, str]:
    """Device, versions, commit and date for a row, under the names of ``ORIGIN``.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    values = where, torch.__version__, _version("triton"), _version("timm"), platform.python_version()
    today = datetime.date.today().isoformat()
    return dict(zip(ORIGIN, (*values, visionattn.__version__, _commit(), today), strict=True))


class CsvFile:
    """A file of rows under one header; ``path`` None keeps nothing.

    Args:
        path: The file, made with its folder if need be.
        columns: Its header.

    Raises:
        ValueError: The path is a folder, or a file with other columns.
    """

    def __init__(self, path: Path | None, columns: Sequence[str]):
        self.path, self.columns = path, list(columns)
        if path is None:
            return
        if path.is_dir():
            raise ValueError(f"--output {path} is a folder; give the name of a CSV file")
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file), None)
            if header is not None and header != self.columns:
                raise ValueError(
                    f"{path} has the columns {','.join(header)}, rows of this version have {','.join(self.columns)}; "
                    "choose another --output"
                )

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; columns that it lacks stay empty."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
