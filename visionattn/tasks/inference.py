"""Using a trained classifier: evaluation on a split, and predictions for pictures."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import OmegaConf
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import visionattn
from visionattn.data.images import read_image
from visionattn.data.pipeline import EpochSampler, Samples, collate
from visionattn.tasks.train import write_text


@dataclass
class Classifier:
    """A model with what is needed to use it on pictures."""

    name: str
    model: nn.Module
    classes: list[str]
    in_chans: int
    data_config: dict[str, Any]


def load_run(run: str | Path) -> Classifier:
    """Load the best checkpoint of a run.

    Args:
        run: Folder of the run, or a checkpoint file.

    Returns:
        The classifier in evaluation mode.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of a training run.
    """
    path = Path(run)
    path = path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the folder of a finished run or a .ckpt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        hparams, weights = content["hyper_parameters"], content["state_dict"]
        model_args, classes = dict(hparams["model"]), hparams["classes"]
    except Exception as error:  # torch raises a dozen types for damaged files
        raise ValueError(f"{path} is no checkpoint of a training run, or damaged ({type(error).__name__})") from error
    name = model_args.pop("model_name")
    model = visionattn.create_model(name, **model_args, num_classes=len(classes), in_chans=hparams["in_chans"])
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if k.startswith("model.")})
    return Classifier(name, model.eval(), classes, hparams["in_chans"], hparams["data"])


def load_model(name: str, checkpoint: str | None, classes: list[str] | None = None) -> Classifier:
    """Create a registered model with its published weights or a checkpoint file.

    Args:
        name: timm name.
        checkpoint: File of weights; the published ones by default.
        classes: Class names in label order; numbers by default.

    Returns:
        The classifier in evaluation mode.
    """
    overlay = dict(file=checkpoint) if checkpoint else None
    model = visionattn.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    classes = classes or [str(i) for i in range(model.num_classes)]
    return Classifier(name, model.eval(), classes, model.in_chans, resolve_model_data_config(model))


@torch.inference_mode()
def evaluate(run: Path, overrides: list[str]) -> dict[str, Any]:
    """Top-1 and top-5 of a run's best checkpoint on its validation split.

    Args:
        run: Folder of the run.
        overrides: ``key=value`` changes to its configuration, for example ``data.root=...``.

    Returns:
        Metrics, throughput, and what was measured.

    Raises:
        FileNotFoundError: The run or its data are missing.
    """
    classifier = load_run(run)
    config = OmegaConf.load(run / "config.yaml")
    config = OmegaConf.merge(config, OmegaConf.from_dotlist(overrides))
    known = dict(classes=classifier.classes) if config.data.source._target_.endswith("ImageFolder") else {}
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split, **known)
    transform = create_transform(**classifier.data_config, is_training=False)
    samples = Samples(source, transform, config.seed, config.data.on_error, replace=False)
    loader = DataLoader(
        samples,
        batch_size=config.data.batch_size,
        sampler=EpochSampler(samples, shuffle=False),
        num_workers=config.data.workers,
        collate_fn=collate,
    )
    count = len(classifier.classes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classifier.model.to(device)
    metrics = [MulticlassAccuracy(count, top_k=k, average="micro").to(device) for k in (1, min(5, count))]
    images, skipped, start = 0, 0, time.perf_counter()
    for batch in loader:
        skipped += len(batch["skipped"])
        if len(batch["label"]):
            logits = classifier.model(batch["image"].to(device))
            for metric in metrics:
                metric.update(logits, batch["label"].to(device))
            images += len(logits)
    result = dict(
        model=classifier.name,
        run=str(run),
        data=str(config.data.source._target_).rsplit(".", 1)[-1],
        split=config.data.val_split,
        images=images,
        skipped=skipped,
        top1=100 * float(metrics[0].compute()),
        top5=100 * float(metrics[1].compute()),
        images_per_second=images / (time.perf_counter() - start),
        device=device,
    )
    write_text(run / "eval.json", json.dumps(result, indent=1))
    return result


@torch.inference_mode()
def predict(classifier: Classifier, paths: list[str], topk: int) -> list[list[tuple[str, float]]]:
    """The most likely classes of each picture.

    Args:
        classifier: From ``load_run`` or ``load_model``.
        paths: Image files.
        topk: Classes per picture.

    Returns:
        For each picture ``(class, probability)``, best first.

    Raises:
        FileNotFoundError: A picture is missing.
        ValueError: A picture cannot be read.
    """
    transform = create_transform(**classifier.data_config, is_training=False)
    results = []
    for path in paths:
        image = transform(read_image(path, classifier.in_chans))
        top = classifier.model(image[None]).softmax(dim=1)[0].topk(min(topk, len(classifier.classes)))
        results.append(
            [(classifier.classes[i], p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
        )
    return results


def draw(paths: list[str], results: list[list[tuple[str, float]]], in_chans: int, output: Path) -> None:
    """Write a contact sheet of pictures with their best class.

    Args:
        paths: Image files.
        results: From ``predict``.
        in_chans: Channels that the pictures are read with.
        output: PNG file; written under a temporary name and renamed.
    """
    from matplotlib.figure import Figure

    columns = min(len(paths), 8)
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(2 * columns, 2.3 * rows), layout="constrained")
    for i, (path, result) in enumerate(zip(paths, results, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(read_image(path, in_chans), cmap="gray")
        axes.set_title(f"{result[0][0]}  {result[0][1]:.0%}", fontsize=9)
        axes.axis("off")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(output.name + ".part")
    figure.savefig(temporary, format="png", dpi=120)
    temporary.rename(output)
