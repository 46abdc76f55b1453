"""Arithmetic of large trainings: hours, data rate and checkpoints, for the tables of ``docs/scaling.md``."""

import csv
import math
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from visionattn.tasks.config import write_text

PAGE = "docs/scaling.md"
IMAGES = 1_281_167  # of ImageNet-1K's training set
IMAGE_BYTES = 115_000  # the published archive of them has 147.9 x 10**9 bytes
GPUS = (8, 16, 32, 64, 128, 256, 512)
EFFICIENCY = {8: 0.95, 16: 0.92, 32: 0.9, 64: 0.88, 128: 0.85, 256: 0.8, 512: 0.75}  # assumed, not measured
CORE_IMAGES_PER_SECOND = 90  # decoded and augmented by a core; docs/scaling.md says where that was measured
# 419 unexpected interruptions of 16,384 H100 in 54 days: Llama Team, "The Llama 3 Herd of Models", arXiv 2407.21783
GPU_MTBF_HOURS = 54 * 24 * 16_384 / 419
SAVE_SECONDS = 5.0  # assumed time that training waits for a checkpoint
REFERENCE = "biformer_s"


def young_interval(save_seconds: float, mtbf_seconds: float) -> float:
    """Seconds of training between checkpoints that lose the least time: ``sqrt(2 * save * MTBF)``.

    Args:
        save_seconds: Time that training waits for a checkpoint.
        mtbf_seconds: Mean time between failures of the whole job.

    Reference:
        J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974.
    """
    return math.sqrt(2 * save_seconds * mtbf_seconds)


def lost_share(interval: float, save_seconds: float, mtbf_seconds: float) -> float:
    """Share of the time that goes to saving and to work done twice after failures, to first order.

    Args:
        interval: Seconds between checkpoints.
        save_seconds: Time that training waits for a checkpoint.
        mtbf_seconds: Mean time between failures of the whole job.
    """
    return save_seconds / interval + interval / (2 * mtbf_seconds)


def training_hours(images_per_second: float, epochs: int, gpus: int, images: int = IMAGES) -> float:
    """Hours of a training at the assumed efficiency, without validation.

    Args:
        images_per_second: Of one GPU.
        epochs: Passes over the images.
        gpus: One of ``GPUS``.
        images: Of a pass.
    """
    return images * epochs / (images_per_second * gpus * EFFICIENCY[gpus]) / 3600


def measured_throughput(root: Path) -> dict[str, tuple[float, str]]:
    """Images per second and GPU of each model in training at 224 pixels, uncompiled and without CUDA graphs.

    Args:
        root: The checkout, with ``docs/benchmarks/models.csv``.
    """
    found: dict[str, tuple[float, str]] = {}
    with (root / "docs" / "benchmarks" / "models.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            plain = row["compile"] in ("", "False") and row["cuda_graph"] != "True" and not row["model_kwargs"]
            size = row["height"] == row["width"] == "224"
            if row["mode"] == "training" and size and plain and row["device"].startswith("NVIDIA"):
                rate = float(row["images_per_s"]), row["device"].removeprefix("NVIDIA ").split()[0]
                found[row["model"]] = max(rate, found.get(row["model"], rate))
    return found


def _parameters(root: Path) -> dict[str, float]:
    """Millions of parameters by model, from the table of models, which is quicker than to make them all."""
    page = (root / "docs" / "models.md").read_text(encoding="utf-8")
    return {
        name: float(count) for name, count in re.findall(r"^\| `(\w+)` \|[^|]*\| ([\d.]+) M \|", page, re.MULTILINE)
    }


def _recipe(path: Path, parameters: dict[str, float]) -> dict[str, Any]:
    """What a recipe says of epochs, batch and rate, on 8 GPUs, and the size of its checkpoint."""
    configs, recipe = path.parents[2], OmegaConf.load(path)
    names = {key: value for entry in recipe.defaults for key, value in entry.items()}
    task = OmegaConf.merge(OmegaConf.load(configs / "task" / "classification.yaml"), recipe.get("task") or {})
    trainer = OmegaConf.merge(OmegaConf.load(configs / "trainer" / "ddp.yaml"), recipe.get("trainer") or {})
    size = (recipe.data.get("transform") or {}).get("input_size", [3, 224, 224])[-1]
    name = OmegaConf.load(configs / "model" / f"{names['override /model']}.yaml").model_name
    # weights and the optimizer's two averages of each, in float32
    copies = 3 + bool(task.ema_decay)
    batch = recipe.data.batch_size * GPUS[0] * trainer.accumulate_grad_batches
    return dict(
        name=path.stem,
        model=name,
        size=size,
        epochs=trainer.max_epochs,
        batch=batch,
        lr=task.lr * batch / task.lr_batch,
        checkpoint=4 * copies * parameters[name],  # MB
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def recipe_table(root: Path) -> str:
    """Markdown table of the recipes of ``configs/experiment/imagenet``: steps, checkpoint and hours."""
    rates, parameters = measured_throughput(root), _parameters(root)
    columns = "recipe", "epochs", "batch", "learning rate", "steps", "checkpoint", "images/s of one GPU"
    hours = [f"hours on {gpus} GPUs" for gpus in (8, 64, 512)]
    lines = [f"| {' | '.join([*columns, *hours])} |", "|---" * (len(columns) + len(hours)) + "|"]
    for path in sorted((root / "configs" / "experiment" / "imagenet").glob("*.yaml")):
        recipe = _recipe(path, parameters)
        rate = rates.get(recipe["model"]) if recipe["size"] == 224 else None
        cells = [
            f"`{recipe['name']}`",
            str(recipe["epochs"]),
            str(recipe["batch"]),
            f"{recipe['lr']:.2g}",
            f"{IMAGES // recipe['batch'] * recipe['epochs']:,}",
            f"{recipe['checkpoint']:.0f} MB",
            f"{rate[0]:.0f} ({rate[1]})" if rate else "not measured",
        ]
        cells += [_number(training_hours(rate[0], recipe["epochs"], n)) if rate else "-" for n in (8, 64, 512)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cluster_table(root: Path) -> str:
    """Markdown table of numbers of GPUs: batch, data rate, cores, failures and checkpoints."""
    rate, _ = measured_throughput(root)[REFERENCE]
    columns = (
        "GPUs",
        "assumed efficiency",
        "global batch at 128 each",
        "steps of an epoch",
        "images/s",
        "MB/s of JPEG",
        "cores for the data",
        "hours between failures",
        "minutes between checkpoints",
        "time lost",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for gpus in GPUS:
        images = rate * gpus * EFFICIENCY[gpus]
        mtbf = GPU_MTBF_HOURS / gpus * 3600
        interval = young_interval(SAVE_SECONDS, mtbf)
        cells = [
            str(gpus),
            f"{EFFICIENCY[gpus]:.0%}",
            str(128 * gpus),
            str(IMAGES // (128 * gpus)),
            f"{images:,.0f}",
            f"{images * IMAGE_BYTES / 1e6:,.0f}",
            str(math.ceil(images / CORE_IMAGES_PER_SECOND)),
            f"{mtbf / 3600:,.0f}",
            f"{interval / 60:.0f}",
            f"{lost_share(interval, SAVE_SECONDS, mtbf):.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page_with_tables(root: Path) -> str:
    """The text of ``docs/scaling.md`` with the present tables.

    Args:
        root: The checkout.

    Raises:
        ValueError: The page lacks the markers between which the tables stand.
    """
    text = (root / PAGE).read_text(encoding="utf-8")
    for name, table in (("recipes", recipe_table(root)), ("clusters", cluster_table(root))):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"{root / PAGE} must hold the markers {begin} and {end}, between which a table stands")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


def write_page(root: Path) -> bool:
    """Bring ``docs/scaling.md`` up to date; whether it changed."""
    text = page_with_tables(root)
    changed = text != (root / PAGE).read_text(encoding="utf-8")
    if changed:
        write_text(root / PAGE, text)
    return changed
