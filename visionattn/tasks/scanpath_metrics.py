"""How alike two scanpaths are, and how a set of them behaves. Agreement with OAT's published code is tested.

Alignment: Needleman and Wunsch 1970; ScanMatch: Cristino, Mathôt, Theeuwes and Gilchrist 2010; MultiMatch: Jarodzka,
Holmqvist and Nyström 2010, by the package multimatch-gaze; the behaviour metric: OAT, arXiv:2407.13335.
"""

import math
from collections.abc import Sequence

import numpy as np
from multimatch_gaze import docomparison
from rapidfuzz.distance import LCSseq, Levenshtein

Path = Sequence[int]
BEHAVIOUR = ("ends on target", "length", "search", "refixation", "revisit")
MULTIMATCH = ("vector", "direction", "length", "position")
_LEAST = 3  # fixations that MultiMatch needs


def _check(*paths: Path) -> None:
    if not all(len(path) for path in paths):
        raise ValueError("a scanpath without fixations cannot be compared; leave it out or give it one")


def sequence_score(predicted: Path, true: Path) -> float:
    """Needleman-Wunsch score over the longer length, with match 1, mismatch 0 and gap 0, so the common subsequence's.

    Args:
        predicted: Object indices.
        true: Object indices.

    Raises:
        ValueError: An empty scanpath, here and below.
    """
    _check(predicted, true)
    return LCSseq.similarity(list(predicted), list(true)) / max(len(predicted), len(true))


def edit_distance(predicted: Path, true: Path) -> int:
    """Levenshtein distance with all costs 1, not normalised."""
    _check(predicted, true)
    return Levenshtein.distance(list(predicted), list(true))


def substitution(centres: np.ndarray, unit: float, threshold: float = 3.5) -> np.ndarray:
    """ScanMatch's substitution matrix over objects: ``1 - d / threshold``.

    The published one, ``max - d`` shifted so that 0 lies at the threshold, divided by its largest value, which is 1
    here for an object with itself. Pairs further apart than the threshold are negative.

    Args:
        centres: ``[N, 2]`` pixels.
        unit: Pixels that count as distance 1 (a cell; the published code counts bins of its grid).
        threshold: Distance of score 0, units; 3.5 is the published default.

    Returns:
        ``[N, N]``.
    """
    d = np.linalg.norm(centres[:, None] - centres[None], axis=-1) / unit
    return 1 - d / threshold


def scan_match(predicted: Path, true: Path, scores: np.ndarray) -> float:
    """Needleman-Wunsch score with a substitution matrix and gap 0, over the longer length; 1 for equal scanpaths.

    Durations, which the published form can weigh by repeating letters, are not used.

    Args:
        predicted: Object indices.
        true: Object indices.
        scores: Of ``substitution``.
    """
    _check(predicted, true)
    row = np.zeros(len(true) + 1)
    for i in predicted:
        diagonal = row[:-1] + scores[i, list(true)]
        best = np.maximum(row[1:], diagonal)
        row = np.concatenate([[0.0], np.maximum.accumulate(np.maximum(best, 0.0))])
    return float(row[-1]) / max(len(predicted), len(true))


def _fixations(points: np.ndarray) -> np.ndarray:
    found = np.ones(len(points), dtype=[("start_x", "f8"), ("start_y", "f8"), ("duration", "f8")])
    found["start_x"], found["start_y"] = points.T
    return found


def multi_match(
    predicted: np.ndarray, true: np.ndarray, size: tuple[int, int], published_padding: bool = False
) -> np.ndarray:
    """MultiMatch without simplification and without durations.

    Args:
        predicted: ``[T, 2]`` pixels x, y.
        true: ``[T, 2]``.
        size: Width and height of the image, pixels.
        published_padding: Complete scanpaths of fewer than three fixations by fixations at pixel (1, 1), as OAT
            does. By default they have no value.

    Returns:
        ``MULTIMATCH``, ``[4]``; NaN where a scanpath has fewer than three fixations.
    """
    _check(predicted.tolist(), true.tolist())
    if published_padding:
        pairs = [np.concatenate([p, np.ones((max(_LEAST - len(p), 0), 2))]) for p in (predicted, true)]
    else:
        pairs = [predicted, true]
    if min(map(len, pairs)) < _LEAST:
        return np.full(4, math.nan)
    found = docomparison(_fixations(pairs[0]), _fixations(pairs[1]), screensize=list(size))
    return np.array(found[:4], dtype=float)


def nss(predicted: np.ndarray, true: np.ndarray, size: tuple[int, int]) -> float:
    """Mean at the true fixations of the z-scored map that is 1 at the pixels of the predicted ones and 0 elsewhere.

    Args:
        predicted: ``[T, 2]`` pixels x, y.
        true: ``[T, 2]``.
        size: Width and height of the image, pixels.
    """
    _check(predicted.tolist(), true.tolist())
    hit = {tuple(p) for p in np.floor(predicted).astype(int).tolist()}
    share = len(hit) / (size[0] * size[1])
    values = [float(tuple(p) in hit) for p in np.floor(true).astype(int).tolist()]
    deviation = math.sqrt(share * (1 - share))
    return (float(np.mean(values)) - share) / deviation if deviation else math.nan


def sim(probabilities: np.ndarray, classes: Sequence[int]) -> float:
    """Mean probability of the true class, which is the similarity of a distribution ``[T, K]`` to a one-hot one."""
    _check(classes)
    return float(probabilities[np.arange(len(classes)), np.asarray(classes, dtype=int)].mean())


def behaviour(path: Path, target: int | None) -> np.ndarray:
    """``BEHAVIOUR`` of one scanpath: the shares of its fixations that begin on an object not seen before, stay, or
    return.

    A run of fixations on one object is one visit: its first fixation counts as search or revisit, the others as
    refixations. The three shares sum to 1.

    Args:
        path: Object indices.
        target: The object looked for; without one the first number is NaN.

    Returns:
        ``[5]``.
    """
    _check(path)
    seen, counts, last = set(), [0, 0, 0], None
    for i in path:
        counts[1 if i == last else 2 if i in seen else 0] += 1
        seen.add(i)
        last = i
    ends = math.nan if target is None else float(path[-1] == target)
    return np.array([ends, len(path), *(count / len(path) for count in counts)])


def delta(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean over the five of ``|predicted - true| / true``; lower is better.

    0 / 0 is 0; a behaviour that the true scanpaths never show gives infinity if the others do. Without a target the
    mean is over four.

    Args:
        predicted: Mean behaviour ``[5]``.
        true: Mean behaviour ``[5]``.
    """
    known = ~(np.isnan(predicted) | np.isnan(true))
    p, t = predicted[known], true[known]
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(p == t, 0.0, np.abs(p - t) / t)
    return float(parts.mean())


def bootstrap(
    values: Sequence[float], rounds: int = 1000, seed: int = 0
) -> tuple[float | None, tuple[float, float] | None, int]:
    """Mean, 95 % percentile bootstrap interval and number of values, those that are NaN left out.

    Args:
        values: One for each scene, which are what is drawn.
        rounds: Bootstrap draws.
        seed: Of the draws.

    Returns:
        The mean (None without a value), the interval (None with fewer than two), and how many values there were.
    """
    known = np.array([v for v in values if not math.isnan(v)])
    if len(known) < 2:
        return (float(known[0]) if len(known) else None), None, len(known)
    drawn = known[np.random.default_rng(seed).integers(len(known), size=(rounds, len(known)))].mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(known.mean()), (float(low), float(high)), len(known)


def bootstrap_delta(
    predicted: np.ndarray, true: np.ndarray, rounds: int = 1000, seed: int = 0
) -> tuple[float, tuple[float, float] | None]:
    """``delta`` of the means over scenes, with the interval over draws of scenes.

    Args:
        predicted: Mean behaviour of each scene ``[S, 5]``.
        true: ``[S, 5]``.
        rounds: Bootstrap draws.
        seed: Of the draws.
    """
    whole = delta(predicted.mean(0), true.mean(0))
    if len(predicted) < 2:
        return whole, None
    drawn = np.random.default_rng(seed).integers(len(predicted), size=(rounds, len(predicted)))
    values = [delta(predicted[i].mean(0), true[i].mean(0)) for i in drawn]
    low, high = np.percentile(values, (2.5, 97.5))
    return whole, (float(low), float(high))
