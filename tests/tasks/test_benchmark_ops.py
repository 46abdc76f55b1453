"""The operators' benchmark: its forms compute the same, and its rows and table say what was measured."""

import contextlib
import csv

import pytest
import torch

from visionattn.cli import main
from visionattn.ops import routed_attention
from visionattn.tasks import benchmark_ops as ops
from visionattn.tasks import timing
from visionattn.tasks.benchmark_ops import DENSE, FLEX, FORMS, GATHER, OURS, Shape, benchmark_ops, check
from visionattn.tasks.records import ORIGIN

SMALL = {"small regions": Shape(2, 8, 2, 2, 3, 16), "large regions": Shape(2, 24, 2, 8, 2, 16)}
EVERY_SHAPE = pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """The benchmark at small shapes, uncompiled."""
    monkeypatch.setattr(ops, "_DEVICE", "cpu")
    monkeypatch.setattr(ops, "SHAPES", SMALL)
    monkeypatch.setattr(ops, "OFFICIAL_MS", dict.fromkeys(SMALL, (0.5, 4.0)))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@EVERY_SHAPE
@pytest.mark.parametrize("form", [OURS, GATHER, DENSE])
def test_output_and_gradient_agree_with_float64(form, shape):
    packed, index, weights = ops.inputs(shape, torch.float64)
    assert check(form, FORMS[form](packed, index, shape), packed, index, weights, shape) < 1e-12


@EVERY_SHAPE
def test_gather_form_is_routed_attention(shape):
    packed, index, _ = ops.inputs(shape, torch.float64)
    prepared = ops.gather_form(packed, index, shape)
    expected = routed_attention(*packed.unbind(3), index, (shape.region, shape.region))[0]
    assert torch.allclose(prepared.attend(*prepared.inputs), expected, atol=1e-12)
    T, C = shape.region**2, shape.heads * shape.dim
    assert [tuple(x.shape[2:]) for x in prepared.inputs] == [(T, C), (T, 2 * C)]  # keys and values side by side


@EVERY_SHAPE
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_form_is_routed_attention(shape):
    packed, index, _ = ops.inputs(shape, torch.float64)
    prepared = ops.flex_form(packed.detach(), index, shape)
    expected = routed_attention(*packed.unbind(3), index, (shape.region, shape.region))[0]
    assert torch.allclose(prepared.restore(prepared.attend(*prepared.inputs)), expected, atol=1e-12)


def test_blocks_of_flex_are_the_table():
    """What the compiled kernels walk over; the uncompiled form asks the mask alone."""
    shape = SMALL["large regions"]
    _, index, _ = ops.inputs(shape, torch.float64)
    mask = ops.block_mask(index, shape)
    assert mask.BLOCK_SIZE == (64, 64) and not mask.kv_num_blocks.any()
    assert (mask.full_kv_num_blocks == shape.topk).all()
    assert torch.equal(mask.full_kv_indices[..., : shape.topk].sort().values, index.sort().values)
    listed = (index[..., None] == torch.arange(9)).any(dim=3)
    assert torch.equal(mask.to_dense().bool(), listed)
    assert torch.equal(mask.full_q_num_blocks, listed.sum(dim=2, dtype=torch.int32))


def test_a_wrong_result_is_not_timed():
    shape = SMALL["small regions"]
    packed, index, weights = ops.inputs(shape, torch.float64)
    prepared = FORMS[OURS](packed, index, shape)
    wrong = prepared._replace(attend=lambda q, k, v: prepared.attend(q, k, v) * 1.1)
    with pytest.raises(ValueError, match=r"visionattn, Shape.*: error 1.0e-01 .* allowed 0.02; not timed"):
        check(OURS, wrong, packed, index, weights, shape)


@pytest.fixture
def clocks(monkeypatch):
    """Clocks that need no GPU; calls are made, and the gather form's backward cannot be captured."""

    def graph(call, repeats, rounds):
        result = call()
        if isinstance(result, tuple) and len(result) == 2:
            raise RuntimeError("not captured: a reason\nand more of it")
        return 0.25

    monkeypatch.setattr(ops, "events_ms", lambda call, rounds: call() is not None and 2.0)
    monkeypatch.setattr(ops, "host_us", lambda call, number: 40.0)
    monkeypatch.setattr(ops, "extra_mib", lambda call, results: 3.2)
    monkeypatch.setattr(ops, "graph_ms", graph)
    monkeypatch.setattr(ops, "origin", lambda device: dict.fromkeys(ORIGIN, "x") | dict(device="NVIDIA H100"))


def test_rows_and_table(clocks, tmp_path):
    path = tmp_path / "ops.csv"
    table = benchmark_ops(path, list(FORMS), rounds=2)
    with path.open(newline="") as file:
        rows = {(row["shape"], row["form"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(name, form) for name in SMALL for form in FORMS]
    ours, gather, flex = (rows["large regions", form] for form in (OURS, GATHER, FLEX))
    assert list(ours) == [*ops.COLUMNS, *ORIGIN]
    assert (ours["forward_ms"], ours["both_ms"], ours["both_clock"], ours["note"]) == ("0.25", "0.25", "graph", "")
    assert float(ours["forward_to_floor"]) == pytest.approx(0.25 / float(ours["forward_floor_ms"]), rel=1e-3)
    assert float(ours["error"]) < 0.02 and ours["forward_to_official"] == ""
    assert (gather["forward_to_official"], gather["both_to_official"]) == ("0.5", "0.5")
    assert (gather["both_ms"], gather["both_clock"]) == ("2.0", "events")
    assert gather["note"] == "both: RuntimeError: not captured: a reason"
    # no backward on a CPU: the row of a peer that cannot run has the reason
    assert flex["forward_ms"] == "" and flex["note"].startswith("NotImplementedError: FlexAttention")
    lines = table.splitlines()
    assert len(lines) == 2 + 8 + 2 and lines[3].startswith("| small regions | gather | 0.25 / 2* | ")
    assert "| small regions | flex_attention | - | - | - | - | - | - | NotImplementedError" in table


def test_a_wrong_result_of_ours_ends_the_run(clocks, monkeypatch):
    monkeypatch.setattr(ops, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="allowed 0.0; not timed"):
        benchmark_ops(None, [OURS], 2)


def test_a_wrong_result_of_a_peer_is_its_row(clocks, monkeypatch):
    monkeypatch.setattr(ops, "PEER_TOLERANCE", 0.0)
    table = benchmark_ops(None, [GATHER], 2)
    assert table.count("ValueError: gather, Shape") == 2


def test_forms_are_chosen(clocks, capsys):
    main(["benchmark", "--ops", "--forms", "gather", "--rounds", "1"])
    assert capsys.readouterr().out.count("| gather |") == 2
    with pytest.raises(SystemExit, match="unknown form 'x'; choose of visionattn, gather"):
        main(["benchmark", "--ops", "--forms", "gather,x"])


def test_floor_is_the_larger_of_copies_and_exponentials():
    forward, both = ops._floors_ms(Shape(1, 64, 1, 8, 1), 3_000_000_000)
    assert (forward, both) == (pytest.approx(4.0), pytest.approx(12.0))
    exps = 64**2 * 64 / 3.7e12 * 1e3
    assert ops._floors_ms(Shape(1, 64, 1, 8, 1), 1) == (pytest.approx(exps), pytest.approx(2 * exps))


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_capture_tries_again_and_names_the_first_cause(failures, monkeypatch):
    """The order of things in a capture; what CUDA does in it needs a GPU."""
    for name in ("synchronize", "empty_cache", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    modes, calls = [], []

    def captured(call, repeats, stream, mode):
        modes.append(mode)
        if len(modes) <= failures:
            try:
                raise RuntimeError("the cause")
            finally:
                raise RuntimeError("capture invalidated")
        return "graph"

    monkeypatch.setattr(timing, "_captured", captured)
    with pytest.raises(RuntimeError, match="not captured: the cause") if failures == 2 else contextlib.nullcontext():
        assert timing.capture(lambda: calls.append(1)) == "graph"
    assert modes == ["thread_local", "relaxed"][: failures + 1] and len(calls) == 3
