"""``visionattn explain``: files, positions, and errors that say what to do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from untrained_runs import segmentation_run

import visionattn
from visionattn.cli import main
from visionattn.cli_explain import prepare
from visionattn.explain.report import METHODS, Subject, available_methods, explain

OFFERED = {
    "test_biformer": "routing attention distance gradcam erf",
    "test_nat": "attention distance gradcam erf",
    "test_litv2": "attention distance gradcam erf",
    "test_davit": "attention channels distance gradcam erf",
    "test_overlock": "kernels context gates channel_gates distance gradcam erf",
    "test_patnet": "attention gates channel_gates distance gradcam erf",
    "test_lgvit": "attention gates distance gradcam erf",
    "test_activator": "gates gradcam erf",
    "test_ninformer": "gates gradcam erf",
    "test_efficientnet": "gradcam erf",
}


@pytest.fixture
def photo(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("name", OFFERED)
def test_methods_of_a_model(name):
    assert available_methods(visionattn.create_model(name)) == OFFERED[name].split()


def subject(name, in_chans=1, size=(45, 70)):
    torch.manual_seed(0)
    model = visionattn.create_model(name, in_chans=in_chans, num_classes=3).eval()
    return Subject(model, torch.randn(1, in_chans, *size), Image.new("RGB", size[::-1]), (69, 3), samples=1)


OTHERS = [pytest.param(f"test_{name}", marks=pytest.mark.thorough) for name in ("biformer", "davit", "patnet")]


@pytest.mark.parametrize("name", ["test_overlock", *OTHERS])
def test_every_method_writes_a_figure_and_arrays(name, tmp_path):
    """Grey images of a size that nothing divides; the position in the last, cut cells."""
    lines = []
    files = explain(subject(name), tmp_path / "out" / "here", report=lines.append)
    offered = OFFERED[name].split()
    assert [path.name for path in files[:-1]] == [f"{m}.{end}" for m in offered for end in ("png", "npz")]
    assert lines == [f"{m} ({i + 1} of {len(offered)})" for i, m in enumerate(offered)]
    assert sorted((tmp_path / "out" / "here").iterdir()) == sorted(files)  # nothing temporary is left
    for path in files[:-1]:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert image.width > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 50
        else:
            with np.load(path) as arrays:
                assert arrays.files and all(np.isfinite(arrays[key]).all() for key in arrays.files)
    summary = json.loads(files[-1].read_text())
    assert summary["position"] == [69, 3] and summary["image"] == [45, 70] and summary["methods"] == offered


def test_arrays_are_those_of_the_functions(tmp_path):
    one = subject("test_nat")
    explain(one, tmp_path, ["attention"])
    with np.load(tmp_path / "attention.npz") as arrays:
        for layer in one.recording.attention():
            cell = one.recording.grid(layer.stage, layer.size).cell(69, 3, layer.size)
            np.testing.assert_array_equal(arrays[layer.name], layer.at(*cell)[0].numpy())
            assert arrays[layer.name].shape == (layer.heads, *layer.size)


def test_command_writes_what_was_asked(photo, tmp_path, capsys):
    main(
        ["explain", str(photo), "--model", "test_biformer", "--untrained", "--methods", "routing,gradcam"]
        + ["--position", "40", "20", "--size", "60", "90", "--output", str(tmp_path / "out")]
    )
    out, err = capsys.readouterr()
    names = ["routing.png", "routing.npz", "gradcam.png", "gradcam.npz", "summary.json"]
    assert [line.rpartition("/")[2] for line in out.split()] == names
    assert "routing (1 of 2)" in err and "image 90 x 60, position 52, 24 in it" in err
    with np.load(tmp_path / "out" / "routing.npz") as arrays:
        assert arrays["stages.0.blocks.0.attn.mask"].shape == (60, 90)


def test_command_explains_weights_of_a_file(photo, tmp_path):
    model = visionattn.create_model("test_biformer")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    weights = ["--model", "test_biformer", "--checkpoint", str(tmp_path / "weights.pth")]
    main(["explain", str(photo), *weights, "--methods", "gradcam", "--target", "7", "--output", str(tmp_path / "out")])
    with np.load(tmp_path / "out" / "gradcam.npz") as arrays:
        assert arrays["target"] == 7


def test_network_for_masks_is_explained_at_the_sizes_of_its_evaluation(photo, tmp_path, capsys):
    unet = dict(_target_="visionattn.heads.segmenter.Segmenter", decoder="unet")
    run = segmentation_run(tmp_path / "run", **unet, backbone="test_biformer")
    command = ["explain", str(photo), "--run", str(run), "--position", "69", "10", "--output", str(tmp_path / "out")]
    for size, shape in ([], (50, 70)), (["--size", "96", "128"], (96, 128)):
        main([*command, *size])
        x, y = 69 * shape[1] // 70, 10 * shape[0] // 50
        assert f"image {shape[1]} x {shape[0]}, position {x}, {y} in it" in capsys.readouterr().err
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["methods"] == [
            "routing", "attention", "distance",
        ]  # fmt: skip
        with np.load(tmp_path / "out" / "routing.npz") as arrays:
            masks = [arrays[name] for name in arrays.files if name.endswith(".mask")]
        assert len(masks) == 4 and all(mask.shape == shape and mask.sum() > 0.5 for mask in masks)
    with pytest.raises(SystemExit, match="--target is for the Grad-CAM of classifiers"):
        main([*command, "--target", "nucleus"])
    with pytest.raises(SystemExit, match=r"has no 'gradcam'; it has routing, attention, distance"):
        main([*command, "--methods", "gradcam"])
    Image.new("L", (1030, 20)).save(photo)
    with pytest.raises(SystemExit, match=r"is 1030 x 20; give --size, for example --size 1024"):
        main(command)
    run = segmentation_run(tmp_path / "other", **unet, backbone="test_resnet")
    with pytest.raises(SystemExit, match="holds nothing that can be shown"):
        main(["explain", str(photo), "--run", str(run)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "test_nat"], "'routing'; it has attention, distance, gradcam, erf"),
        (["--model", "test_biformer", "--methods", "atention"], "unknown method 'atention'; did you mean attention"),
        (["--model", "test_biformer", "--position", "70", "0"], r"outside the image of 70 x 50 pixels"),
        (["--model", "test_biformer", "--position", "0", "25"], "crops away; choose one with x in"),
        (["--model", "test_biformer", "--size", "0"], "--size 0: expected a side"),
        (["--model", "test_biformer", "--target", "cat"], "unknown class 'cat'"),
        (["--model", "test_biformer", "--samples", "0"], "expected at least 1 random image"),
        (["--model", "test_biformers"], "unknown model 'test_biformers'; did you mean test_biformer"),
        (["--model", "test_biformer", "--checkpoint", "x.pth"], "either --checkpoint FILE or --untrained"),
        (["--run", "here"], "--checkpoint and --untrained go with --model"),
        (
            ["--model", "vit_tiny_patch16_224", "--methods", "gradcam", "--size", "64", "96"],
            r"takes no image of 64 x 96: .*; leave out",
        ),
        (["--model", "test_biformer.none"], r"Invalid pretrained tag"),
        ([], "either --run FOLDER or --model NAME"),
    ],
)
def test_command_errors(arguments, message, photo, tmp_path):
    methods = [] if "--methods" in arguments else ["--methods", "routing"]
    output = ["--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=message):
        main(["explain", str(photo), *arguments, *methods, "--untrained", *output])
    assert not (tmp_path / "out").exists()


def test_unreadable_image(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    for name, message in (("bad.png", r"cannot read image .*bad\.png \(13 bytes\)"), ("none.png", "no image at")):
        with pytest.raises(SystemExit, match=message):
            main(["explain", str(tmp_path / name), "--model", "test_biformer", "--untrained"])


@pytest.mark.parametrize("crop_pct, size", [(1.0, None), (0.7, None), (0.7, (33, 80))])
def test_position_follows_the_picture(crop_pct, size):
    """A bright dot is where the prepared position says, after resizing and cropping."""
    original = Image.new("L", (300, 200))
    original.paste(255, (176, 81, 185, 90))
    config = dict(input_size=(1, 64, 64), interpolation="bicubic", mean=(0.5,), std=(0.5,), crop_pct=crop_pct)
    image, picture, (x, y) = prepare(original, config, size, (180, 85))
    assert image.shape[2:] == (picture.height, picture.width) == (size or (64, 64))
    weights = (image[0, 0] - image.min()).clamp(min=0)
    rows, columns = (torch.arange(n).float() for n in image.shape[2:])
    assert (weights.sum(1) @ rows / weights.sum()).item() == pytest.approx(y, abs=1.01)
    assert (weights.sum(0) @ columns / weights.sum()).item() == pytest.approx(x, abs=1.01)


def test_help_lists_the_methods():
    from visionattn import cli_explain

    assert tuple(METHODS) == tuple(cli_explain._methods())
