"""What needs no training: searches that visit every object once until they come to the target."""

from collections.abc import Callable

import numpy as np

from visionattn.data.scanpath import Scene, saliency


def _until(order: list[int], target: int | None, length: int) -> list[int]:
    """The order up to and with the target; without a target its first ``length`` objects."""
    return order[: order.index(target) + 1] if target is not None else order[:length]


def random_order(scene: Scene, rng: np.random.Generator, length: int) -> list[int]:
    """Objects by chance."""
    return _until(rng.permutation(len(scene.boxes)).tolist(), scene.target, length)


def saliency_order(scene: Scene, rng: np.random.Generator, length: int) -> list[int]:
    """The most salient object first."""
    return _until(np.argsort(-saliency(scene.image, scene.boxes), kind="stable").tolist(), scene.target, length)


def nearest_neighbour(scene: Scene, rng: np.random.Generator, length: int) -> list[int]:
    """From the middle of the image on always the nearest object that was not visited."""
    centres, at = scene.centres, np.array(scene.size) / 2
    left, order = list(range(len(centres))), []
    while left:
        order.append(min(left, key=lambda i: (float(np.linalg.norm(centres[i] - at)), i)))
        left.remove(order[-1])
        at = centres[order[-1]]
    return _until(order, scene.target, length)


def target_at_once(scene: Scene, rng: np.random.Generator, length: int) -> list[int]:
    """The target alone; without one the most salient object."""
    return [scene.target] if scene.target is not None else saliency_order(scene, rng, 1)


BASELINES: dict[str, Callable[[Scene, np.random.Generator, int], list[int]]] = {
    "random order": random_order,
    "saliency order": saliency_order,
    "nearest neighbour": nearest_neighbour,
    "target at once": target_at_once,
}
"""Scene, generator and a length for scenes without a target to a scanpath."""
