"""Small folders and archives in COCO's format: noise with bright rectangles."""

import io
import json
import zipfile

import numpy as np
from PIL import Image

from visionattn.data.trees import PICTURES

CROWNS = [(1, 1, 40, 30), (360, 300, 400, 340), (740, 500, 760, 520)]
"""Left, top, right and bottom of the made-up trees, pixels counted from 1 at the left and top."""
CATEGORIES = [dict(id=3, name="bar"), dict(id=7, name="block")]


def scene(number, height=64, width=80):
    """Pixels, and two objects: one as a polygon, one as a run-length encoding."""
    rng = np.random.default_rng(number)
    image = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
    objects = []
    for k, (w, h) in enumerate(((40, 16), (22, 24))):
        x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
        image[y : y + h, x : x + w, k] += 150
        if k:
            mask = np.zeros((height, width), np.uint8)
            mask[y : y + h, x : x + w] = 1
            segmentation = dict(size=[height, width], counts=runs(mask))
        else:
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        box = dict(bbox=[x, y, w, h], area=w * h, iscrowd=0, segmentation=segmentation)
        objects.append(dict(category_id=CATEGORIES[k]["id"], image_id=number, id=2 * number + k, **box))
    return image, objects


def runs(mask):
    """COCO's uncompressed encoding: lengths of runs of 0 and 1 in turn, column by column."""
    flat = mask.T.flatten()
    edges = np.flatnonzero(np.diff(flat)) + 1
    lengths = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return [0, *lengths] if flat[0] else lengths


def listing(numbers):
    """The list of a split and the files of its images."""
    images, objects, files = [], [], {}
    for number in numbers:
        pixels, found = scene(number)
        name = f"{number:012d}.jpg"
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        files[name] = file.getvalue()
        images.append(dict(id=number, file_name=name, height=pixels.shape[0], width=pixels.shape[1]))
        objects += found if number != numbers[-1] else []  # the last image has no object
    return dict(images=images, annotations=objects, categories=CATEGORIES), files


def folder(root, splits=(("train", range(1, 5)), ("val", range(5, 8)))):
    """An own folder: ``annotations/SPLIT.json`` and ``images/``."""
    for split, numbers in splits:
        content, files = listing(numbers)
        for path, body in ((f"annotations/{split}.json", json.dumps(content).encode()), *images_of(files)):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(body)
    return root


def images_of(files):
    return [(f"images/{name}", body) for name, body in files.items()]


def archives(target):
    """The three files of COCO 2017, with few images."""
    paths, lists = [], {}
    for split, numbers in (("train", range(1, 5)), ("val", range(5, 8))):
        content, files = listing(numbers)
        lists[f"annotations/instances_{split}2017.json"] = json.dumps(content)
        paths.append(target / f"{split}2017.zip")
        with zipfile.ZipFile(paths[-1], "w") as archive:
            for name, body in files.items():
                archive.writestr(f"{split}2017/{name}", body)
    paths.append(target / "annotations_trainval2017.zip")
    with zipfile.ZipFile(paths[-1], "w") as archive:
        for name, body in lists.items():
            archive.writestr(name, body)
    return paths


def tree_wheel(target):
    """The file of the package deepforest with plain pictures of the true sizes and few trees."""
    box = "<object><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
    path = target / "deepforest-2.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, size in zip(PICTURES, ((2299, 2472), (1249, 1035)), strict=True):
            picture = io.BytesIO()
            Image.new("RGB", size, (90, 120, 80)).save(picture, "PNG", compress_level=1)
            archive.writestr(f"deepforest/data/{name}.png", picture.getvalue())
            body = "".join(box.format(*corners) for corners in CROWNS)
            archive.writestr(f"deepforest/data/{name}.xml", f"<annotation>{body}</annotation>")
    return path
