"""Vision backbones built on efficient attention, registered with timm on import.

>>> import visionattn, timm
>>> model = timm.create_model("biformer_s")
"""

import difflib
import fnmatch
import pickle
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from visionattn import models as _models  # registers the backbones  # noqa: F401

__version__ = "0.1.0"
__all__ = ["__version__", "create_model", "list_models"]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the backbones that this package registers with timm.

    Args:
        pattern: Shell pattern, for example ``"biformer_*"``.

    Returns:
        Sorted names.
    """
    # timm's own module filter sees only the last part of a module's path, which other packages may share
    names = (
        name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith(__name__ + ".")
    )
    return sorted(fnmatch.filter(names, pattern))


def create_model(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with our backbones registered, and the nearest names for an unknown one.

    Args:
        name: A name of ``list_models()`` or any other of timm.
        **kwargs: As for ``timm.create_model``.

    Returns:
        The model.

    Raises:
        ValueError: timm knows no such model or weights, or the weights are of another model or hold more than tensors.
        FileNotFoundError: ``pretrained_cfg_overlay=dict(file=...)`` or ``checkpoint_path`` names no file.
    """
    overlay = (kwargs.get("pretrained_cfg_overlay") or {}) if kwargs.get("pretrained") else {}  # else it is not read
    file = overlay.get("file") or kwargs.get("checkpoint_path")
    if file and not Path(file).is_file():
        raise FileNotFoundError(f"no checkpoint at {file}")
    if ":" not in name and not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3) or list_models()[:3]
        raise ValueError(f"unknown model {name!r}; did you mean {', '.join(near)}? All: visionattn list")
    try:
        return timm.create_model(name, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, pickle.UnpicklingError) as error:
        if "weights_only" in str(error):
            raise ValueError(f"{file or name} holds more than tensors and is refused; save tensors alone") from error
        reason = " ".join(str(error).split())[:300]
        known = "No pretrained weights" in reason or "Invalid pretrained tag" in reason
        hint = f"; timm.list_pretrained({name.split('.')[0]!r}) names what there is" if known else ""
        raise ValueError(f"{name}: {reason}{hint}") from error
