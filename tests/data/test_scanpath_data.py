"""Scenes and scanpaths: own data, published layouts, bad input, and the SYNTHETIC source."""

import json
import zipfile

import made_up_scanpaths
import numpy as np
import pytest
import torch
from made_up_archives import zipped
from PIL import Image

from visionattn.data import synthetic_scanpaths
from visionattn.data.hull import RandomHulls, convex_hull
from visionattn.data.published import preparer
from visionattn.data.scanpath import ScanpathFolder, assign, divide, places, saliency
from visionattn.data.scanpath_pipeline import ScanpathSamples, SceneTransform, collate_scenes
from visionattn.data.synthetic_scanpaths import SyntheticScanpaths, draw_path, similarity

BOXES = [[0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 12]]
SCENE = dict(
    image="a.png", size=[40, 20], boxes=BOXES, target=1, fixations={"eve": [[5, 5], [29, 1]], "bob": [[39, 19]]}
)


def write(folder, *scenes, **more):
    Image.fromarray(np.full((20, 40, 3), 90, dtype=np.uint8)).save(folder / "a.png")
    (folder / "scenes.json").write_text(json.dumps(dict(scenes=list(scenes), **more)))
    return folder


def test_own_scenes(tmp_path):
    source = ScanpathFolder(write(tmp_path, SCENE | dict(split="train")), "train", rows=2, cols=4)
    scene = source.scene(0)
    assert (scene.paths, scene.viewers, scene.outside, source.longest()) == ([[0, 2], [2]], ["eve", "bob"], 1, 2)
    assert scene.places.tolist()[:2] == [[0.0, 0.0], [0.0, 1.0]] and scene.places[2].tolist() == [pytest.approx(0.1), 2]
    batch = collate_scenes([ScanpathSamples(source, SceneTransform("crops", (6, 5)))[0, 0, i] for i in (0, 1)])
    assert batch["image"].shape == (2, 3, 3, 6, 5) and batch["path"].tolist() == [[0, 2], [2, -1]]
    whole = ScanpathSamples(source, SceneTransform("image", size=(40, 40)))[0, 0, 0]
    assert whole["image"].shape == (3, 40, 40) and whole["boxes"][2].tolist() == [20, 0, 30, 24]


def test_fixations_between_boxes_go_to_the_nearest_centre():
    boxes = np.array([[0, 0, 10, 10], [2, 2, 30, 30], [40, 0, 50, 10]], dtype=float)
    assert assign(np.array([[4.0, 4.0], [20.0, 20.0], [36.0, 5.0], [-9.0, 0.0]]), boxes) == ([0, 1, 2, 0], 2)


def test_places_on_and_beside_a_grid():
    boxes = np.array([[0, 0, 10, 10], [10, 10, 20, 20], [5, 0, 15, 10]], dtype=float)
    assert places(boxes, (20, 20), 2, 2, False).tolist() == [[0, 0], [1, 1], [0, 0.5]]
    with pytest.raises(ValueError, match="2 x 2 has 4 objects, got 3 boxes"):
        places(boxes, (20, 20), 2, 2, True)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(boxes=[]), "has no objects"),
        (dict(boxes=[[1, 2, 3]]), r"array \(1, 3\)"),
        (dict(boxes=[[5, 5, 5, 9]], target=0), "expected x1 < x2"),
        (dict(boxes="abc"), "lists .x1, y1, x2, y2. of numbers"),
        (dict(target=3), "the target 3 is none of the 3 objects"),
        (dict(target=True), "the target True is none"),
        (dict(fixations={"eve": []}), "viewer eve has a scanpath without fixations"),
        (dict(fixations=[[[1, 2, 3]]]), "pairs of finite numbers"),
        (dict(fixations=[["x"]]), "pairs of numbers"),
        (dict(fixations=7), "a list of scanpaths"),
        (dict(image=None), "expected an object with image"),
    ],
)
def test_bad_scenes_are_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ScanpathFolder(write(tmp_path, SCENE | dict(split="train") | change))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scenes at"):
        ScanpathFolder(tmp_path)
    wrong = ScanpathFolder(write(tmp_path, SCENE | dict(split="train", size=[41, 20])))
    with pytest.raises(ValueError, match=r"\(40, 20\) pixels, the file says \[41, 20\]"):
        wrong.scene(0)
    with pytest.raises(FileNotFoundError, match="no image at"):
        ScanpathFolder(write(tmp_path, SCENE | dict(split="train", image="b.png"))).scene(0)
    with pytest.raises(ValueError, match="has no scanpath in split 'val'"):
        ScanpathFolder(write(tmp_path, SCENE | dict(split="train")), "val")
    with pytest.raises(ValueError, match=r"is a grid of \[1, 3\], the network has 6 x 10"):
        ScanpathFolder(write(tmp_path, SCENE | dict(split="train", grid=[1, 3]))).scene(0)
    with pytest.raises(ValueError, match="holds the set 'x', expected 'amazon'"):
        ScanpathFolder(write(tmp_path, SCENE, name="x"), name="amazon")
    (tmp_path / "scenes.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON file"):
        ScanpathFolder(tmp_path)
    (tmp_path / "scenes.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no scenes"):
        ScanpathFolder(tmp_path)


def test_splits_are_disjoint(tmp_path):
    write(tmp_path, *[SCENE] * 20)
    for by, total in (("scene", 20), ("trial", 40)):
        sizes = [len(ScanpathFolder(tmp_path, split, by=by)) for split in ("train", "val", "test")]
        assert sum(sizes) == 40 and min(sizes) >= 4 and total
    parts = divide(20, 0)
    assert sorted(i for part in parts.values() for i in part) == list(range(20)) and divide(20, 0) == parts != divide(
        20, 1
    )


def test_one_object_and_free_viewing(tmp_path):
    scene = dict(image="a.png", boxes=[[0, 0, 40, 20]], target=None, fixations=[[[3, 3], [4, 4]]], split="train")
    found = ScanpathFolder(write(tmp_path, scene)).scene(0)
    assert found.paths == [[0, 0]] and found.target is None and found.viewers == ["0"]


@pytest.mark.parametrize("masks", [False, True])
def test_amazon(masks, tmp_path):
    archives = made_up_scanpaths.amazon(tmp_path, masks)
    with pytest.raises(ValueError, match="amazon has 100 images, Amazon.json names 3"):
        preparer("amazon")("amazon", archives, tmp_path / "set")
    found = preparer("amazon")("amazon", archives, tmp_path / "set", complete=False)
    assert found["counts"] == dict(scanpaths=18, too_long_or_short=0, empty=0, masks=3 * masks, scenes=3)
    scene = ScanpathFolder(tmp_path / "set", "train", rows=6, cols=14, name="amazon").scene(0)
    assert len(scene.boxes) == 84 and scene.target == 49 and scene.places[49].tolist() == [3, 7]
    # every viewer has the own scanpath
    assert [path[0] for path in scene.paths] == [1, 2, 3, 4, 5, 6] and scene.paths[0][1:] == [49, 49]


def test_amazon_drops_outliers_of_length_and_needs_a_target(tmp_path):
    (archive,) = made_up_scanpaths.amazon(tmp_path)
    folder = tmp_path / "open"
    zipfile.ZipFile(archive).extractall(folder)
    path = folder / "AmazonCovers" / "Amazon.json"
    table = json.loads(path.read_text())
    table["1.jpg"]["fixations"]["1"] *= 30
    path.write_text(json.dumps(table))
    found = preparer("amazon")("amazon", [folder], tmp_path / "a", complete=False)
    assert found["counts"]["too_long_or_short"] == 1 and found["counts"]["scanpaths"] == 17
    table["2.jpg"]["ground_truth"] = [dict(xmin=900, xmax=950, ymin=900, ymax=950)]
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="the target of 2.jpg meets none of its 84 books"):
        preparer("amazon")("amazon", [folder], tmp_path / "b", complete=False)
    (folder / "AmazonCovers" / "images" / "3.jpg").unlink()
    with pytest.raises(ValueError, match="the archives hold no image images/3.jpg"):
        path.write_text(json.dumps({"3.jpg": table["3.jpg"]}))
        preparer("amazon")("amazon", [folder], tmp_path / "c", complete=False)
    path.write_text(json.dumps({"1.jpg": {"fixations": {"1": [[1, 1]]}}}))
    with pytest.raises(ValueError, match="another layout"):
        preparer("amazon")("amazon", [folder], tmp_path / "d", complete=False)


def test_shelves(tmp_path):
    found = preparer("shelves")("shelves", made_up_scanpaths.shelves(tmp_path), tmp_path / "set")
    assert found["counts"] == dict(scanpaths=8, scenes=4)
    scene = ScanpathFolder(tmp_path / "set", "train", rows=2, cols=11, group="Q1").scene(0)
    assert scene.target == 3 and scene.paths == [[0, 12, 20]] * 2 and scene.boxes[0].tolist() == [0, 152, 152, 601]
    with pytest.raises(FileNotFoundError, match="no CSV table, only .'a.pkl', 'b.xlsx'.*Pickle files are not read"):
        preparer("shelves")("shelves", [zipped(tmp_path / "x.zip", {"a.pkl": b"x", "b.xlsx": b"x"})], tmp_path / "y")
    with pytest.raises(ValueError, match=r"lacks the columns \['Question', 'Sub_ID', 'T_Package', 'X', 'Y'\]"):
        preparer("shelves")("shelves", [zipped(tmp_path / "z.zip", {"a.csv": "ID\n1"})], tmp_path / "y")


def test_cocosearch18(tmp_path):
    found = preparer("cocosearch18")("cocosearch18", made_up_scanpaths.cocosearch18(tmp_path), tmp_path / "set")
    assert found["counts"] == dict(scanpaths=6, wrong=1, empty=3, no_image=0, scenes=4)
    assert {split: len(names) for split, names in found["splits"].items()} == dict(train=3, val=1)
    source = ScanpathFolder(tmp_path / "set", "val", name="cocosearch18")
    scene = source.scene(0)
    assert scene.target == 59 and scene.paths == [[0, 32, 59]] * 2
    absent = [scene for scene in json.loads((tmp_path / "set" / "scenes.json").read_text())["scenes"]][-1]
    assert absent["target"] is None and list(absent["fixations"]) == ["9"]


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_mit1003(kind, tmp_path):
    found = preparer("mit1003")("mit1003", made_up_scanpaths.mit1003(tmp_path, kind), tmp_path / "set")
    assert found["counts"] == dict(scanpaths=8, empty=int(kind == "json"), scenes=4)
    scene = ScanpathFolder(tmp_path / "set", "train", rows=6, cols=8).scene(0)
    assert scene.target is None and scene.paths == [[9, 47, 19]] * 2


def test_synthetic_scenes_follow_the_rule_and_share_no_digit(monkeypatch):
    rng = np.random.default_rng(0)  # reading the digits takes seconds
    made = rng.integers(256, size=(60, 28, 28), dtype=np.uint8), rng.integers(10, size=60)
    monkeypatch.setattr(synthetic_scanpaths, "_digits", lambda: made)
    train, val, test = (SyntheticScanpaths(split, scenes=30) for split in ("train", "val", "test"))
    assert (len(train), len(val), val.scenes) == (30, 80, 20)
    seen = [{d.tobytes() for d in source.digits} for source in (train, val, test)]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    scene, again = val.scene(3), SyntheticScanpaths("val", scenes=30).scene(3)
    assert np.array_equal(scene.image, again.image) and scene.paths == again.paths
    assert all("SYNTHETIC" in viewer for viewer in scene.viewers)
    assert all((path[-1] == scene.target and scene.target not in path[:-1]) or len(path) == 20 for path in scene.paths)
    assert saliency(scene.image, scene.boxes).shape == (12,)


def test_the_rule_without_noise(monkeypatch):
    monkeypatch.setitem(draw_path.__globals__["WEIGHTS"], "noise", 0.0)
    alike = similarity(np.array([[1, 0], [1, 1], [2, 0], [7, 5]]), 0)
    assert alike.tolist() == [1.5, 0.5, 1.0, 0.0]
    at = np.array([[0.0, 0], [0, 1], [0, 2], [0, 3]])
    path = draw_path(at, np.array([0.0, 0, 0.2, 0.4]), np.zeros(4), 0, np.random.default_rng(0), 9)
    # the nearest and more salient, then its salient neighbour, then away from what is inhibited
    assert path == [2, 3, 1, 0]


def test_hulls():
    square = np.array([[0.5, 0.5], [1, 0], [0, 0], [1, 1], [0, 1.0]])
    assert convex_hull(square) == [1, 3, 4, 2]
    source = RandomHulls("val", sizes=(5, 7))
    assert len(source) == 1000 and len(source[0, 0, 1]["image"]) == 7
    assert torch.equal(source[0, 0, 0]["image"], RandomHulls("val", sizes=(5, 7))[0, 0, 0]["image"])
    with pytest.raises(ValueError, match="not on a line"):
        convex_hull(np.array([[0.0, 0], [1, 1], [2, 2]]))
    with pytest.raises(ValueError, match=r"sizes=\[2\]"):
        RandomHulls(sizes=[2])
