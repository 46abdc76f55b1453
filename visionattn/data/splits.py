"""Fixed divisions of images into training, validation and test, by groups."""

import re
from collections.abc import Sequence
from math import floor

import numpy as np

SPLITS = ("train", "val", "test")


def check_split(split: str) -> None:
    """Refuse an unknown split.

    Raises:
        ValueError: ``split`` is none of ``SPLITS``.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")


def group_names(names: Sequence[str], pattern: str | None) -> list[str]:
    """Group of each name: what the pattern's first bracket (or the whole match) finds, or the name without a pattern.

    Args:
        names: Stems of files.
        pattern: Regular expression, searched for anywhere in the name.

    Raises:
        ValueError: The pattern is no regular expression, or does not occur in a name.
    """
    if not pattern:
        return list(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"group_pattern={pattern!r} is no regular expression: {error}") from error
    matches = [expression.search(name) for name in names]
    missed = [name for name, match in zip(names, matches, strict=True) if not match]
    if missed:
        raise ValueError(
            f"group_pattern={pattern!r} does not occur in {len(missed)} of {len(names)} names, first {missed[0]!r}; "
            "write a pattern that finds the patient in every name"
        )
    return [(match[1] if expression.groups else match[0]) for match in matches if match]


def split_groups(
    groups: Sequence[str],
    val: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    fold: int | None = None,
    folds: int | None = None,
) -> dict[str, list[int]]:
    """Divide images so that no group (patient, eye) is in two splits.

    The distinct groups are shuffled by ``seed``, whatever order they come in. Without folds the first
    ``round(test * groups)`` make the test, the next ``round(val * groups)`` the validation split, at least one group
    each. With folds the test split is fold ``fold`` of ``folds`` nearly equal ones, so that each group is tested
    once over all folds, and validation is the share ``val`` of the remaining groups.

    Args:
        groups: Group of each image.
        val: Share of the groups, in [0, 1); 0 leaves the split empty.
        test: Share of the groups, in [0, 1); not used with folds.
        seed: Seed of the shuffle.
        fold: Number of the fold, from 0.
        folds: Number of folds.

    Returns:
        Ascending numbers of images for each of ``"train"``, ``"val"``, ``"test"``.

    Raises:
        ValueError: A share outside [0, 1), only one of ``fold`` and ``folds``, a fold outside them, or too few groups.
    """
    if (fold is None) != (folds is None):
        raise ValueError(f"fold={fold}, folds={folds}: give both for cross-validation, or neither")
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}={share} must be a share of the groups in [0, 1)")
    distinct = np.array(sorted(set(groups)), dtype=object)
    shuffled = [str(group) for group in distinct[np.random.RandomState(seed).permutation(len(distinct))]]
    if fold is not None and folds is not None:
        if not 2 <= folds <= len(shuffled) or not 0 <= fold < folds:
            raise ValueError(
                f"fold={fold}, folds={folds}: expected 2 <= folds <= {len(shuffled)} groups and 0 <= fold < folds"
            )
        tested = shuffled[fold::folds]
    else:
        tested = shuffled[: _count(test, len(shuffled))]
    rest = [group for group in shuffled if group not in set(tested)]
    validated = rest[: _count(val, len(rest) if fold is not None else len(shuffled))]
    if len(validated) >= len(rest):
        raise ValueError(
            f"{len(distinct)} groups are too few for val={val}, test={test}: none is left for training; "
            "lower the shares or give more groups"
        )
    place = {group: "train" for group in rest} | dict.fromkeys(validated, "val") | dict.fromkeys(tested, "test")
    return {split: [i for i, group in enumerate(groups) if place[group] == split] for split in SPLITS}


def _count(share: float, total: int) -> int:
    return max(floor(share * total + 0.5), 1) if share else 0
