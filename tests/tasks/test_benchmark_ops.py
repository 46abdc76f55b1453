"""The operators' benchmark: its forms compute the same, and its rows and table say what was measured."""

import contextlib
import csv

import pytest
import torch

from visionattn.cli import main
from visionattn.ops import routed_attention
from visionattn.tasks import benchmark_ops as ops
from visionattn.tasks import benchmark_routing as routing
from visionattn.tasks import operator_forms, timing
from visionattn.tasks.benchmark_ops import benchmark_ops
from visionattn.tasks.benchmark_routing import GATHER, OPERATOR, Shape
from visionattn.tasks.operator_forms import DENSE, FLEX, OURS, check
from visionattn.tasks.records import ORIGIN

FORMS = OPERATOR.forms
SMALL = {"small regions": Shape(2, 8, 2, 2, 3, 16), "large regions": Shape(2, 24, 2, 8, 2, 16)}
EVERY_SHAPE = pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """The benchmark at small shapes."""
    published = {GATHER: dict.fromkeys(SMALL, (0.5, 4.0))}
    small = OPERATOR._replace(sets={"default": lambda: SMALL}, published=published)
    monkeypatch.setitem(ops.OPERATORS, "routed_attention", small)


def made(shape):
    """Data in float64."""
    return routing.inputs(shape, torch.float64, "cpu")


@EVERY_SHAPE
@pytest.mark.parametrize("form", [OURS, GATHER, DENSE])
def test_output_and_gradient_agree_with_float64(form, shape):
    data = made(shape)
    assert check(form, FORMS[form], FORMS[form].prepare(data, shape), data, shape) < 1e-12


@EVERY_SHAPE
def test_gather_form_is_routed_attention(shape):
    data = made(shape)
    prepared = routing.gather_form(data, shape)
    expected = routed_attention(*data.batched[0].unbind(3), data.table, (shape.region, shape.region))[0]
    assert torch.allclose(prepared.attend(*prepared.inputs), expected, atol=1e-12)
    T, C = shape.region**2, shape.heads * shape.dim
    assert [tuple(x.shape[2:]) for x in prepared.inputs] == [(T, C), (T, 2 * C)]  # keys and values side by side


@EVERY_SHAPE
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_form_is_routed_attention(shape):
    data = made(shape)
    packed = data.batched[0].detach()
    prepared = routing.flex_form(data._replace(batched=(packed,)), shape)
    expected = routed_attention(*packed.unbind(3), data.table, (shape.region, shape.region))[0]
    assert torch.allclose(prepared.restore(prepared.attend(*prepared.inputs)), expected, atol=1e-12)


def test_blocks_of_flex_are_the_table():
    """What the compiled kernels walk over; the uncompiled form asks the mask alone."""
    shape = SMALL["large regions"]
    index = made(shape).table
    mask = routing.block_mask(index, shape)
    assert mask.BLOCK_SIZE == (64, 64) and not mask.kv_num_blocks.any()
    assert (mask.full_kv_num_blocks == shape.topk).all()
    assert torch.equal(mask.full_kv_indices[..., : shape.topk].sort().values, index.sort().values)
    listed = (index[..., None] == torch.arange(9)).any(dim=3)
    assert torch.equal(mask.to_dense().bool(), listed)
    assert torch.equal(mask.full_q_num_blocks, listed.sum(dim=2, dtype=torch.int32))


def test_a_wrong_result_is_not_timed():
    shape = SMALL["small regions"]
    data = made(shape)
    prepared = FORMS[OURS].prepare(data, shape)
    wrong = prepared._replace(attend=lambda q, k, v: prepared.attend(q, k, v) * 1.1)
    with pytest.raises(ValueError, match=r"visionattn, Shape.*: error 1.0e-01 .* allowed 1e-10; not timed"):
        check(OURS, FORMS[OURS], wrong, data, shape)


def test_a_gradient_that_is_no_number_is_not_timed():
    """However the other errors compare with it."""
    shape = SMALL["small regions"]
    data = made(shape)
    prepared = FORMS[OURS].prepare(data, shape)

    def attend(q, k, v):
        out = prepared.attend(q, k, v)
        out.register_hook(lambda grad: grad * float("nan"))
        return out

    with pytest.raises(ValueError, match="error nan"):
        check(OURS, FORMS[OURS], prepared._replace(attend=attend), data, shape)


def test_rows_and_table(clocks, flex_fails, tmp_path):
    path = tmp_path / "ops.csv"
    table = benchmark_ops(path, rounds=2)
    with path.open(newline="") as file:
        rows = {(row["shape"], row["form"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(name, form) for name in SMALL for form in FORMS]
    ours, gather, flex = (rows["large regions", form] for form in (OURS, GATHER, FLEX))
    assert list(ours) == [*ops.COLUMNS, *ORIGIN]
    assert (ours["forward_ms"], ours["both_ms"], ours["both_clock"], ours["note"]) == ("0.25", "0.25", "graph", "")
    assert float(ours["forward_to_floor"]) == pytest.approx(0.25 / float(ours["forward_floor_ms"]), rel=1e-3)
    assert float(ours["error"]) < 0.02 and ours["forward_to_published"] == ""
    assert (gather["forward_to_published"], gather["both_to_published"]) == ("0.5", "0.5")
    assert (gather["forward_published_ms"], gather["both_published_ms"], gather["dtype"]) == ("0.5", "4.0", "bf16")
    assert (gather["both_ms"], gather["both_clock"]) == ("2.0", "events")
    assert gather["note"] == "both: RuntimeError: not captured: a reason"
    # the row of a peer that cannot run has the reason
    assert flex["forward_ms"] == "" and flex["note"] == "NotImplementedError: no kernel | of a kind"
    lines = table.splitlines()
    assert len(lines) == 2 + 8 + 2 and lines[3].startswith("| small regions | gather | 0.25 / 2* | ")
    dashes = " | ".join("-" * 7)
    assert f"| small regions | flex_attention | {dashes} | NotImplementedError: no kernel / of a kind |" in lines


def test_a_wrong_result_of_ours_ends_the_run(clocks, monkeypatch):
    monkeypatch.setitem(operator_forms.TOLERANCES, torch.bfloat16, 0.0)
    with pytest.raises(ValueError, match="allowed 0; not timed"):
        benchmark_ops(None, [OURS], 2)


def test_a_wrong_result_of_a_peer_is_its_row(clocks, monkeypatch):
    monkeypatch.setattr(operator_forms, "PEER_FACTOR", 0)
    table = benchmark_ops(None, [GATHER], 2)
    assert table.count("ValueError: gather, Shape") == 2


def test_forms_are_chosen(clocks, capsys):
    main(["benchmark", "--ops", "--forms", "gather", "--rounds", "1"])
    out, progress = capsys.readouterr()
    assert out.count("| gather |") == 2 and progress.splitlines()[0] == "small regions, gather: 0.25 / 2* ms"
    with pytest.raises(SystemExit, match="unknown form 'x'; choose of visionattn, gather"):
        main(["benchmark", "--ops", "--forms", "gather,x"])
    with pytest.raises(SystemExit, match="unknown shapes 'networks' of routed_attention; choose of default"):
        main(["benchmark", "--ops", "--shapes", "networks"])


def test_floor_is_the_larger_of_copies_and_exponentials():
    forward, both = operator_forms.attention_floors_ms(3_000_000_000, 64)
    assert (forward, both) == (pytest.approx(4.0), pytest.approx(12.0))
    exps = 64**2 * 64 / 3.7e12 * 1e3
    assert routing.floors(Shape(1, 64, 1, 8, 1, 1), 1) == (pytest.approx(exps), pytest.approx(2 * exps))


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
