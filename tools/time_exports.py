"""Time exported files beside the eager model on the CPU: rows for docs/benchmarks/exports.csv, a table in export.md.

``python tools/time_exports.py davit_t convnext_tiny --threads 2``; without names the table is written anew from the
rows that are there. A format that a model cannot take is named and left out.
"""

import argparse
import csv
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionattn.tasks.config import write_text
from visionattn.tasks.export import Exportable, Settings, export, folded, from_name
from visionattn.tasks.export_formats import Runner, load_aoti, load_onnx
from visionattn.tasks.quantize import quantize_file
from visionattn.tasks.records import ORIGIN, markdown, origin
from visionattn.tasks.row_files import CsvFile
from visionattn.tasks.timing import times_in_turn

ROOT = Path(__file__).resolve().parent.parent
ROWS, PAGE = ROOT / "docs" / "benchmarks" / "exports.csv", ROOT / "docs" / "export.md"
BEGIN, END = "<!-- exports: begin -->", "<!-- exports: end -->"
FORMS = {"eager": "eager", "torch": "torch.export", "aoti": "AOTInductor", "onnx": "ONNX", "int8": "ONNX, 8 bits"}
BATCHES = (1, 8)
COLUMNS = ("model", "form", "batch", "rounds", "median_ms", "fastest_ms", "mib", "error", "same_class", *ORIGIN)


def forms(network: Exportable, folder: Path, wanted: list[str]) -> Iterator[tuple[str, Runner, float | None]]:
    """Name, function and MiB of every form that the model takes, all with a free batch."""
    yield "eager", folded(network.model.eval(), (2, network.in_chans, *network.size))[0], None
    loaders = {"torch": lambda path: torch.export.load(path).module(), "aoti": load_aoti, "onnx": load_onnx}
    for name in [name for name in loaders if name in wanted]:
        path = folder / f"{name}.pt2"
        try:
            facts = export(network, Settings(name, "batch"), path)
        except ValueError as error:
            print(f"{network.name}: no {FORMS[name]}: {error}", file=sys.stderr)
            continue
        yield name, loaders[name](path), facts["bytes"] / 2**20
        if name == "onnx":
            small = folder / "int8.onnx"
            shutil.copy(path, small)
            quantize_file(small)
            yield "int8", load_onnx(small), small.stat().st_size / 2**20


def agreement(expected: Tensor, found: Tensor) -> tuple[float, float]:
    """RMS of the difference over that of the logits, and percent of images whose class stays."""
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    return float(error), 100 * float((found.argmax(1) == expected.argmax(1)).float().mean())


@torch.no_grad()
def measure(name: str, wanted: list[str], rounds: int, file: CsvFile) -> None:
    """Append the rows of one model with random weights."""
    torch.manual_seed(0)
    network = from_name(name, random_weights=True)
    with tempfile.TemporaryDirectory() as folder:
        found = list(forms(network, Path(folder), wanted))
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(32, network.in_chans, *network.size, generator=generator)
        expected = found[0][1](images)
        close = {form: agreement(expected, run(images)) for form, run, _ in found[1:]}
        for batch in BATCHES:
            calls = {form: partial(run, images[:batch]) for form, run, _ in found}
            seconds = times_in_turn(calls, rounds, "cpu", warm_ups=2)
            for form, _, size in found:
                row: dict[str, Any] = dict(model=name, form=form, batch=batch, rounds=rounds, **origin("cpu"))
                row |= {key: f"{1e3 * of(seconds[form]):.1f}" for key, of in _TIMES.items()}
                row |= {} if size is None else dict(mib=f"{size:.1f}")
                row |= dict(error=f"{close[form][0]:.1e}", same_class=f"{close[form][1]:.0f}") if form in close else {}
                file.append(row)


_TIMES = dict(median_ms=statistics.median, fastest_ms=min)


def table_of(rows: list[dict[str, str]]) -> str:
    """Times of both batches, sizes, and differences to the eager outputs, from the last row of every kind."""
    last = {(row["model"], row["form"], int(row["batch"])): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for form in [form for form in FORMS if (model, form, 1) in last]:
            one, many = (last[model, form, batch] for batch in BATCHES)
            cells = [row[key] for key in ("median_ms", "fastest_ms") for row in (one, many)]
            lines.append([f"`{model}`", FORMS[form], *cells, one["mib"], one["error"], one["same_class"]])
    header = ["model", "form", "median ms, batch 1", "batch 8", "fastest ms, batch 1", "batch 8", "file MiB"]
    return markdown([*header, "error", "same class %"], lines)


def write_page() -> None:
    """Put the table between the markers of the page."""
    with ROWS.open(newline="", encoding="utf-8") as file:
        table = table_of(list(csv.DictReader(file)))
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="NAME")
    parser.add_argument("--formats", nargs="+", choices=("torch", "aoti", "onnx"), default=["torch", "onnx"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = CsvFile(ROWS, COLUMNS)
    for model in arguments.models:
        measure(model, arguments.formats, arguments.rounds, rows)
    write_page()
