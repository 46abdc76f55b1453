"""Timing of models and attention layers."""

import csv
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from PIL import Image
from torch import nn

from visionattn.cli import main
from visionattn.layers.routing_attention import RoutingAttention
from visionattn.tasks import benchmark_models, timing
from visionattn.tasks.benchmark_dense import gathered
from visionattn.tasks.benchmark_models import COLUMNS, Settings
from visionattn.tasks.records import ORIGIN, markdown, origin
from visionattn.tasks.row_files import CsvFile, row_file
from visionattn.tasks.timing import times_in_turn


def benchmark(*arguments):
    main(["benchmark", *arguments])


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table_rows(text):
    return [re.split(r" *\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("| `")]


def test_calls_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = times_in_turn(calls, 3, "cpu")
    assert order == list("ab") * 8 and {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


# models


def test_models_are_timed_side_by_side(capsys):
    benchmark("test_patnet", "test_patnet:folded", "test_ninformer", "--rounds", "2", "--batch", "3")
    output = capsys.readouterr().out
    found = table_rows(output)
    assert [row[0] for row in found] == ["`test_patnet`", "`test_patnet:folded`", "`test_ninformer`"]
    median, p90, p99, fastest, rate, ratio, single = map(float, found[0][3:10])
    assert ratio == 1 and fastest <= median <= p90 <= p99 and rate == pytest.approx(3000 / median, rel=0.05)
    assert 0 < single < median * 2
    assert "Batch 3" in output and "PyTorch" in output


def test_every_mode_makes_a_row_of_the_csv_file(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setattr(timing, "_REPORT_EVERY", 1e9)  # or a slow machine would have more to say
    caplog.set_level("INFO", logger="visionattn")
    path = tmp_path / "new" / "models.csv"
    modes = "--modes", "inference,training,features", "--rounds", "1", "--batch-size", "2", "--output", str(path)
    benchmark("test_overlock", *modes, "--model-kwargs", "num_classes=7", "--input-size", "64", "96")
    rows = read(path)
    assert list(rows[0]) == [*COLUMNS, *ORIGIN]
    assert [row["mode"] for row in rows] == ["inference", "training", "features"]
    progress = [re.sub(r"\d+", "#", record.getMessage()) for record in caplog.records if record.name == "visionattn"]
    assert progress == [
        f"test_overlock, {row['mode']}: {line}" for row in rows for line in ("ready after # s", "# images/s")
    ]
    for row in rows:
        assert float(row["images_per_s"]) == pytest.approx(2000 / float(row["median_ms"]), rel=1e-3)
        assert (row["height"], row["width"], row["model_kwargs"], row["peak_gib"]) == ("64", "96", "num_classes=7", "")
        assert row["torch"] == torch.__version__ and float(row["parameters_m"]) > 0
        trained = row["mode"] == "training"  # a step is timed for the whole batch only, and has no count of operations
        assert (row["one_image_ms"] == "", row["gmacs"] == "") == (trained, trained)
    benchmark("test_nat", "--rounds", "1", "--output", str(path))
    assert len(read(path)) == 4 and path.read_text().count("median_ms") == 1
    assert len(table_rows(capsys.readouterr().out)) == 4


def test_percentiles_are_of_all_rounds(monkeypatch):
    times = [0.001 * i for i in range(1, 101)]
    monkeypatch.setattr(benchmark_models, "times_in_turn", lambda calls, *rest, **more: dict.fromkeys(calls, times))
    (row,) = benchmark_models._rows(["test_patnet"], "inference", Settings(rounds=100))
    assert (row["median_ms"], row["p90_ms"], row["p99_ms"], row["fastest_ms"]) == (50.5, 90.1, 99.01, 1)


def test_long_work_says_how_far_it_is(monkeypatch):
    monkeypatch.setattr(timing, "_REPORT_EVERY", 0)
    lines = []
    times_in_turn({"a": lambda: None}, 3, "cpu", warm_ups=1, report=lines.append)
    assert lines == ["warming up", "round 1 of 3", "round 2 of 3"]


def test_rows_as_json_and_as_a_picture(tmp_path):
    path, plot = tmp_path / "new" / "rows.json", tmp_path / "other" / "rows.png"
    benchmark("test_patnet", "--rounds", "1", "--output", str(path), "--plot", str(plot))
    benchmark("test_nat", "--rounds", "1", "--output", str(path))
    rows = json.loads(path.read_text())
    assert [row["model"] for row in rows] == ["test_patnet", "test_nat"] and list(rows[0]) == [*COLUMNS, *ORIGIN]
    assert rows[0]["peak_gib"] is None and rows[0]["median_ms"] > 0
    with Image.open(plot) as image:
        grey = image.convert("L")
        assert grey.width > 600 and len(grey.getcolors(256)) > 10
    assert [p.name for p in plot.parent.iterdir()] == ["rows.png"]


def test_bad_plots_and_formats_name_the_remedy(tmp_path):
    for arguments, message in (
        (("test_nat", "--plot", "rows.txt"), "--plot rows.txt: expected the name of a file that ends with .png"),
        (("test_nat", "--output", "rows.xml"), "expected the suffix .csv, .json, .md, or --format csv|json|markdown"),
        (("--attention", "14", "--plot", "a.png"), "--plot a.png is for models"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            benchmark(*arguments)


def test_networks_with_heads_are_timed(tmp_path):
    heads = "unet", "sentence_attention", "oat", "mask_rcnn"
    path, names = tmp_path / "heads.csv", [f"{head}/test_nat" for head in heads]
    how = "--rounds", "1", "--batch-size", "2", "--output", str(path), "--input-size", "64"
    benchmark(*names, "--modes", "training", *how)
    benchmark(*names[-2:], *how)
    expected = [(name, "training") for name in names] + [(name, "inference") for name in names[-2:]]
    assert [(row["model"], row["mode"]) for row in read(path)] == expected
    with pytest.raises(SystemExit, match="unet/test_nat has a head; leave out the mode features"):
        benchmark("unet/test_nat", "--modes", "features")
    with pytest.raises(SystemExit, match="unknown backbone 'test_gnat'"):
        benchmark("unet/test_gnat")
    with pytest.raises(SystemExit, match="published form of BiFormer's attention, which this network does not have"):
        benchmark("unet/test_nat:gather")


@pytest.mark.parametrize("size", [(14, 14), (13, 18)])
def test_the_gathered_form_equals_the_operator(size):
    layer = RoutingAttention(32, 4, num_regions=4, topk=3).double()
    x = torch.randn(2, *size, 32, dtype=torch.float64, requires_grad=True)
    (gathering,) = gathered(nn.Sequential(layer))
    results = []
    for form in (layer, gathering):
        out = form(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert_close("output or gradient", expected, actual, 1e-12)


def test_a_training_step_changes_the_weights():
    settings = Settings(modes=("training",), batch=2)
    model, shape = benchmark_models._create("test_nat", "training", settings)
    before = [p.clone() for p in model.parameters()]
    benchmark_models._step(model, "training", torch.randn(2, *shape), settings)()
    assert model.training and any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_type_format_and_compilation_reach_the_model(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: compiled.append(options) or model)
    settings = Settings(dtype="bf16", autocast=False, channels_last=True, compile="default", batch=2)
    assert settings.weights_dtype == torch.bfloat16 and not settings.cast()._enabled
    model, _ = benchmark_models._create("test_patnet", "inference", settings)
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert weights and all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    steps, _ = benchmark_models._prepare("test_patnet", "inference", settings)
    assert (
        compiled == [dict(dynamic=False, mode="default")]
        and steps[1]().dtype == torch.bfloat16
        and steps[2]().shape[0] == 2
    )


def test_unknown_mode_of_compilation_is_named():
    with pytest.raises(ValueError, match="compile='fast' is not a mode of torch.compile; use default, reduce-overhead"):
        Settings(compile="fast")


def test_autocast_keeps_the_weights():
    settings = Settings(dtype="bf16")
    model, shape = benchmark_models._create("test_patnet", "inference", settings)
    output = benchmark_models._step(model, "inference", torch.randn(1, *shape), settings)()
    assert next(model.parameters()).dtype == torch.float32 and output.dtype == torch.bfloat16


def test_models_of_a_fixed_size_are_made_for_the_size():
    kept = benchmark_models._create("test_vit", "inference", Settings())[1]
    model, shape = benchmark_models._create("test_vit", "inference", Settings(size=(96, 128)))
    assert shape == (3, 96, 128) != kept and model(torch.zeros(1, *shape)).shape == (1, 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either names of models or --attention"),
        (["test_nat", "--attention", "7"], "either names of models or --attention"),
        (["nat_x"], "unknown model 'nat_x'; did you mean"),
        (["test_nat", "--modes", "inference,drawing"], "unknown mode 'drawing'; choose of inference,training,features"),
        (["test_nat", "--input-size", "1", "2", "3"], "expected a side, or a height and a width"),
        (["test_nat", "--batch-size", "0"], "batch 0"),
        (["test_nat", "--cuda-graph"], "--cuda-graph needs --device cuda"),
        (["test_patnet:folded", "--modes", "training"], "leave out :folded for training"),
        (["test_nat", "--model-kwargs", "n_wim=16"], "test_nat does not take {'n_wim': 16}"),
        (["test_vit", "--size", "100"], r"test_vit cannot do inference of 1 images of \(3, 100, 100\): .*divisible"),
    ],
)
def test_what_cannot_be_timed_is_named(arguments, message):
    with pytest.raises(SystemExit, match=message):
        benchmark(*arguments, "--rounds", "1") if arguments else benchmark()


@pytest.mark.parametrize("arguments", [["test_nat", "--device", "cuda"], ["--ops"]])
def test_a_missing_device_is_named(arguments, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="CUDA device"):
        benchmark(*arguments)


def test_an_argument_of_no_form_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark("test_nat", "--model-kwargs", "depth")
    assert "'depth' is not of the form NAME=VALUE" in capsys.readouterr().err


def test_the_tool_is_the_command(monkeypatch):
    tool = Path(__file__).parents[2] / "tools" / "benchmark_models.py"
    monkeypatch.setattr(sys, "argv", [str(tool), "--rounds", "1", "nat_x"])
    with pytest.raises(SystemExit, match="unknown model 'nat_x'"):
        runpy.run_path(str(tool), run_name="__main__")


# layers


def test_attention_layers_are_timed_side_by_side(capsys):
    benchmark("--attention", "14", "--dim", "48", "--heads", "4", "--rounds", "1")
    names = [row[0] for row in table_rows(capsys.readouterr().out)]
    peers = ["windows of 7", "HiLo, alpha 0.9", "HiLo, alpha 0.5", "spatial reduction by 2", "whole map"]
    assert names == [f"`{name}`" for name in peers]


# records


def test_a_file_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv has the columns a,b, .*choose another --output"):
        CsvFile(path, ("a", "c"))
    with pytest.raises(ValueError, match="is a folder"):
        CsvFile(tmp_path, ("a",))
    CsvFile(path, ("a", "b")).append(dict(a=3))
    assert path.read_text() == "a,b\n1,2\n3,\n"
    with pytest.raises(ValueError, match="'c'"):
        CsvFile(path, ("a", "b")).append(dict(c=3))


@pytest.mark.parametrize("name", ["rows.json", "rows.md"])
def test_other_formats_grow_and_keep_their_columns(tmp_path, name):
    path = tmp_path / name
    row_file(path, ("a", "b")).append(dict(a="x|y"))
    row_file(path, ("a", "b")).append(dict(a=1, b=2))
    text = path.read_text()
    if name.endswith("json"):
        assert json.loads(text) == [dict(a="x|y", b=None), dict(a=1, b=2)]
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(ValueError, match="bad.json is no JSON"):
            row_file(tmp_path / "bad.json", ("a",))
    else:
        assert text == "| a | b |\n|---|---|\n| x\\|y |  |\n| 1 | 2 |\n"
    with pytest.raises(ValueError, match="has the columns a,b, .*choose another --output"):
        row_file(path, ("a", "c"))
    assert path.read_text() == text
    assert row_file(tmp_path / "rows.txt", ("a",), "csv").columns == ["a"]


def test_origin_names_versions_and_commit():
    found = origin("cpu")
    assert tuple(found) == ORIGIN and found["device"].endswith("CPU threads") and found["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{7,}|unknown", found["commit"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])


def test_markdown():
    assert markdown(("a", "b"), [("1", "2")]) == "| a | b |\n|---|---|\n| 1 | 2 |"
