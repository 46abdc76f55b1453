"""Files that would run a program, are damaged or blown up: refused by name wherever a user can hand one in."""

import importlib
import io
import os
import pickle
import re
import zipfile

import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image

from visionattn.cli import main
from visionattn.heads._published import read_published
from visionattn.heads.herseg import HERSeg
from visionattn.tasks.checkpoints import read_torch_file
from visionattn.tasks.config import check_sources, config_folder
from visionattn.tasks.export import from_run
from visionattn.tasks.saving import DurableCheckpointIO

NAME = "test_patnet"


class Call:
    """Unpickles to the result of a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(marker):
    return f"open({str(marker)!r}, 'w').close()"


WAYS = {
    "system": lambda marker: Call(os.system, f"touch {marker}"),
    "exec": lambda marker: Call(exec, touch(marker)),
    "importlib": lambda marker: Call(getattr, Call(importlib.import_module, "os"), "mkfifo"),
    "file": lambda marker: Call(open, str(marker), "w"),
}


def zipped(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def polyglot(content):
    """A pickle for readers that begin at the front, with an archive for those that begin at the end."""
    return pickle.dumps(content, protocol=2) + zipped(content)


WRITERS = {"zip": zipped, "pickle": lambda content: pickle.dumps(content, protocol=2), "polyglot": polyglot}


@pytest.fixture(scope="module")
def weights():
    return timm.create_model(NAME, num_classes=2).state_dict()


def in_run(weights, evil=None):
    """What Lightning would keep of a run of two classes."""
    hparams = dict(classes=["cat", "dog"], in_chans=3, model=dict(model_name=NAME), data={}, more=evil)
    return dict(state_dict={f"model.{key}": x for key, x in weights.items()}, hyper_parameters=hparams, epoch=0)


@pytest.fixture
def places(tmp_path):
    """Ways to hand in the file ``path``: name to a function."""
    run, picture = tmp_path / "run", tmp_path / "picture.png"
    (run / "checkpoints").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "data" / split / name / "0.png")
    data = [f"data.root={tmp_path / 'data'}", f"output_dir={tmp_path}", "data.workers=0"]
    (run / "config.yaml").write_text("data: {transform: {}}\n")

    def into_run(path):
        return (run / "checkpoints" / "best.ckpt").write_bytes(path.read_bytes())

    return {
        "file": lambda path: timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(path))),
        "convert": lambda path: main(["convert", NAME, str(path), "--folder", str(tmp_path / "converted")]),
        "predict": lambda path: main(["predict", str(picture), "--model", NAME, "--checkpoint", str(path)]),
        "predict_run": lambda path: main(["predict", str(picture), "--run", str(path)]),
        "eval_model": lambda path: main(["eval", "--model", NAME, "--checkpoint", str(path), *data]),
        "eval_run": lambda path: (into_run(path), main(["eval", str(run)])),
        "resume": lambda path: main(["train", f"model={NAME}", *data, "name=x", f"ckpt_path={path}"]),
        "trainer": lambda path: DurableCheckpointIO().load_checkpoint(path, weights_only=False),
        "export_run": lambda path: from_run(path),
        "head": lambda path: read_published(path),
        "herseg": lambda path: HERSeg(
            "test_lgvit", decoder_kwargs=dict(dim=32, num_heads=4, mlp_dim=32)
        ).load_published(path),
    }


PLACES = (
    "file",
    "convert",
    "predict",
    "predict_run",
    "eval_model",
    "eval_run",
    "resume",
    "trainer",
    "export_run",
    "head",
)


def refused(places, place, path):
    with pytest.raises((SystemExit, ValueError)) as stop:
        places[place](path)
    expected = "best.ckpt" if place == "eval_run" else path.name
    text = str(stop.value)
    assert expected in text and "weights_only=False" not in text  # which PyTorch and timm would advise


def combinations():
    """Every place with every container, the ways and endings in turn; and thoroughly all with all."""
    for i, place in enumerate(PLACES):
        for j, writer in enumerate(WRITERS):
            for k, way in enumerate(WAYS):
                for m, suffix in enumerate((".pth", ".ckpt", ".bin")):
                    chosen = k == (i + j) % len(WAYS) and m == (i + j) % 3
                    yield pytest.param(place, writer, way, suffix, marks=[] if chosen else pytest.mark.thorough)


@pytest.mark.parametrize(("place", "writer", "way", "suffix"), list(combinations()))
def test_program_in_a_pickle_does_not_run(places, weights, tmp_path, place, writer, way, suffix):
    marker, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    path.write_bytes(WRITERS[writer](dict(in_run(weights, [{"deep": WAYS[way](marker)}]), model=weights)))
    refused(places, place, path)
    assert not marker.exists() and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("way", ["system", "exec", "file"])
@pytest.mark.parametrize("writer", WRITERS)
def test_those_programs_would_run(tmp_path, way, writer):
    marker = tmp_path / "ran"
    (tmp_path / "evil").write_bytes(WRITERS[writer]({"deep": [WAYS[way](marker)]}))
    with (tmp_path / "evil").open("rb") as file:
        torch.load(file, weights_only=False) if writer == "zip" else pickle.load(file)
    assert marker.exists()


HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>" + b"<p>x</p>" * 200 + b"</body></html>"
OFFSETS = [0.0, 0.00005, 0.001, 0.3, 0.7, 0.99, 0.9999]


@pytest.mark.parametrize("place", ["predict_run", "eval_run", "trainer"])
@pytest.mark.parametrize("damage", ["html", *OFFSETS])
def test_damaged_checkpoint_of_a_run_is_named(places, weights, tmp_path, damage, place):
    whole = zipped(in_run(weights))
    (tmp_path / "cut.ckpt").write_bytes(HTML if damage == "html" else whole[: int(len(whole) * damage)])
    refused(places, place, tmp_path / "cut.ckpt")


def test_checkpoint_with_a_flipped_byte_is_named_or_read(weights, tmp_path):
    whole, path, refusals = zipped(in_run(weights)), tmp_path / "flipped.ckpt", 0
    for offset in range(0, 4000, 100):  # names and pickle lie at the front; flipped weights are weights
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0xFF]) + whole[offset + 1 :])
        try:
            read_torch_file(path)
        except ValueError as error:
            refusals += path.name in str(error)
    assert refusals > 10


@pytest.mark.parametrize("place", [*PLACES, "herseg"])
def test_archive_that_unpacks_to_more_is_refused(places, weights, tmp_path, place):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(io.BytesIO(zipped(in_run(weights)))) as archive, zipfile.ZipFile(path, "w") as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry), zipfile.ZIP_STORED)
        bomb.writestr("archive/data/bomb", bytes(50_000_000), zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000_000
    with pytest.raises((SystemExit, ValueError), match=r"\.ckpt has \d+ bytes and would unpack to"):
        places[place](path)


@pytest.mark.parametrize(
    "config",
    [
        "data: {transform: {}, source: {_target_: os.system, command: touch MARKER}}",
        "data: {transform: {}, source: {_target_: visionattn.data.datasets.os.system, command: touch MARKER}}",
        "data: {transform: {}, source: {_target_: visionattn.cli.main, argv: [list]}}",
        "data: {transform: {}, source: {_target_: FOLDER, root: {_target_: os.system, command: touch MARKER}}}",
        "data: {transform: {}, source: {_target_: FOLDER, classes: [{_target_: builtins.exec, _args_: [x]}]}}",
        "evil: {_target_: os.system, command: touch MARKER}\ndata: {transform: {}, source: '${evil}'}",
    ],
)
def test_configuration_of_a_run_can_call_sources_of_data_only(places, weights, tmp_path, config):
    run, marker = tmp_path / "run", tmp_path / "ran"
    config = config.replace("MARKER", str(marker)).replace("FOLDER", "visionattn.data.datasets.ImageFolder")
    (run / "config.yaml").write_text(config + "\n")
    torch.save(in_run(weights), run / "checkpoints" / "best.ckpt")
    with pytest.raises(SystemExit, match=r"config\.yaml names data\.source.*no source of data of visionattn"):
        main(["eval", str(run)])
    assert not marker.exists()


REFUSED = {  # what a run's file says and the command may say, with what stands there otherwise
    "data.source.root=${oc.env:TOKEN}": "environment",
    "data.root=s3://bucket/set": "over the network",
    "data.cache=/data/cache": "shards are written and removed",
    "data.source.download=true": "write what it fetches",
    "data.source._args_=[CIFAR10, /data/set, val, 3, true]": "names are not known",
}


@pytest.mark.parametrize("change", REFUSED)
def test_configuration_of_a_run_reads_this_machine_only(tmp_path, monkeypatch, change):
    monkeypatch.setenv("TOKEN", "secret")
    source = {"_target_": "visionattn.data.shard_source.Shards", "root": "${data.root}", "cache": "${data.cache}"}
    config = OmegaConf.create(dict(data=dict(root="/data/set", cache=None, source=source), name="${data.root}"))
    check_sources(config, tmp_path, [])
    changed = OmegaConf.merge(config, OmegaConf.from_dotlist([change]))
    with pytest.raises(
        ValueError, match=f"{re.escape(change.partition('=')[0])}.*({REFUSED[change]}).*say so: "
    ) as error:
        check_sources(changed, tmp_path, [])
    assert "secret" not in str(error.value)
    check_sources(changed, tmp_path, [change])


@pytest.mark.parametrize(
    "root",
    [
        "${ oc.env : TOKEN}",
        "${${name}:TOKEN}",
        "\\${oc.env:TOKEN}",  # which Hydra's own pass over the source would resolve
        "${dollar}${rest}",
        "${https}${host}",
        "${list._args_[0]}",
    ],
)
def test_configuration_of_a_run_cannot_hide_what_it_asks(tmp_path, monkeypatch, root):
    monkeypatch.setenv("TOKEN", "secret")
    parts = dict(name="oc.env", dollar="$", rest="{oc.env:TOKEN}", https="https:", host="//evil.org")
    if "list" in root:
        parts["list"] = dict(_args_=["${oc.env:TOKEN}"])
    source = {"_target_": "visionattn.data.shard_source.Shards", "root": root}
    with pytest.raises(ValueError, match="names .*, (which could read|an address)"):
        check_sources(OmegaConf.create(dict(**parts, data=dict(source=source))), tmp_path, [])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dict(root="/x", download="${data.root}"), "write what it fetches"),
        (dict(root="${data.scheme}${data.root}"), "over the network"),
        (dict(root="/x", cache="${data.root}"), "shards are written"),
    ],
)
def test_what_the_command_says_of_one_thing_is_not_said_of_another(tmp_path, source, message):
    config = dict(data=dict(scheme="s3:/", root="/sets/mine", source=source))
    with pytest.raises(ValueError, match=message):
        check_sources(OmegaConf.create(config), tmp_path, ["data.root=/sets/mine"])


def test_own_and_stated_sources_of_data_are_called(tmp_path):
    targets = {
        line.partition("_target_:")[2].split(",")[0].strip()
        for path in (config_folder() / "data").glob("*.yaml")
        for line in path.read_text().splitlines()
        if "_target_:" in line
    }
    assert len(targets) > 10
    for target in targets:
        check_sources(OmegaConf.create(dict(data=dict(source=dict(_target_=target)))), tmp_path, [])
    own = OmegaConf.create(dict(data=dict(source=dict(_target_="my_package.Slides"))))
    check_sources(own, tmp_path, ["data.source._target_=my_package.Slides"])
