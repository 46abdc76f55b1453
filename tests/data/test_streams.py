"""Hugging Face sets as streams: order, shares of processes, faults, training."""

import io
import re

import datasets
import numpy as np
import pytest
import torch
from helpers import checkpoint, train_run
from PIL import Image
from torch.utils.data import DataLoader

from visionattn.cli import main
from visionattn.data.pipeline import EpochSampler, collate, samples_of
from visionattn.data.streams import HuggingFaceStream

FEATURES = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    # five seconds at the end of every pass over Parquet files
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def encoded(i):
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), (i, 2 * i, 3)).save(buffer, "png")  # the first channel is the number
    return buffer.getvalue()


def write(folder, split, sizes, broken=()):
    """A Parquet file for each of the sizes, of images that are numbered throughout."""
    folder.mkdir(exist_ok=True)
    first = 0
    for number, size in enumerate(sizes):
        numbers = range(first, first + size)
        rows = {
            "picture": [{"bytes": b"no picture" if i in broken else encoded(i), "path": None} for i in numbers],
            "kind": [i % 2 for i in numbers],
        }
        name = f"{split}-{number:05d}-of-{len(sizes):05d}.parquet"
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / name)
        first += size
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("set")
    write(root, "train", [6, 6, 6, 6])
    return write(root, "validation", [5, 2])


def stream(folder, split="train", **kwargs):
    return HuggingFaceStream(str(folder), split, image_column="picture", label_column="kind", buffer=5, **kwargs)


def numbers(source, *args):
    return [np.asarray(source[row][0])[0, 0, 0] for row in source.epoch_order(*args)]


def to_tensor(image):
    return torch.from_numpy(np.array(image)) + torch.rand(1)


@pytest.mark.parametrize("world_size", [1, 2, 3])  # whole files for each of 2 processes, each third row for 3
def test_processes_share_the_rows(folder, world_size):
    source = stream(folder)
    assert source.classes == ["cat", "dog"] and len(source) == 24
    orders = [numbers(source, 1, 0, rank, world_size) for rank in range(world_size)]
    assert {len(order) for order in orders} == {24 // world_size}
    assert sorted(i for order in orders for i in order) == list(range(24))
    assert orders[0] == numbers(source, 1, 0, 0, world_size)
    assert orders[0] != numbers(source, 2, 0, 0, world_size)
    assert orders[0] != numbers(source, 1, 7, 0, world_size)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_has_every_row_once_in_order(folder, world_size):
    source = stream(folder, "validation")
    shares = [numbers(source, None, 0, rank, world_size) for rank in range(world_size)]
    assert shares == [list(range(rank, 7, world_size)) for rank in range(world_size)]
    assert [source[row][1] for row in source.epoch_order(None, 0)] == [0, 1, 0, 1, 0, 1, 0]


def test_processes_have_equal_shares_of_unequal_files(tmp_path):
    source = stream(write(tmp_path / "set", "train", [3, 7]))
    orders = [numbers(source, 0, 0, rank, 2) for rank in range(2)]
    assert [len(order) for order in orders] == [5, 5]
    assert sorted(len(set(order)) for order in orders) == [3, 5]  # one begins anew, one leaves two out


@pytest.mark.parametrize("repeats, samples", [(1, None), (2, None), (1, 9)])
def test_batches_do_not_depend_on_the_workers(folder, repeats, samples):
    def batches(workers, first=0):
        data = samples_of(stream(folder), to_tensor, seed=4)
        sampler = EpochSampler(data, True, 4, repeats, rank=1, world_size=2, samples=samples)
        sampler.resume(2, first)
        found = list(DataLoader(data, 4, sampler=sampler, num_workers=workers, collate_fn=collate))
        assert sum(len(batch["label"]) for batch in found) == len(sampler) - first == (samples or 12) - first
        return found

    rest = batches(1, 4)  # of a run that was stopped after a batch
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches(0)[1:], rest, strict=True))
    for first, second in zip(batches(0), batches(2), strict=True):
        assert torch.equal(first["image"], second["image"]) and first["name"] == second["name"]


def test_broken_image_is_named_or_replaced_by_one_of_its_batch(tmp_path):
    source = stream(write(tmp_path / "set", "train", [6], broken={2, 3}))
    rows = list(source.epoch_order(None, 0))
    keys = [(0, position, row) for position, row in enumerate(rows)]
    with pytest.raises(ValueError, match=r"set/train\[2\].*on_error=skip"):
        samples_of(source, to_tensor).__getitems__(keys)
    batch = collate(samples_of(source, to_tensor, on_error="skip").__getitems__(keys))
    assert [int(image[0, 0, 0]) for image in batch["image"]] == [0, 1, 4, 4, 4, 5]
    assert len(batch["skipped"]) == 3 and "train[3]" in batch["skipped"][1]
    left_out = samples_of(source, to_tensor, on_error="skip", replace=False)
    assert len(collate(left_out.__getitems__(keys))["image"]) == 4
    with pytest.raises(ValueError, match="none of a batch of 2"):
        samples_of(source, to_tensor, on_error="skip").__getitems__(keys[2:4])


def test_what_does_not_fit_the_set_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no split 'test', only train, validation"):
        stream(folder, "test")
    with pytest.raises(FileNotFoundError, match=r"data\.path"):
        stream(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no column 'image', only picture, kind"):
        HuggingFaceStream(str(folder))
    with pytest.raises(ValueError, match="3 classes other than the 2"):
        stream(folder, classes=["a", "b", "c"])
    with pytest.raises(ValueError, match="24 images for 30 processes"):
        stream(folder).epoch_order(0, 0, 0, 30)
    with pytest.raises(ValueError, match="ended after 24 of 99 images"):
        list(stream(folder, samples={"train": 99}).epoch_order(0, 0))


def test_labels_without_names_take_those_of_the_configuration(tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    rows = {"picture": [{"bytes": encoded(i), "path": None} for i in range(3)], "kind": [0, 1, 2]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"no names.*data\.classes"):
        stream(tmp_path)
    source = stream(tmp_path, classes=["cat", "dog"])
    rows = list(source.epoch_order(None, 0))
    assert source[rows[1]][1] == 1
    with pytest.raises(ValueError, match=r"train\[2\] has the label 2, there are 2 classes"):
        source[rows[2]]


@pytest.mark.parametrize(
    "kind, label, number",
    [
        ("string", "dog", 1),
        ("bool", True, 1),
        ("string", "bird", None),
        ("string", "1", None),
        ("float32", 1.0, None),
        (["int64"], [1], None),
        ("int64", None, None),
        ("int64", -1, None),
    ],
)
def test_labels_are_numbers_or_names_of_classes(tmp_path, kind, label, number):
    column = datasets.Sequence(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
    features = datasets.Features({"picture": datasets.Image(), "kind": column})
    rows = {"picture": [{"bytes": encoded(0), "path": None}], "kind": [label]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    source = stream(tmp_path, classes=["cat", "dog"])
    (row,) = source.epoch_order(None, 0)
    if number is not None:
        assert source[row][1] == number and type(source[row][1]) is int
        return
    with pytest.raises(ValueError, match=rf"train\[0\] has the label {re.escape(repr(label))}, there are 2 classes"):
        source[row]


def test_folder_of_images_by_class_is_streamed(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "0.png").write_bytes(encoded(9))
    source = HuggingFaceStream(str(tmp_path))
    image, label, name = source[list(source.epoch_order(None, 0))[1]]
    assert image.size == (20, 30) and label == 1 and name.endswith("train/dog/0.png")


def test_run_on_a_stream_is_evaluated(folder, tmp_path, capsys):
    settings = [
        "model=biformer_nano",
        "model.model_name=test_biformer",
        "data=hf_stream",
        f"data.path={folder}",
        "data.image_column=picture",
        "data.label_column=kind",
        "data.workers=1",
        "data.batch_size=6",
        "data.buffer=8",
        "+data.transform.input_size=[3,32,32]",
        "task.warmup_epochs=0",
        "~logger.tensorboard",
    ]
    run = train_run(settings, tmp_path, "run", "trainer.max_epochs=1")
    assert checkpoint(run)["hyper_parameters"]["classes"] == ["cat", "dog"] and checkpoint(run)["global_step"] == 4
    main(["eval", str(run)])
    assert '"images": 7' in capsys.readouterr().out
