"""COVIDx label files on a made-up folder."""

import pytest
from PIL import Image

from visionattn.data.covidx import COVIDx, parse_line

LINES = """1 a.png negative rsna
patient two b c.png positive ricord
3 d.png positive

4 e.png negative positive
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "test_COVIDx8B.txt").write_text(LINES)
    (tmp_path / "data" / "test").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b c.png", "d.png", "e.png"]):
        Image.new("L", (8, 6), 10 * i).save(tmp_path / "data" / "test" / name)
    return tmp_path


def test_lines_are_read_from_their_end(root):
    data = COVIDx(root, "val", in_chans=1)
    assert data.classes == ["negative", "positive"]
    assert [(path.rpartition("/")[2], label) for path, label in data.samples] == [
        ("a.png", 0),
        ("b c.png", 1),
        ("d.png", 1),
        ("e.png", 0),
    ]
    assert data.patients == ["1", "patient two", "3", "4"]
    image, label, name = data[3]
    assert image.size == (8, 6) and image.getpixel((0, 0)) == 30 and label == 0 and name == data.name(3)
    assert len(COVIDx(root, "test", classes=["positive", "negative"])) == 4


def test_three_classes(root):
    (root / "labels" / "test_COVIDx9A.txt").write_text("1 a.png COVID-19 cohen\n2 d.png normal rsna\n")
    assert [label for _, label in COVIDx(root, "test", "9A").samples] == [2, 0]
    assert parse_line("x y", ["normal"], set()) is None
    assert parse_line("1 normal rsna", ["normal"], set()) is None  # no file name


def test_errors_name_the_file(root):
    with pytest.raises(FileNotFoundError, match="train_COVIDx8B.txt"):
        COVIDx(root, "train")
    with pytest.raises(ValueError, match="split='dev'"):
        COVIDx(root, "dev")
    with pytest.raises(ValueError, match="version='8'"):
        COVIDx(root, "test", "8")
    (root / "data" / "test" / "d.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of the 4 images .* missing, first .*d.png"):
        COVIDx(root, "test")
    (root / "labels" / "test_COVIDx8B.txt").write_text("1 a.png negative rsna\n2 b.png maybe rsna\n")
    with pytest.raises(ValueError, match="line 2: '2 b.png maybe rsna'"):
        COVIDx(root, "test")
    (root / "labels" / "test_COVIDx8B.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no images"):
        COVIDx(root, "test")
