"""Windows over tensors, and files larger than memory."""

import tracemalloc

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import nn

from visionattn.tasks.sliding import TiledImage, probabilities, segment_file


class Bright(nn.Module):
    def forward(self, x):
        return (x[:, :1] - 0.5) * 10


def test_windows_give_what_the_whole_image_gives():
    x = torch.rand(1, 3, 70, 90)
    whole = probabilities(Bright(), x)
    assert torch.allclose(probabilities(Bright(), x, 32, flips=True), whole, atol=1e-6)
    with pytest.raises(ValueError, match="window=0"):
        probabilities(Bright(), x, 0)
    with pytest.raises(ValueError, match="overlap=1"):
        probabilities(Bright(), x, 32, overlap=1)


@pytest.mark.parametrize("layout", [dict(tile=(32, 32)), dict(rowsperstrip=7), dict(tile=(32, 48), compression="zlib")])
def test_parts_of_a_tiff_are_the_image(tmp_path, layout):
    pixels = np.random.default_rng(0).integers(0, 255, (75, 101, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", **layout)
    padded = np.pad(pixels, ((5, 20), (5, 20), (0, 0)), mode="reflect")
    image = TiledImage(tmp_path / "a.tif")
    for top, left, height, width in [(-5, -5, 40, 40), (30, 40, 30, 33), (55, 70, 30, 40)]:
        part = image.read(top, left, height, width)
        assert np.array_equal(part, padded[top + 5 : top + 5 + height, left + 5 : left + 5 + width])


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_masks_of_files_are_those_of_the_whole(tmp_path, name):
    pixels = np.random.default_rng(0).integers(0, 255, (75, 101, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / name)
    label = lambda part: (part[..., 0] > 100).astype(np.uint8)  # noqa: E731
    segment_file(tmp_path / name, tmp_path / "m.tif", label, tile=32, margin=8)
    assert np.array_equal(tifffile.imread(tmp_path / "m.tif"), label(pixels))
    assert not list(tmp_path.glob("*.part"))


def test_memory_is_that_of_some_tiles(tmp_path):
    side = 4096  # 48 MB of pixels
    blank = (np.full((256, 256, 3), i % 200, np.uint8) for i in range((side // 256) ** 2))
    tifffile.imwrite(
        tmp_path / "a.tif", blank, shape=(side, side, 3), dtype=np.uint8, tile=(256, 256), photometric="rgb"
    )
    import visionattn.tasks.sliding as sliding

    before, sliding._CACHE = sliding._CACHE, 4 * 2**20
    tracemalloc.start()
    try:
        segment_file(tmp_path / "a.tif", tmp_path / "m.tif", lambda p: p[..., 0] // 100, tile=256, margin=16)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        sliding._CACHE = before
    assert peak < 16 * 2**20  # of the image's 48 and the mask's 16 MB
    assert tifffile.imread(tmp_path / "m.tif").shape == (side, side)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no image at"):
        TiledImage(tmp_path / "a.tif")
    (tmp_path / "b.tif").write_bytes(b"not a TIFF at all")
    with pytest.raises(ValueError, match="cannot be read as an image"):
        TiledImage(tmp_path / "b.tif")
    with pytest.raises(ValueError, match="tile=100"):
        segment_file(tmp_path / "b.tif", tmp_path / "m.tif", lambda p: p, tile=100)


def test_empty_tiles_and_other_channels(tmp_path):
    grey = np.zeros((64, 64), np.uint8)
    grey[:, 40:] = 9
    tifffile.imwrite(tmp_path / "a.tif", grey, tile=(32, 32))
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as file:
        file.pages[0].tags["TileByteCounts"].overwrite([0, 1024, 0, 1024])
    image = TiledImage(tmp_path / "a.tif")
    assert np.array_equal(image.read(0, 0, 64, 64), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(np.stack([grey] * 3, 2)).save(tmp_path / "b.png")
    assert np.array_equal(TiledImage(tmp_path / "b.png", 1).read(0, 0, 64, 64), grey[..., None])
    tifffile.imwrite(tmp_path / "c.tif", grey, photometric="miniswhite")
    with pytest.raises(ValueError, match="MINISWHITE; convert it to RGB or grey"):
        TiledImage(tmp_path / "c.tif")
