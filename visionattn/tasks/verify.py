"""Top-1 of published weights against the published figure, for the table of models."""

import json
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.models import PretrainedCfg

import visionattn
from visionattn.data.datasets import ImageFolder
from visionattn.data.labelled_folder import LabelledFolder
from visionattn.models._weights import fetch_weights
from visionattn.tasks import zoo
from visionattn.tasks.checkpoints import full_name, read_index, verify_checkpoint
from visionattn.tasks.config import compose, write_text
from visionattn.tasks.inference import evaluate, load_model


def synsets() -> list[str]:
    """The 1000 classes of ImageNet-1K by their WordNet numbers, in label order."""
    info = ImageNetInfo("imagenet-1k")
    return [info.index_to_label_name(i) for i in range(info.num_classes())]


def class_folders(root: str | Path, count: int, names: list[str] | None = None, in_chans: int = 3) -> ImageFolder:
    """Images in folders of a model's classes, or of some of them.

    Args:
        root: ``ROOT/val/CLASS/IMAGE`` or ``ROOT/CLASS/IMAGE``.
        count: Classes that the model knows.
        names: Their folders' names in label order; by default the synsets for 1000 classes. Of other models only the
            number of folders can be compared, and labels follow the folders' sorted names.
        in_chans: Channels that the images are read with.

    Raises:
        FileNotFoundError: There are no images.
        ValueError: Other classes than the model's.
    """
    split = "val" if Path(root, "val").is_dir() else ""
    names = synsets() if names is None and count == 1000 else names
    source = ImageFolder(root, split, in_chans, classes=names)
    if len(source.classes) != count:
        raise ValueError(
            f"{Path(root, split)} has {len(source.classes)} class folders, the model knows {count} classes; "
            "give the set that its weights were trained on"
        )
    return source


def validation_images(root: str | Path, count: int, labels: str | Path | None = None) -> ImageFolder | LabelledFolder:
    """The validation set in one of its two layouts.

    Args:
        root: ``ROOT/val/CLASS/IMAGE`` or ``ROOT/CLASS/IMAGE``; with ``labels`` ``ROOT[/val]/IMAGE``.
        count: Classes that the model knows.
        labels: File of labels, see ``visionattn.data.labelled_folder.read_labels``.

    Raises:
        FileNotFoundError: There are no images.
        ValueError: Other classes than the model's.
    """
    root = Path(root)
    split = "val" if (root / "val").is_dir() else ""
    if labels is not None:
        names = synsets() if count == 1000 else [str(i) for i in range(count)]
        return LabelledFolder(root / split, labels, names)
    if (root / split).is_dir() and not any(entry.is_dir() for entry in (root / split).iterdir()):
        raise FileNotFoundError(f"{root / split} holds no class folders; for one folder of images give --labels FILE")
    return class_folders(root, count)


def weights_of(name: str, folder: Path) -> str:
    """The file of a model's published weights: that of the index if it is there, else downloaded and checked.

    Args:
        name: timm name, with or without a tag.
        folder: Folder of ``index.csv``.

    Raises:
        ValueError: No weights are published, or a file is not the one that the index lists.
        FileNotFoundError: They cannot be had.
    """
    model: Any = visionattn.create_model(name, device="meta")
    identifier = full_name(model)
    row = read_index(folder).get(identifier)
    if row and (folder / row["file"]).is_file():
        verify_checkpoint(folder / row["file"])
        return str(folder / row["file"])
    try:
        path, _ = fetch_weights(PretrainedCfg(**model.pretrained_cfg))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"the weights of {identifier} cannot be had: {error}; give --checkpoint FILE"
        ) from error
    if not path:
        raise ValueError(f"no weights are published for {identifier}; give --checkpoint FILE")
    return path


def verify(
    name: str,
    root: str | Path,
    checkpoint: str | None = None,
    folder: str | Path = "checkpoints",
    labels: str | Path | None = None,
    overrides: list[str] | None = None,
) -> dict[str, Any]:
    """Measure top-1 of a model's weights beside the published figure.

    A result over all 50,000 images goes to ``FOLDER/results/NAME.json``, and the tables of the checkout that FOLDER
    lies in are written anew. Whether the column fills is decided by ``visionattn.tasks.zoo.verified_top1``. A result
    over a part is returned and written nowhere.

    Args:
        name: timm name, with or without a tag.
        root: As for ``validation_images``.
        checkpoint: File of weights; by default that of the index, or the published one.
        folder: Folder of ``published.csv``, ``index.csv`` and ``results``.
        labels: As for ``validation_images``.
        overrides: Changes to ``configs/train.yaml``, for example ``data.batch_size=64``.

    Returns:
        As ``evaluate``, with ``published_top1``, ``difference`` in points, ``whole`` (all 50,000 images were read) and
        ``fills_column``; ``written`` lists the files.

    Raises:
        FileNotFoundError: Images, labels or weights are missing.
        ValueError: An unknown name, weights that do not fit, or images of other classes.
    """
    folder = Path(folder)
    checkpoint = checkpoint or weights_of(name, folder)
    count = int(visionattn.create_model(name, device="meta").num_classes)
    source = validation_images(root, count, labels)
    config = compose(["data=folder", "data.on_error=skip", *(overrides or [])])
    config.data.root = str(root)  # not among the changes, in whose grammar a path may mean something else
    classifier = load_model(name, checkpoint)
    result = evaluate(classifier, config, source)
    figure = zoo.published_figures(folder).get(result["name"])
    published = float(figure["top1"]) if figure else None
    result["published_top1"] = published
    result["difference"] = None if published is None else result["top1"] - published
    result["whole"] = result["images"] == zoo.IMAGES and not result["skipped"]
    written: list[Path] = []
    if result["whole"]:
        path = folder / "results" / f"{result['name']}.json"
        write_text(path, json.dumps(result, indent=1) + "\n")
        written.append(path)
        checkout = folder.resolve().parent
        if (checkout / zoo.MODELS_PAGE).is_file():
            written += zoo.write_tables(checkout)
    fills = result["whole"] and zoo.verified_top1(result["name"], folder) is not None
    return result | dict(fills_column=fills, written=[str(path) for path in written])


def summary(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    lines = [
        f"{result['name']}: top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % of {result['images']} images"
    ]
    if result["published_top1"] is not None:
        lines.append(f"published {result['published_top1']:.1f} %, difference {result['difference']:+.2f} points")
    lines.append(f"{result['images_per_second']:.1f} images/s, weights SHA-256 {result['checkpoint_sha256']}")
    if result["skipped"]:
        lines.append(f"{result['skipped']} unreadable, first {result['skipped_images'][0]}")
    if not result["whole"]:
        lines.append(f"part of the validation set ({zoo.IMAGES:,} images): not written, the column stays as it is")
    elif not result["fills_column"]:
        lines.append(
            "the index does not list these weights (visionattn convert enters them): the column stays as it is"
        )
    lines += [f"written: {path}" for path in result["written"]]
    return "\n".join(lines)
