"""Building a backbone through timm, with checkpoints that fail clearly.

timm loads with ``strict=False`` once the number of classes differs, so a checkpoint of another network would pass
unnoticed, its errors name no file, and of a file with trained and averaged weights it takes the averaged ones. Its
download cache is keyed by the last part of an address, which is the same word for all files of some file shares.
"""

import os
import pickle
import re
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.models import build_model_with_cfg, load_state_dict
from timm.models._builder import resolve_pretrained_cfg
from torch import Tensor, nn

Weights = dict[str, Tensor]
Replacement = str | Callable[[re.Match[str]], str]
Filter = Callable[[Weights, nn.Module], Weights]
Model = TypeVar("Model", bound=nn.Module)


def download_weights(url: str, name: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch a checkpoint once, under a name of its own.

    Args:
        url: Address of the file.
        name: File name in the cache, unique to the weights.
        cache_dir: Folder; ``checkpoints`` in torch's hub folder by default.

    Returns:
        Path of the complete file (it is downloaded to a temporary name and renamed).

    Raises:
        RuntimeError: The address does not answer with a file.
    """
    folder = Path(cache_dir or os.path.join(torch.hub.get_dir(), "checkpoints"))
    path = folder / name
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=True)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise RuntimeError(
            f"the published weights at {url} cannot be had ({error}); get the file another way and pass "
            'pretrained_cfg_overlay=dict(file="..."), or use pretrained=False'
        ) from error
    return path


def unwrap(state_dict: dict[str, Any]) -> Weights:
    """The tensors of a published file, which may lie under ``model`` or ``state_dict``."""
    for inner in ("model", "state_dict"):
        if isinstance(state_dict.get(inner), dict):
            state_dict = state_dict[inner]
    return state_dict


def rename_keys(state_dict: dict[str, Any], names: Sequence[tuple[str, Replacement]]) -> Weights:
    """The tensors of a published file under other names.

    Args:
        state_dict: A state dict, possibly under ``model`` or ``state_dict``.
        names: Regular expressions and what replaces them, applied to every key in this order.
    """
    renamed = {}
    for key, tensor in unwrap(state_dict).items():
        for pattern, name in names:
            key = re.sub(pattern, name, key)
        renamed[key] = tensor
    return renamed


def _readable(path: str) -> bool:
    """Whether the file itself is a checkpoint, whatever the model wants of it."""
    try:
        return isinstance(load_state_dict(path), dict)
    except Exception:  # readers raise a dozen types for damaged files
        return False


def _checked(filter_fn: Filter, classifier: str) -> Filter:
    def apply(weights: Weights, model: nn.Module) -> Weights:
        weights = filter_fn(weights, model)
        # torch fills in the batch counters that some files leave out
        optional = (classifier + ".", "num_batches_tracked")
        own = {k for k in model.state_dict() if not k.startswith(optional[0]) and not k.endswith(optional[1])}
        missing, foreign = sorted(own - weights.keys()), sorted(weights.keys() - model.state_dict().keys())
        foreign = [key for key in foreign if not key.startswith(classifier + ".")]
        if missing or foreign:
            raise ValueError(
                f"the checkpoint does not fit {type(model).__name__}: {len(missing)} of its keys are missing "
                f"(first {missing[:1]}), {len(foreign)} are unknown (first {foreign[:1]}); "
                "is it of another architecture or variant?"
            )
        return weights

    return apply


def build_backbone(cls: type[Model], variant: str, pretrained: bool, filter_fn: Filter, **kwargs: Any) -> Model:
    """``timm.models.build_model_with_cfg`` for our backbones.

    Args:
        cls: Class of the backbone.
        variant: Registered name.
        pretrained: Load weights.
        filter_fn: Renames the keys of published checkpoints.
        **kwargs: As for timm: ``pretrained_cfg``, ``pretrained_cfg_overlay``, ``features_only``, constructor arguments.

    Returns:
        The model, or timm's wrapper of it with ``features_only=True``.

    Raises:
        FileNotFoundError: The checkpoint file does not exist.
        ValueError: The checkpoint is damaged, of another architecture, or holds more than tensors.
        RuntimeError: There are no weights, or they cannot be downloaded.
    """
    source, url = "", ""
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not cfg.state_dict and not cfg.source:
        if cfg.file:
            source = str(cfg.file)
        elif cfg.url and not cfg.hf_hub_id:
            name = f"{cfg.architecture}.{cfg.tag or 'default'}.pth"
            url = cfg.url
            source = str(download_weights(cfg.url, name, kwargs.get("cache_dir")))
        if source and not Path(source).is_file():
            raise FileNotFoundError(f"no checkpoint at {source!r}; give the path of a .pth or .safetensors file")
        if source:
            kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "file": source}
    try:
        if source:  # timm itself would prefer averaged weights, which the published figures are not of
            kwargs["pretrained_cfg_overlay"]["state_dict"] = load_state_dict(source, use_ema=False)
        model = build_model_with_cfg(
            cls,
            variant,
            pretrained,
            pretrained_filter_fn=_checked(filter_fn, cfg.classifier or "head.fc"),
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **kwargs,
        )
        for module in model.modules():  # the model, and timm's wrapper: neither shall keep the weights twice
            if isinstance(getattr(module, "pretrained_cfg", None), dict):
                module.pretrained_cfg["state_dict"] = None
        return model
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{source or variant}: the checkpoint holds objects other than tensors and was not unpickled, since that "
            "could run code; save its state dict as .safetensors with a tool you trust"
        ) from error
    except Exception as error:  # readers raise a dozen types for damaged files
        if not source or isinstance(error, TypeError):  # an unknown argument of the constructor
            raise
        if url and not _readable(source):  # a connection that broke leaves a short file in the cache
            Path(source).unlink(missing_ok=True)
        raise ValueError(f"cannot load {source}{url and ' from ' + url} into {variant}: {error}") from error
