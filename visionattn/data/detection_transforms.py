"""Augmentation of images with boxes and masks, by torchvision's transforms, and their batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from visionattn.data.coco import decode_mask
from visionattn.data.detection import Scene
from visionattn.data.pipeline import Batch, Samples
from visionattn.data.randomness import seeded

_LEAST = 1.0  # pixels a side of a training box has left at least


class DetectionTransform:
    """From a scene to what a detector takes; resizing is the detector's.

    Args:
        crop: Side of random square crops for training, in pixels, filled with black where the image ends; None: whole
            images.
        scale: The image is enlarged before cropping by a factor drawn between these two, evenly on a log scale.
        hflip: Probability of a reflection left to right.
        vflip: Probability of a reflection top to bottom.
        turn: Probability of a quarter turn; with both reflections at 0.5, 0.5 gives all eight positions alike.
        color: Strength of random brightness, contrast and saturation.
        min_visible: Share of a box that must be left inside a crop; objects with less are left out.
        masks: Whether objects have masks.
        train: Augment; otherwise all of these but ``masks`` are without effect.

    Raises:
        ValueError: Values outside their range.
    """

    def __init__(
        self,
        crop: int | None = None,
        scale: Sequence[float] = (1.0, 1.0),
        hflip: float = 0.5,
        vflip: float = 0.0,
        turn: float = 0.0,
        color: float = 0.0,
        min_visible: float = 0.4,
        masks: bool = False,
        train: bool = True,
    ):
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] or (crop is not None and crop < 32):
            raise ValueError(f"crop={crop}, scale={list(scale)}: expected 32 pixels or more, and 0 < least <= most")
        shares = dict(hflip=hflip, vflip=vflip, turn=turn, color=color, min_visible=min_visible)
        if strange := {key: value for key, value in shares.items() if not 0 <= value <= 1}:
            raise ValueError(f"data.transform: {strange} must lie in [0, 1]")
        self.crop, self.scale, self.min_visible = crop, tuple(scale), min_visible
        self.turn, self.masks, self.train = turn, masks, train
        steps: list[Any] = [v2.RandomHorizontalFlip(hflip), v2.RandomVerticalFlip(vflip)]
        steps += [v2.ColorJitter(color, color, color)] if color else []
        self.steps = v2.Compose(steps)

    def __call__(self, scene: Scene) -> Batch:
        """``image [C, H, W]`` in [0, 1], ``target`` for the detector and, to evaluate, the untransformed ``truth``."""
        image: Any = tv_tensors.Image(torch.from_numpy(np.array(scene.image)).permute(2, 0, 1))
        height, width = scene.image.shape[:2]
        kept = np.flatnonzero(~scene.crowd)
        # unclamped, so that it can be seen how much of a box a crop left
        how: Any = dict(format="XYXY", canvas_size=(height, width), clamping_mode=None)
        target: Any = dict(
            boxes=tv_tensors.BoundingBoxes(torch.from_numpy(scene.boxes[kept]), **how),
            labels=torch.from_numpy(scene.labels[kept]),
        )
        if self.masks:
            target["masks"] = tv_tensors.Mask(_stack(scene, kept, (height, width)))
        if self.train:
            image, target = self._augment(image, target)
        target = {key: value.as_subclass(torch.Tensor) for key, value in target.items()}
        image = F.to_dtype(image, torch.float32, scale=True).as_subclass(torch.Tensor)
        return dict(image=image, target=target, truth=None if self.train else truth_of(scene), name=scene.name)

    def _augment(self, image: Any, target: Any) -> tuple[Any, Any]:
        if self.scale != (1.0, 1.0):
            low, high = np.log(self.scale)
            factor = float(torch.empty(()).uniform_(low, high).exp())
            size = [max(round(side * factor), 1) for side in image.shape[-2:]]
            image, target = v2.Resize(size)(image, target)
        whole = target["boxes"].clone()
        if self.crop:
            image, target = v2.RandomCrop(self.crop, pad_if_needed=True)(image, target)
        canvas = target["boxes"].canvas_size
        cut = F.clamp_bounding_boxes(target["boxes"], clamping_mode="hard")
        sides = cut[:, 2:] - cut[:, :2]
        area = (whole[:, 2:] - whole[:, :2]).prod(1)
        seen = (sides.prod(1) >= self.min_visible * area) & (sides > _LEAST).all(1)
        target = {key: value[seen] for key, value in (target | dict(boxes=cut)).items()}
        target["boxes"] = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=canvas)
        if "masks" in target:
            target["masks"] = tv_tensors.Mask(target["masks"])
        image, target = self.steps(image, target)
        if self.turn and float(torch.rand(())) < self.turn:
            image, target = _quarter_turn(image, target)
        return image, target


def _quarter_turn(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Turned left by 90 degrees, without the interpolation of torchvision's rotation."""
    x0, y0, x1, y1 = target["boxes"].unbind(1)
    width = image.shape[-1]
    turned = target | dict(boxes=torch.stack([y0, width - x1, y1, width - x0], 1))
    if "masks" in target:
        turned["masks"] = torch.rot90(target["masks"], 1, (1, 2))
    return torch.rot90(image, 1, (1, 2)), turned


def _stack(scene: Scene, kept: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Masks ``[N, H, W]`` uint8 of the objects ``kept``."""
    if scene.masks is None:
        raise ValueError(f"{scene.name} has no masks; train boxes alone with data.transform.masks=false")
    masks = [decode_mask(scene.masks[i]) for i in kept]
    return torch.from_numpy(np.stack(masks)) if masks else torch.zeros((0, *size), dtype=torch.uint8)


def truth_of(scene: Scene) -> dict[str, Any]:
    """What the evaluation compares with: boxes, labels, crowd regions, areas and encoded masks of every object."""
    return dict(
        boxes=torch.from_numpy(scene.boxes),
        labels=torch.from_numpy(scene.labels),
        crowd=torch.from_numpy(scene.crowd),
        areas=torch.from_numpy(np.asarray(scene.areas, np.float32)),
        masks=scene.masks,
        size=scene.image.shape[:2],
    )


class DetectionSamples(Samples):
    """``Samples`` of images with objects."""

    def _sample(self, i: int, seed: int, skipped: list[str]) -> Batch:
        scene = self.source[i]
        with seeded(seed):
            return dict(**self.transform(scene), number=i)


def collate_scenes(items: list[Batch]) -> Batch:
    """Join scenes of any sizes: lists ``image``, ``target``, ``truth``, ``name``, ``number`` and ``skipped``."""
    kept = [item for item in items if "image" in item]
    return dict(
        **{key: [item[key] for item in kept] for key in ("image", "target", "truth", "name", "number")},
        skipped=[note for item in items for note in item["skipped"]],
    )
