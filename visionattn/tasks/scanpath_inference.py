"""Using a trained scanpath run: evaluation beside baselines and viewers, and the path over an own scene."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch

from visionattn.data.images import read_image
from visionattn.data.scanpath import Scene, check_entry, make_scene
from visionattn.data.scanpath_pipeline import SceneTransform, collate_scenes
from visionattn.heads.oat import OAT, Memory
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.inference import read_checkpoint, run_config
from visionattn.tasks.scanpath import scenes_of
from visionattn.tasks.scanpath_baselines import BASELINES
from visionattn.tasks.scanpath_data import make_network
from visionattn.tasks.scanpath_metrics import (
    behaviour,
    bootstrap,
    bootstrap_delta,
    edit_distance,
    multi_match,
    nss,
    scan_match,
    sequence_score,
    sim,
    substitution,
)
from visionattn.tasks.scanpath_report import draw_scenes, write_report

GREEDY, SAMPLED, VIEWERS = "model, greedy", "model, sampled", "viewers among themselves"
METRICS = ("sequence score", "edit distance", "ScanMatch", "MultiMatch", "NSS", "SIM")
_SHOWN = 6


@dataclass
class Gazer:
    """A network with what is needed to use it on scenes."""

    model: OAT
    transform: SceneTransform
    max_length: int
    hparams: dict[str, Any]
    checkpoint: Path

    def encode(self, scene: Scene) -> tuple[Memory, dict[str, Any]]:
        """The network's memory of a scene, and its batch of one."""
        paths = scene.paths or [[0]]
        batch = collate_scenes([dict(**self.transform(scene), path=path, name="", skipped=[]) for path in paths])
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        one = scenes_of({k: v[:1] for k, v in batch.items()})
        return self.model.encode(one), batch


def load_gazer(run: str | Path, averaged: bool | None = None) -> Gazer:
    """Load the best checkpoint of a scanpath run.

    Args:
        run: Folder of the run, or a checkpoint file.
        averaged: Take the averaged weights rather than the trained ones; by default those that the run validated.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file is no checkpoint of a scanpath run, or has no averaged weights.
    """
    path, hparams, weights = read_checkpoint(run, averaged)
    if hparams.get("task") != "scanpath":
        raise ValueError(f"{path} is no checkpoint of a scanpath run")
    model = make_network(dict(hparams["model"]))
    model.load_state_dict(weights)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return Gazer(model, SceneTransform(**hparams["data"]), int(hparams["max_length"]), hparams, path)


def _unit(scene: Scene) -> float:
    sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
    return float(np.sqrt(sides.prod(1).mean()))


def compare(scene: Scene, predicted: list[int], true: list[int], distances: bool = True) -> dict[str, float]:
    """All metrics of two scanpaths but SIM; MultiMatch, the mean of its four, and NSS at the centres of the boxes."""
    at = scene.centres
    found = {
        "sequence score": sequence_score(predicted, true),
        "edit distance": float(edit_distance(predicted, true)),
        "ScanMatch": scan_match(predicted, true, substitution(at, _unit(scene))),
        "NSS": nss(at[predicted], at[true], scene.size),
    }
    if distances:
        found["MultiMatch"] = float(multi_match(at[predicted], at[true], scene.size).mean())
    return found


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    result = {}
    for name in METRICS:
        values = [row[name] for row in rows if not np.isnan(row.get(name, np.nan))]
        result[name] = float(np.mean(values)) if values else float("nan")
    return result


def _scene_paths(gazer: Gazer, scene: Scene, samples: int, length: int, seed: int) -> dict[str, Any]:
    """Scanpaths of every method, and the model's SIM."""
    memory, batch = gazer.encode(scene)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    paths: dict[str, list[list[int]]] = {GREEDY: gazer.model.generate(memory, gazer.max_length)}
    if samples:
        paths[SAMPLED] = gazer.model.generate(memory.repeat(samples), gazer.max_length, True, generator)
    paths |= {name: [find(scene, rng, length)] for name, find in BASELINES.items()}
    tokens, classes = gazer.model.teacher(batch["path"], batch["mask"].shape[1])
    chances = gazer.model.decode(memory.repeat(len(tokens)), tokens).softmax(-1).double().cpu().numpy()
    shares = [
        sim(p[: len(path) + 1], c[: len(path) + 1])
        for p, c, path in zip(chances, classes.tolist(), scene.paths, strict=True)
    ]
    return dict(paths=paths, sim=float(np.mean(shares)))


def _viewers(scene: Scene) -> dict[str, float]:
    pairs = [(a, b) for i, a in enumerate(scene.paths) for b in scene.paths[i + 1 :]]
    return _mean([compare(scene, a, b) for a, b in pairs])


def _behaviours(paths: list[list[int]], target: int | None) -> np.ndarray:
    return np.mean([behaviour(path, target) for path in paths], 0)


def _summary(
    rows: list[dict[str, float]], predicted: list[np.ndarray], true: list[np.ndarray], seed: int
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in METRICS:
        mean, ci, known = bootstrap([row[name] for row in rows], seed=seed)
        result[name] = dict(mean=mean, ci95=ci, undefined=len(rows) - known)
    value, ci = bootstrap_delta(np.stack(predicted), np.stack(true), seed=seed)
    finite = bool(np.isfinite(value))
    known_ci = ci if ci is not None and np.isfinite(ci).all() else None
    result["delta"] = dict(mean=value if finite else None, ci95=known_ci, undefined=int(not finite))
    return result


@torch.inference_mode()
def evaluate_scanpaths(run: str | Path, overrides: list[str], averaged: bool | None = None) -> dict[str, Any]:
    """Evaluate a run; writes ``RUN/eval/SPLIT``: metrics.json, per_scene.csv, report.md and pictures.png.

    A metric is the mean over the viewers of a scene, then over scenes; intervals are bootstraps over scenes. ``model,
    sampled`` is the mean over ``task.samples`` drawn scanpaths (of MultiMatch, over the first). ``viewers among
    themselves`` compares every pair of viewers of a scene, and for delta every other viewer with the rest.

    Args:
        run: Folder of the run, or one of its checkpoint files.
        overrides: ``key=value`` changes to its configuration, for example ``data.val_split=test``.
        averaged: As in ``load_gazer``.

    Returns:
        For each method ``mean``, ``ci95`` and ``undefined`` (scenes without a value) of every metric.

    Raises:
        FileNotFoundError: The run or its data are missing.
        ValueError: The file is no checkpoint of a scanpath run, or an unreadable scene.
    """
    gazer = load_gazer(run, averaged)
    config, folder = run_config(run, overrides)
    source = hydra.utils.instantiate(config.data.source, split=config.data.val_split)
    rows: dict[str, list[dict[str, float]]] = {}
    acts: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    table, shown, outside, fixations = [], [], 0, 0
    length = max(round(float(np.mean([len(p) for i in range(source.scenes) for p in source.scene(i).paths]))), 1)
    for i in range(source.scenes):
        scene = source.scene(i)
        outside, fixations = outside + scene.outside, fixations + sum(map(len, scene.paths))
        found = _scene_paths(gazer, scene, config.task.samples, length, config.seed + i)
        true = _behaviours(scene.paths, scene.target)
        for name, paths in found["paths"].items():
            each = [compare(scene, p, t, k == 0) for k, p in enumerate(paths) for t in scene.paths]
            row = _mean(each) | ({"SIM": found["sim"]} if name == GREEDY else {})
            rows.setdefault(name, []).append(row)
            pair = acts.setdefault(name, ([], []))
            pair[0].append(_behaviours(paths, scene.target))
            pair[1].append(true)
            table.append({"scene": scene.name, "method": name, "path": " ".join(map(str, paths[0])), **row})
        if len(scene.paths) > 1:
            rows.setdefault(VIEWERS, []).append(_viewers(scene))
            pair = acts.setdefault(VIEWERS, ([], []))
            pair[0].append(_behaviours(scene.paths[::2], scene.target))
            pair[1].append(_behaviours(scene.paths[1::2], scene.target))
        if len(shown) < _SHOWN:
            shown.append((scene, found["paths"][GREEDY][0], scene.paths[0]))
    result: dict[str, Any] = dict(
        task="scanpath",
        checkpoint=str(gazer.checkpoint),
        checkpoint_sha256=sha256(str(gazer.checkpoint)),
        data=str(config.data.source._target_).rsplit(".", 1)[-1],
        split=config.data.val_split,
        scenes=source.scenes,
        scanpaths=len(source),
        fixations=fixations,
        outside=outside,
        samples=config.task.samples,
        methods={name: _summary(rows[name], *acts[name], config.seed) for name in rows},
    )
    write_report(folder / "eval" / str(config.data.val_split), result, table, shown)
    return result


def own_scene(path: Path, boxes: Path | None, gazer: Gazer) -> Scene:
    """The scene of a JSON file, or of an image and a JSON file with its boxes (a list, or an object with a target).

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: Damaged or incomplete files.
    """
    file = path if boxes is None else boxes
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; give a scene as JSON, or an image with --boxes FILE")
    try:
        entry = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is no JSON file ({error}); give a scene as JSON, or an image with --boxes FILE"
        ) from error
    root = file.parent
    if boxes is not None:
        read_image(path, 3)  # says what is wrong with it
        entry = {"boxes": entry} if isinstance(entry, list) else entry
        entry, root = {**entry, "image": path.name}, path.parent
    check_entry(entry, str(file))
    return make_scene(entry, root, gazer.model.rows, gazer.model.cols, str(file))


@torch.inference_mode()
def predict_command(args: Any) -> Iterator[str]:
    """``visionattn predict`` for scenes: the objects in their order, and a picture."""
    if args.run_folder is None:
        raise ValueError("--task scanpath needs --run FOLDER")
    gazer, shown = load_gazer(args.run_folder), []
    boxes = Path(args.boxes) if args.boxes else None
    for path in args.images:
        scene = own_scene(Path(path), boxes, gazer)
        (found,) = gazer.model.generate(gazer.encode(scene)[0], gazer.max_length)
        shown.append((scene, found, scene.paths[0] if scene.paths else None))
        ending = (
            "" if scene.target is None else f", {'ends' if found[-1] == scene.target else 'does not end'} on the target"
        )
        yield f"{path}: objects {' '.join(map(str, found))}{ending}"
    draw_scenes(shown, Path(args.output))
    yield f"picture: {args.output}"
