"""Model cards, written from what was measured."""

import csv
import inspect
import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
from timm.models._hub import generate_readme

import visionattn
from visionattn.tasks.benchmark_models import FOLDED, macs
from visionattn.tasks.checkpoints import read_index, sha256
from visionattn.tasks.export import Exportable
from visionattn.tasks.zoo import NOT_RUN, published_figures, verified_top1

CHECKPOINTS, BENCHMARKS = "checkpoints", "docs/benchmarks/models.csv"  # in a checkout
_PAPER = re.compile(r"Papers?:\s*(.*?)\s*Code:\s*(.*?)(?:\n\n|\Z)", re.DOTALL)
_ONE = re.compile(r"([^;]*?arXiv:\d{4}\.\d{4,5})")
_METRICS = {"val/top1": "top-1", "val/top5": "top-5", "val/loss": "validation loss"}


def papers(architecture: str) -> tuple[str, str] | None:
    """Papers and original code of a backbone of this package, as its module names them; None for other models."""
    module = inspect.getmodule(timm.models.model_entrypoint(architecture))
    found = _PAPER.search(getattr(module, "__doc__", None) or "")
    if module is None or not module.__name__.startswith("visionattn.") or found is None:
        return None
    return " ".join(found[1].split()).rstrip("."), " ".join(found[2].replace("``", "`").split())


def _throughput(architecture: str, root: Path) -> list[str]:
    """Lines of measured inference, newest last."""
    path, lines = root / BENCHMARKS, []
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["mode"] == "inference" and row["model"] in (architecture, architecture + FOLDED):
                form = "folded, " if row["model"].endswith(FOLDED) else ""
                compiled = f", compiled ({row['compile']})" if row["compile"] else ""
                how = f"{form}batch {row['batch']}, {row['height']} x {row['width']}, {row['dtype']}{compiled}"
                where = f"{row['device']}, PyTorch {row['torch']}, {row['date']}"
                lines.append(f"{float(row['images_per_s']):.0f} images/s ({how}; {where})")
    return lines


def _run_metrics(run: Path | None) -> list[str]:
    """Validation metrics of a run: ``eval.json`` of its best checkpoint, else those of the last epoch."""
    if run is None or not run.is_dir():
        return []
    if (path := run / "eval.json").is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        what = f"{found['images']} images of the split {found['split']}, best checkpoint"
        return [f"{key} {found[name]:.2f} % ({what})" for name, key in (("top1", "top-1"), ("top5", "top-5"))]
    if not (path := run / "metrics.json").is_file():
        return []
    found, lines = json.loads(path.read_text(encoding="utf-8")), []
    for name, text in _METRICS.items():
        if found.get(name) is not None:
            value = f"{found[name]:.4f}" if name.endswith("loss") else f"{100 * found[name]:.2f} %"
            lines.append(f"{text} {value} (validation split, last epoch)")
    return lines


def _are_published(network: Exportable, root: Path) -> bool:
    """Whether the weights are those of the model's name: downloaded, or a file that the index lists."""
    row = read_index(root / CHECKPOINTS).get(network.name, {})
    listed = (row.get("sha256"), row.get("source_sha256"))
    return network.weights == "published" or bool(network.checkpoint and sha256(network.checkpoint) in listed)


def _accuracy(network: Exportable, run: Path | None, root: Path, published: bool) -> dict[str, Any]:
    if run is not None:
        return {"Measured in training": _run_metrics(run) or "nothing: the run left no metrics"}
    if not published:
        return {"Accuracy": "not measured: random weights" if network.weights == "random" else "not measured"}
    facts = published_figures(root / CHECKPOINTS).get(network.name)
    verified = verified_top1(network.name, root / CHECKPOINTS)
    return {
        "Published top-1": f"{facts['top1']} % ({facts['data']}, {facts['source']})" if facts else "none",
        "Verified top-1": NOT_RUN if verified is None else f"{verified:.2f} % (ImageNet-1K, all 50,000 images)",
    }


def card(network: Exportable, run: str | Path | None = None, licence: str | None = None) -> dict[str, Any]:
    """What timm's ``generate_readme`` and ``push_to_hf_hub`` make a model card of.

    Every figure is measured from the model, or read from the checkout's tables or the run's files; a figure that is in
    none of them is not on the card.

    Args:
        network: A classifier of timm or this package.
        run: Folder of the run whose weights they are.
        licence: Of the weights; by default that of the published ones, and of others ``other``, which says nothing.
    """
    model: Any = network.model
    cfg, root = model.pretrained_cfg, Path(visionattn.__file__).parent.parent
    architecture, folder = cfg["architecture"], Path(run) if run is not None else None
    published = _are_published(network, root)
    size = (network.in_chans, *network.size)
    count = sum(parameter.numel() for parameter in model.parameters())
    details: dict[str, Any] = {
        "Architecture": f"`{architecture}`, classifier and backbone",
        "Parameters (M)": f"{count / 1e6:.2f}",
        "MACs (G)": f"{macs(deepcopy(model).to('meta'), size) / 1e9:.3f}",
        "Image size": " x ".join(map(str, size)),
        "Classes": str(len(network.classes)),
        **_accuracy(network, folder, root, published),
    }
    if speeds := _throughput(architecture, root):
        details["Measured throughput"] = speeds
    sources = papers(architecture)
    if sources:
        details["Papers"], details["Original code"] = sources
    licence = licence or (cfg.get("license") if published else None) or "other"
    if licence == "other":
        details["Licence of the weights"] = "not stated; whoever publishes them should state one"
    return dict(
        tags=["image-classification", "timm", "visionattn"],
        license=licence,
        description=f"`{network.name}` of [visionattn](https://github.com/visionattn/visionattn), a model of timm.",
        details=details,
        usage=_usage(),
        **({"citation": [_bibtex(text) for text in _ONE.findall(sources[0])]} if sources else {}),
    )


def _bibtex(paper: str) -> str:
    title, _, rest = paper.strip().partition(", ")
    key = "arxiv" + paper.rpartition(":")[2].replace(".", "_")
    return f"@misc{{{key},\n  title = {{{title}}},\n  note = {{{rest}}}\n}}"


def _usage() -> str:
    return """```python
import timm, torch, visionattn  # the import registers the architecture

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
# transform(PIL image)[None] -> logits; class names: model.pretrained_cfg.get("label_names")
```"""


def card_text(facts: dict[str, Any], title: str) -> str:
    """A card as Markdown with the hub's header."""
    return generate_readme(facts, title)
