"""Metrics of scanpaths against the published values and brute force."""

import math
from itertools import combinations

import numpy as np
import pytest
from helpers import load_reference

from visionattn.tasks.scanpath_metrics import (
    behaviour,
    bootstrap,
    bootstrap_delta,
    delta,
    edit_distance,
    multi_match,
    nss,
    scan_match,
    sequence_score,
    sim,
    substitution,
)


@pytest.fixture(scope="module")
def published():
    manifest, stored = load_reference("heads/scanpath_metrics")
    return manifest["hyperparameters"], manifest["input"]["pairs"], {k: v.numpy() for k, v in stored.items()}


def test_values_of_the_published_code(published):
    screen, pairs, stored = published
    cells = np.array([(i % screen["cols"], i // screen["cols"]) for i in range(screen["rows"] * screen["cols"])])
    size = screen["cell_width"], screen["cell_height"]
    centres = (cells + 0.5) * size + (0, screen["top"])
    predicted = np.stack([behaviour(p["pred"], p["target"]) for p in pairs])
    true = np.stack([behaviour(p["true"], p["target"]) for p in pairs])
    # the source computes the score in float32
    score = [sequence_score(p["pred"], p["true"]) for p in pairs]
    np.testing.assert_allclose(np.float32(score), stored["sequence_score"].astype(np.float32), rtol=0)
    assert [edit_distance(p["pred"], p["true"]) for p in pairs] == stored["edit_distance"].tolist()
    np.testing.assert_allclose(predicted, stored["behaviour"], rtol=1e-15)
    np.testing.assert_allclose(true.mean(0), stored["behaviour_true_mean"], rtol=1e-14)
    assert delta(predicted.mean(0), true.mean(0)) == pytest.approx(stored["delta"].item(), rel=1e-13)
    found = [multi_match(centres[p["pred"]], centres[p["true"]], screen["screen"]) for p in pairs]
    np.testing.assert_allclose(found, stored["multimatch"], rtol=1e-10)
    assert sim(stored["sim_probs"], stored["sim_targets"].astype(int)) == pytest.approx(stored["sim"].item(), rel=1e-13)


def common(a, b):
    """Longest common subsequence by trying all of the shorter one's."""
    a, b = sorted((a, b), key=len)
    for size in range(len(a), 0, -1):
        for kept in combinations(a, size):
            rest = iter(b)
            if all(i in rest for i in kept):
                return size
    return 0


def edits(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


def aligned(a, b, scores):
    """Best sum of scores of pairs in order, with gaps for nothing."""
    if not a or not b:
        return 0.0
    pair = scores[a[0], b[0]] + aligned(a[1:], b[1:], scores)
    return max(pair, aligned(a[1:], b, scores), aligned(a, b[1:], scores))


@pytest.mark.parametrize("seed", range(4))
def test_alignments_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(5, size=n).tolist() for n in rng.integers(1, 7, size=2))
    longer = max(len(a), len(b))
    scores = substitution(rng.random((5, 2)) * 100, 20.0)
    assert sequence_score(a, b) == pytest.approx(common(a, b) / longer)
    assert edit_distance(a, b) == edits(a, b)
    assert scan_match(a, b, scores) == pytest.approx(aligned(a, b, scores) / longer)
    assert scan_match(a, a, scores) == sequence_score(b, b) == pytest.approx(1.0)


def test_scan_match_falls_with_distance():
    scores = substitution(np.array([[0.0, 0.0], [10.0, 0.0], [100.0, 0.0]]), 10.0, 3.5)
    assert scan_match([0], [1], scores) == pytest.approx(1 - 1 / 3.5)
    assert scan_match([0], [2], scores) == 0.0  # a gap is better than a pair so far apart


def test_nss_is_that_of_the_map():
    predicted, true = np.array([[2.0, 1.0], [4.0, 3.0], [2.4, 1.2]]), np.array([[2.0, 1.0], [0.0, 0.0]])
    fixated = np.zeros((5, 6))
    fixated[1, 2] = fixated[3, 4] = 1
    scaled = (fixated - fixated.mean()) / fixated.std()
    assert nss(predicted, true, (6, 5)) == pytest.approx((scaled[1, 2] + scaled[0, 0]) / 2)


def test_short_scanpaths_have_no_multimatch_unless_padded_as_published():
    short, long = np.array([[5.0, 5.0]]), np.array([[5.0, 5.0], [9.0, 2.0], [3.0, 7.0]])
    assert np.isnan(multi_match(short, long, (20, 20))).all()
    padded = np.array([[5.0, 5.0], [1.0, 1.0], [1.0, 1.0]])
    found = multi_match(short, long, (20, 20), published_padding=True)
    np.testing.assert_array_equal(found, multi_match(padded, long, (20, 20)))


def test_behaviour_and_delta_of_edge_cases():
    assert behaviour([3, 3, 1, 3], 3).tolist() == [1, 4, 0.5, 0.25, 0.25]
    free = behaviour([3], None)
    assert math.isnan(free[0]) and free[1:].tolist() == [1, 1, 0, 0]
    assert delta(free, free) == 0.0
    never = np.array([1.0, 2.0, 1.0, 0.0, 0.0])
    assert delta(never, never) == 0.0 and delta(np.array([1, 2, 0.5, 0.5, 0]), never) == math.inf
    with pytest.raises(ValueError, match="without fixations"):
        sequence_score([], [1])


def test_intervals():
    assert bootstrap([1.0, 3.0, math.nan])[::2] == (2.0, 2) and bootstrap([1.0, 3.0])[1] == (1.0, 3.0)
    assert bootstrap([math.nan]) == (None, None, 0) and bootstrap([2.0]) == (2.0, None, 1)
    rows = np.array([[1.0, 2, 1, 0, 0], [1.0, 4, 1, 0, 0]])
    value, (low, high) = bootstrap_delta(rows, rows * [1, 2, 1, 1, 1])
    assert value == low == high == pytest.approx(0.1)
