"""The table of the model zoo, measured and read from files rather than written by hand."""

import csv
import json
from pathlib import Path
from typing import Any

import timm

import visionattn
from visionattn.tasks.benchmark_models import FOLDED, macs
from visionattn.tasks.checkpoints import full_name, read_index
from visionattn.tasks.config import write_text
from visionattn.tasks.records import markdown

BEGIN, END = "<!-- zoo table: begin -->", "<!-- zoo table: end -->"
MODELS_PAGE = "docs/models.md"  # of a checkout
COLUMNS = "model", "weights", "parameters", "MACs", "input", "top-1 published", "verified top-1", "agreement"
SPEEDS = "images/s, inference", "images/s, training", "GiB of training"
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


def _cells(model: Any, published: dict[str, dict[str, str]], folder: Path) -> dict[str, str]:
    """What is known of a model's weights, by column."""
    identifier, cfg = full_name(model), model.pretrained_cfg
    facts, top1 = published.get(identifier), verified_top1(identifier, folder)
    weights = bool(cfg.get("url") or cfg.get("hf_hub_id"))
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "weights": identifier if weights else "-",
        "parameters": f"{count / 1e6:.1f} M",
        "MACs": f"{macs(model, cfg['input_size']) / 1e9:.2f} G",
        "input": str(cfg["input_size"][-1]),
        "top-1 published": f"[{facts['top1']}]({facts['source']})" if facts else "-",
        "verified top-1": "-" if not weights else NOT_RUN if top1 is None else f"{top1:.2f}",
    }


def zoo_rows(folder: Path, speeds: dict[str, dict[str, str]] | None = None) -> list[dict[str, str]]:
    """Cells by column of every registered backbone, and of further tags that have published figures.

    Args:
        folder: The folder ``checkpoints`` of the repository: published figures, index, agreement, evaluation results.
        speeds: Further cells by model, as ``measured_speeds`` reads them.

    Returns:
        Rows with ``COLUMNS``, those of ``speeds``, and ``family``, the name of the file that defines the model.
    """
    published, errors, rows = published_figures(folder), _agreement(folder), []
    for name in visionattn.list_models():
        if name.startswith("test_"):
            continue
        first = full_name(timm.create_model(name, device="meta"))
        for identifier in [first, *(key for key in published if key.startswith(f"{name}.") and key != first)]:
            model: Any = timm.create_model(identifier, device="meta")
            row = {"family": timm.model_entrypoint(name).__module__.rpartition(".")[2]}
            row["model"] = f"`{name}`" if identifier == first else ""
            row |= _cells(model, published, folder)
            row["agreement"] = f"{errors[name]:.0e}" if name in errors else "-"
            rows.append(row | ((speeds or {}).get(name, {}) if identifier == first else {}))
    return rows


def rows_table(rows: list[dict[str, str]], columns: tuple[str, ...] = COLUMNS) -> str:
    """Markdown table of some columns; what a row lacks stays empty."""
    return markdown(columns, [[row.get(column, "") for column in columns] for row in rows])


def zoo_table(folder: Path) -> str:
    """Markdown table of ``zoo_rows``.

    Args:
        folder: The folder ``checkpoints`` of the repository.
    """
    return rows_table(zoo_rows(folder))


def measured_speeds(*paths: Path) -> dict[str, dict[str, str]]:
    """Cells of ``SPEEDS`` by model, from the rows at 224 pixels that were not compiled.

    The fastest run of a file counts: of a CUDA graph where there is one, and in inference of the folded form. A star
    marks runs of one call at a time, a dagger those of another file than the first, which gives what that lacks.

    Args:
        paths: CSV files of ``benchmark_models``.
    """
    speeds: dict[str, dict[str, str]] = {}
    for path, dagger in zip(paths, ["", *[" †"] * len(paths)], strict=False):
        for (name, mode), row in _fastest(path).items():
            star = "" if row["cuda_graph"] == "True" else " *"
            cells = speeds.setdefault(name, {})
            if f"images/s, {mode}" in cells:
                continue
            cells[f"images/s, {mode}"] = f"{float(row['images_per_s']):,.0f}{star}{dagger}"
            if mode == "training":
                cells["GiB of training"] = f"{float(row['peak_gib']):.1f}{dagger}"
    return speeds


def _fastest(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of a file by model and mode."""
    best: dict[tuple[str, str], dict[str, str]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            key = row["model"].removesuffix(FOLDED), row["mode"]
            fits = row["height"] == row["width"] == "224" and not row["compile"] and key[1] in ("inference", "training")
            if fits and float(row["images_per_s"]) > float(best.get(key, {}).get("images_per_s", 0)):
                best[key] = row
    return best


def family_table(rows: list[dict[str, str]]) -> str:
    """Markdown table of the families: models, range of parameters, best published accuracy.

    Args:
        rows: Of ``zoo_rows``.
    """
    lines = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        sizes = sorted(float(row["parameters"].split()[0]) for row in own)
        published = [
            float(row["top-1 published"].strip("[").partition("]")[0]) for row in own if "(" in row["top-1 published"]
        ]
        names = ", ".join(row["model"] for row in own if row["model"])
        best = f"{max(published):.1f}" if published else "-"
        lines.append([f"[{family}](docs/families/{family}.md)", names, f"{sizes[0]:g} to {sizes[-1]:g} M", best])
    return markdown(("family", "models", "parameters", "best published top-1"), lines)


def pages_with_table(root: Path) -> dict[Path, str]:
    """The pages of the repository that show a table of models, with the present one in place.

    Args:
        root: The checkout.

    Returns:
        Path to text.

    Raises:
        ValueError: A page without the two markers.
    """
    speeds = measured_speeds(*(root / "docs" / "benchmarks" / name for name in ("models.csv", "zoo.csv")))
    rows = zoo_rows(root / "checkpoints", speeds)
    tables = {"README.md": family_table(rows), MODELS_PAGE: rows_table(rows, COLUMNS + SPEEDS)}
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        tables[f"docs/families/{family}.md"] = rows_table(own, COLUMNS + SPEEDS)
    pages = {}
    for path, table in ((root / name, table) for name, table in tables.items()):
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
