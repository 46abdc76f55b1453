"""Checkpoints of mmengine read without running code.

mmengine 0.10.7 calls ``torch.load`` as of before PyTorch 2.6, which now refuses the log histories and numpy values that
mmengine itself puts into checkpoints, so no run could be resumed. Reading everything instead (``weights_only=False``)
would let any file run code, and a rule like "only files of this run" is as strong as the folder's permissions and
links. So files stay read by ``weights_only=True``, whoever wrote them, with a short list of allowed classes that only
hold data. One name needs care: pickles of a log history look up its methods with the builtin ``getattr``, which is
answered by a function that knows these four methods and nothing else.
"""

import codecs
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.dist import barrier, get_dist_info
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from safetensors.torch import load_file

from visionattn import _files
from visionattn.models._weights import download_weights

STATISTICS = ("min", "max", "current", "mean")


def history_method(owner: type, name: str) -> Any:
    """The builtin ``getattr`` for the methods of a log history alone.

    Raises:
        pickle.UnpicklingError: Another attribute.
    """
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise pickle.UnpicklingError(f"refused to look up {name!r} of {owner!r}")
    return getattr(HistoryBuffer, name)


def harmless() -> list[Any]:
    """Classes, and functions under the names by which pickles call them, that only hold or make data."""
    reconstruct, scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    numbers = {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"} | {type(np.dtype(str))}
    old_names = [(function, f"numpy.core.multiarray.{function.__name__}") for function in (reconstruct, scalar)]
    return [
        HistoryBuffer,
        ConfigDict,
        np.ndarray,
        np.dtype,
        reconstruct,
        scalar,
        codecs.encode,  # bytes of arrays in pickles of protocol 2
        *numbers,
        *old_names,
        (history_method, "builtins.getattr"),
    ]


def read_checkpoint(filename: str, map_location: Any = None) -> Any:
    """A ``.pth`` or ``.safetensors`` file.

    Args:
        filename: Path.
        map_location: As in ``torch.load``.

    Returns:
        What the file holds: tensors, containers and plain values.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or compressed, or holds objects other than those a checkpoint of mmengine holds.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; give the path of a .pth or .safetensors file")
    _files.check_archive(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(harmless()):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "unreadable"
        raise ValueError(
            f"{path} was not unpickled, since it holds objects other than tensors and plain values, which could run "
            f"code, or is no checkpoint ({_culprit(str(error)) or reason}); if a hook of yours put a class of your own "
            "there, allow it with torch.serialization.add_safe_globals before the run, else save the state dict as "
            ".safetensors with a tool you trust"
        ) from error
    except Exception as error:  # readers raise a dozen types for damaged files
        raise ValueError(f"cannot read the checkpoint {path}: {error}") from error


def _culprit(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if "GLOBAL" in line or "refused" in line]
    return lines[0] if lines else ""


def read_url(filename: str, map_location: Any = None, **kwargs: Any) -> Any:
    """A checkpoint from the web, downloaded once per address by the first process of each machine.

    Raises:
        RuntimeError: The address does not answer with a file.
        ValueError: As of ``read_checkpoint``.
    """
    folder = Path(kwargs.get("model_dir") or os.path.join(torch.hub.get_dir(), "checkpoints"))
    # two addresses may end in the same name
    name = f"{hashlib.sha256(filename.encode()).hexdigest()[:8]}-{filename.partition('?')[0].rpartition('/')[2]}"
    rank, world_size = get_dist_info()
    if int(os.environ.get("LOCAL_RANK", rank)) == 0:
        download_weights(filename, name, folder)
    if world_size > 1:
        barrier()
    return read_checkpoint(str(folder / name), map_location)


def install() -> None:
    """Make these the readers of mmengine."""
    CheckpointLoader.register_scheme("", read_checkpoint, force=True)
    CheckpointLoader.register_scheme(("http://", "https://"), read_url, force=True)
