"""Tables and pictures of an evaluated grounding run."""

from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from visionattn._figures import save_figure
from visionattn.tasks.config import write_text
from visionattn.tasks.grounding_metrics import LEVELS
from visionattn.tasks.records import markdown
from visionattn.tasks.segmentation_report import errors, learning_curve

_ROWS = {
    "iou": "mean IoU",
    **{f"iou_at_{level}": f"share with IoU of at least {level}" for level in LEVELS},
    "pointing": "pointing game",
    "iou_shuffled": "mean IoU with another question",
    "iou_whole_image": "mean IoU of the whole image",
    "iou_all_objects": "mean IoU of all objects of the image",
    "iou_random_object": "mean IoU of one of its objects at random",
}


class Shown(NamedTuple):
    """A question for the pictures: image ``[C, h, w]``, truth and prediction ``[H, W]``."""

    group: str
    question: str
    image: Tensor
    truth: Tensor
    predicted: Tensor
    iou: float


def table(result: dict[str, Any]) -> str:
    """Markdown table of an evaluation: for each metric mean, interval and undefined questions."""
    rows = []
    for key, title in _ROWS.items():
        if key not in result:
            continue
        entry = result[key]
        mean = "undefined" if entry["mean"] is None else f"{entry['mean']:.4f}"
        ci = "" if entry["ci95"] is None else "{:.4f} to {:.4f}".format(*entry["ci95"])
        rows.append([title, mean, ci, f"{entry['undefined']} of {result['questions']}"])
    text = markdown(["metric", "mean over questions", "95 % interval", "undefined"], rows)
    if "iou_by_named" in result:
        kinds = [[kind, f"{v['mean']:.4f}", str(v["questions"])] for kind, v in result["iou_by_named"].items()]
        text += "\n\n" + markdown(["the question names", "mean IoU", "questions"], kinds)
    return text


def draw_answers(shown: list[Shown], output: Path, columns: int = 4) -> None:
    """Write a picture with image, truth, prediction and errors of each question, its text above.

    Args:
        shown: Questions, one a row.
        output: PNG file.
        columns: 3 leaves the errors out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 * columns, 2.2 * len(shown)), layout="constrained")
    for i, one in enumerate(shown):
        pixels, truth, found = one.image.numpy().transpose(1, 2, 0), one.truth.numpy(), one.predicted.long().numpy()
        low, high = pixels.min(), pixels.max()
        views = [(pixels - low) / max(high - low, 1e-9), truth, found, errors(found, truth)]
        titles = [fill(one.question, 32), "truth", f"prediction, IoU {one.iou:.2f}", "errors"]
        for j, (view, title) in enumerate(list(zip(views, titles, strict=True))[:columns]):
            axes = figure.add_subplot(len(shown), columns, columns * i + j + 1)
            axes.imshow(np.squeeze(view), cmap="gray", **(dict(vmin=0, vmax=1) if j in (1, 2) else {}))
            axes.set_title(title, fontsize=8)
            axes.axis("off")
    save_figure(figure, output)


def write_report(folder: Path, result: dict[str, Any], shown: list[Shown], logs: Path) -> None:
    """Write ``report.md``, ``pictures.png`` and ``learning.png``.

    Args:
        folder: Where to.
        result: Of ``evaluate_questions``.
        shown: Some questions.
        logs: Folder of the run's CSV logs.
    """
    draw_answers(shown, folder / "pictures.png")
    pictures = ["pictures.png"]
    pictures += ["learning.png"] if learning_curve(logs, folder / "learning.png", "val/iou") else []
    count = f"{result['questions']} questions about {result['images']} images."
    lines = [f"# {result['name']}, split {result['split']}", "", count, "", table(result), ""]
    lines += ["Errors: white hit, vermilion false, blue missed.", ""]
    write_text(folder / "report.md", "\n".join([*lines, *(f"![{name}]({name})" for name in pictures)]) + "\n")
