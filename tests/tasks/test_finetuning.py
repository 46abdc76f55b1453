"""Training that starts from another run, on the folder that travels with the package."""

import json

import pytest
import torch
from PIL import Image

from visionattn.cli import main
from visionattn.data.datasets import EmbeddedDigits, ImageFolder
from visionattn.data.example_folder import CLASSES, write_example

SMALL = (
    "model=biformer_nano",
    "model.pretrained=false",
    "+model.depths=[1,1,1,1]",
    "data.workers=0",
    "trainer.max_epochs=1",
)


def test_the_example_has_twenty_images_that_no_training_on_the_digits_saw(tmp_path):
    assert write_example(tmp_path / "new") == {"train": 12, "val": 8}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new"]
    digits = EmbeddedDigits("train")
    seen = {digits[i][0].tobytes() for i in range(len(digits))}
    names = set()
    for split, count in (("train", 12), ("val", 8)):
        source = ImageFolder(tmp_path / "new", split, in_chans=1)
        assert source.classes == sorted(CLASSES) and len(source) == count
        images = [source[i][0].tobytes() for i in range(count)]
        assert not seen & set(images)
        names |= set(images)
    picture = Image.open(tmp_path / "new" / "picture.png")
    assert len(names) == 20 and picture.size == (28, 28) and picture.tobytes() not in names | seen


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "kept").write_text("x")
    with pytest.raises(SystemExit, match="kept exists; give the name of a folder to make"):
        main(["data", "example", str(tmp_path / "kept")])
    assert (tmp_path / "kept").read_text() == "x"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run on the example, and the folder of both."""
    folder = tmp_path_factory.mktemp("runs")
    main(["data", "example", str(folder / "example")])
    sized = "data.in_chans=1", "+data.transform.input_size=[1,32,32]", "+data.transform.mean=[0.13]"
    where = f"output_dir={folder}", f"data.root={folder / 'example'}"
    main(["train", "experiment=finetune", "name=first", *SMALL, *where, *sized, "+data.transform.std=[0.31]"])
    return folder


def weights(folder, run):
    content = torch.load(folder / run / "checkpoints" / "last.ckpt", weights_only=True)
    return {k.removeprefix("model."): v for k, v in content["state_dict"].items() if k.startswith("model.")}


def train(folder, name, *changes):
    still = "task.lr=0", "task.warmup_lr=0", "task.min_lr=0", "trainer.max_epochs=1", "data.workers=0"
    where = f"output_dir={folder}", f"name={name}", f"data.root={folder / 'example'}"
    main(["train", "experiment=finetune", *where, *still, *changes])


def test_other_classes_get_a_new_classifier_and_everything_else_is_kept(runs, capsys):
    for split in ("train", "val"):
        (runs / "example" / split / "nine").rename(runs / "example" / split / "other")
    try:
        train(runs, "second", f"start_from={runs / 'first'}")
    finally:
        for split in ("train", "val"):
            (runs / "example" / split / "other").rename(runs / "example" / split / "nine")
    first, second = weights(runs, "first"), weights(runs, "second")
    changed = {key for key in first if not torch.equal(first[key], second[key]) and "running" not in key}
    assert {key for key in changed if "num_batches" not in key} == {"head.fc.weight"} | (changed & {"head.fc.bias"})
    facts = json.loads((runs / "second" / "run.json").read_text())
    assert facts["classes"] == ["four", "other", "seven", "three"] and facts["in_chans"] == 1
    assert facts["data"]["input_size"] == [1, 32, 32] and facts["data"]["mean"] == [0.13]
    assert facts["model"]["model_name"] == "biformer_nano"


def test_the_same_classes_keep_their_classifier(runs):
    train(runs, "third", f"start_from={runs / 'first'}")
    first, third = weights(runs, "first"), weights(runs, "third")
    assert torch.equal(first["head.fc.weight"], third["head.fc.weight"])


def test_a_start_that_is_no_run_is_named(runs, tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint at .*nowhere"):
        train(runs, "fourth", f"start_from={tmp_path / 'nowhere'}")
    with pytest.raises(SystemExit, match="start_from=.* is for classification, not for task=segmentation"):
        main(["train", "experiment=embedded/nuclei", f"output_dir={tmp_path}", f"start_from={runs / 'first'}"])
