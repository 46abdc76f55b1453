"""Made-up archives of ADE20K, Cityscapes and COCO-Stuff in the layouts in which they are downloaded: 6 + 2 images."""

import io

import numpy as np
from made_up_archives import zipped
from PIL import Image

COUNTS = dict(train=6, val=2)
SIDES = (48, 64)
"""Height and width of the first image; each further one is two pixels wider, but for Cityscapes."""


def _file(pixels, kind):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def scene(i, values, kind, wider=2):
    """Image and label file: three bands of ``values``, whose places show in the image's red, green and blue."""
    height, width = SIDES[0], SIDES[1] + wider * i
    bands = np.arange(width) * 3 // width
    label = np.broadcast_to(np.array(values, np.uint8)[bands], (height, width)).copy()
    pixels = np.zeros((height, width, 3), np.uint8)
    for channel in range(3):
        pixels[:, bands == channel, channel] = 200 + i
    return _file(pixels, kind), _file(label, "PNG")


def ade20k(folder):
    files = {"ADEChallengeData2016/objectInfo150.txt": b"not read", "ADEChallengeData2016/sceneCategories.txt": b""}
    for part, short, count in (("training", "train", 6), ("validation", "val", 2)):
        for i in range(count):
            name = f"ADE_{short}_{i + 1:08d}"
            image, label = scene(i, (0, 1, 150), "JPEG")
            files[f"ADEChallengeData2016/images/{part}/{name}.jpg"] = image
            files[f"ADEChallengeData2016/annotations/{part}/{name}.png"] = label
    return [zipped(folder / "ADEChallengeData2016.zip", files)]


def cityscapes(folder):
    images, labels = {"README": b"", "license.txt": b""}, {"README": b""}
    for part, city, count in (("train", "aachen", 6), ("val", "lindau", 2), ("test", "bonn", 2)):
        for i in range(count):
            name = f"{city}_{i:06d}_000019"
            image, label = scene(i, (0, 7, 33), "PNG", wider=0)
            images[f"leftImg8bit/{part}/{city}/{name}_leftImg8bit.png"] = image
            for kind, body in (("labelIds", label), ("instanceIds", label), ("color", image)):
                labels[f"gtFine/{part}/{city}/{name}_gtFine_{kind}.png"] = body
    archives = {"leftImg8bit_trainvaltest.zip": images, "gtFine_trainvaltest.zip": labels}
    return [zipped(folder / name, files) for name, files in archives.items()]


def coco_stuff(folder):
    archives, labels = [], {}
    for part, count in COUNTS.items():
        images = {}
        for i in range(count):
            name = f"{i + 1:012d}" if part == "train" else f"{i + 101:012d}"
            image, labels[f"{part}2017/{name}.png"] = scene(i, (255, 0, 181), "JPEG")
            images[f"{part}2017/{name}.jpg"] = image
        archives.append(zipped(folder / f"{part}2017.zip", images))
    return [*archives, zipped(folder / "stuffthingmaps_trainval2017.zip", labels)]
