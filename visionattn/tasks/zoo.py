"""The table of the model zoo, measured and read from files rather than written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import timm

import visionattn
from visionattn.tasks.benchmark_models import macs
from visionattn.tasks.checkpoints import full_name, read_index
from visionattn.tasks.config import write_text

BEGIN, END = "<!-- zoo table: begin -->", "<!-- zoo table: end -->"
PAGES = ("README.md", "docs/models.md")
NOT_RUN = "not run"
IMAGES, _CLASSES = 50_000, 1000  # of ImageNet-1K's validation set


def published_figures(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of ``folder/published.csv`` by full name; none if there is no such file."""
    if not (folder / "published.csv").is_file():
        return {}
    with (folder / "published.csv").open(newline="", encoding="utf-8") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def verified_top1(name: str, folder: Path) -> float | None:
    """Top-1 of a model's published weights as ``visionattn eval`` measured it.

    Args:
        name: Full name, for example ``"biformer_s.in1k"``.
        folder: Folder of ``index.csv`` and ``results/NAME.json``.

    Returns:
        Percent; None unless the result counts the whole validation set of ImageNet-1K, none skipped, with the weights
        that the index lists under this name.
    """
    path = folder / "results" / f"{name}.json"
    if not path.is_file():
        return None
    result, row = json.loads(path.read_text(encoding="utf-8")), read_index(folder).get(name, {})
    whole = result["name"] == name and result["images"] == IMAGES and result["classes"] == _CLASSES
    listed = result["checkpoint_sha256"] in (row.get("sha256"), row.get("source_sha256"))
    known = whole and not result["skipped"] and bool(result["checkpoint_sha256"]) and listed
    return float(result["top1"]) if known else None


def _agreement(folder: Path) -> dict[str, float]:
    """Largest error against the published network's outputs, by model."""
    errors: dict[str, float] = {}
    with (folder / "agreement.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            errors[row["model"]] = max(errors.get(row["model"], 0.0), float(row["largest_error"]))
    return errors


def zoo_table(folder: Path) -> str:
    """Markdown table of every registered backbone, and of further tags that have published figures.

    Args:
        folder: The folder ``checkpoints`` of the repository: published figures, index, agreement, evaluation results.
    """
    published, errors = published_figures(folder), _agreement(folder)
    columns = "model", "weights", "parameters", "MACs", "input", "top-1 published", "verified top-1", "agreement"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in visionattn.list_models():
        if name.startswith("test_"):
            continue
        first = full_name(timm.create_model(name, device="meta"))
        tags = [first, *(key for key in published if key.startswith(f"{name}.") and key != first)]
        for identifier in tags:
            model: Any = timm.create_model(identifier, device="meta")
            cfg, facts, top1 = model.pretrained_cfg, published.get(identifier), verified_top1(identifier, folder)
            weights = bool(cfg.get("url") or cfg.get("hf_hub_id"))
            count = sum(parameter.numel() for parameter in model.parameters())
            row = [
                f"`{name}`" if identifier == first else "",
                identifier if weights else "-",
                f"{count / 1e6:.1f} M",
                f"{macs(model, cfg['input_size']) / 1e9:.2f} G",
                str(cfg["input_size"][-1]),
                f"[{facts['top1']}]({facts['source']})" if facts else "-",
                "-" if not weights else NOT_RUN if top1 is None else f"{top1:.2f}",
                f"{errors[name]:.0e}" if name in errors else "-",
            ]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def pages_with_table(root: Path) -> dict[Path, str]:
    """The pages of the repository that show the table, with the present one in place.

    Args:
        root: The checkout.

    Returns:
        Path to text.

    Raises:
        ValueError: A page without the two markers.
    """
    table, pages = zoo_table(root / "checkpoints"), {}
    for path in (root / name for name in PAGES):
        before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{path} must hold the markers {BEGIN} and {END}, between which the table stands")
        pages[path] = f"{before}{BEGIN}\n{table}\n{END}{after}"
    return pages


def write_tables(root: Path) -> list[Path]:
    """Bring the pages up to date; returns those that changed."""
    pages = pages_with_table(root)
    changed = [path for path, text in pages.items() if path.read_text(encoding="utf-8") != text]
    for path in changed:
        write_text(path, pages[path])
    return changed
