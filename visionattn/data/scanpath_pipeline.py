"""From scenes with scanpaths to reproducible batches."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visionattn.data.pipeline import Batch, Samples
from visionattn.data.scanpath import ScanpathSource, Scene, window


class SceneTransform:
    """A scene as tensors.

    Args:
        objects: ``"crops"``: the boxes cut out and resized; ``"image"``: the whole image resized.
        crop: Height and width of the crops, pixels.
        size: Height and width of the image, pixels; its proportions are not kept.
        scale: ``"unit"``: values in [0, 1]; ``"minmax"``: every crop or image stretched to [0, 1], as OAT does for its
            shelves.
        mean: Subtracted per channel after that.
        std: Divided by.

    Raises:
        ValueError: Another name, or sizes below 1.
    """

    def __init__(
        self,
        objects: str = "crops",
        crop: Sequence[int] = (150, 93),
        size: Sequence[int] = (320, 512),
        scale: str = "unit",
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
    ):
        if objects not in ("crops", "image") or scale not in ("unit", "minmax"):
            raise ValueError(f"objects={objects!r}, scale={scale!r}: expected crops or image, unit or minmax")
        if len(crop) != 2 or len(size) != 2 or min(*crop, *size) < 1:
            raise ValueError(f"crop={list(crop)}, size={list(size)}: expected a height and a width each, at least 1")
        self.objects, self.crop, self.size, self.scale = objects, tuple(crop), tuple(size), scale
        self.mean, self.std = (torch.tensor(list(v))[:, None, None] for v in (mean, std))

    def _tensor(self, pixels: np.ndarray, size: tuple[int, ...]) -> Tensor:
        if pixels.shape[:2] != size:
            shape = size[1], size[0]
            pixels = np.asarray(Image.fromarray(pixels).resize(shape, Image.Resampling.BILINEAR))
        x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255
        if self.scale == "minmax":
            x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
        return (x - self.mean) / self.std

    def __call__(self, scene: Scene) -> Batch:
        """``image`` (``[N, 3, h, w]`` or ``[3, H, W]``), ``boxes`` in its pixels, ``places`` and ``target``."""
        height, width = scene.image.shape[:2]
        if self.objects == "crops":
            crops = [self._tensor(scene.image[window(box, (height, width))], self.crop) for box in scene.boxes]
            image, factor = torch.stack(crops), np.ones(4)
        else:
            image = self._tensor(scene.image, self.size)
            factor = np.array([self.size[1] / width, self.size[0] / height] * 2)
        return dict(
            image=image,
            boxes=torch.from_numpy(scene.boxes * factor).float(),
            places=torch.from_numpy(scene.places).float(),
            target=-1 if scene.target is None else scene.target,
        )


class ScanpathSamples(Samples):
    """``Samples`` of trials, a scene and the path of one viewer; arguments as there."""

    source: ScanpathSource
    transform: SceneTransform

    def _sample(self, i: int, seed: int, skipped: list[str]) -> Batch:
        number, viewer = self.source.trials[i]
        scene = self.source.scene(number)
        return dict(**self.transform(scene), path=scene.paths[viewer], name=scene.name)


def collate_scenes(items: list[Batch]) -> Batch:
    """Join scenes of different numbers of objects.

    Returns:
        ``image`` (``[B, N, 3, h, w]``, zeros behind a scene's objects, or ``[B, 3, H, W]``), ``boxes`` ``[B, N, 4]``,
        ``places`` ``[B, N, 2]``, ``target`` ``[B]``, ``mask`` ``[B, N]``, ``path`` ``[B, T]`` with -1 behind its
        end, and the lists ``name`` and ``skipped``; empty tensors where every sample was skipped.
    """
    kept = [item for item in items if "image" in item]
    lists = dict(name=[item["name"] for item in kept], skipped=[note for item in items for note in item["skipped"]])
    if not kept:
        return dict(image=torch.empty(0), target=torch.empty(0, dtype=torch.long), **lists)
    most = max(len(item["boxes"]) for item in kept)
    longest = max(len(item["path"]) for item in kept)
    images = [
        F.pad(item["image"], (0, 0) * 3 + (0, most - len(item["boxes"]))) if item["image"].dim() == 4 else item["image"]
        for item in kept
    ]
    return dict(
        image=torch.stack(images),
        boxes=torch.stack([F.pad(item["boxes"], (0, 0, 0, most - len(item["boxes"]))) for item in kept]),
        places=torch.stack([F.pad(item["places"], (0, 0, 0, most - len(item["boxes"]))) for item in kept]),
        target=torch.tensor([item["target"] for item in kept]),
        mask=torch.tensor([[i < len(item["boxes"]) for i in range(most)] for item in kept]),
        path=torch.tensor([item["path"] + [-1] * (longest - len(item["path"])) for item in kept]),
        **lists,
    )
