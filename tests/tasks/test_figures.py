"""Figures as files."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from visionattn._figures import save_figure
from visionattn._writing import SavingError
from visionattn.tasks.inference import draw


def test_names_with_dollars_are_drawn_as_they_are(tmp_path):
    picture = Image.new("RGB", (8, 8))
    draw([picture, picture], ["a$b_{c$", "$5 to $10"], tmp_path / "sheet.png")  # the first is no formula
    drawn = []
    for name in ("$x^2$", r"\$x^2\$"):
        figure = Figure(figsize=(2, 1))
        axes = figure.subplots()
        axes.set_title(name)
        axes.semilogy([1, 1000])
        save_figure(figure, tmp_path / "figure.png")
        with Image.open(tmp_path / "figure.png") as image:
            drawn.append(np.asarray(image.convert("L")))
        assert axes.title.get_text() == name and not axes.title.get_parse_math()
        assert axes.yaxis.get_ticklabels()[0].get_parse_math()  # powers of ten
    assert (drawn[0] != drawn[1]).any()


def test_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SavingError, match=r"cannot write .*figure.png"):
        save_figure(Figure(), tmp_path / "file" / "figure.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
