"""Backbones by their names in timm, with errors that say what else there is."""

import difflib
from typing import Any

import timm


def create_backbone(name: str, **kwargs: Any) -> Any:
    """``timm.create_model`` for a head.

    Args:
        name: A name in timm.
        **kwargs: As for ``timm.create_model``.

    Raises:
        ValueError: timm knows no such model.
    """
    bare = name.split(".")[0]
    if ":" not in name and not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=3) or ["biformer_t", "resnet50"]
        raise ValueError(f"backbone={name!r} is no model of timm's; did you mean {', '.join(near)}?")
    return timm.create_model(name, **kwargs)
