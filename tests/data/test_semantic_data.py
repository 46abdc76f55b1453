"""ADE20K, Cityscapes and COCO-Stuff from made-up archives to samples, and the transforms of scenes."""

import io
import json
import zipfile

import made_up_scenes
import numpy as np
import pytest
import torch
from made_up_archives import zipped
from made_up_scenes import COUNTS, ade20k, cityscapes, coco_stuff
from PIL import Image
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from visionattn.data.archives import unpack
from visionattn.data.pipeline import EpochSampler
from visionattn.data.published import preparer
from visionattn.data.segmentation import IGNORE, Sample
from visionattn.data.segmentation_pipeline import SegmentationSamples
from visionattn.data.segmentation_transforms import SegmentationTransform
from visionattn.data.semantic import SemanticDataset
from visionattn.data.semantic_layouts import LAYOUTS, UNKNOWN, color_map
from visionattn.data.semantic_prepare import prepare
from visionattn.data.semantic_transforms import PhotometricDistortion, fitted, random_crop

LAST = dict(ade20k=149, cityscapes=18, coco_stuff=170)  # the third band's label


def prepared(name, folder, **kwargs):
    (folder / "files").mkdir()
    return prepare(name, getattr(made_up_scenes, name)(folder / "files"), folder / "set", complete=False, **kwargs)


@pytest.mark.parametrize("name", LAYOUTS)
def test_archives_become_a_folder_of_the_same_files(name, tmp_path):
    told = []
    info = prepared(name, tmp_path, progress=told.append)
    assert preparer(name) is prepare and info["counts"] == COUNTS and told
    assert info == json.loads((tmp_path / "set" / "dataset.json").read_text())
    assert all(len(value) == 64 for value in info["sources"].values())
    for split, count in COUNTS.items():
        source = SemanticDataset(tmp_path / "set", split, name=name)
        assert len(source) == count and len(source.classes) == len(source.palette) == len(LAYOUTS[name].classes)
        sample = source[1]
        third = sample.mask.shape[1] // 3
        assert (sample.mask[:, :third] == IGNORE).all() and (sample.mask[:, -third:] == LAST[name]).all()
        assert (sample.mask[:, third + 1 : -third - 1] == 0).all()
        assert sample.image[0, 0, 0] > 190 and sample.image[0, -1, 2] > 190
    pixels = info["pixels"]["val"]
    assert {key for key, count in pixels.items() if count} == {"ignored", source.classes[0], source.classes[LAST[name]]}
    # the files are the makers', byte by byte
    archive = (tmp_path / "files").glob("*.zip")
    bodies = {body for path in archive for body in map(zipfile.ZipFile(path).read, zipfile.ZipFile(path).namelist())}
    kept = [path for path in (tmp_path / "set").rglob("*") if path.is_file() and path.name != "dataset.json"]
    assert len(kept) == 16 and all(path.read_bytes() in bodies for path in kept)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_unpacked_folders_are_linked_and_left_as_they_are(tmp_path):
    (tmp_path / "files").mkdir()
    folders = unpack(coco_stuff(tmp_path / "files"), tmp_path / "coco")
    before = sorted(path for folder in folders for path in folder.rglob("*"))
    prepare("coco_stuff", folders, tmp_path / "set", complete=False)
    assert sorted(path for folder in folders for path in folder.rglob("*")) == before
    first = next(path for path in before if path.name == "000000000001.jpg")
    assert first.samefile(tmp_path / "set" / "images" / "train" / first.name)


def test_folders_of_another_file_system_are_copied(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("cross-device link")

    (tmp_path / "files").mkdir()
    folders = unpack(ade20k(tmp_path / "files"), tmp_path / "ade")
    monkeypatch.setattr("os.link", refuse)
    told = []
    prepare("ade20k", folders, tmp_path / "set", told.append, complete=False)
    assert sum(line.startswith("copying") for line in told) == 2
    assert len(SemanticDataset(tmp_path / "set", "train")) == 6
    assert (folders[0] / "ADEChallengeData2016" / "images" / "training" / "ADE_train_00000001.jpg").is_file()


def test_mappings_are_the_published_ones():
    city, stuff = LAYOUTS["cityscapes"].table(), LAYOUTS["coco_stuff"].table()
    # of cityscapesScripts: road, sidewalk, traffic light, sky, train, motorcycle, bicycle; parking, caravan, unlabelled
    assert city[[7, 8, 19, 23, 31, 32, 33]].tolist() == [0, 1, 6, 10, 16, 17, 18]
    assert set(city[[0, 3, 9, 29, 255]].tolist()) == {IGNORE}
    names = LAYOUTS["coco_stuff"].classes
    assert [names[stuff[number - 1]] for number in (1, 90, 92, 182)] == ["person", "toothbrush", "banner", "wood"]
    assert stuff[12 - 1] == UNKNOWN  # street sign
    assert LAYOUTS["ade20k"].classes[0] == "wall" and LAYOUTS["ade20k"].classes[149] == "flag"
    for layout in LAYOUTS.values():
        assert len(set(layout.classes)) == len(layout.classes) == len(layout.values) == len(layout.palette)
    assert color_map(3) == ((128, 0, 0), (0, 128, 0), (128, 128, 0)) and len(set(color_map(171))) == 171


def changed(archive, change):
    """The archive with its files put through ``change``."""
    with zipfile.ZipFile(archive) as content:
        files = {name: content.read(name) for name in content.namelist()}
    return [zipped(archive, change(files) or files)]


def labels_of(value, shape=(48, 64)):
    file = io.BytesIO()
    Image.fromarray(np.full(shape, value, np.uint8)).save(file, "PNG")
    return file.getvalue()


ROOT = "ADEChallengeData2016"
FIRST = f"{ROOT}/annotations/training/ADE_train_00000001.png"
FAULTS = {
    "1 images have no label file .'train/ADE_train_00000001'.": lambda files: files.pop(FIRST) and None,
    "1 label files have no image .'val/ADE_val_00000009'.": lambda files: files.update(
        {f"{ROOT}/annotations/validation/ADE_val_00000009.png": labels_of(1)}
    ),
    r"1 pairs are wrong; .*3072 pixels of values that the set does not have: .151.": lambda files: files.update(
        {FIRST: labels_of(151)}
    ),
    r"1 pairs are wrong; .*is 48 x 64 .height x width., its label file .* 40 x 64": lambda files: files.update(
        {FIRST: labels_of(1, (40, 64))}
    ),
    "mode RGB, expected one channel": lambda files: files.update({FIRST: labels_of(1, (48, 64, 3))}),
    "cannot read label file .*take it from the archive anew": lambda files: files.update({FIRST: b"no image"}),
    "ADE_train_00000001 occurs twice": lambda files: files.update({f"copy/{FIRST.replace(ROOT, 'x')}": labels_of(1)}),
    "hold no label file of ade20k .*expected ADEChallengeData2016.zip": lambda files: {
        name: body for name, body in files.items() if "annotations" not in name
    },
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults_are_named_and_nothing_is_left(message, tmp_path):
    (tmp_path / "files").mkdir()
    archives = changed(*ade20k(tmp_path / "files"), FAULTS[message])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare("ade20k", archives, tmp_path / "set", complete=False)
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_other_numbers_of_images_are_refused(tmp_path):
    message = r"cityscapes has .*'train': 2975, 'val': 500.* hold .*'train': 6, 'val': 2.*leftImg8bit_trainvaltest.zip"
    with pytest.raises(ValueError, match=message):
        prepare("cityscapes", cityscapes(tmp_path), tmp_path / "set")
    with pytest.raises(ValueError, match="expected one of ade20k"):
        prepare("ade", [], tmp_path / "set")


def test_prepared_folder_that_does_not_fit_is_refused(tmp_path):
    prepared("ade20k", tmp_path)
    root = tmp_path / "set"
    with pytest.raises(ValueError, match="holds the set 'ade20k', expected 'cityscapes'"):
        SemanticDataset(root, name="cityscapes")
    with pytest.raises(ValueError, match="no split 'test' with public labels"):
        SemanticDataset(root, "test")
    label = root / "labels" / "val" / "ADE_val_00000001.png"
    label.write_bytes(labels_of(200))
    with pytest.raises(ValueError, match=r"ADE_val_00000001.png has 3072 pixels of values .*\[200\]"):
        SemanticDataset(root, "val")[0]
    label.write_bytes(labels_of(1, (48, 60)))
    with pytest.raises(ValueError, match="48 x 64 .height x width., its mask 48 x 60"):
        SemanticDataset(root, "val")[0]
    label.unlink()
    with pytest.raises(FileNotFoundError, match="1 files are missing, first .*ADE_val_00000001.png"):
        SemanticDataset(root, "val")
    with pytest.raises(FileNotFoundError, match="visionattn data prepare"):
        SemanticDataset(tmp_path)


class Halves:
    """Red where the label is 1, blue where it is 2; the rest is not counted."""

    classes, in_chans = ["a", "b", "c"], 3

    def __len__(self):
        return 4

    def __getitem__(self, i):
        mask = np.full((60, 100 + i), IGNORE)
        mask[10:, :50], mask[10:, 50:] = 1, 2
        image = np.zeros((*mask.shape, 3), np.uint8)
        image[mask == 1, 0] = image[mask == 2, 2] = 200
        return Sample(image, mask, f"halves_{i}")


def test_crops_stay_aligned_and_are_completed():
    transform = SegmentationTransform("semantic", size=[64, 96], short_side=60, mean=[0.0], std=[1.0])
    transform.augment = v2.RandomHorizontalFlip()  # colours are compared
    samples = SegmentationSamples(Halves(), transform)
    agreed = []
    for position in range(16):
        item = samples[0, position, position % 4]
        image, mask = item["image"], item["mask"]
        assert image.shape == (3, 64, 96) and mask.shape == (64, 96) and mask.dtype == torch.int64
        for label, channel in ((1, 0), (2, 2)):
            agreed.append(((image[channel] > 0.4) == (mask == label)).float().mean().item())
    assert np.mean(agreed) > 0.97, agreed
    small = SegmentationTransform("semantic", size=[64, 96], short_side=60, scale=(0.5, 0.5))(Halves()[0])
    assert (small["image"][:, 30:] == 0).all() and (small["image"][:, :, 50:] == 0).all()
    assert (small["mask"][30:] == IGNORE).all() and set(small["mask"][6:30, :50].unique().tolist()) == {1, 2}


def test_no_class_takes_nearly_all_of_a_crop_where_that_can_be():
    torch.manual_seed(0)
    sample = Halves()[0]

    def shares(ratio):
        found = []
        for _ in range(40):
            part, _ = random_crop(sample, [40, 40], None, (1.0, 1.0), ratio)
            counts = np.bincount(part.mask[part.mask != IGNORE], minlength=3)
            found.append(counts.max() / counts.sum())
        return np.array(found)

    assert (shares(1.0) == 1).mean() > 0.25
    assert (shares(0.75) < 0.75).mean() > 0.9  # eleven boxes are drawn at most


def test_scales_reach_half_and_double_and_boxes_stay_inside():
    torch.manual_seed(1)
    sample, seen = Halves()[1], []
    for _ in range(200):
        part, sides = random_crop(sample, [30, 30], 60, (0.5, 2.0), 1.0)
        assert sides == [30, 30] and part.image.shape[:2] == part.mask.shape
        seen.append(30 / part.mask.shape[0])
    assert 0.5 <= min(seen) < 0.56 and 1.9 < max(seen) <= 2.0
    whole, sides = random_crop(sample, [512, 512], 30, (1.0, 1.0), 1.0)
    assert whole.mask.shape == sample.mask.shape and sides == [30, 50]


def test_evaluation_resizes_the_short_side_and_keeps_the_mask():
    item = SegmentationTransform("semantic", short_side=30, train=False)(Halves()[0])
    assert item["image"].shape == (3, 30, 50) and item["mask"].shape == (60, 100)
    assert fitted(100, 1000, 50) == (20, 200)  # the long side is at most four times the short one
    item = SegmentationTransform("semantic", train=False)(Halves()[0])
    assert item["image"].shape == (3, 60, 100)


def test_distortion_keeps_range_and_grey_stays_grey():
    torch.manual_seed(0)
    image, mask = torch.rand(3, 20, 20), torch.zeros(20, 20, dtype=torch.long)
    changes = []
    for _ in range(100):
        found, same = PhotometricDistortion()(image, mask)
        assert same is mask and found.min() >= 0 and found.max() <= 1 and found.shape == image.shape
        changes.append((found - image).abs().mean().item())
    assert min(changes) == 0 and max(changes) > 0.1
    grey, _ = PhotometricDistortion()(torch.rand(1, 20, 20), mask)
    assert grey.shape == (1, 20, 20)


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(recipe="default", short_side=512), "short_side=512 is for recipe='semantic'"),
        (dict(recipe="semantic", scale=(2.0, 0.5)), "scale=.2.0, 0.5. must be two growing numbers"),
        (dict(recipe="semantic", cat_max_ratio=0), "cat_max_ratio=0 lie in"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        SegmentationTransform(**given)


@pytest.mark.parametrize("repeats, world", [(1, 1), (1, 2), (3, 1)])
def test_epochs_of_any_length_go_on_in_the_data(repeats, world):
    data = TensorDataset(torch.arange(10))
    keys = dict(dataset=data, shuffle=True, seed=3, repeats=repeats, rank=world - 1, world_size=world)
    passes = EpochSampler(**keys)
    whole = []
    for number in range(12):
        passes.set_epoch(number)
        whole += [i for _, _, i in passes]
    for samples in (4, 7, 23):
        sampler, found = EpochSampler(**keys, samples=samples), []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            part = list(sampler)
            assert len(part) == len(sampler) == samples and len({position for _, position, _ in part}) == samples
            found += [i for _, _, i in part]
        assert found == whole[: 2 * samples]
    assert len(EpochSampler(data, shuffle=False, samples=3)) == 10
    with pytest.raises(ValueError, match="an epoch of 0 samples of 10 images"):
        EpochSampler(data, shuffle=True, samples=0)
