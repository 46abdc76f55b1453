"""Pictures for the web page that travel in installed packages; nothing is fetched."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from visionattn._figures import save_picture

_PHOTOS = {"skimage": ("data", ("chelsea.png", "coffee.png", "astronaut.png", "rocket.jpg"))}
_MISSING = (ImportError, FileNotFoundError, ValueError)


def example_pictures(folder: str | Path) -> list[Path]:
    """Pictures that the embedded experiments were not trained on, and photographs, of the packages that are installed.

    Args:
        folder: Where pictures go that are no files of their own in their packages.

    Returns:
        Files of nuclei, a scene for questions, digits and tree crowns, then photographs of scikit-image.
    """
    found = []
    for name, picture in (("nuclei", _nuclei), ("scene", _scene), ("digit", _digit), ("trees", _trees)):
        try:
            path = Path(folder, f"{name}.png")
            save_picture(picture(), path)
            found.append(path)
        except _MISSING:  # the package is not installed, or another version
            continue
    return [*found, *_photographs()]


def _photographs() -> Iterator[Path]:
    for package, (folder, names) in _PHOTOS.items():
        spec = find_spec(package)
        if spec is not None and spec.origin:
            files = (Path(spec.origin).parent / folder / name for name in names)
            yield from (file for file in files if file.is_file())


def _nuclei() -> Image.Image:
    from visionattn.data.nuclei import Nuclei

    source = Nuclei("val", in_chans=1)
    first, last = source.places[0][0], source.places[-1][0] + source.tile
    return Image.fromarray((source.image[first:last, :256].clip(0, 1) * 255).round().astype(np.uint8))


def _scene() -> Image.Image:
    from visionattn.data.scenes import Scenes

    return Image.fromarray(Scenes("val", count=1)[0].image)


def _digit() -> Image.Image:
    from visionattn.data.datasets import EmbeddedDigits

    return EmbeddedDigits("val")[0][0]


def _trees() -> Image.Image:
    from visionattn.data.trees import Trees

    return Image.fromarray(np.asarray(Trees("val")[0].image))
