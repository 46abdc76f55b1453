"""Data and network of a scanpath run from its configuration."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from visionattn.data.scanpath_pipeline import ScanpathSamples, SceneTransform, collate_scenes
from visionattn.heads.oat import OAT
from visionattn.tasks.loaders import EpochData
from visionattn.tasks.networks import make_head


def make_network(arguments: dict[str, Any]) -> OAT:
    """The network of a ``model`` group.

    Args:
        arguments: ``_target_``, ``visionattn.heads.oat.OAT``, and its arguments.

    Raises:
        ValueError: Another ``_target_``, or arguments that OAT does not have.
    """
    return make_head(arguments, OAT, "model=oat")


def prepare_scanpaths(config: DictConfig, source: Any, val: Any) -> tuple[nn.Module, EpochData, dict[str, Any], int]:
    """Network, loaders, what the checkpoint keeps of them, and the number of outputs (which counts for nothing).

    Raises:
        ValueError: A source without scanpaths, or a network that gives none or takes other objects than the data gives.
    """
    if not hasattr(source, "trials"):
        raise ValueError(f"data.source={config.data.source._target_} has no scanpaths; choose data=scanpaths")
    arguments: Any = OmegaConf.to_container(config.model, resolve=True)
    group: Any = OmegaConf.to_container(config.data, resolve=True)
    mode = arguments.get("objects", "crops")
    if group["transform"].get("objects", "crops") != mode:
        raise ValueError(
            f"model.objects={mode}, but data.transform.objects={group['transform'].get('objects')}; set both"
        )
    kept = dict(
        task="scanpath",
        model={
            **{k: v for k, v in arguments.items() if k != "backbone_kwargs"},
            "backbone_kwargs": {k: v for k, v in (arguments.get("backbone_kwargs") or {}).items() if k != "pretrained"},
        },
        data=group["transform"],
        max_length=source.longest(),
    )
    transform, given = SceneTransform(**group["transform"]), dict(seed=config.seed, on_error=group["on_error"])
    train, plain = ScanpathSamples(source, transform, **given), ScanpathSamples(val, transform, replace=False, **given)
    return make_network(arguments), EpochData(group, train, plain, collate_scenes, config.seed), kept, 1
