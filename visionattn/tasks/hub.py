"""Folders and repositories that ``timm.create_model("local-dir:...")`` and ``("hf-hub:...")`` load."""

import os
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import push_to_hf_hub, save_for_hf

from visionattn._writing import saving
from visionattn.tasks.cards import card, card_text
from visionattn.tasks.export import Exportable, compare

FILES = ("config.json", "model.safetensors", "README.md")


def _described(network: Exportable) -> dict[str, Any]:
    """What timm writes into ``config.json`` beyond what it knows of the model.

    Raises:
        ValueError: The network is no registered model, or no classifier.
    """
    if network.arguments is None:
        kind = type(network.model).__name__
        raise ValueError(f"{kind} {network.name} is no classifier that timm knows, so no hub can build it; use onnx")
    how = {key: tuple(x) if isinstance(x, list) else x for key, x in network.preprocessing.items()}
    numbers = [str(i) for i in range(len(network.classes))]
    named = network.classes != numbers and len(set(network.classes)) == len(network.classes)
    names = dict(label_names=network.classes) if named else {}
    args = dict(network.arguments)
    if network.in_chans != 3:
        args["in_chans"] = network.in_chans
    return dict(model_config=dict(pretrained_cfg=how, num_classes=len(network.classes), **names), model_args=args)


def save_folder(
    network: Exportable, folder: str | Path, run: str | Path | None = None, licence: str | None = None
) -> dict[str, Any]:
    """Write ``config.json``, ``model.safetensors`` and a model card.

    They are written beside the folder, loaded by timm and compared, and moved only then.

    Args:
        network: A classifier, from ``from_name`` or ``from_run``.
        folder: Where the files go; those of these names are replaced.
        run: The run whose weights they are.
        licence: As for ``card``.

    Returns:
        ``config.json``.

    Raises:
        SavingError: The folder cannot be written.
        ValueError: A network that timm cannot build by name, a file in the place of the folder, or a model that differs
            after loading.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file; the format hub writes a folder")
    described = _described(network)
    facts = card(network, run, licence)
    with saving(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as name:
            made = Path(name)
            save_for_hf(network.model, name, safe_serialization=True, **described)
            (made / "README.md").write_text(card_text(facts, network.name), encoding="utf-8")
            again = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
            found = compare(network.model, again, [[2, network.in_chans, *network.size]])
            if found.relative > 1e-5:
                raise ValueError(f"the model that timm loads again differs by {found.relative:.1e} of the outputs' RMS")
            folder.mkdir(exist_ok=True)
            for file in FILES:
                os.replace(made / file, folder / file)
    return facts


def push(
    network: Exportable,
    repository: str,
    run: str | Path | None = None,
    licence: str | None = None,
    private: bool = False,
) -> str:
    """Create a repository on the Hugging Face hub and upload weights, configuration and card, by timm's function.

    The token is huggingface_hub's own affair (``hf auth login`` or HF_TOKEN).

    Args:
        network: A classifier.
        repository: ``OWNER/NAME``.
        run: As for ``save_folder``.
        licence: As for ``card``.
        private: Make a new repository private.

    Returns:
        Address of the commit.

    Raises:
        ValueError: A network that timm cannot build by name, or a name that is none.
    """
    owner, slash, name = repository.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise ValueError(f"--push {repository}: expected OWNER/NAME")
    described = _described(network)
    facts = card(network, run, licence)
    with torch.no_grad():
        commit = push_to_hf_hub(
            network.model, repository, private=private, model_card=facts, safe_serialization=True, **described
        )
    return str(commit)
