"""Results of benchmarks: a Markdown table, and where and with what they arose."""

import datetime
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
