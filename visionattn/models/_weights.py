"""Building a backbone through timm, with checkpoints that fail clearly.

timm loads with ``strict=False`` once the number of classes differs, so a checkpoint of another network would pass
unnoticed, its errors name no file, and of a file with trained and averaged weights it takes the averaged ones. Its
download cache is keyed by the last part of an address, which is the same word for all files of some file shares.
"""

import logging
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
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from visionattn import _files

_log = logging.getLogger(__name__)
Weights = dict[str, Tensor]
Replacement = str | Callable[[re.Match[str]], str]
Filter = Callable[[Weights, nn.Module], Weights]
Model = TypeVar("Model", bound=nn.Module)


def download_folder(cache_dir: str | Path | None = None) -> Path:
    """The folder of downloads, by default ``checkpoints`` in torch's hub folder."""
    return Path(cache_dir or os.path.join(torch.hub.get_dir(), "checkpoints"))


def download_name(cfg: Any) -> str:
    """Name there of the file at the address of a timm configuration."""
    return f"{cfg.architecture}.{cfg.tag or 'default'}.pth"


def download_weights(url: str, name: str, cache_dir: str | Path | None = None, digest: str | None = None) -> Path:
    """Fetch a checkpoint once, under a name of its own.

    Args:
        url: Address of the file.
        name: File name in the cache, unique to the weights.
        cache_dir: As in ``download_folder``.
        digest: SHA-256 that the file must have; where it is not known, the log shows the one that was found.

    Returns:
        Path of the complete file (it is downloaded to a temporary name, checked and renamed).

    Raises:
        RuntimeError: The address does not answer with a file, or with another than the digest says.
    """
    path = download_folder(cache_dir) / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digest, progress=True)
    except (urllib.error.URLError, OSError, ValueError, RuntimeError) as error:  # the last of another digest
        raise RuntimeError(
            f"the published weights at {url} cannot be had ({error}); get the file another way and pass "
            'pretrained_cfg_overlay=dict(file="..."), or use pretrained=False'
        ) from error
    if digest is None:
        _log.info(
            "%s: nobody has stated its SHA-256; this download has %s, which pretrained_cfg_overlay=dict(sha256=...) "
            "checks from now on",
            url,
            _files.sha256(path),
        )
    return path


def _hub_file(repository: str, filename: str | None, cache_dir: str | Path | None) -> str:
    """A file of the Hugging Face hub in its cache, by default the safetensors that timm prefers."""
    name = filename or "model.safetensors"
    try:
        return download_from_hf(repository, name, cache_dir=cache_dir)
    except Exception as error:  # of the hub's client, which raises a dozen types
        raise RuntimeError(
            f"{name} of {repository} on the Hugging Face hub cannot be had ({error}); name another file with "
            'pretrained_cfg_overlay=dict(hf_hub_filename="..."), or leave out sha256'
        ) from error


def _take_digest(kwargs: dict[str, Any]) -> str | None:
    """``sha256`` of the overlay, which timm's configurations do not know, taken out of it."""
    overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
    if "sha256" not in overlay:
        return None
    text = overlay.pop("sha256")
    kwargs["pretrained_cfg_overlay"] = overlay
    return _files.check_digest_text(text, "pretrained_cfg_overlay: sha256")


def fetch_weights(
    cfg: Any, stated: str | None = None, cache_dir: str | Path | None = None, unchecked_hub: bool = True
) -> tuple[str, str]:
    """File of a configuration's weights, downloaded if need be and with the digest that is known of it.

    Args:
        cfg: timm's configuration.
        stated: SHA-256 that the file must have; by default that of the index of converted checkpoints, if it has one.
        cache_dir: Folder of downloads.
        unchecked_hub: Also fetch a file of the hub whose digest is not known, which timm does itself.

    Returns:
        The file and the address that it came from; empty where there is none.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: It cannot be downloaded.
        ValueError: It has another digest than the overlay or the index states.
    """
    name = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    address = "" if cfg.file else cfg.hf_hub_id or cfg.url or ""
    digest = stated or (address and _files.known_digest(name, address)) or None
    origin = "pretrained_cfg_overlay" if stated else "checkpoints/index.csv"
    path = ""
    if cfg.file:
        path = str(cfg.file)
    elif cfg.hf_hub_id:
        path = _hub_file(cfg.hf_hub_id, cfg.hf_hub_filename, cache_dir) if digest or unchecked_hub else ""
    elif cfg.url:
        path = str(download_weights(cfg.url, download_name(cfg), cache_dir, digest))
    if path and not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path!r}; give the path of a .pth or .safetensors file")
    if path and digest:
        _files.verify_sha256(path, digest, origin)
    return path, address


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
            The overlay also takes ``sha256``, which the file of weights must have.

    Returns:
        The model, or timm's wrapper of it with ``features_only=True``.

    Raises:
        FileNotFoundError: The checkpoint file does not exist.
        ValueError: The checkpoint is damaged, of another architecture or digest, or holds more than tensors.
        RuntimeError: There are no weights, or they cannot be downloaded.
    """
    source, url = "", ""
    stated = _take_digest(kwargs)
    cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    if pretrained and not cfg.state_dict and cfg.source != "local-dir" and (stated or not cfg.source):
        source, url = fetch_weights(cfg, stated, kwargs.get("cache_dir"), unchecked_hub=False)
        if source:
            overlay = kwargs.get("pretrained_cfg_overlay") or {}
            kwargs["pretrained_cfg_overlay"] = {**overlay, "file": source, "source": None}
    elif stated and pretrained:
        raise ValueError("sha256 is of a file, an address or the hub, not of a folder or weights in memory")
    try:
        if source:  # timm itself would prefer averaged weights, which the published figures are not of
            _files.check_archive(source)
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
    except Exception as error:  # readers raise a dozen types for damaged files
        if not source or isinstance(error, TypeError):  # an unknown argument of the constructor
            raise
        if url and not _readable(source):  # a connection that broke leaves a short file in the cache
            Path(source).unlink(missing_ok=True)
        # timm's own text, of which this is the cause, advises to unpickle all the same
        if isinstance(error.__cause__ or error, pickle.UnpicklingError):
            raise ValueError(
                f"{source}{url and ' from ' + url} is damaged or no checkpoint, or holds other objects than tensors; "
                "it was not unpickled, since that could run code; save it as .safetensors with a tool you trust"
            ) from error
        raise ValueError(f"cannot load {source}{url and ' from ' + url} into {variant}: {error}") from error
