"""Using a trained classifier: evaluation on a split, and predictions for pictures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

import visionattn
from visionattn._figures import save_figure
from visionattn.data.images import check_channels
from visionattn.data.pipeline import EpochSampler, collate, samples_of
from visionattn.tasks.checkpoints import full_name, read_torch_file, sha256
from visionattn.tasks.config import check_sources, compose
from visionattn.tasks.networks import make_classifier
from visionattn.tasks.progress import tracked

_BATCH = 32  # pictures predicted at once


@dataclass
class Classifier:
    """A model with what is needed to use it on pictures."""

    name: str
    model: nn.Module
    classes: list[str]
    in_chans: int
    data_config: dict[str, Any]
    checkpoint: str | None

    def transformed(self, image: Image.Image) -> Tensor:
        """A picture with the model's number of channels as the model takes it, normalised: ``[C, H, W]``."""
        return create_transform(**self.data_config, is_training=False)(image)


def checkpoint_of(run: str | Path) -> Path:
    """Best checkpoint of a run's folder, or the file itself."""
    path = Path(run)
    return path / "checkpoints" / "best.ckpt" if path.is_dir() else path


def read_checkpoint(run: str | Path, averaged: bool | None) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """File, hyperparameters and the network's weights of a run's best checkpoint.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: Take the averaged weights rather than the trained ones; by default those that the run validated.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of a training run, or has no averaged weights.
    """
    path = checkpoint_of(run)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the folder of a finished run or a .ckpt file")
    content = read_torch_file(path)
    try:
        hparams, weights = dict(content["hyper_parameters"]), content["state_dict"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of a training run, or damaged ({type(error).__name__})") from error
    prefix = "ema.module." if (hparams.get("averaged", False) if averaged is None else averaged) else "model."
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if not weights:
        raise ValueError(f"{path} has no averaged weights; train with task.ema_decay=0.9999, or evaluate without them")
    return path, hparams, weights


def load_run(run: str | Path, averaged: bool | None = None) -> Classifier:
    """Load the best checkpoint of a run.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: Take the averaged weights rather than the trained ones; by default those that the run validated.

    Returns:
        The classifier in evaluation mode.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of a training run, or has no averaged weights.
    """
    path, hparams, weights = read_checkpoint(run, averaged)
    try:
        model_args, classes = dict(hparams["model"]), hparams["classes"]
        name = model_args["backbone" if "backbone" in model_args else "model_name"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of a classification ({type(error).__name__})") from error
    model = make_classifier(model_args, len(classes), hparams["in_chans"])
    model.load_state_dict(weights)
    return Classifier(name, model.eval(), classes, hparams["in_chans"], hparams["data"], str(path))


def load_model(
    name: str,
    checkpoint: str | None = None,
    classes: list[str] | None = None,
    in_chans: int = 3,
    pretrained: bool = True,
) -> Classifier:
    """Create a registered model with its published weights or a checkpoint file.

    Args:
        name: timm name, with or without a tag.
        checkpoint: File of weights, .pth or .safetensors; the published ones by default.
        classes: Class names in label order; by default ImageNet's for 1000 classes, else numbers.
        in_chans: Channels of the images; timm adapts the first layer of weights for others.
        pretrained: False leaves the random weights of a new model, whose classes are numbers.

    Returns:
        The classifier in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown name, or weights of another model or number of classes.
    """
    sized: dict[str, Any] = dict(num_classes=len(classes)) if classes else {}
    overlay: dict[str, Any] = {**sized, "file": checkpoint} if checkpoint else {}
    model: Any = visionattn.create_model(
        name, pretrained=pretrained, pretrained_cfg_overlay=overlay, in_chans=in_chans, **(sized if checkpoint else {})
    )
    count = model.num_classes
    if classes and len(classes) != count:
        raise ValueError(f"the weights of {name} know {count} classes, the data has {len(classes)}; fine-tune it first")
    if classes is None and count == 1000 and pretrained:
        labels = ImageNetInfo("imagenet-1k")
        classes = [labels.index_to_description(i) for i in range(count)]
    classes = classes or [str(i) for i in range(count)]
    return Classifier(full_name(model), model.eval(), classes, in_chans, resolve_model_data_config(model), checkpoint)


def _changed(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration with ``key=value`` changes; unknown keys are errors, but for arguments of the transform."""
    OmegaConf.set_struct(config, True)
    OmegaConf.set_struct(config.data.transform, False)
    for text in overrides:
        key, _, value = text.partition("=")
        if not value or isinstance(config.get(key), DictConfig):
            raise ValueError(f"{text!r}: a run is evaluated with changes of single values, for example data.root=DIR")
    changes = OmegaConf.from_dotlist([text.lstrip("+") for text in overrides])
    return OmegaConf.merge(config, changes)  # type: ignore[return-value]


def run_config(run: str | Path, overrides: list[str]) -> tuple[DictConfig, Path]:
    """Configuration of a run with ``key=value`` changes, and the run's folder.

    Raises:
        FileNotFoundError: There is no configuration.
        ValueError: A change of a key that it does not have, or what ``check_sources`` refuses.
    """
    folder = Path(run) if Path(run).is_dir() else Path(run).parent.parent
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"no config.yaml in {folder}; give the folder of a run")
    config = OmegaConf.load(folder / "config.yaml")
    if not isinstance(config, DictConfig):
        raise ValueError(f"{folder / 'config.yaml'} is no configuration of a run")
    config = _changed(config, overrides)
    check_sources(config, folder / "config.yaml", overrides)
    return config, folder


def evaluate_run(run: str | Path, overrides: list[str], averaged: bool | None = None) -> dict[str, Any]:
    """Evaluate a run on its validation split.

    Args:
        run: Folder of the run (its best checkpoint), or one of its checkpoint files.
        overrides: ``key=value`` changes to its configuration, for example ``data.root=...``.
        averaged: As in ``load_run``.

    Returns:
        As ``evaluate``.

    Raises:
        FileNotFoundError: The run or its data are missing.
        ValueError: A change of a key that the configuration does not have.
    """
    classifier = load_run(run, averaged)
    config, _ = run_config(run, overrides)
    return evaluate(classifier, config, _validation(config, classifier.classes))


def evaluate_model(name: str, checkpoint: str | None, overrides: list[str]) -> dict[str, Any]:
    """Evaluate a registered model with published weights, or with those of a file, on the validation split of a set.

    Args:
        name: timm name, with or without a tag.
        checkpoint: File of weights; the published ones by default.
        overrides: Changes to ``configs/train.yaml``, for example ``["data=folder", "data.root=DIR"]``.

    Returns:
        As ``evaluate``.

    Raises:
        FileNotFoundError: The weights or the data are missing.
        ValueError: An unknown name, or weights that do not fit the model or the number of classes.
    """
    config = compose(overrides)
    source = _validation(config, None)
    check_channels(config.data.in_chans)
    classifier = load_model(name, checkpoint, source.classes, config.data.in_chans)
    return evaluate(classifier, config, source)


def _validation(config: DictConfig, classes: list[str] | None) -> Any:
    known = dict(classes=classes) if classes and config.data.source._target_.endswith("ImageFolder") else {}
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split, **known)
    if classes and source.classes != classes:
        raise ValueError(
            f"the model was trained on {len(classes)} classes ({', '.join(classes[:3])}, ...), the data has "
            f"{len(source.classes)} ({', '.join(source.classes[:3])}, ...); evaluate on the same classes"
        )
    return source


@torch.inference_mode()
def evaluate(classifier: Classifier, config: DictConfig, source: Any) -> dict[str, Any]:
    """Top-1 and top-5 in percent, and images per second with reading and transforms.

    Args:
        classifier: From ``load_run`` or ``load_model``.
        config: Composed configuration, of which the ``data`` group counts; its ``transform`` may change ``input_size``,
            ``crop_pct``, ``interpolation``, ``mean`` and ``std``.
        source: Images and labels.

    Returns:
        Metrics, and what was measured with which weights.
    """
    data = {k: config.data.transform.get(k, v) for k, v in classifier.data_config.items()}
    data = {k: tuple(v) if isinstance(v, ListConfig | list) else v for k, v in data.items()}
    kwargs = dict(seed=config.seed, on_error=config.data.on_error, replace=False)
    samples = samples_of(source, create_transform(**data, is_training=False), **kwargs)
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
    images, skipped, start = 0, [], time.perf_counter()
    for batch in tracked(loader, len(source)):
        skipped += batch["skipped"]
        if len(batch["label"]):
            logits = classifier.model(batch["image"].to(device))
            for metric in metrics:
                metric.update(logits, batch["label"].to(device))
            images += len(logits)
    if not images:
        raise ValueError(f"none of the {len(source)} images can be read; the first error: {skipped[0]}")
    return dict(
        name=classifier.name,
        checkpoint=classifier.checkpoint,
        checkpoint_sha256=sha256(classifier.checkpoint) if classifier.checkpoint else None,
        data=str(config.data.source._target_).rsplit(".", 1)[-1],
        split=config.data.val_split,
        classes=count,
        images=images,
        skipped=len(skipped),
        skipped_images=skipped,
        top1=100 * float(metrics[0].compute()),
        top5=100 * float(metrics[1].compute()),
        input_size=list(data["input_size"]),
        images_per_second=images / (time.perf_counter() - start),
        device=torch.cuda.get_device_name() if device == "cuda" else device,
    )


def distinct_stems(images: Sequence[str | Path]) -> list[str]:
    """Names of image files without folder and ending, by which results are called.

    Raises:
        ValueError: Two of one name.
    """
    stems = [Path(image).stem for image in images]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise ValueError(f"several images are named {twice[0]}; their results would overwrite each other")
    return stems


@torch.inference_mode()
def predict(classifier: Classifier, images: list[Image.Image], topk: int) -> list[list[tuple[str, float]]]:
    """The most likely classes of each picture.

    Args:
        classifier: From ``load_run`` or ``load_model``.
        images: Pictures of any size, with the classifier's number of channels (``read_image``).
        topk: Classes per picture.

    Returns:
        For each picture ``(class, probability)``, best first.
    """
    results = []
    for i in range(0, len(images), _BATCH):
        logits = classifier.model(torch.stack([classifier.transformed(image) for image in images[i : i + _BATCH]]))
        top = logits.softmax(dim=1).topk(min(topk, len(classifier.classes)))
        for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            results.append([(classifier.classes[i], p) for p, i in zip(values, indices, strict=True)])
    return results


def draw(images: list[Image.Image], titles: list[str], output: Path, colors: list[str] | None = None) -> None:
    """Write a contact sheet.

    Args:
        images: Pictures.
        titles: What stands above each.
        output: PNG file; written under a temporary name and renamed.
        colors: Colour of each title; black by default.
    """
    from matplotlib.figure import Figure

    columns = min(len(images), 8)
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(1.8 * columns, 2.1 * rows), layout="constrained")
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        axes.imshow(image, cmap="gray")
        axes.set_title(title, fontsize=9, color=colors[i] if colors else "black")
        axes.axis("off")
    save_figure(figure, output)
