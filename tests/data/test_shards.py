"""Tar shards: written, indexed, read in any order, fetched by URL."""

import functools
import io
import json
import os
import signal
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import webdataset
from helpers import assert_same_weights, checkpoint, train_run
from PIL import Image
from torch.utils.data import DataLoader

from visionattn.cli import main
from visionattn.data import shard_cache
from visionattn.data.datasets import ImageFolder
from visionattn.data.pipeline import EpochSampler, Samples, collate
from visionattn.data.shard_cache import ShardCache
from visionattn.data.shard_source import Shards
from visionattn.data.shard_writing import write_shards
from visionattn.data.shards import check_shards, index_shards, read_index
from visionattn.tasks.stopping import LastCheckpoint


def make_folder(root, train=20, val=3):
    rng = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.randint(0, 255, (20, 30, 3), dtype=np.uint8))
                image.save(root / split / name / f"{name}.{i}.JPEG")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("shards") / "set"
    write_shards(folder, output, images=6)
    return output


def to_tensor(image):
    return torch.from_numpy(np.array(image)) + torch.rand(1)  # augmentation, in the least


def test_shards_hold_what_the_folder_holds(folder, shards):
    for split in ("train", "val"):
        expected, source = ImageFolder(folder, split), Shards(shards, split)
        assert source.classes == expected.classes and len(source) == len(expected)
        pictures = {
            np.asarray(image).tobytes(): label for image, label, _ in map(expected.__getitem__, range(len(expected)))
        }
        found = {np.asarray(image).tobytes(): label for image, label, _ in map(source.__getitem__, range(len(source)))}
        assert found == pictures
    assert "train-000000.tar:" in Shards(shards, "train")[0][2]
    labels = [set(shard.labels) for shard in read_index(shards / "train").shards]
    assert {0, 1} in labels  # not a class after the other


def test_same_folder_gives_the_same_bytes(folder, shards, tmp_path):
    write_shards(folder, tmp_path / "again", images=6, workers=1)
    for path in sorted(shards.rglob("*.*")):
        assert (tmp_path / "again" / path.relative_to(shards)).read_bytes() == path.read_bytes()


def test_webdataset_reads_what_was_written(shards):
    urls = [str(path) for path in sorted((shards / "train").glob("*.tar"))]
    stream = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpeg", "cls")
    source = Shards(shards, "train")
    for i, (image, label) in enumerate(stream):
        assert np.array_equal(image, np.asarray(source[i][0])) and label == source[i][1]
    assert i == len(source) - 1


def test_shards_that_webdataset_wrote_are_indexed(tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "x-%04d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(7):
            buffer = io.BytesIO()
            Image.new("L", (4 + i, 5)).save(buffer, "png")
            label = {"cls": i % 2} if i < 4 else {"json": {"label": i % 2, "caption": "of no use here"}}
            writer.write({"__key__": f"some/where/{i:04d}", "png": buffer.getvalue(), **label})
    with pytest.raises(FileNotFoundError, match="visionattn data index"):
        Shards(tmp_path)
    index_shards(tmp_path, ["even", "odd"])
    source = Shards(tmp_path, in_chans=1)
    assert source.classes == ["even", "odd"] and [source[i][0].size[0] for i in range(7)] == list(range(4, 11))
    assert [source[i][1] for i in range(7)] == [0, 1, 0, 1, 0, 1, 0]


# order


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_processes_share_an_epoch(shards, world_size):
    source = Shards(shards, "train", window=2)
    for epoch in (0, 1):
        orders = [source.epoch_order(epoch, 5, rank, world_size) for rank in range(world_size)]
        assert {len(order) for order in orders} == {-(-40 // world_size)}
        joined = [i for order in orders for i in order]
        assert sorted(joined[:40]) == list(range(40)) or set(joined) == set(range(40))
    assert source.epoch_order(0, 5) == source.epoch_order(0, 5) != source.epoch_order(1, 5)
    assert source.epoch_order(0, 5) != source.epoch_order(0, 6)
    in_order = [i for rank in range(world_size) for i in source.epoch_order(None, 5, rank, world_size)]
    assert in_order == list(range(40))


def test_process_reads_few_shards_at_a_time(shards):
    source = Shards(shards, "train", window=2)  # of 7 shards with 5 or 6 images
    order = source.epoch_order(3, 0)
    assert len({source._shard(i) for i in order[:10]}) == 2
    halves = [{source._shard(i) for i in source.epoch_order(3, 0, rank, 2)} for rank in range(2)]
    assert max(map(len, halves)) <= 4 and len(halves[0] & halves[1]) <= 1


@pytest.mark.parametrize("repeats, samples", [(1, None), (2, None), (1, 25)])
def test_batches_do_not_depend_on_the_workers(shards, repeats, samples):
    def batches(workers, first=0):
        data = Samples(Shards(shards, "train", window=2), to_tensor, seed=4)
        sampler = EpochSampler(data, True, 4, repeats, rank=1, world_size=2, samples=samples)
        sampler.resume(2, first)
        loader = DataLoader(data, 4, sampler=sampler, num_workers=workers, collate_fn=collate)
        found = list(loader)
        assert sum(len(batch["name"]) for batch in found) == len(sampler) - first == (samples or 20) - first
        return found

    first, second = batches(0), batches(2)
    rest = batches(1, 8)  # of a run that was stopped after two batches
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first[2:], rest, strict=True))
    assert [batch["name"] for batch in first] == [batch["name"] for batch in second]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))
    if repeats == 2:
        names = [name for batch in first for name in batch["name"]]
        assert names[0::2] == names[1::2] and not torch.equal(first[0]["image"][0], first[0]["image"][1])


# faults


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def copy_of(shards, target):
    target.mkdir()
    for path in (shards / "train").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_truncated_shard_is_named_and_skipped_on_request(shards, tmp_path):
    place = copy_of(shards, tmp_path / "cut")
    path = place / "train-000001.tar"
    source = Shards(place)
    path.write_bytes(path.read_bytes()[:3000])
    first = int(source.starts[1])
    assert source[first - 1] and source[first]  # what is there is read
    with pytest.raises(ValueError, match=r"train-000001\.tar:.*truncated.*on_error=skip"):
        Samples(source, to_tensor)[(0, 0, first + 4)]
    sample = Samples(source, to_tensor, on_error="skip")[(0, 0, first + 4)]
    assert "train-000002.tar" in sample["name"] and "train-000001.tar" in sample["skipped"][0]
    with pytest.raises(ValueError, match=r"1 shards .*train-000001\.tar \(3000 bytes"):
        check_shards(place)
    with pytest.raises(ValueError, match=r"train-000001\.tar \(3000 bytes\)"):
        index_shards(place)


def test_shards_of_another_size_are_refused_at_the_start(shards, tmp_path):
    place = copy_of(shards, tmp_path / "sizes")
    for number, size in ((1, 3000), (4, 30720)):
        path = place / f"train-{number:06d}.tar"
        path.write_bytes(path.read_bytes()[:size].ljust(size, b"\0"))
    with pytest.raises(ValueError, match=r"2 shards .*001\.tar \(3000 bytes.*004\.tar \(30720 bytes.*data index"):
        Shards(place)


def test_changed_shard_is_found_by_its_digest(shards, tmp_path):
    place = copy_of(shards, tmp_path / "changed")
    check_shards(place)
    path = place / "train-000002.tar"
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000002\.tar"):
        check_shards(place)


@pytest.mark.parametrize("cut", [512, 1024, 1500])
def test_shard_that_ends_early_is_not_indexed(shards, tmp_path, cut):
    place = copy_of(shards, tmp_path / "early")
    path = place / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"train-000000\.tar"):
        index_shards(place)


def test_missing_shard_or_index_is_named(shards, tmp_path):
    place = copy_of(shards, tmp_path / "missing")
    (place / "train-000003.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 7 shards.*train-000003\.tar"):
        Shards(place)
    with pytest.raises(FileNotFoundError, match="no folder of shards"):
        Shards(tmp_path, "validation")
    with pytest.raises(ValueError, match="2 classes.*training knows 1"):
        Shards(shards, "val", classes=["cat"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda index: index.update(format=9), "format 9"),
        (lambda index: index.pop("classes"), "classes"),
        (lambda index: index["shards"][0].update(name="../../evil.tar"), "no name of a shard"),
        (lambda index: index["shards"][0]["offsets"].pop(), "different lengths"),
        (lambda index: index["shards"][0]["sizes"].__setitem__(0, 10**9), "image at bytes"),
        (lambda index: index["shards"][0]["labels"].__setitem__(0, 7), "labels 0 to 7 for 2 classes"),
        (lambda index: index["shards"].clear(), "lists no images"),
        (lambda index: index["shards"][0]["names"].__setitem__(0, 1), "names that are no list of str"),
        (lambda index: index["shards"][0].update(names=None), "names that are no list of str"),
        (lambda index: index["shards"][0]["labels"].__setitem__(0, 0.5), "labels that are no list of int"),
        (lambda index: index["shards"][0]["labels"].__setitem__(0, True), "labels that are no list of int"),
        (lambda index: index["shards"][0]["offsets"].__setitem__(0, 512.0), "offsets that are no list of int"),
        (lambda index: index["shards"][0]["offsets"].__setitem__(0, 10**19), "image at bytes"),
        (lambda index: index["shards"][0].update(bytes=10**20), "size of 1000"),
        (lambda index: index["shards"][0].update(bytes="20480"), "size of '20480'"),
    ],
)
def test_damaged_index_is_refused(shards, tmp_path, change, message):
    place = copy_of(shards, tmp_path / "index")
    index = json.loads((place / "index.json").read_text())
    index["shards"][0]["labels"][1] = 0
    change(index)
    (place / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"index.json.*{message}"):
        Shards(place)


def test_index_that_is_nested_too_deeply_is_refused(shards, tmp_path):
    place = copy_of(shards, tmp_path / "deep")
    (place / "index.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"index\.json is no index of shards"):
        Shards(place)


def test_labels_do_not_count_classes_without_end(tmp_path):
    write_tar(tmp_path / "x.tar", {"a.png": b"x", "a.cls": b"30000000"})
    with pytest.raises(ValueError, match="label 30000000, .*--classes"):
        index_shards(tmp_path)


def test_name_that_is_no_text_is_kept(tmp_path):
    root, name = tmp_path / "set", os.fsdecode(b"caf\xe9.png")
    (root / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (4, 5)).save(root / "train" / "cat" / "0.png")
    os.rename(root / "train" / "cat" / "0.png", root / "train" / "cat" / name)
    (root / "train" / "cat" / f"broken {name}").write_bytes(b"no picture")
    write_shards(root, tmp_path / "out", ["train"], on_error="skip")
    assert Shards(tmp_path / "out", "train")[0][2].endswith(f"train-000000.tar:cat/{name}")
    assert b"broken caf\xe9.png" in (tmp_path / "out" / "train" / "skipped_images.txt").read_bytes()


@pytest.mark.parametrize(
    "members, message",
    [
        ({"a.png": b"x", "a.cls": b"0", "a.pyd": b"x"}, r"'a\.pyd', which may run code"),
        ({"a.png": b"x", "a.meta.pth": b"x"}, r"'a\.meta\.pth', which may run code"),
        ({"a.png": b"x"}, "sample a has no label"),
        ({"a.png": b"x", "a.cls": b"cat"}, "sample a has the label 'cat'"),
        ({"a.png": b"x", "a.json": b"{}"}, "sample a 'label'"),
        ({"a.cls": b"0"}, "sample a has 0 images"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"0"}, "sample a has 2 images"),
    ],
)
def test_shard_that_cannot_be_used_is_refused(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ValueError, match=rf"x\.tar.*{message}"):
        index_shards(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_link_in_a_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "../secret.png"
        tar.addfile(member)
    with pytest.raises(ValueError, match="no plain file"):
        index_shards(tmp_path)


def test_writing_leaves_nothing_half_written(tmp_path):
    root = make_folder(tmp_path / "set", train=3)
    broken = root / "val" / "dog" / "dog.1.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    output = tmp_path / "out"
    with pytest.raises(ValueError, match=r"dog\.1\.JPEG.*--on-error skip"):
        write_shards(root, output)
    assert [path.name for path in output.iterdir()] == ["train"]  # which was finished before
    with pytest.raises(ValueError, match="exists already"):
        write_shards(root, output)
    found = write_shards(root, output, ["val"], on_error="skip")["val"]
    assert sum(map(len, found.shards)) == 5
    assert "dog.1.JPEG" in (output / "val" / "skipped_images.txt").read_text()
    with pytest.raises(FileNotFoundError, match="no dataset folder"):
        write_shards(tmp_path / "nowhere", tmp_path / "other")
    assert not (tmp_path / "other").exists()


# by URL


class Requests(ThreadingHTTPServer):
    """A server of a folder that counts requests, and fails or shortens those it is told to."""

    def __init__(self, folder):
        self.seen, self.failures, self.short = [], 0, False
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        if self.server.failures and self.path.endswith(".tar"):
            self.server.failures -= 1
            self.send_error(503)
            return
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        outputfile.write(content[:700] if self.server.short and self.path.endswith(".tar") else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(shards, monkeypatch):
    monkeypatch.setattr(shard_cache, "_WAIT", 0.01)
    server = Requests(shards)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_url_gives_the_same_images_each_fetched_once(shards, server, tmp_path):
    source = Shards(server.url, "train", window=2, cache=tmp_path, cache_gb=1)
    local = Shards(shards, "train", window=2)
    assert source.epoch_order(1, 0) == local.epoch_order(1, 0)
    data = Samples(source, to_tensor)
    loader = DataLoader(data, 4, sampler=EpochSampler(data, True), num_workers=2, collate_fn=collate)
    for batch in loader:
        for name, label in zip(batch["name"], batch["label"], strict=True):
            assert label == int("dog" in name) and name.startswith(server.url)
    fetched = [path for path in server.seen if path.endswith(".tar")]
    assert sorted(fetched) == [f"/train/train-{i:06d}.tar" for i in range(7)]  # by two processes and their threads


def test_next_window_is_fetched_ahead(server, tmp_path):
    source = Shards(server.url, "train", window=2, cache=tmp_path, cache_gb=1)
    data = Samples(source, to_tensor)
    keys = list(EpochSampler(data, True))
    data[keys[0]]
    wanted = {source.cache.path(source.shards[source._shard(i)]) for _, _, i in keys[:20]}
    source._ahead.wanted.put(None)  # ends the thread when the rest is done
    for thread in threading.enumerate():
        if thread.name == "shards ahead":
            thread.join(20)
    assert wanted == set(tmp_path.glob("*.tar")) and len(wanted) == 4


def test_broken_connections_are_tried_again(server, tmp_path):
    source = Shards(server.url, "val", cache=tmp_path)
    server.failures = 2
    assert source[0][0].size == (30, 20)
    assert len([path for path in server.seen if path.endswith(".tar")]) == 3


def test_url_that_stays_broken_is_named(server, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{server.url}/nothing/index\.json"):
        Shards(server.url, "nothing", cache=tmp_path)
    source = Shards(server.url, "train", cache=tmp_path)
    server.short = True
    with pytest.raises(ValueError, match=rf"cannot fetch {server.url}/train/train-000000\.tar \(tried 4 times\)"):
        source[0]
    requests = len(server.seen)
    with pytest.raises(ValueError, match="train-000000"):
        source[1]
    assert len(server.seen) == requests  # not asked again for each image
    assert not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("shuffle", [True, False])
def test_shard_that_could_not_be_fetched_is_tried_again_in_the_next_epoch(server, tmp_path, shuffle):
    source = Shards(server.url, "val", cache=tmp_path)
    data = Samples(source, to_tensor, replace=False, on_error="skip")
    sampler = EpochSampler(data, shuffle)
    server.failures = 99
    assert [len(data[key]["skipped"]) for key in sampler] == [1] * 6
    server.failures = 0
    sampler.set_epoch(1)
    assert [len(data[key]["skipped"]) for key in sampler] == [0] * 6


def test_other_content_than_the_index_says_is_refused(shards, server, tmp_path):
    source = Shards(server.url, "val", cache=tmp_path)
    source.shards[0].sha256 = "0" * 64
    with pytest.raises(ValueError, match="SHA-256"):
        source[0]
    assert not list(tmp_path.glob("*.tar"))


def test_cache_keeps_its_size(shards, server, tmp_path):
    index = read_index(shards / "train")
    size = max(shard.bytes for shard in index.shards)
    cache = ShardCache(f"{server.url}/train", tmp_path, 2.5 * size / 1e9)
    first, second, third = (cache.path(shard) for shard in index.shards[:3])
    cache.get(index.shards[0])
    cache.get(index.shards[1])
    cache.get(index.shards[0])  # wanted again, so that the second is the oldest
    own = [tmp_path / name for name in ("backup.tar", "0123456789abcdef.tar")]
    for path in own:  # of the user's, older and larger than all
        path.write_bytes(bytes(4 * size))
        os.utime(path, (0, 0))
    cache.get(index.shards[2])
    assert first.exists() and not second.exists() and third.exists() and all(path.exists() for path in own)
    with pytest.raises(ValueError, match="two windows of 16 shards"):
        Shards(server.url, "train", cache=tmp_path, cache_gb=1e-6)


# training


def test_run_on_shards_stops_and_resumes(folder, tmp_path, capsys, monkeypatch):
    main(["data", "shard", str(folder), "--output", str(tmp_path / "set"), "--size", "8"])
    assert "40 images of 2 classes in 5 shards" in capsys.readouterr().out
    settings = [
        "model=biformer_nano",
        "model.model_name=test_biformer",
        "data=shards",
        f"data.root={tmp_path / 'set'}",
        "data.workers=0",
        "data.batch_size=10",
        "data.window=2",
        "+data.transform.input_size=[3,32,32]",
        "task.warmup_epochs=0",
        "task.epochs=2",
        "~logger.tensorboard",
    ]
    whole = train_run(settings, tmp_path, "whole", "trainer.max_epochs=2")

    def terminate(self, trainer, module, *args):
        if (trainer.current_epoch, args[1]) == (1, 2):  # inside the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(LastCheckpoint, "on_train_batch_start", terminate)
        train_run(settings, tmp_path, "parts", "trainer.max_epochs=2")
    assert 4 < checkpoint(tmp_path / "parts")["global_step"] < 8
    parts = train_run(settings, tmp_path, "parts", "trainer.max_epochs=2", "ckpt_path=last", "data.workers=1")
    assert_same_weights(whole, parts)
    with pytest.raises(SystemExit, match=r"40 images for 1 processes are 40 each, less than data\.batch_size=41"):
        train_run(settings, tmp_path, "large", "trainer.max_epochs=1", "data.batch_size=41")
