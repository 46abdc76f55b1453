"""Data and network of a run of semantic segmentation from its configuration."""

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from visionattn.data.semantic_layouts import color_map
from visionattn.tasks.loaders import EpochData
from visionattn.tasks.networks import make_head
from visionattn.tasks.segmentation_data import check_batch, check_splits, sample_data


def make_labeller(arguments: dict[str, Any], classes: list[str], in_chans: int) -> nn.Module:
    """The network of a ``model`` group, with one logit for every class.

    Raises:
        ValueError: As ``make_head``, or fewer than two classes.
    """
    if len(classes) < 2:
        raise ValueError(f"the data has the classes {classes}; expected at least two")
    return make_head(arguments, num_classes=len(classes), in_chans=in_chans)


def palette_of(source: Any) -> list[list[int]]:
    """Colours of a source's classes, its own or by ``color_map``; plain numbers, which a checkpoint can keep."""
    colors: Any = getattr(source, "palette", None) or color_map(len(source.classes))
    if isinstance(colors, Mapping):
        colors = [colors[name] for name in source.classes]
    return [[int(value) for value in color] for color in colors]


def prepare_labels(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, EpochData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of classes.

    Raises:
        ValueError: A network that gives no masks, splits that do not fit each other, or a batch of one image for a
            decoder that needs two.
    """
    check_splits(source, val)
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    check_batch(arguments, min(config.data.batch_size, len(source)))
    model = make_labeller(arguments, source.classes, config.data.in_chans)
    data = sample_data(config, source, val)
    kept = dict(
        task="semantic",
        model={k: v for k, v in arguments.items() if k not in ("pretrained", "pretrained_backbone")},
        data=OmegaConf.to_container(config.data.transform, resolve=True),
        palette=palette_of(source),
    )
    return model, data, kept, len(source.classes)
