"""Data and network of a detection run from its configuration."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from visionattn.data.detection_transforms import DetectionSamples, DetectionTransform, collate_scenes
from visionattn.tasks.loaders import EpochData
from visionattn.tasks.networks import make_head


def make_detector(arguments: dict[str, Any], classes: list[str], in_chans: int) -> nn.Module:
    """The network of a ``model`` group.

    Args:
        arguments: ``_target_``, a class of ``visionattn.heads``, and its arguments.
        classes: Names of the kinds of objects.
        in_chans: Channels of the image.

    Raises:
        ValueError: Another ``_target_``, a network that is no detector, or arguments that its class does not have.
    """
    model = make_head(arguments, num_classes=len(classes), in_chans=in_chans)
    if not hasattr(model, "detector_name"):
        raise ValueError(f"{type(model).__name__} is no detector; choose model=retinanet, fcos, faster_rcnn, mask_rcnn")
    return model


def prepare_objects(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, EpochData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of classes.

    Raises:
        ValueError: A source without boxes, a network that is no detector, splits with other classes, or a network of
            masks on data that are read without them.
    """
    if not hasattr(source, "category_ids"):
        raise ValueError(f"{type(source).__name__} has no boxes; choose data=coco or data=trees")
    if val.classes != source.classes or val.category_ids != source.category_ids:
        raise ValueError(f"the splits have other classes: {source.classes[:5]} and {val.classes[:5]}")
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    model = make_detector(arguments, source.classes, config.data.in_chans)
    group: Any = OmegaConf.to_container(config.data, resolve=True)
    if model.detector_name == "mask_rcnn" and not group["transform"].get("masks"):
        raise ValueError("mask_rcnn learns from masks; set data.masks=true, or take model=faster_rcnn for boxes alone")

    def samples(split: Any, train: bool) -> DetectionSamples:
        transform = DetectionTransform(**group["transform"], train=train)
        return DetectionSamples(split, transform, config.seed, group["on_error"], replace=train)

    kept = dict(
        task="detection",
        model={k: v for k, v in arguments.items() if k != "pretrained"},
        category_ids=source.category_ids,
    )
    return (
        model,
        EpochData(group, samples(source, True), samples(val, False), collate_scenes, config.seed),
        kept,
        len(source.classes),
    )
