"""Files for other programs: what is kept, what is refused, and what reads them."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import untrained_runs
from helpers import assert_close
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn

from visionattn._writing import SavingError
from visionattn.cli import main
from visionattn.tasks import export_formats
from visionattn.tasks.checkpoints import sha256
from visionattn.tasks.export import Settings, compare, export, folded, from_name, from_run
from visionattn.tasks.quantize import _labelled, int8


@pytest.fixture(scope="module")
def network():
    """The cheapest model to trace."""
    torch.manual_seed(5)
    return from_name("test_activator", random_weights=True)


@pytest.fixture(scope="module")
def onnx_file(network, tmp_path_factory):
    """An ONNX file with all sizes free, and its facts."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return path, export(network, Settings("onnx", "all"), path)


@pytest.mark.slow
def test_onnx_file_of_any_size_runs_in_onnxruntime_alone(network, onnx_file):
    path, facts = onnx_file
    content = onnx.load(path)
    assert {node.domain for node in content.graph.node} == {""} and not content.functions
    assert [entry.version for entry in content.opset_import if not entry.domain] == [facts["opset"]] == [20]
    axes = [axis.dim_param or axis.dim_value for axis in content.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"] == facts["input"]["shape"]
    session = onnxruntime.InferenceSession(path)
    for shape in ((5, 3, 39, 101), (1, 3, 64, 64)):
        x = torch.randn(shape)
        (logits,) = session.run(["output"], {"images": x.numpy()})
        assert_close(f"logits at {shape}", network.model(x), logits, 1e-5)
    inside = json.loads(session.get_modelmeta().custom_metadata_map["visionattn"])
    beside = json.loads(path.with_name("model.onnx.json").read_text())
    assert beside == facts and beside["sha256"] == sha256(path) and beside["bytes"] == path.stat().st_size
    assert inside.items() <= beside.items() and len(inside["classes"]) == 10
    assert inside["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.json"]


@pytest.mark.slow
def test_torch_file_needs_pytorch_alone(tmp_path, capsys):
    weights, path = tmp_path / "weights.pth", tmp_path / "out" / "model.pt2"
    model = timm.create_model("test_biformer").eval()
    torch.save(model.state_dict(), weights)
    main(
        [
            "export",
            "--format",
            "torch",
            "--size",
            "48",
            "64",
            "--checkpoint",
            str(weights),
            "--output",
            str(path),
            "test_biformer",
        ]
    )
    text, facts = capsys.readouterr().out, json.loads((tmp_path / "out" / "model.pt2.json").read_text())
    assert "images 1 x 3 x 48 x 64" in text and "largest difference" in text and facts["sha256"] in text
    assert (
        facts["weights_sha256"] == sha256(weights) and len(facts["classes"]) == 1000 and "tench" in facts["classes"][0]
    )
    files = {"visionattn.json": ""}
    program = torch.export.load(path, extra_files=files)
    assert "visionattn." not in str(program.graph) and json.loads(files["visionattn.json"])["name"] == facts["name"]
    x = torch.randn(1, 3, 48, 64)
    assert_close("logits", model(x), program.module()(x), 1e-5)


def test_safetensors_load_through_timm(tmp_path):
    path = tmp_path / "weights.safetensors"
    main(["export", "test_davit", "--random-weights", "--format", "safetensors", "--output", str(path)])
    overlay = dict(file=str(path))
    first, second = (
        timm.create_model("test_davit", pretrained=True, pretrained_cfg_overlay=overlay).state_dict() for _ in range(2)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)
    facts = json.loads(path.with_name(path.name + ".json").read_text())
    assert facts["form"] == "trained" and facts["weights_sha256"] == hashlib.sha256(save(first)).hexdigest()


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("name", ["test_biformer", "test_resnet"])
def test_safetensors_of_a_run_load_by_the_call_beside_them(name, in_chans, tmp_path, monkeypatch):
    run = untrained_runs.classification_run(tmp_path / "run", name, tuple("abcd"), in_chans, drop_path_rate=0.1)
    network = from_run(run)
    facts = export(network, Settings("safetensors", size=(64, 32)), tmp_path / "weights.safetensors")
    overlay = dict(file="weights.safetensors", num_classes=4, input_size=[in_chans, 64, 32])
    sizes = dict(num_classes=4, in_chans=in_chans, drop_path_rate=0.1)
    assert facts["create_model"] == dict(model_name=name, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    monkeypatch.chdir(tmp_path)
    x = torch.randn(2, in_chans, 64, 32)
    with torch.no_grad():
        assert torch.equal(timm.create_model(**facts["create_model"]).eval()(x), network.model(x))


def test_safetensors_that_timm_does_not_load_are_not_kept(tmp_path):
    network = from_name("test_davit", random_weights=True)
    with pytest.raises(ValueError, match="timm does not load the weights again: .*unexpected keyword"):
        export(replace(network, arguments=dict(wrong=1)), Settings("safetensors"), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.st: timm reads safetensors from names that end with \.safetensors"):
        export(network, Settings("safetensors"), tmp_path / "x.st")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_place_that_takes_no_file_is_named_before_the_work(network, tmp_path, monkeypatch, format):
    monkeypatch.setitem(export_formats.WRITERS, format, lambda *arguments: pytest.fail("written all the same"))
    monkeypatch.setattr("visionattn.tasks.export.reparameterize_model", lambda model: pytest.fail("folded"))
    (tmp_path / "file").touch()
    for folder in ("/proc", str(tmp_path / "file")):
        path = Path(folder, "x.safetensors")
        with pytest.raises(SavingError, match=f"cannot write {path}: .*write to a folder that this user may write to"):
            export(network, Settings(format), path)


def test_missing_data_is_said_as_it_is(network, tmp_path, monkeypatch):
    monkeypatch.setitem(export_formats.WRITERS, "torch", lambda model, *arguments: model)

    def change(path, network):
        return dict(images=len(list(_labelled(network, str(tmp_path / "none"), None))))

    with pytest.raises(FileNotFoundError, match="^no dataset folder"):
        export(network, Settings("torch"), tmp_path / "x.pt2", change)


@pytest.mark.parametrize(("name", "changes"), [("test_patnet", True), ("test_biformer", False)])
def test_folded_form_comes_first(name, changes):
    network = from_name(name, random_weights=True)
    form, is_folded = folded(network.model, (2, 3, 64, 64))
    assert is_folded == changes and (form is network.model) != changes
    assert compare(network.model, form, [[1, 3, 65, 97]]).relative < 1e-4


def test_folded_form_that_differs_is_refused(monkeypatch):
    def wrong(model):
        return nn.Sequential(model, nn.Softmax(1), nn.Linear(10, 10))

    monkeypatch.setattr("visionattn.tasks.export.reparameterize_model", wrong)
    with pytest.raises(ValueError, match="folded form differs"):
        folded(from_name("test_activator", random_weights=True).model, (1, 3, 64, 64))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda y: y + 0.01, "not kept: the torch file's outputs differ"),
        (lambda y: y[:, :9], "expected \\[1, 10\\]"),
        (lambda y: y * float("nan"), "not finite"),
        (lambda y: y.view(7, 7), "fails for images of"),
    ],
)
def test_file_that_differs_is_not_kept(network, tmp_path, monkeypatch, wrong, message):
    def write(model, images, free, path, facts):
        path.write_bytes(b"x")
        return lambda x: wrong(model(x))

    monkeypatch.setitem(export_formats.WRITERS, "torch", write)
    (tmp_path / "model.pt2").write_bytes(b"an older file")
    with pytest.raises(ValueError, match=message):
        export(network, Settings("torch"), tmp_path / "model.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"an older file"


def test_operators_of_other_domains_are_named():
    node = onnx.helper.make_node("FusedGemm", ["x"], ["y"], domain="com.microsoft")
    with pytest.raises(ValueError, match=r"operators of com\.microsoft"):
        export_formats.check_domains(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either the NAME"),
        (["test_nat", "--run", "somewhere"], "give either the NAME"),
        (["biformer_x", "--random-weights"], "did you mean"),
        (["test_nat"], "No pretrained weights.*--random-weights"),
        (["test_nat", "--random-weights", "--checkpoint", "x.pth"], "exclude each other"),
        (["test_nat", "--checkpoint", "x.pth"], "no checkpoint at"),
        (["test_ninformer", "--random-weights", "--dynamic"], "takes images of .* only"),
        (["test_ninformer", "--random-weights", "--size", "80"], "takes images of .* only"),
        (["test_nat", "--random-weights", "--size", "1", "2", "3"], "expected a side"),
        (["test_nat", "--random-weights", "--batch", "0"], "must be positive"),
        (["test_nat", "--random-weights", "--format", "torch", "--int8"], "--int8 is for --format onnx"),
        (["test_nat", "--random-weights", "--data", "x"], "add --int8"),
        (["test_nat", "--random-weights", "--int8", "--images", "0"], "--images 0: .* at least 1 image"),
        (["test_nat", "--random-weights", "--int8", "--images", "-3"], "--images -3: .* at least 1 image"),
        (["test_nat", "--random-weights", "--push", "a/b"], "--push is for"),
        (["--run", "nowhere"], "no checkpoint at"),
    ],
)
def test_wrong_command_is_explained(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main(["export", "--format", "onnx", "--output", str(tmp_path / "x.onnx"), *arguments])
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="is a folder"):
        main(["export", "test_nat", "--random-weights", "--format", "onnx", "--output", str(tmp_path)])


def test_missing_compiler_is_named(network, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="there is no no-such-compiler; install g"):
        export(network, Settings("aoti"), tmp_path / "x.pt2")


def test_model_that_cannot_be_traced_says_why(network, tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3)) if bool(x.sum() > 0) else x.amax((1, 2, 3))

    with pytest.raises(ValueError, match="cannot be traced with a free batch: .*; leave out --dynamic"):
        export_formats.trace(Branches(), torch.ones(2, 3, 8, 8), "batch")


@pytest.mark.thorough
def test_file_that_onnxruntime_cannot_load_says_why(network, tmp_path):
    class Precise(nn.Module):
        def forward(self, x):
            return nn.functional.avg_pool2d(x.double(), 2).mean((2, 3)).float()

    with pytest.raises(ValueError, match="ONNX Runtime cannot run .* an implementation for AveragePool"):
        export_formats.write_onnx(Precise(), torch.ones(1, 3, 8, 8), "none", tmp_path / "x.onnx", "{}")


# 8 bits


def changed(onnx_file, folder, network, **options):
    """Facts of the 8-bit copy of the file."""
    path = folder / "copy.onnx"
    shutil.copy(onnx_file[0], path)
    return path, int8(**options)(path, network)["int8"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two images for the first and last of 10 classes."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        (root / "val" / f"c{i:03d}").mkdir(parents=True)
    for i in (0, 9):
        pixels = np.random.RandomState(i).randint(0, 255, (70, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "val" / f"c{i:03d}" / "x.png")
    return root


def test_chosen_size_is_what_pictures_are_made_into(network, pictures, tmp_path, monkeypatch):
    def write(model, images, free, path, facts):
        path.write_bytes(b"x")
        return model

    def measured(path, network):
        return dict(seen=list(next(_labelled(network, pictures, 1))[0].shape))

    monkeypatch.setitem(export_formats.WRITERS, "torch", write)
    facts = export(network, Settings("torch", size=(48, 40)), tmp_path / "model.pt2", measured)
    assert facts["input"]["shape"] == facts["seen"] == [1, 3, 48, 40]
    assert facts["preprocessing"] == network.preprocessing | dict(input_size=[3, 48, 40])
    assert list(network.preprocessing["input_size"]) == [3, 64, 64]


def test_8_bits_take_the_images_of_the_models_classes(network, pictures, tmp_path):
    run = replace(network, weights="run", classes=[f"c{i:03d}" for i in reversed(range(10))])
    assert [label for _, label in _labelled(run, str(pictures), None)] == [0, 9]
    assert [label for _, label in _labelled(replace(run, classes=[*run.classes, "c010"]), str(pictures), None)] == [
        0,
        9,
    ]
    with pytest.raises(ValueError, match=r"does not know, first 'c009'.*named as the 9 classes"):
        next(_labelled(replace(run, classes=run.classes[1:]), str(pictures), None))
    with pytest.raises(ValueError, match=r"does not know, first 'c000'.*n01440764"):
        next(_labelled(replace(network, classes=["tench"] * 1000), str(pictures), None))


def test_chosen_size_of_masks_is_what_whole_images_are_resized_to(network):
    masks = replace(network, task="segmentation", preprocessing=dict(resize=[64, 64], window=None))
    assert masks.resized((48, 40)).preprocessing == dict(resize=[48, 40], window=None)
    assert replace(masks, preprocessing=dict(resize=None)).resized((48, 40)).preprocessing == dict(resize=None)


@pytest.mark.slow
def test_8_bits_are_measured_and_kept(onnx_file, network, pictures, tmp_path):
    path, facts = changed(onnx_file, tmp_path, network, max_loss=100.0)
    content = onnx.load(path)
    assert {"MatMulInteger", "DynamicQuantizeLinear"} <= {node.op_type for node in content.graph.node}
    assert {node.domain for node in content.graph.node} == {""} and [
        entry.domain for entry in content.opset_import
    ] == [""]
    assert facts["images"] == 64 and facts["agreement"] > 50
    assert path.stat().st_size < 0.5 * facts["bytes_before"]
    _, facts = changed(onnx_file, tmp_path, network, data=str(pictures), max_loss=100.0)
    assert facts["images"] == 2 and {facts["top1"], facts["top1_int8"]} <= {0.0, 50.0, 100.0}


@pytest.mark.slow
def test_8_bits_that_lose_are_refused(onnx_file, network, pictures, tmp_path):
    def lossless(*arguments):
        return dict(images=64, agreement=97.0, right=[40, 38])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("visionattn.tasks.quantize._measure", lossless)
        with pytest.raises(ValueError, match=r"the same in 97\.00 % of 64 random images.* --max-loss 1 allows"):
            changed(onnx_file, tmp_path, network)
        with pytest.raises(ValueError, match=r"top-1 falls from 62\.50 to 59\.38 %"):
            changed(onnx_file, tmp_path, network, data=str(pictures))
        assert changed(onnx_file, tmp_path, network, max_loss=3.5)[1]["agreement"] == 97.0
    (tmp_path / "two" / "a").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "two" / "a" / "x.png")
    with pytest.raises(ValueError, match="1 class folders, the model knows 10"):
        changed(onnx_file, tmp_path, network, data=str(tmp_path / "two"))


# runs


def test_run_brings_classes_and_preprocessing(tmp_path):
    run = untrained_runs.classification_run(tmp_path / "run")
    path = tmp_path / "weights.safetensors"
    main(["export", "--run", str(run), "--format", "safetensors", "--output", str(path)])
    facts = json.loads(path.with_name(path.name + ".json").read_text())
    assert facts["classes"] == ["cat", "dog", "owl"] and facts["input"]["shape"] == [1, 1, 48, 48]
    assert facts["preprocessing"]["mean"] == [0.4] and facts["weights_sha256"] == sha256(
        run / "checkpoints" / "best.ckpt"
    )


def test_segmentation_run_brings_threshold_and_its_own_keys(tmp_path):
    fpn = dict(_target_="visionattn.heads.segmenter.Segmenter", backbone="test_resnet", decoder="fpn")
    network = from_run(untrained_runs.segmentation_run(tmp_path / "run", **fpn))
    facts = export(network, Settings("safetensors"), tmp_path / "masks.safetensors")
    assert facts["threshold"] == 0.4 and facts["classes"] == ["background", "nucleus"]
    assert facts["output"]["layout"] == "NKHW" and facts["preprocessing"]["mean"] == [0.5]
    weights = load_file(tmp_path / "masks.safetensors")
    assert weights.keys() == network.model.network.state_dict().keys()
    assert network.model(torch.randn(1, 1, 64, 64)).shape == (1, 1, 64, 64)


def test_other_runs_are_refused(tmp_path):
    untrained_runs.save_run(tmp_path / "run", dict(task="detection"), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="task detection; runs of classification and segmentation"):
        from_run(tmp_path / "run")


# what takes long


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "free", "format"),
    [
        *((name, "all", "onnx") for name in ("test_biformer", "test_davit", "test_nat", "test_litv2", "lgvit_d24")),
        *((name, "all", "onnx") for name in ("test_overlock", "test_patnet")),
        ("test_ninformer", "batch", "onnx"),
        ("test_biformer", "all", "torch"),
    ],
)
def test_every_family_exports(name, free, format, tmp_path):
    facts = export(from_name(name, random_weights=True), Settings(format, free), tmp_path / "model")
    assert facts["relative_difference"] < 1e-4 and len(facts["compared_at"]) == (6 if free == "all" else 3)


@pytest.mark.thorough
def test_compiled_package_equals_eager(network, tmp_path):
    path = tmp_path / "model.pt2"
    facts = export(network, Settings("aoti", "batch"), path)
    x = torch.randn(5, 3, 64, 64)
    assert_close("logits", network.model(x), torch._inductor.aoti_load_package(str(path))(x), 1e-5)
    assert facts["relative_difference"] < 1e-4


@pytest.mark.thorough
def test_masks_of_the_nuclei_network_run_in_onnxruntime(tmp_path):
    model = dict(_target_="visionattn.heads.fsgnet.FSGNetDecoder", backbone="test_biformer", base_c=16)
    network = from_run(untrained_runs.segmentation_run(tmp_path / "run", **model))
    facts = export(network, Settings("onnx", "batch"), tmp_path / "masks.onnx")
    assert facts["relative_difference"] < 1e-3
