"""Files of a benchmark's rows that only grow: CSV, JSON and Markdown."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visionattn.tasks.config import write_text
from visionattn.tasks.records import markdown

SUFFIXES = {".csv": "csv", ".json": "json", ".md": "markdown"}


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
            raise ValueError(f"--output {path} is a folder; give the name of a file")
        if path.is_file() and (header := self.header(path)) is not None and header != self.columns:
            raise ValueError(
                f"{path} has the columns {','.join(header)}, rows of this version have {','.join(self.columns)}; "
                "choose another --output"
            )

    def header(self, path: Path) -> list[str] | None:
        """Columns of a file that is there; None of an empty one."""
        with path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), None)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; columns that it lacks stay empty.

        Raises:
            ValueError: The row has a column that the file lacks.
        """
        if foreign := [key for key in row if key not in self.columns]:
            raise ValueError(f"the columns {', '.join(self.columns)} lack {', '.join(map(repr, foreign))}")
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._add(self.path, row)

    def _add(self, path: Path, row: dict[str, Any]) -> None:
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)


class JsonFile(CsvFile):
    """A list of objects, each with every column and ``null`` for what a row lacks."""

    def _rows(self, path: Path) -> list[dict[str, Any]]:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        try:
            rows = json.loads(text or "[]")
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); choose another --output") from error
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError(f"{path} is no list of objects; choose another --output")
        return rows

    def header(self, path: Path) -> list[str] | None:
        """Keys of the first object."""
        rows = self._rows(path)
        return list(rows[0]) if rows else None

    def _add(self, path: Path, row: dict[str, Any]) -> None:
        rows = [*self._rows(path), {key: row.get(key) for key in self.columns}]
        write_text(path, json.dumps(rows, indent=1) + "\n")


class MarkdownFile(CsvFile):
    """A table of every column."""

    def header(self, path: Path) -> list[str] | None:
        """Cells of the first line."""
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        return [cell.strip() for cell in first.strip("| ").split("|")] if first else None

    def _add(self, path: Path, row: dict[str, Any]) -> None:
        cells = [str(row.get(key, "")).replace("|", "\\|").replace("\n", " ") for key in self.columns]
        head, line = markdown(self.columns, [cells]).rsplit("\n", 1)
        before = path.read_text(encoding="utf-8").rstrip("\n") if path.is_file() else ""
        write_text(path, f"{before or head}\n{line}\n")


_FILES = {"csv": CsvFile, "json": JsonFile, "markdown": MarkdownFile}
FORMATS = tuple(_FILES)


def row_file(path: Path | None, columns: Sequence[str], form: str | None = None) -> CsvFile:
    """The file of rows at a path.

    Args:
        path: The file to write or to add to; None keeps nothing.
        columns: Names of what rows hold.
        form: Of ``FORMATS``; by default that of the suffix: .csv, .json or .md.

    Raises:
        ValueError: An unknown suffix and no format, or as ``CsvFile``.
    """
    if path is not None and form is None and not path.is_dir():
        form = SUFFIXES.get(path.suffix.lower())
        if form is None:
            expected = ", ".join(SUFFIXES)
            raise ValueError(f"--output {path}: expected the suffix {expected}, or --format {'|'.join(FORMATS)}")
    return _FILES[form or "csv"](path, columns)
