"""``visionattn explain``: pictures and arrays of what a model looks at."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

_LARGE = 1024  # pixels of a side from which a whole picture at its own size is refused


def add(commands: Any) -> None:
    """Add the command to the subparsers of ``visionattn``."""
    command = commands.add_parser(
        "explain",
        help="show what a model looks at: attention, routed regions, gates, Grad-CAM, receptive fields",
        description="visionattn explain cat.png --model biformer_s --position 120 80 --output explained; or with --run "
        "outputs/digits for a classifier or a segmentation trained here. Writes a PNG and an .npz file per method.",
    )
    add = command.add_argument
    add("image", metavar="IMAGE")
    add("--run", dest="run_folder", help="folder of a run of classification or segmentation, or a .ckpt file")
    add("--model", help="a model of this package or of timm with pretrained weights")
    add("--checkpoint", help="weights for --model, .pth or .safetensors")
    add("--untrained", action="store_true", help="with --model: random weights, to look at the architecture")
    add("--position", type=int, nargs=2, metavar=("X", "Y"), help="pixel of IMAGE to ask about (default: the middle)")
    add("--methods", metavar="A,B", help="some of " + ",".join(_methods()) + " (default: all that the model has)")
    add("--target", metavar="CLASS", help="class for gradcam, by name or number (default: the most likely)")
    add(
        "--size",
        type=int,
        nargs="+",
        metavar="N",
        help="side, or height and width, to which the whole image is resized",
    )
    add("--samples", type=int, default=8, help="random images for erf (default 8)")
    add("--output", default="explained", help="folder to write (default explained)")
    command.set_defaults(run=explain_command)


def _methods() -> Sequence[str]:
    # the parser is built for every command, which must not load what this one needs
    return (
        "routing",
        "attention",
        "channels",
        "kernels",
        "context",
        "gates",
        "channel_gates",
        "distance",
        "gradcam",
        "erf",
    )


def explain_command(args: argparse.Namespace) -> None:
    """Load model and image, and write the explanations."""
    from visionattn.explain.report import explain

    name, subject, methods = _masks(args) if _kind(args) == "segmentation" else _classes(args)

    def report(line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    height, width = subject.image.shape[2:]
    report(f"{name}: image {width} x {height}, position {subject.position[0]}, {subject.position[1]} in it")
    for path in explain(subject, args.output, methods, report):
        sys.stdout.write(f"{path}\n")


def _kind(args: argparse.Namespace) -> str:
    if (args.run_folder is None) == (args.model is None):
        raise ValueError("give either --run FOLDER or --model NAME")
    if args.run_folder and (args.checkpoint or args.untrained):
        raise ValueError("--checkpoint and --untrained go with --model; a run has its own weights")
    if args.checkpoint and args.untrained:
        raise ValueError("give either --checkpoint FILE or --untrained")
    if args.model:
        return "classification"
    from visionattn.tasks.kinds import kind_of

    kind = kind_of(args.run_folder)
    if kind not in ("classification", "segmentation"):
        raise ValueError(f"{args.run_folder} is a {kind} run; explain takes classification or segmentation, or --model")
    return kind


def _wanted(args: argparse.Namespace, model: Any) -> list[str]:
    from visionattn.explain.report import check_methods

    return check_methods(model, args.methods.split(",") if args.methods else None)


def _classes(args: argparse.Namespace) -> tuple[str, Any, list[str]]:
    """Name, subject and methods of a classifier."""
    from visionattn.data.images import read_image
    from visionattn.explain.report import Subject

    classifier = _classifier(args)
    methods = _wanted(args, classifier.model)
    original = read_image(args.image, classifier.in_chans, exif=True)
    image, picture, position = prepare(original, classifier.data_config, _size(args.size), args.position)
    target = _target(args.target, classifier.classes) if args.target is not None else None
    if args.size is not None:
        _check_size(classifier, image)
    subject = Subject(classifier.model, image, picture, position, classifier.classes, target, args.samples)
    return classifier.name, subject, methods


def _masks(args: argparse.Namespace) -> tuple[str, Any, list[str]]:
    """Name, subject and methods of a network for masks; the picture as its evaluation sees it, in one piece."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.nn import functional as F

    from visionattn.data.masks import read_pixels
    from visionattn.data.segmentation import Sample
    from visionattn.data.segmentation_transforms import SegmentationTransform, to_unit
    from visionattn.explain.grid import check_position
    from visionattn.explain.report import Subject
    from visionattn.tasks.segmentation_inference import load_masker

    if args.target is not None:
        raise ValueError("--target is for the Grad-CAM of classifiers; a network for masks shows no class")
    masker = load_masker(args.run_folder)
    model = masker.model.cpu()
    methods = _wanted(args, model)
    pixels, size = read_pixels(args.image, masker.in_chans), _size(args.size)
    height, width = pixels.shape[:2]
    x, y = check_position(args.position or (width // 2, height // 2), height, width)
    transform = SegmentationTransform(**masker.transform, train=False)
    image = transform(Sample(pixels, None, args.image))["image"][None]
    if size is not None:
        image = F.interpolate(image, size, mode="bicubic", antialias=True)
    elif not transform.resizes and max(height, width) > _LARGE:
        raise ValueError(
            f"{args.image} is {width} x {height}; give --size, for example --size {_LARGE}, or a part of it"
        )
    rows, columns = image.shape[2:]
    shown = np.asarray(
        torch.broadcast_to(to_unit(pixels, masker.transform.get("intensity", "range")), (3, height, width))
    )
    picture = Image.fromarray((shown.clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)).resize((columns, rows))
    position = (x * columns // width, y * rows // height)
    return masker.name, Subject(model, image, picture, position), methods


def _classifier(args: argparse.Namespace) -> Any:
    from visionattn.tasks.inference import Classifier, load_model, load_run

    if args.run_folder:
        return load_run(args.run_folder)
    if not args.untrained:
        return load_model(args.model, args.checkpoint)
    from timm.data import resolve_model_data_config

    import visionattn

    model: Any = visionattn.create_model(args.model).eval()
    names = [str(i) for i in range(model.num_classes)]
    config = resolve_model_data_config(model)
    return Classifier(args.model, model, names, config["input_size"][0], config, None)


def _check_size(classifier: Any, image: Any) -> None:
    """Timm's models refuse a size by errors of several types."""
    import torch

    height, width = image.shape[2:]
    try:
        with torch.no_grad():
            classifier.model(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{classifier.name} takes no image of {height} x {width}: {reason}; leave out --size"
        ) from error


def _size(values: list[int] | None) -> tuple[int, int] | None:
    if values is None:
        return None
    if len(values) > 2 or min(values) < 1:
        raise ValueError(f"--size {' '.join(map(str, values))}: expected a side, or a height and a width, in pixels")
    return values[0], values[-1]


def _target(text: str, classes: Sequence[str]) -> int:
    if text in classes:
        return list(classes).index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    import difflib

    near = difflib.get_close_matches(text, classes, n=3) or list(classes)[:3]
    raise ValueError(f"unknown class {text!r}; a name like {', '.join(near)}, or a number below {len(classes)}")


def prepare(
    original: Any, data_config: dict[str, Any], size: tuple[int, int] | None, position: Sequence[int] | None
) -> tuple[Any, Any, tuple[int, int]]:
    """An image as the model takes it.

    Args:
        original: PIL image of the model's number of channels.
        data_config: Preprocessing as timm resolves it; resize and crop count where ``size`` is None.
        size: Height and width to which the whole image is resized instead.
        position: Column and row in ``original``; the middle by default.

    Returns:
        The normalised image ``[1, C, H, W]``, the same as a picture, and the position in it.

    Raises:
        ValueError: The position lies outside the image, or in what the crop leaves out.
    """
    import numpy as np
    from PIL import Image
    from timm.data import create_transform
    from torchvision import transforms

    from visionattn.explain.grid import check_position

    at = check_position(position or (original.width // 2, original.height // 2), original.height, original.width)
    whole = create_transform(**data_config, is_training=False).transforms
    first = next(i for i, step in enumerate(whole) if "ToTensor" in type(step).__name__)
    geometry, rest = transforms.Compose(whole[:first]), transforms.Compose(whole[first:])
    if size is not None:
        geometry = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    picture = geometry(original)
    # the coordinates themselves go the image's way, so whatever resizes and crops it moves the position with it
    rows, columns = np.mgrid[: original.height, : original.width].astype(np.float32)
    x, y = (np.asarray(geometry(Image.fromarray(axis))) for axis in (columns, rows))
    step = max(1.0, original.width / picture.width, original.height / picture.height)
    away = np.hypot(x - at[0], y - at[1])
    if away.min() > step:
        raise ValueError(
            f"position {at} lies in the margin that the model's preprocessing crops away; choose one with x in "
            f"[{x.min():.0f}, {x.max():.0f}] and y in [{y.min():.0f}, {y.max():.0f}], or give --size to use it all"
        )
    row, column = np.unravel_index(away.argmin(), away.shape)
    return rest(picture)[None], picture.convert("RGB"), (int(column), int(row))
