"""Questions with images and masks: scenes, own folders, published sets, and what bad data gets."""

import json
import re

import made_up_archives
import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.data import scenes
from visionattn.data.grounding import Question, QuestionFolder, other_questions
from visionattn.data.grounding_pipeline import GroundingSamples, GroundingTransform, collate_questions
from visionattn.data.grounding_prepare import PreparedQuestions, prepare, read_any_mask
from visionattn.data.scenes import Scenes


@pytest.fixture(scope="module")
def some_scenes():
    return Scenes("test", count=40)


def test_scenes_depend_on_seed_split_and_number_alone(some_scenes):
    again, other = Scenes("test", count=7), Scenes("test", count=7, seed=1)
    assert len(some_scenes) == 80 and len(again) == 14 and scenes.COUNTS["test"] == 1000
    for i in (0, 13):
        assert np.array_equal(again[i].image, some_scenes[i].image) and again[i].question == some_scenes[i].question
    assert not np.array_equal(other[0].image, some_scenes[0].image)


def test_questions_have_one_answer_in_their_scene(some_scenes):
    for i in range(len(some_scenes)):
        sample, shapes = some_scenes[i], some_scenes.foreground(i)
        kinds = [some_scenes.library[number][1:] for number, _, _ in some_scenes.plans[i // 2][0]]
        asked = set(re.findall(r"\w+", sample.question))
        colors, names = {c for _, c, _ in some_scenes.library}, {s for _, _, s in some_scenes.library}
        color, name = asked & colors, asked & names
        assert color or name
        fits = [k for k, (c, s) in enumerate(kinds) if {c} >= color and {s} >= name]
        assert some_scenes.named(i) == " and ".join(["color"] * len(color) + ["shape"] * len(name))
        assert len(fits) == 1 and np.array_equal(sample.mask == 1, shapes[fits[0]])
        assert sample.answer in {kinds[fits[0]][0], kinds[fits[0]][1], " ".join(kinds[fits[0]])}


def test_scenes_are_of_four_shapes_that_do_not_touch(some_scenes):
    for i in range(0, len(some_scenes), 2):
        shapes = some_scenes.foreground(i)
        assert len(shapes) >= 4 and sum(s.astype(int) for s in shapes).max() == 1
        image = some_scenes[i].image.astype(int)
        union = np.any(shapes, axis=0)
        assert len(np.unique(image[~union], axis=0)) == 1  # one background
        assert np.abs(image[union] - image[0, 0]).max(1).min() > 30


def test_splits_share_no_image_of_the_package():
    parts = [{path for path, _, _ in scenes._library(split)} for split in ("train", "val", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert all("train" in path.parts for path in parts[0] | parts[1]) and all("test" in p.parts for p in parts[2])


def test_bad_scenes_are_named(monkeypatch):
    for kwargs in (dict(side=64), dict(shapes=(3, 4)), dict(questions_each=5), dict(count=0)):
        with pytest.raises(ValueError, match="a side of at least 96, 4 to 6 shapes"):
            Scenes("test", **kwargs)
    monkeypatch.setattr(scenes, "find_spec", lambda name: None)
    scenes._library.cache_clear()
    with pytest.raises(ImportError, match=r"visionattn\[ground\]"):
        Scenes("test", count=1)


def test_other_question_is_of_the_same_image_if_there_is_one():
    questions, groups = ["a", "b", "b", "c", "d"], ["1", "1", "1", "2", "3"]
    others = other_questions(questions, groups)
    assert others[:3] == ["b", "a", "a"]
    assert others[3] != "c" and others[4] != "d" and others == other_questions(questions, groups)
    with pytest.raises(ValueError, match="every question is the same"):
        other_questions(["a", "a"], ["1", "2"])


# transforms


def test_mirrored_only_where_the_question_has_no_side():
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :2] = 255
    mask = (image[..., 0] > 0).astype(np.int64)
    flip = GroundingTransform((4, 6), flip=1.0)
    for text, column in (("where is the cup?", -1), ("what is on the left?", 0), ("the left-hand side?", 0)):
        result = flip(Question(image, mask, "x", question=text))
        assert result["mask"][0, column] == 1 and result["image"][0, 0, column] > 0
    still = GroundingTransform(8, flip=1.0, train=False)(Question(image, mask, "x", question="where?"))
    assert still["image"].shape == (3, 8, 8) and torch.equal(still["mask"], torch.from_numpy(mask))
    with pytest.raises(ValueError, match="flip=2 is a probability"):
        GroundingTransform(8, flip=2)


def test_batch_holds_questions_and_their_numbers(some_scenes):
    samples = GroundingSamples(some_scenes, GroundingTransform(32, train=False), replace=False)
    batch = collate_questions([samples[0, 0, 3], samples[0, 1, 8]])
    assert batch["question"] == [some_scenes.questions[3], some_scenes.questions[8]] and batch["number"] == [3, 8]
    assert batch["image"].shape == (2, 3, 32, 32) and batch["mask"].shape == (2, 96, 96)
    odd = {**samples[0, 0, 3], "mask": torch.zeros(5, 5)}
    with pytest.raises(ValueError, match=r"masks of the sizes \[\(5, 5\), \(96, 96\)\]; set data.val_batch_size=1"):
        collate_questions([odd, samples[0, 0, 3]])


# own folders


@pytest.fixture
def folder(tmp_path):
    entries = []
    for i in range(6):
        for kind, value in (("images", None), ("masks", 255)):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / f"{i}.png").write_bytes(made_up_archives.picture("x.png", value))
        entries.append(dict(image=f"{i}.png", mask=f"{i}.png", question=f"what is {i}?", answer="it"))
    write(tmp_path, entries)
    return tmp_path, entries


def write(folder, entries):
    (folder / "questions.json").write_text(json.dumps(entries))


def test_own_folder_is_divided_by_images(folder):
    root, entries = folder
    write(root, [*entries, {**entries[0], "question": "and where?"}])
    parts = [QuestionFolder(root, split) for split in ("train", "val", "test")]
    assert sorted(map(len, parts))[:2] in ([1, 1], [1, 2]) and sum(map(len, parts)) == 7
    assert not set(parts[0].groups) & (set(parts[1].groups) | set(parts[2].groups))
    sample = parts[0][0]
    assert sample.mask[:4].all() and not sample.mask[4:].any() and sample.question == parts[0].questions[0]


def test_own_folder_with_a_table_and_splits(folder):
    root, entries = folder
    (root / "questions.json").unlink()
    lines = ["image,mask,question,split"]
    for entry, split in zip(entries, ["train"] * 4 + ["val", "test"], strict=True):
        lines.append(f"{entry['image']},{entry['mask']},{entry['question']},{split}")
    (root / "questions.csv").write_text("\n".join(lines))
    assert [len(QuestionFolder(root, split)) for split in ("train", "val", "test")] == [4, 1, 1]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(question=" "), ValueError, "question number 1 has no question; add it"),
        (dict(mask="absent.png"), FileNotFoundError, "1 files are missing, first mask .*absent.png of image 0.png"),
        (dict(image="absent.png"), FileNotFoundError, "first image .*absent.png"),
        (dict(image="../x.png"), ValueError, "names '../x.png', expected a file in images"),
        (dict(split="training"), ValueError, "has the split '', expected one of train, val, test"),
    ],
)
def test_bad_entries_are_named(folder, change, error, message):
    root, entries = folder
    write(root, [{**entries[0], **change}, *entries[1:]])
    with pytest.raises(error, match=message):
        [QuestionFolder(root, split) for split in ("train", "val", "test")]


def test_bad_lists_and_files_are_named(folder):
    root, entries = folder
    for text, message in (("{", "is damaged"), ("[]", "no list of questions"), ("{}", "no list of questions")):
        (root / "questions.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            QuestionFolder(root)
    (root / "questions.csv").write_text("image")
    with pytest.raises(FileNotFoundError, match="holds 2 of questions.json and questions.csv, expected one"):
        QuestionFolder(root)
    (root / "questions.csv").unlink()
    write(root, [{**entry, "split": "train"} for entry in entries])
    with pytest.raises(ValueError, match="has no question in this split"):
        QuestionFolder(root, "val")
    (root / "images" / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot read image .*0.png"):
        QuestionFolder(root)[0]
    Image.new("L", (3, 4)).save(root / "masks" / "1.png")
    with pytest.raises(ValueError, match=r"1.png: the image is 8 x 10 .* its mask 4 x 3"):
        QuestionFolder(root)[1]


# published sets

COUNTS = dict(vizwiz=(5, 5, 0), textvqa_x=(4, 2, 0), vqs=(6, 6, 0), vqa_x=(5, 1, 6))


@pytest.mark.parametrize("name", COUNTS)
def test_published_layout_becomes_a_folder(name, tmp_path):
    archives = getattr(made_up_archives, name)(tmp_path)
    if name in ("textvqa_x", "vqs"):
        with pytest.raises(ValueError, match="the set has [0-9]+; give all archives of the set, or .* --partial"):
            prepare(name, archives, tmp_path / "whole")
    info = prepare(name, archives, tmp_path / "set", complete=False)
    assert tuple(len(info["splits"][split]) for split in ("train", "val", "test")) == COUNTS[name]
    assert info["counts"]["left_out"] == 0 and info["sources"]
    source = PreparedQuestions(tmp_path / "set", "train", name=name)
    sample = source[0]
    assert sample.image.shape == (8, 10, 3) and sample.mask[:4].all() and not sample.mask[4:].any()
    assert sample.question == source.questions[0] and sample.question.endswith("?")
    val = PreparedQuestions(tmp_path / "set", "val")
    assert not set(source.groups) & set(val.groups)
    with pytest.raises(ValueError, match=f"holds the set '{name}', expected 'other'"):
        PreparedQuestions(tmp_path / "set", name="other")


def test_what_archives_lack_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="0 files named train_grounding"):
        prepare("vizwiz", [made_up_archives.zipped(tmp_path / "a.zip", {"x.txt": "x"})], tmp_path / "set")
    for name, message in (("textvqa_x", "TextVQA_0.5.1_train.json"), ("vqa_x", "val2014_questions.json")):
        with pytest.raises(FileNotFoundError, match=message):
            prepare(name, [tmp_path / "a.zip"], tmp_path / "set")
    files = {"train_grounding.json": json.dumps({"a.jpg": dict(question="?")}), "val_grounding.json": "{}"}
    archive = made_up_archives.zipped(tmp_path / "b.zip", files)
    with pytest.raises(ValueError, match=r"of 1 questions 1 have no image \['a'\]; 1 have no mask \['a'\]; give all"):
        prepare("vizwiz", [archive], tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="no question is complete"):
        prepare("vizwiz", [archive], tmp_path / "set", complete=False)
    with pytest.raises(FileNotFoundError, match=r"visionattn data prepare NAME"):
        PreparedQuestions(tmp_path / "set")


def test_damaged_masks_are_named(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"x")
    np.save(tmp_path / "b.npy", np.zeros(3))
    for name, message in (("a", "cannot read mask .*a.npy"), ("b", r"shape \[3\] of float64, expected numbers")):
        with pytest.raises(ValueError, match=message):
            read_any_mask(tmp_path / f"{name}.npy")
