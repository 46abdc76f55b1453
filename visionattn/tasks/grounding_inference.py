"""Using a trained grounding run: evaluation on a split, and masks that answer questions about image files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visionattn._figures import save_picture
from visionattn.data.grounding import CLASSES, Question, other_questions
from visionattn.data.grounding_pipeline import GroundingSamples, GroundingTransform
from visionattn.data.masks import read_pixels
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.grounding import answer_probabilities
from visionattn.tasks.grounding_data import make_grounder
from visionattn.tasks.grounding_metrics import iou, question_metrics, summarize
from visionattn.tasks.grounding_report import Shown, write_report
from visionattn.tasks.inference import distinct_stems, read_checkpoint, run_config
from visionattn.tasks.segmentation_metrics import write_results
from visionattn.tasks.segmentation_report import overlay

_PICTURES = 8


@dataclass
class Grounder:
    """A network with what is needed to ask it."""

    name: str
    model: Any
    in_chans: int
    transform: dict[str, Any]
    checkpoint: str

    def answer(self, image: Tensor, questions: list[str], like: Tensor) -> Tensor:
        """Probabilities ``[B, H, W]`` of one image ``[C, h, w]`` for B questions, at the size of ``like``."""
        device = next(self.model.parameters()).device
        images = image.to(device).expand(len(questions), -1, -1, -1)
        return answer_probabilities(self.model, images, questions, like).cpu()


def load_grounder(run: str | Path, averaged: bool | None = None) -> Grounder:
    """Load the best checkpoint of a grounding run.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: Take the averaged weights rather than the trained ones; by default those that the run validated.

    Returns:
        The network in evaluation mode with its text encoder.

    Raises:
        FileNotFoundError: There is no checkpoint, or the frozen sentence model that it names is gone.
        ValueError: The file is no checkpoint of a grounding run, or has no averaged weights.
    """
    path, hparams, weights = read_checkpoint(run, averaged)
    try:
        arguments, in_chans, transform = dict(hparams["model"]), hparams["in_chans"], dict(hparams["data"])
        if hparams["task"] != "grounding":
            raise KeyError("task")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no checkpoint of a grounding run ({type(error).__name__})") from error
    model = make_grounder(arguments, in_chans)
    model.load_state_dict(weights)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Grounder(f"sentence attention, {arguments['backbone']}", model, in_chans, transform, str(path))


@torch.inference_mode()
def evaluate_questions(run: str | Path, overrides: list[str], averaged: bool | None = None) -> dict[str, Any]:
    """Evaluate a run; writes ``RUN/eval/SPLIT``: metrics.json, per_image.csv, report.md and pictures.

    Every question is also answered for the mask of another one (``other_questions``): what is left of the IoU then did
    not come from reading the question.

    Args:
        run: Folder of the run, or one of its checkpoint files.
        overrides: ``key=value`` changes to its configuration, for example ``data.val_split=test``.
        averaged: As in ``load_grounder``.

    Returns:
        What ``summarize`` gives, and what was measured with which weights.

    Raises:
        FileNotFoundError: The run or its data are missing.
        ValueError: No truth, or an unreadable sample.
    """
    grounder = load_grounder(run, averaged)
    config, folder = run_config(run, overrides)
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split)
    transform: Any = GroundingTransform(**grounder.transform, train=False)
    samples = GroundingSamples(source, transform, config.seed, config.data.on_error, replace=False)
    others = other_questions(source.questions, source.groups, config.seed)
    objects = getattr(source, "foreground", None)
    rows: list[dict[str, Any]] = []
    shown: list[Shown] = []
    skipped: list[str] = []
    for i in range(len(samples)):
        batch = samples[0, i, i]
        skipped += batch["skipped"]
        if "image" not in batch:
            continue
        mask = batch["mask"]
        found, wrong = grounder.answer(batch["image"], [batch["question"], others[i]], mask)
        row: dict[str, Any] = {key: batch[key] for key in ("name", "group", "question", "answer")}
        row |= question_metrics(found, mask)
        row |= dict(iou_shuffled=iou(wrong > 0.5, mask == 1), iou_whole_image=iou(mask >= 0, mask == 1))
        if objects is not None:
            row |= _by_objects(objects(i), mask == 1, np.random.default_rng([config.seed, i])) | dict(
                named=source.named(i)
            )
        rows.append(row)
        if len(shown) < _PICTURES and row["group"] not in {other.group for other in shown}:
            shown.append(Shown(row["group"], row["question"], batch["image"], mask, found > 0.5, row["iou"]))
    result: dict[str, Any] = dict(
        task="grounding",
        name=grounder.name,
        checkpoint=grounder.checkpoint,
        checkpoint_sha256=sha256(grounder.checkpoint),
        split=config.data.val_split,
        skipped=len(skipped),
        skipped_images=skipped,
        **summarize(rows, seed=config.seed),
    )
    output = folder / "eval" / str(config.data.val_split)
    write_results(output, result, rows)
    write_report(output, result, shown, folder / "logs")
    return result


def _by_objects(objects: list[np.ndarray], truth: Tensor, rng: np.random.Generator) -> dict[str, float]:
    """IoU of answers without a question: all objects of the image, and one of them at random."""
    everything, one = np.any(objects, 0), objects[int(rng.integers(len(objects)))]
    return {
        name: iou(torch.from_numpy(found), truth)
        for name, found in (("iou_all_objects", everything), ("iou_random_object", one))
    }


@torch.inference_mode()
def answer_mask(grounder: Grounder, pixels: np.ndarray, question: str) -> np.ndarray:
    """Where the answer to a question about one image is.

    Args:
        grounder: From ``load_grounder``.
        pixels: ``[H, W, C]``, as ``read_pixels`` gives them.
        question: What is asked.

    Returns:
        ``[H, W]`` bool.

    Raises:
        ValueError: An empty or too long question.
    """
    grounder.model.text.check([question])
    sample = GroundingTransform(**grounder.transform, train=False)(Question(pixels, None, "image", question=question))
    return (grounder.answer(sample["image"], [question], sample["mask"])[0] > 0.5).numpy()


def predict_answers(
    run: str | Path, images: list[str], question: str, output: str | Path
) -> tuple[list[Path], list[str]]:
    """Write the masks that answer a question about image files, and pictures with them laid over.

    Args:
        run: Folder of the run, or a checkpoint file.
        images: Image files; they are not turned by their EXIF data.
        question: What is asked about each.
        output: Folder for ``NAME_mask.png`` (0 and 255) and ``NAME_overlay.png``.

    Returns:
        The mask files, and the words of the question that the run's text encoder does not know.

    Raises:
        FileNotFoundError: A missing run or image.
        ValueError: An unreadable image, two of one name, or an empty or too long question.
    """
    stems = distinct_stems(images)
    grounder, written = load_grounder(run), []
    grounder.model.text.check([question])  # before an image is read
    for path, stem in zip(images, stems, strict=True):
        pixels = read_pixels(path, grounder.in_chans)
        mask = answer_mask(grounder, pixels, question)
        written.append(Path(output) / f"{stem}_mask.png")
        save_picture(Image.fromarray(mask.astype(np.uint8) * 255), written[-1])
        save_picture(Image.fromarray(overlay(pixels, mask)), Path(output) / f"{stem}_overlay.png")
    return written, grounder.model.text.unknown(question)


def predict_command(args: Any) -> Iterator[str]:
    """``visionattn predict`` for answers."""
    if args.run_folder is None:
        raise ValueError("--task grounding needs --run FOLDER")
    if not args.question:
        raise ValueError('a grounding run answers a question; give it with --question "..."')
    folder = "predictions" if args.output == "prediction.png" else args.output
    masks, unknown = predict_answers(args.run_folder, args.images, args.question, folder)
    if unknown:
        yield f"words that the run never met, which all count as one unknown word: {', '.join(unknown)}"
    for path in masks:
        yield f"mask of the {CLASSES[1]}: {path}, over the image: {path.name.replace('_mask', '_overlay')}"
