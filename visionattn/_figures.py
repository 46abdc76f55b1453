"""Figures and pictures as files."""

from pathlib import Path
from typing import Any

from PIL import Image

from visionattn._writing import replaced


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG under a temporary name and rename it; names with ``$`` are no formulas in it.

    Raises:
        SavingError: The file cannot be written.
    """
    from matplotlib.axis import Tick
    from matplotlib.text import Text

    # marks of axes may hold formulas (powers of ten), everything else is text of ours or of users
    marks = {id(label) for tick in figure.findobj(Tick) for label in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if id(text) not in marks:
            text.set_parse_math(False)
    with replaced(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG under a temporary name and rename it.

    Raises:
        SavingError: The file cannot be written.
    """
    with replaced(path) as temporary:
        picture.save(temporary, format="png")
