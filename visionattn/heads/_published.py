"""Checkpoints of the published networks."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from visionattn import _files


def read_published(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, without the prefix ``module.`` of parallel training.

    Args:
        path: ``.pth`` or ``.safetensors``: a state dict, or under ``model_state_dict``, ``state_dict``, ``model``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, compressed, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of a .pth or .safetensors file")
    _files.check_archive(path)
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects other than tensors, or is no checkpoint, and was not unpickled, since that could "
            "run code; save its state dict as .safetensors with a tool you trust"
        ) from error
    except Exception as error:  # readers raise a dozen types for damaged files
        raise ValueError(f"cannot read the checkpoint {path}: {error}") from error
    for inner in ("model_state_dict", "state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(inner), dict):
            found = found[inner]
    if not isinstance(found, dict) or not all(isinstance(x, Tensor) for x in found.values()):
        raise ValueError(f"{path} holds no state dict, expected names and tensors")
    return {key.removeprefix("module."): tensor for key, tensor in found.items()}


def fill(
    network: nn.Module, weights: dict[str, Tensor], path: str | Path, check: str, optional: str | None = None
) -> None:
    """Load weights that are those of the network, all of them and no others.

    Args:
        network: To be filled.
        weights: By the network's own names; counters of batches may be missing.
        path: For the message.
        check: For the message: what to look at where they do not fit.
        optional: Names that begin so may be missing too.

    Raises:
        ValueError: Missing or unknown tensors, or others than the network's shapes.
    """
    own = network.state_dict()
    lacking = [k for k in own.keys() - weights.keys() if not k.endswith("num_batches_tracked")]
    missing = sorted(k for k in lacking if not (optional and k.startswith(optional)))
    unknown = sorted(weights.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape)
    if missing or unknown or shapes:
        raise ValueError(
            f"{path} does not fit this {type(network).__name__}: {len(missing)} tensors are missing (first "
            f"{missing[:1]}), {len(unknown)} unknown (first {unknown[:1]}), {len(shapes)} of another shape (first "
            f"{shapes[:1]}); check {check}"
        )
    network.load_state_dict(weights, strict=False)
