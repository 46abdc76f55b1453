"""Splits by group, folders of images and masks, reading them."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from visionattn.data.masks import MaskFolder, read_mask, read_pixels, survey
from visionattn.data.segmentation import IGNORE
from visionattn.data.splits import group_names, split_groups

TWO = ["background", "foreground"]
THREE = ["background", "disc", "cup"]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array)).save(path)
    return path


def make_pairs(images, masks, names, shape=(6, 8)):
    for number, name in enumerate(names):
        save(images / f"{name}.png", np.full((*shape, 3), number, dtype=np.uint8))
        mask = np.zeros(shape, dtype=np.uint8)
        mask[: number % 3] = 255
        save(masks / f"{name}.png", mask)


def test_groups_are_not_divided():
    groups = [f"p{i // 3}" for i in range(60)]
    splits = split_groups(groups, val=0.2, test=0.2)
    members = {name: {groups[i] for i in numbers} for name, numbers in splits.items()}
    assert sorted(i for numbers in splits.values() for i in numbers) == list(range(60))
    assert len(members["val"]) == len(members["test"]) == 4 and len(members["train"]) == 12
    assert not members["train"] & members["val"] and not members["test"] & (members["train"] | members["val"])
    # the order of the images does not matter, the seed does
    turned = split_groups(groups[::-1], val=0.2, test=0.2)
    assert {groups[::-1][i] for i in turned["test"]} == members["test"]
    assert split_groups(groups, seed=1)["test"] != split_groups(groups)["test"]


def test_every_group_is_tested_in_one_fold():
    groups = [str(i // 2) for i in range(20)]
    tested = [split_groups(groups, fold=fold, folds=5)["test"] for fold in range(5)]
    assert sorted(i for numbers in tested for i in numbers) == list(range(20))
    assert all(split_groups(groups, val=0, fold=0, folds=10)[s] for s in ("train", "test"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(val=1.0), "val=1.0"),
        (dict(fold=1), "fold=1, folds=None"),
        (dict(fold=5, folds=5), "0 <= fold < folds"),
        (dict(fold=0, folds=9), "<= 4 groups"),
        (dict(val=0.5, test=0.5), "4 groups are too few"),
    ],
)
def test_impossible_split_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        split_groups(["a", "b", "c", "d"], **options)


def test_group_pattern_finds_the_patient():
    assert group_names(["p1_left", "p2_right"], r"^(p\d)_") == ["p1", "p2"]
    with pytest.raises(ValueError, match="1 of 2 names, first 'x'"):
        group_names(["p1_left", "x"], r"p\d")
    with pytest.raises(ValueError, match="no regular expression"):
        group_names(["a"], "(")


def test_three_layouts_are_found(tmp_path):
    names = [f"p{i // 2}_{i % 2}" for i in range(20)]
    make_pairs(tmp_path / "a" / "val" / "images", tmp_path / "a" / "val" / "masks", names[:3])
    make_pairs(tmp_path / "b" / "images" / "val", tmp_path / "b" / "masks" / "val", names[:4])
    make_pairs(tmp_path / "c" / "images", tmp_path / "c" / "masks", names)
    assert len(MaskFolder(tmp_path / "a", "val")) == 3 and len(MaskFolder(tmp_path / "b", "val")) == 4
    parts = {split: MaskFolder(tmp_path / "c", split, group_pattern="^(p[0-9])") for split in ("train", "val", "test")}
    groups = {split: {part[i].group for i in range(len(part))} for split, part in parts.items()}
    assert sum(map(len, parts.values())) == 20 and sum(map(len, groups.values())) == 10
    sample = MaskFolder(tmp_path / "a", "val")[1]
    assert sample.name == "p0_1" and sample.image.shape == (6, 8, 3) and sample.mask.sum() == 8
    assert survey(MaskFolder(tmp_path / "a", "val"))["empty"] == ["p0_0"]
    with pytest.raises(FileNotFoundError, match="'test'"):
        MaskFolder(tmp_path / "b", "test")
    with pytest.raises(ValueError, match="split='dev'"):
        MaskFolder(tmp_path / "b", "dev")
    with pytest.raises(ValueError, match="not split yet"):
        MaskFolder(tmp_path / "b", "val", fold=0, folds=2)


def test_bad_pairs_are_named_and_counted(tmp_path):
    images, masks = tmp_path / "images" / "train", tmp_path / "masks" / "train"
    make_pairs(images, masks, ["a", "b", "c"])
    (masks / "b.png").rename(masks / "d.png")
    with pytest.raises(ValueError, match=r"1 images have no mask \['b'\], 1 masks have no image \['d'\]"):
        MaskFolder(tmp_path)
    (masks / "d.png").rename(masks / "b.png")
    save(masks / "c.png", np.zeros((5, 8), dtype=np.uint8))
    (images / "b.png").write_bytes(b"nothing")
    source = MaskFolder(tmp_path)
    with pytest.raises(ValueError, match="c.png: the image is 6 x 8 .* mask 5 x 8"):
        source[2]
    faults = survey(source)["faults"]
    assert len(faults) == 2 and "b.png" in faults[0]
    save(images / "a.jpg", np.zeros((6, 8), dtype=np.uint8))
    with pytest.raises(ValueError, match="have one stem"):
        MaskFolder(tmp_path)
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        MaskFolder(tmp_path)


def test_mask_suffix_leaves_other_files_out(tmp_path):
    make_pairs(tmp_path / "train" / "images", tmp_path / "spare", ["a", "b"])
    for name in "ab":
        save(tmp_path / "train" / "masks" / f"{name}_vessels.gif", np.ones((6, 8), dtype=np.uint8) * 255)
        save(tmp_path / "train" / "masks" / f"{name}_lesions.gif", np.zeros((6, 8), dtype=np.uint8))
    assert MaskFolder(tmp_path, mask_suffix="_vessels")[1].mask.all()


def test_binary_masks_of_every_kind(tmp_path):
    truth = np.zeros((8, 8), dtype=np.uint8)
    truth[2:5] = 1
    palette = Image.fromarray(truth)
    palette.putpalette([0, 0, 0, 200, 200, 200])
    palette.save(tmp_path / "palette.png")
    files = [tmp_path / "palette.png", save(tmp_path / "labels.png", truth), save(tmp_path / "grey.gif", truth * 255)]
    files += [save(tmp_path / "deep.png", truth.astype(np.uint16) * 65535), save(tmp_path / "bits.png", truth > 0)]
    files += [save(tmp_path / "rgba.png", np.dstack([truth * 255] * 3 + [np.full_like(truth, 255)]))]
    for path in files:
        assert (read_mask(path, TWO) == truth).all(), path
    with pytest.raises(ValueError, match="values up to 100.*set threshold"):
        read_mask(save(tmp_path / "odd.png", truth * 100), TWO)
    assert (read_mask(tmp_path / "odd.png", TWO, threshold=1) == truth).all()


def test_labels_and_palettes(tmp_path):
    truth = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    assert (read_mask(save(tmp_path / "labels.png", truth), THREE) == truth).all()
    with pytest.raises(ValueError, match=r"outside the 3 classes.*\[7\]"):
        read_mask(save(tmp_path / "wrong.png", truth + np.uint8([0, 6, 0, 0])), THREE)
    colours = np.array([[[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 255]]], dtype=np.uint8)
    palette = dict(background=[0, 0, 0], disc=[255, 0, 0], cup=[0, 255, 0], ignore=[255, 255, 255])
    assert (read_mask(save(tmp_path / "rgb.png", colours), THREE, palette) == [[0, 1, 2, IGNORE]]).all()
    with pytest.raises(ValueError, match="in colour; give palette"):
        read_mask(tmp_path / "rgb.png", THREE)
    palette["ignore"] = [9, 9, 9]
    with pytest.raises(ValueError, match=r"first \[255, 255, 255\] at row 0, column 3"):
        read_mask(tmp_path / "rgb.png", THREE, palette)
    with pytest.raises(ValueError, match=r"differ in \['cup'\]"):
        MaskFolder(tmp_path, classes=THREE, palette=dict(background=[0, 0, 0], disc=[1, 1, 1]))
    with pytest.raises(ValueError, match="different names"):
        MaskFolder(tmp_path, classes=["a", "a"])


def test_depth_of_images_is_kept(tmp_path):
    deep = (np.arange(48, dtype=np.uint16) * 1000).reshape(6, 8)
    pixels = read_pixels(save(tmp_path / "grey.png", deep), 1)
    assert pixels.dtype == np.uint16 and (pixels[..., 0] == deep).all()
    tifffile.imwrite(tmp_path / "rgb.tif", np.dstack([deep, deep, deep]), photometric="rgb", compression="zlib")
    assert (read_pixels(tmp_path / "rgb.tif", 3) == deep[..., None]).all()
    assert abs(read_pixels(tmp_path / "rgb.tif", 1)[..., 0].astype(int) - deep).max() <= 1
    floats = save(tmp_path / "float.tif", np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4))
    assert read_pixels(floats, 3).shape == (3, 4, 3) and read_pixels(floats, 1).min() == -1
    (tmp_path / "bad.tif").write_bytes(b"II*\0nonsense")
    with pytest.raises(ValueError, match="bad.tif"):
        read_pixels(tmp_path / "bad.tif")
    with pytest.raises(FileNotFoundError, match="none.png"):
        read_pixels(tmp_path / "none.png")


def test_patients_of_folders_that_are_split_already_are_known(tmp_path):
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
            Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / split / kind / "p1_a.png")
    assert MaskFolder(tmp_path, "train").groups == []
    assert MaskFolder(tmp_path, "train", group_pattern="^(p1)_").groups == ["p1"]
