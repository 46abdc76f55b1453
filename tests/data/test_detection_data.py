"""Objects: COCO's format with everything that can be wrong in it, the tree crowns, augmentation."""

import json
import zipfile

import made_up_coco
import numpy as np
import pytest
import torch

from visionattn.data import trees
from visionattn.data.coco import CocoFolder, decode_mask
from visionattn.data.coco_prepare import prepare
from visionattn.data.detection import Scene
from visionattn.data.detection_transforms import DetectionTransform
from visionattn.data.trees import REGIONS, Trees


@pytest.fixture
def root(tmp_path):
    return made_up_coco.folder(tmp_path / "set")


def test_a_folder_gives_boxes_labels_and_masks_of_both_encodings(root):
    source = CocoFolder(root, "train", masks=True)
    assert (source.classes, source.category_ids, len(source)) == (["bar", "block"], [3, 7], 4)
    found = source[0]
    assert found.image.shape == (64, 80, 3) and found.labels.tolist() == [1, 2]
    for box, mask in zip(found.boxes.astype(int), found.masks, strict=True):
        expected = np.zeros((64, 80), np.uint8)
        expected[box[1] : box[3], box[0] : box[2]] = 1
        assert np.array_equal(decode_mask(mask), expected)
    assert source[3].boxes.shape == (0, 4) and source[3].masks == []
    assert len(CocoFolder(root, "train", keep_empty=False)) == 3


def change(content, key, **values):
    content[key][0].update(values)


BROKEN = {
    "which the list does not have": lambda c: change(c, "annotations", image_id=99),
    "unknown category 5; known: 3 \\(bar\\)": lambda c: change(c, "annotations", category_id=5),
    "annotation 2: bbox=\\[1, 2, 0, 4\\] has no area": lambda c: change(c, "annotations", bbox=[1, 2, 0, 4]),
    "lies outside the image of 80 x 64": lambda c: change(c, "annotations", bbox=[70, 2, 20, 4]),
    "is not finite": lambda c: change(c, "annotations", bbox=[float("nan"), 2, 20, 4]),
    "is not \\[left, top, width, height\\]": lambda c: change(c, "annotations", bbox=[1, 2]),
    "1 ids occur twice in 'images', first '2'": lambda c: change(c, "images", id=2),
    "ids occur twice in 'annotations'": lambda c: change(c, "annotations", id=3),
    "names occur twice in 'categories', first 'block'": lambda c: change(c, "categories", name="block"),
    "list 'annotations' is empty": lambda c: c["annotations"].clear(),
    "has no list 'images'": lambda c: c.pop("images"),
    "lacks \\['file_name'\\]": lambda c: c["images"][0].pop("file_name"),
    "leads out of the folder": lambda c: change(c, "images", file_name="../x.jpg"),
    "segmentation has a polygon": lambda c: change(c, "annotations", segmentation=[[1, 2, 3, 4]]),
    "segmentation is missing": lambda c: change(c, "annotations", segmentation=[]),
    "size \\[8, 8\\], the image has \\[64, 80\\]": lambda c: change(
        c, "annotations", segmentation=dict(size=[8, 8], counts=[64])
    ),
    "runs over 64 pixels": lambda c: change(c, "annotations", segmentation=dict(size=[64, 80], counts=[64])),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_wrong_list_is_refused_by_name(root, message):
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    BROKEN[message](content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"train.json.*{message}"):
        CocoFolder(root, "train", masks=True)


def test_missing_files_are_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no list of objects for split 'test'; looked for annotations"):
        CocoFolder(root, "test")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        CocoFolder(tmp_path / "nowhere")
    (root / "images" / "000000000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="names 4 images, 1 of them missing, first .*000000000002.jpg"):
        CocoFolder(root, "train")
    (root / "annotations" / "train.json").write_text("{")
    with pytest.raises(ValueError, match="train.json is no JSON"):
        CocoFolder(root, "train")


def test_unusable_boxes_can_be_dropped_and_crowds_are_kept_apart(root):
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    change(content, "annotations", bbox=[1, 2, 0, 4])
    content["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    source = CocoFolder(root, "train", bad_boxes="drop")
    assert source.dropped == 1 and source[0].crowd.tolist() == [True]
    assert len(DetectionTransform(train=False)(source[0])["target"]["boxes"]) == 0


def test_an_image_of_another_size_is_named(root):
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["images"][0]["width"] = 90
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1.jpg has 80 x 64 pixels, .* says 90 x 64"):
        CocoFolder(root, "train")[0]


def test_coco_is_checked_against_its_published_numbers(tmp_path):
    archives = made_up_coco.archives(tmp_path)
    with pytest.raises(ValueError, match="4 images and 2 categories, expected 118287 and 80; 0 of its images are mi"):
        prepare("coco", archives, tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="no instances_train2017.json in the archives"):
        prepare("coco", archives[:2], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    folders = []
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / "unpacked")
    folders = [tmp_path / "unpacked" / name for name in ("train2017", "val2017", "annotations")]
    (folders[0] / "000000000001.jpg").unlink()
    info = prepare("coco", folders, tmp_path / "part", complete=False)
    assert info["counts"] == dict(train=3, val=3)
    assert len(CocoFolder(tmp_path / "part", "train", masks=True)) == 3


# trees


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A made-up package with few trees in pictures of the true sizes."""
    monkeypatch.setattr(trees, "PICTURES", dict.fromkeys(trees.PICTURES, len(made_up_coco.CROWNS)))
    return made_up_coco.tree_wheel(tmp_path)


def test_splits_of_trees_share_no_pixel_and_cut_crowns_are_no_errors(wheel):
    covered = {}
    for split in REGIONS:
        for name, left, top, width, height in Trees(split, wheel=wheel).places:
            shape = (2472, 2299) if name == next(iter(trees.PICTURES)) else (1035, 1249)
            seen = covered.setdefault((split, name), np.zeros(shape, bool))
            seen[top : top + height, left : left + width] = True
    for name in trees.PICTURES:
        assert sum(found.astype(int) for (_, n), found in covered.items() if n == name).max() == 1
    source = Trees("train", wheel=wheel)
    first = source[source.places.index((next(iter(trees.PICTURES)), 0, 0, 383, 330))]
    # the second crown lies in it with 22 x 29 of its 41 x 41 pixels
    assert first.boxes.tolist() == [[0, 0, 40, 30], [359, 299, 383, 330]] and first.crowd.tolist() == [False, False]
    assert first.image.shape == (330, 383, 3)
    test = Trees("test", wheel=wheel)
    cut = [scene.crowd.tolist() for scene in test if len(scene.boxes)]
    assert cut == [[False]]  # 749 to 760 of 739 to 760


def test_another_package_is_refused(tmp_path, wheel, monkeypatch):
    monkeypatch.setattr(trees, "PICTURES", dict.fromkeys(trees.PICTURES, 4))
    with pytest.raises(ValueError, match="has 3 boxes, expected 4"):
        Trees("val", wheel=wheel)
    with pytest.raises(FileNotFoundError, match="pip download --no-deps deepforest"):
        Trees(wheel=tmp_path / "none.whl")
    (tmp_path / "bad.whl").write_bytes(b"x")
    with pytest.raises(ValueError, match="is no wheel"):
        Trees(wheel=tmp_path / "bad.whl")
    monkeypatch.setattr(trees, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps deepforest"):
        Trees()
    with pytest.raises(ValueError, match="tile=10 must"):
        Trees(tile=10, wheel=wheel)


# augmentation


def test_boxes_and_masks_follow_the_pixels_through_every_augmentation():
    image = np.zeros((60, 90, 3), np.uint8)
    image[20:35, 30:60] = 255
    box, mask = [30, 20, 60, 35], np.asfortranarray((image[..., 0] > 0).astype(np.uint8))
    from pycocotools import mask as coder

    scene = Scene(image, [box], [1], "x", masks=[coder.encode(mask)])
    transform = DetectionTransform(crop=48, hflip=0.5, vflip=0.5, turn=0.5, masks=True, min_visible=0.2)
    kept, shapes = 0, set()
    for seed in range(40):
        torch.manual_seed(seed)
        found = transform(scene)
        bright, target = found["image"][0] > 0.5, found["target"]
        assert found["image"].shape == (3, 48, 48)
        if len(target["boxes"]) == 0:
            assert bright.sum() < 0.2 * 15 * 30
            continue
        kept += 1
        rows, columns = bright.nonzero().unbind(1)
        x0, y0, x1, y1 = target["boxes"][0].tolist()
        assert (x0, y0, x1, y1) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert torch.equal(target["masks"][0].bool(), bright)
        shapes.add((x1 - x0) > (y1 - y0))
    assert kept > 20 and shapes == {True, False}


def test_scaling_moves_boxes_and_evaluation_changes_nothing():
    scene = Scene(np.zeros((60, 90, 3), np.uint8), [[30, 20, 60, 35]], [1], "x")
    doubled = DetectionTransform(scale=(2.0, 2.0), hflip=0.0)(scene)
    assert doubled["image"].shape == (3, 120, 180) and doubled["target"]["boxes"].tolist() == [[60, 40, 120, 70]]
    plain = DetectionTransform(crop=32, scale=(2.0, 2.0), train=False)(scene)
    assert plain["image"].shape == (3, 60, 90) and plain["target"]["boxes"].tolist() == [[30, 20, 60, 35]]


@pytest.mark.parametrize("settings", [dict(crop=8), dict(scale=(1.2, 1.0)), dict(hflip=2.0), dict(min_visible=-1)])
def test_settings_outside_their_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DetectionTransform(**settings)
