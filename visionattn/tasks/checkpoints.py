"""Published checkpoints as safetensors under our own names, with digests that tell one file from another."""

import csv
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.models import load_state_dict

import visionattn
from visionattn import _files
from visionattn._files import sha256
from visionattn._writing import replaced
from visionattn.tasks.config import write_text

COLUMNS = ("name", "file", "sha256", "bytes", "parameters", "source_file", "source_sha256", "source_url", "license")


def full_name(model: Any) -> str:
    """timm's identifier of a model's weights, for example ``biformer_s.in1k``."""
    cfg = model.pretrained_cfg
    return f"{cfg['architecture']}.{cfg['tag']}" if cfg.get("tag") else cfg["architecture"]


def read_index(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of ``folder/index.csv`` by name; none if there is no such file."""
    return _files.read_index(folder / "index.csv")


def read_torch_file(path: str | Path, map_location: Any = "cpu") -> Any:
    """Content of a file that ``torch.save`` wrote, if it is tensors and plain values.

    Args:
        path: File.
        map_location: As in ``torch.load``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, no checkpoint, compressed, or holds other objects; nothing of it has run.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    _files.check_archive(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged or no checkpoint, or holds objects other than tensors and plain values "
            "(UnpicklingError); it was not unpickled, since that could run code"
        ) from error
    except Exception as error:  # torch raises a dozen types for damaged files
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from error


def _write_index(folder: Path, rows: dict[str, dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[name] for name in sorted(rows))
    write_text(folder / "index.csv", text.getvalue())


def convert_checkpoint(name: str, source: str | Path, folder: str | Path, url: str | None = None) -> Path:
    """Turn an official checkpoint into safetensors and enter it in ``folder/index.csv``.

    The file must fill the model completely. Half precision becomes float32, which loses nothing; float64 stays.

    Args:
        name: timm name, with a tag (``"biformer_s.in1k"``) or for the model's default one.
        source: Official .pth or .safetensors file.
        folder: Where ``NAME.TAG.safetensors`` and the index go.
        url: Where the source came from; by default the address, or the repository of the Hugging Face hub, that the
            model's configuration states.

    Returns:
        Path of the new file (written under a temporary name and renamed; an existing one is replaced).

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: An unknown name, or a file that is damaged, of another model or number of classes.
    """
    source, folder = Path(source), Path(folder)
    if not source.is_file():
        raise FileNotFoundError(f"no checkpoint at {source}; give the path of an official .pth or .safetensors file")
    overlay = dict(file=str(source))
    model: Any = visionattn.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    if any(tensor.dtype == torch.float64 for tensor in _tensors(load_state_dict(str(source), use_ema=False))):
        model = visionattn.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64)
    cfg, weights = model.pretrained_cfg, model.state_dict()
    identifier, digest = full_name(model), sha256(source)
    path = folder / f"{identifier}.safetensors"
    with replaced(path) as temporary:
        content = save(weights, dict(name=identifier, source_sha256=digest, visionattn=visionattn.__version__))
        temporary.write_bytes(content)
    rows: dict[str, dict[str, Any]] = {**read_index(folder)}
    rows[identifier] = dict(
        name=identifier,
        file=path.name,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        source_file=source.name,
        source_sha256=digest,
        source_url=url or cfg.get("url") or cfg.get("hf_hub_id") or "",
        license=cfg.get("license") or "",
    )
    _write_index(folder, rows)
    return path


def _tensors(content: Any) -> list[torch.Tensor]:
    values = content.values() if isinstance(content, dict) else ()
    return [value for value in values if isinstance(value, torch.Tensor)]


def verify_checkpoint(path: str | Path) -> dict[str, str]:
    """Compare a converted file with the index beside it.

    Args:
        path: File in a folder with ``index.csv``.

    Returns:
        Its row of the index.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The index does not know the file, or its content has changed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; write one with visionattn convert")
    row = next((row for row in read_index(path.parent).values() if row["file"] == path.name), None)
    if row is None:
        raise ValueError(f"{path.parent / 'index.csv'} has no row for {path.name}; write it with visionattn convert")
    if row["sha256"] != (found := sha256(path)):
        raise ValueError(f"{path} has SHA-256 {found}, the index says {row['sha256']}; convert or copy it again")
    return row
