"""Data and network of a segmentation run from its configuration."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from visionattn.data.segmentation_pipeline import SegmentationSamples, collate_samples
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.tasks.loaders import EpochData
from visionattn.tasks.networks import make_head

_POOLING = ("upernet", "pan")  # have a batch norm of one pixel an image


def outputs(classes: list[str]) -> int:
    """Channels of the logits: one for two classes, else one for each."""
    if len(classes) < 2:
        raise ValueError(f"the data has the classes {classes}; expected the background and at least one more")
    return 1 if len(classes) == 2 else len(classes)


def make_network(arguments: dict[str, Any], classes: list[str], in_chans: int) -> nn.Module:
    """The network of a ``model`` group.

    Args:
        arguments: ``_target_``, a class of ``visionattn.heads``, and its arguments.
        classes: Names, the background first.
        in_chans: Channels of the image.

    Raises:
        ValueError: Another ``_target_``, for example a classifier's, or arguments that its class does not have.
    """
    return make_head(arguments, num_classes=outputs(classes), in_chans=in_chans)


def check_splits(source: Any, val: Any) -> None:
    """Refuse splits that do not fit each other.

    Raises:
        ValueError: Other classes, or a patient in both.
    """
    if val.classes != source.classes:
        raise ValueError(f"the splits have other classes: {source.classes} and {val.classes}")
    if shared := sorted(set(getattr(source, "groups", ())) & set(getattr(val, "groups", ()))):
        raise ValueError(f"{len(shared)} patients are in training and validation, first {shared[0]!r}; divide them")


def check_batch(arguments: dict[str, Any], size: int) -> None:
    """Refuse a batch of one image for a decoder that needs two.

    Raises:
        ValueError: It does.
    """
    if arguments.get("decoder") in _POOLING and size < 2:
        raise ValueError(f"the decoder {arguments['decoder']} needs two images in a batch; set data.batch_size=2")


def sample_data(config: DictConfig, source: Any, val: Any) -> EpochData:
    """Loaders of both splits, transformed as ``data.transform`` says."""
    group: Any = OmegaConf.to_container(config.data, resolve=True)

    def samples(split: Any, train: bool) -> SegmentationSamples:
        transform = SegmentationTransform(**group["transform"], train=train)
        return SegmentationSamples(split, transform, config.seed, group["on_error"], replace=train)

    return EpochData(group, samples(source, True), samples(val, False), collate_samples, config.seed)


def prepare_masks(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, EpochData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of outputs.

    Raises:
        ValueError: A network that gives no masks, classes without a background, splits with other classes or a patient
            in both, or a batch of one image for a decoder that needs two.
    """
    check_splits(source, val)
    if not getattr(source, "background", True):
        raise ValueError("task=segmentation takes the first class for the background; this data wants task=semantic")
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    check_batch(arguments, min(config.data.batch_size, len(source)))
    model = make_network(arguments, source.classes, config.data.in_chans)
    data = sample_data(config, source, val)
    kept = dict(
        task="segmentation",
        model={k: v for k, v in arguments.items() if k not in ("pretrained", "pretrained_backbone")},
        data=OmegaConf.to_container(config.data.transform, resolve=True),
    )
    return model, data, kept, outputs(source.classes)
