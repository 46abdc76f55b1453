"""The published sets that ``visionattn data prepare`` knows, and the function that prepares each."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from visionattn.data.grounding_layouts import LAYOUTS as GROUNDING
from visionattn.data.layouts import LAYOUTS
from visionattn.data.semantic_layouts import LAYOUTS as SEMANTIC

SETS: dict[str, str] = dict.fromkeys(LAYOUTS, "visionattn.data.prepare:prepare")
SETS |= dict.fromkeys(GROUNDING, "visionattn.data.grounding_prepare:prepare")
"""Name of a set to ``module:function`` with the arguments of ``visionattn.data.prepare.prepare``, whose result has
``splits`` (names of each split)."""
SETS |= dict.fromkeys(SEMANTIC, "visionattn.data.semantic_prepare:prepare")
SETS["coco"] = "visionattn.data.coco_prepare:prepare"
SETS |= dict.fromkeys(("amazon", "shelves", "cocosearch18", "mit1003"), "visionattn.data.scanpath_sets:prepare")


def preparer(name: str) -> Callable[..., dict[str, Any]]:
    """The function that prepares a set.

    Raises:
        ValueError: An unknown name.
    """
    if name not in SETS:
        near = get_close_matches(name, SETS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"no published set {name!r}{hint} Known: {', '.join(SETS)}")
    module, _, function = SETS[name].partition(":")
    prepare: Callable[..., dict[str, Any]] = getattr(import_module(module), function)
    return prepare
