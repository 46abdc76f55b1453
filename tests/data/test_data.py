"""Reading images, sources and samplers."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data.datasets import EmbeddedDigits, HuggingFaceDataset, ImageFolder
from visionattn.data.images import read_image
from visionattn.data.pipeline import EpochSampler, Samples, collate


def make_folder(root, count=3):
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.randint(0, 255, (20, 30, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "I;16", "1"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_every_kind_of_picture_is_read(tmp_path, mode, in_chans):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 5), 32768, dtype=np.uint16)).save(path)
    else:
        Image.new("RGB", (5, 4), (128, 128, 128)).convert(mode).save(path)
    image = read_image(path, in_chans)
    assert image.size == (5, 4) and len(image.getbands()) == in_chans
    if mode != "1":
        assert abs(np.asarray(image).mean() - 128) < 4


@pytest.mark.parametrize("fault", ["empty", "text", "truncated"])
def test_broken_picture_is_named(tmp_path, fault):
    path = tmp_path / "broken.jpg"
    Image.new("RGB", (64, 64), (9, 200, 30)).save(path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not a picture", "truncated": data[: len(data) // 2]}[fault])
    with pytest.raises(ValueError, match="broken.jpg"):
        read_image(path)


def test_broken_picture_is_skipped_on_request(tmp_path):
    root = make_folder(tmp_path)
    (root / "train" / "cat" / "1.png").write_bytes(b"")
    source = ImageFolder(root, "train")
    to_tensor = lambda image: torch.from_numpy(np.array(image))  # noqa: E731
    with pytest.raises(ValueError, match=r"1\.png.*on_error=skip"):
        Samples(source, to_tensor)[(0, 0, 1)]
    replaced = Samples(source, to_tensor, on_error="skip")[(0, 0, 1)]
    assert replaced["name"].endswith("2.png") and "1.png" in replaced["skipped"][0]
    batch = collate([Samples(source, to_tensor, on_error="skip", replace=False)[(0, 0, i)] for i in range(3)])
    assert len(batch["image"]) == 2 and len(batch["skipped"]) == 1


@pytest.mark.parametrize("remove", ["", "train", "classes", "images"])
def test_incomplete_folder_is_refused(tmp_path, remove):
    if remove != "":
        (tmp_path / "train").mkdir()
    if remove == "images":
        (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        ImageFolder(tmp_path, "train")


def test_unknown_class_in_validation_is_refused(tmp_path):
    root = make_folder(tmp_path)
    with pytest.raises(ValueError, match="dog"):
        ImageFolder(root, "val", classes=["cat"])


def test_digits_are_split_without_overlap():
    train, val = EmbeddedDigits("train"), EmbeddedDigits("val")
    assert (len(train), len(val)) == (4000, 1000)
    assert not set(train.numbers) & set(val.numbers)
    image, label, name = val[0]
    assert image.size == (28, 28) and 0 <= label < 10 and name.startswith("digits[")


def test_huggingface_folder_is_read(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [Image.new("RGB", (6, 5), (i, 0, 0)) for i in range(4)], "label": [0, 1, 0, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part}).save_to_disk(tmp_path / "set")
    source = HuggingFaceDataset(tmp_path / "set")
    assert source.classes == ["a", "b"] and source[3][1] == 1 and source[3][0].size == (6, 5)
    with pytest.raises(FileNotFoundError, match="no split"):
        HuggingFaceDataset(tmp_path / "set", "test")


@pytest.mark.parametrize("repeats", [1, 3])
def test_epoch_order_depends_on_seed_and_epoch_only(repeats):
    def keys(seed, epoch, rank=0, world=1):
        sampler = EpochSampler(range(12), True, seed, repeats, rank, world)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert keys(0, 1) == keys(0, 1) != keys(0, 2)
    assert keys(0, 1) != keys(1, 1)
    assert len({position for rank in range(2) for _, position, _ in keys(0, 1, rank, 2)}) == 12


def test_sample_depends_on_its_key_only():
    source = EmbeddedDigits("val")
    samples = Samples(source, lambda image: torch.rand(3), seed=5)
    first = samples[(2, 7, 1)]["image"]
    torch.rand(10)
    assert torch.equal(first, samples[(2, 7, 1)]["image"])
    assert not torch.equal(first, samples[(2, 8, 1)]["image"])
