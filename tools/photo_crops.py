"""Photographs that travel in scikit-image and scikit-learn, and a data set of crops of them.

The models of the pictures in docs/explain.md are trained on it. Usage: python tools/photo_crops.py photos
"""

import random
import sys
from pathlib import Path

from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_image

COUNTS = dict(train=160, val=30)


def main(folder: Path) -> None:
    """Write ``NAME.png`` and ``{train,val}/NAME/NUMBER.png`` below ``folder``, the same ones each time."""
    photos = dict(cat=data.chelsea(), coffee=data.coffee(), astronaut=data.astronaut(), rocket=data.rocket())
    photos |= dict(flower=load_sample_image("flower.jpg"), temple=load_sample_image("china.jpg"))
    choice = random.Random(0)
    for name, array in photos.items():
        photo = Image.fromarray(array)
        for split, count in COUNTS.items():
            crops = folder / split / name
            crops.mkdir(parents=True)
            for i in range(count):
                side = choice.randint(min(photo.size) * 2 // 5, min(photo.size))
                x, y = (choice.randint(0, n - side) for n in photo.size)
                photo.crop((x, y, x + side, y + side)).resize((72, 72)).save(crops / f"{i:03}.png")
        photo.save(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
