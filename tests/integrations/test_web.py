"""What stands behind the web page: its list of models, its answers, its refusals. The page itself: test_web_browser."""

import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from made_up_runs import train_runs
from PIL import Image
from safetensors.torch import save_file

from visionattn import _files
from visionattn.cli import main
from visionattn.integrations.web import build_page, check_address, describe
from visionattn.integrations.web_answers import answer, regions
from visionattn.integrations.web_examples import example_pictures
from visionattn.integrations.web_models import Choice, find_runs, load, model_choices, run_choices
from visionattn.models._weights import fetch_weights
from visionattn.tasks.grounding_inference import predict_answers
from visionattn.tasks.segmentation_inference import predict_masks

BIFORMER = Choice("test_biformer (random weights)", model="test_biformer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("web")
    train_runs(found)
    return found


@pytest.fixture(scope="module")
def choices(folder):
    """Entries of the runs by their names."""
    return {choice.run.name: choice for choice in run_choices(find_runs(folder / "outputs"))}


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The pictures that travel in packages, by their names."""
    return {path.stem: path for path in example_pictures(tmp_path_factory.mktemp("examples"))}


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


# the list


def test_runs_are_found_with_their_tasks(choices):
    kinds = {name: choice.kind for name, choice in choices.items()}
    assert kinds == dict(digits="classification", grounding="grounding", nuclei="segmentation")
    assert choices["nuclei"].label.endswith("outputs/nuclei (segmentation run)")
    assert "nuclei" in describe(choices["nuclei"]) and "Random" not in describe(choices["nuclei"])


def test_runs_that_cannot_be_shown_are_named(folder, tmp_path):
    damaged, path = tmp_path / "damaged" / "checkpoints" / "best.ckpt", tmp_path / "eyes" / "checkpoints" / "best.ckpt"
    for file in (damaged, path):
        file.parent.mkdir(parents=True)
    damaged.write_bytes(b"no checkpoint")
    torch.save(dict(hyper_parameters=dict(task="scanpath"), state_dict={"model.x": torch.zeros(1)}), path)
    with pytest.raises(ValueError, match="task scanpath, which the page does not show .* use visionattn predict"):
        run_choices([path])
    lines = []
    found = run_choices([*find_runs(tmp_path), folder / "outputs" / "digits"], lines.append)
    assert [choice.run.name for choice in found] == ["digits"]
    assert len(lines) == 2 and "damaged" in lines[0] and "scanpath" in lines[1]


def test_backbones_say_where_their_weights_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    file = tmp_path / "mine.safetensors"
    save_file(timm.create_model("test_nat").state_dict(), file)
    cached = tmp_path / "hub" / "checkpoints" / "nat_mini.in1k.pth"
    cfg = timm.models.get_pretrained_cfg("nat_mini")
    served = tmp_path / "served.pth"
    served.touch()
    assert fetch_weights(replace(cfg, url=served.as_uri())) == (str(cached), served.as_uri())
    found = model_choices(["nat_*", "test_biformer"], {"test_nat": str(file)})
    labels = [choice.label for choice in found]
    assert labels[:2] == ["nat_mini (published weights)", "test_nat (weights of mine.safetensors)"]
    assert set(labels[2:]) == {f"{name} (random weights)" for name in ("nat_b", "nat_s", "nat_t", "test_biformer")}
    index = tmp_path / "hub" / "index.csv"
    index.write_text(f"name,source_sha256,source_url\nnat_mini.in1k,{'0' * 64},{cfg.url}\n")
    monkeypatch.setattr(_files, "index_path", lambda: index)
    with pytest.raises(ValueError, match=r"nat_mini\.in1k\.pth has SHA-256 .* says 0000"):
        load(found[0])
    expected = timm.create_model("test_nat")
    expected.load_state_dict(load(found[1]).model.state_dict())
    assert not any(choice.label.startswith("test_") for choice in model_choices())


def test_random_weights_are_the_same_each_time_and_leave_the_seed():
    state = torch.get_rng_state()
    first = load(BIFORMER).model.state_dict()
    load.cache_clear()
    second = load(BIFORMER).model.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(torch.get_rng_state(), state)


# answers


def test_digits_get_probabilities(choices, examples):
    assert examples.keys() >= {"nuclei", "scene", "digit", "chelsea"}
    found = answer(choices["digits"], examples["digit"])
    assert len(found.scores) == 5 and set(found.scores) < set("0123456789")
    assert list(found.scores.values()) == sorted(found.scores.values(), reverse=True)
    assert next(iter(found.scores)) in found.text and found.picture is None
    assert found.view.size == (448, 448)  # 32 pixels, each 14 wide


def test_masks_are_those_of_predict(choices, picture, tmp_path):
    found = answer(choices["nuclei"], picture)
    predict_masks(choices["nuclei"].run, [str(picture)], tmp_path / "out")
    mask = np.array(Image.open(tmp_path / "out" / "a_mask.png"))
    assert np.array_equal(found.picture, Image.open(tmp_path / "out" / "a_overlay.png"))
    assert f"nucleus: {(mask == 1).mean():.1%} of the pixels" in found.text


def test_answers_are_those_of_predict(choices, picture, tmp_path):
    question = "where is the <b>qwertz</b>?"
    found = answer(choices["grounding"], picture, question)
    predict_answers(choices["grounding"].run, [str(picture)], question, tmp_path / "out")
    mask, pixels = (np.array(Image.open(path)) for path in (tmp_path / "out" / "a_mask.png", picture))
    shown = np.array(found.picture)
    assert f"{(mask > 0).mean():.1%} of the pixels" in found.text or not mask.any()
    assert np.array_equal(shown[mask > 0], pixels[mask > 0]) and shown[mask == 0].min() >= 204
    assert "qwertz" in found.warning and "<b>" not in found.text
    with pytest.raises(ValueError, match="type one"):
        answer(choices["grounding"], picture, " ")


def test_pictures_are_turned_as_browsers_show_them(choices, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[274] = 6  # a quarter turn
    turned.save(tmp_path / "a.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "b.png")
    for name in ("digits", "nuclei"):
        first, second = (answer(choices[name], tmp_path / f"{stem}.png") for stem in "ab")
        assert first.text == second.text
    assert first.picture.size == (50, 70) and np.array_equal(first.picture, second.picture)


def test_regions_follow_the_position(picture):
    view = answer(BIFORMER, picture).view
    shown = {}
    for position in ((10, 20), (view.width - 5, view.height - 9)):
        marked, stages = regions(BIFORMER, picture, position)
        assert marked.size == view.size and marked.getpixel(position) == (0, 230, 118)
        assert [caption.partition(",")[0] for _, caption in stages] == [f"stage {i}" for i in (1, 2, 3, 4)]
        assert stages[-1][1].endswith(": all")
        shown[position] = np.array(stages[0][0])
    near, far = shown.values()
    assert (near[0, 0] == (0, 230, 118)).all() and (far[-1, -1] == (0, 230, 118)).all()  # the corner's own regions
    assert not (near[-1, -1] == (0, 230, 118)).all()
    with pytest.raises(ValueError, match=rf"position \({view.width}, 0\) lies outside"):
        regions(BIFORMER, picture, (view.width, 0))
    other = Choice("test_nat (random weights)", model="test_nat")
    assert answer(other, picture).view is None
    with pytest.raises(ValueError, match="no routed attention"):
        regions(other, picture, (0, 0))


def test_pictures_that_cannot_be_shown_are_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="text.png is no picture that can be read"):
        answer(BIFORMER, tmp_path / "text.png")
    Image.new("1", (5000, 4000)).save(tmp_path / "huge.png")
    with pytest.raises(ValueError, match="huge.png has 5000 x 4000 pixels; the page takes up to 16.8 million"):
        answer(BIFORMER, tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(ValueError, match="huge.png: Image size .* exceeds"):
        answer(BIFORMER, tmp_path / "huge.png")


# the page and the command


def test_page_offers_every_model_without_telemetry(choices, examples, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    page = build_page([*choices.values(), BIFORMER], list(examples.values()))
    assert not page.analytics_enabled
    dropdown = next(block for block in page.blocks.values() if block.elem_id == "model")
    assert [label for label, _ in dropdown.choices] == [*(c.label for c in choices.values()), BIFORMER.label]
    assert all(fn.api_visibility == "private" for fn in page.fns.values() if fn.name in ("choose", "predict", "look"))
    with pytest.raises(ValueError, match="no model to show"):
        build_page([])


def test_address_that_cannot_be_used_is_refused():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} is in use .* --port {port + 1}"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    with pytest.raises(ValueError, match="--port 0: ports are 1 to 65535"):
        check_address("127.0.0.1", 0)
    with pytest.raises(ValueError, match="no server can be started at 203.0.113.1"):
        check_address("203.0.113.1", port)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models", "biformer_x"], "no model matches 'biformer_x'; did you mean biformer_"),
        (["--run", "nowhere"], "no checkpoint at nowhere"),
        (["--checkpoint", "biformer_t=nowhere.pth"], "no weights at nowhere.pth"),
        (["--port", "99999"], "--port 99999"),
    ],
)
def test_command_ends_with_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    free = [] if "--port" in arguments else ["--port", str(_free_port())]
    with pytest.raises(SystemExit, match=message) as error:
        main(["web", *arguments, *free])
    assert "\n" not in str(error.value)
    assert not list(Path(tmp_path).iterdir())


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
