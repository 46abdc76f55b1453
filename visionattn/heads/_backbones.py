"""Backbones by their names in timm, with errors that say what else there is."""

import difflib
from collections.abc import Sequence
from typing import Any

import timm


def check_name(name: str, names: Sequence[str], what: str) -> None:
    """Refuse a name that is not in a list.

    Raises:
        ValueError: It is not; the nearest ones are named.
    """
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or list(names)[:10]
        raise ValueError(f"unknown {what} {name!r}; nearest: {', '.join(near)}")


def check_backbone(name: str) -> None:
    """Refuse a name, with or without a tag, that timm does not know; those of a hub or folder (``hf-hub:``) pass.

    Raises:
        ValueError: timm knows no such model.
    """
    bare = name.split(".")[0]
    if ":" not in name and not timm.is_model(bare):
        check_name(bare, timm.list_models(), "backbone")


def create_backbone(name: str, **kwargs: Any) -> Any:
    """``timm.create_model`` for a head.

    Args:
        name: A name in timm.
        **kwargs: As for ``timm.create_model``.

    Raises:
        ValueError: timm knows no such model.
    """
    check_backbone(name)
    return timm.create_model(name, **kwargs)
