"""The benchmark of the neighbourhood operators: its forms, shapes and rows."""

import csv
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from visionattn.cli import main
from visionattn.ops import neighborhood_attention
from visionattn.tasks import benchmark_neighborhood as attention
from visionattn.tasks import benchmark_ops as ops
from visionattn.tasks import benchmark_sum as sums
from visionattn.tasks import operator_forms
from visionattn.tasks.benchmark_neighborhood import APART, BIAS, NATTEN, Shape
from visionattn.tasks.benchmark_ops import benchmark_ops
from visionattn.tasks.benchmark_sum import WINDOWS
from visionattn.tasks.operator_forms import DENSE, EAGER, FLEX, OURS, check

SMALL = {shape.name(): shape for shape in (Shape(3, 9, 2, 8, 5), Shape(2, 12, 1, 16, 3, 4), Shape(2, 24, 1, 8, 3, 2))}
STRIDED = {shape.name(): shape for shape in (Shape(2, 11, 2, 8, 5, 2, 3), Shape(3, 12, 2, 8, 3, 1, 3))}
SMALL_SUMS = {shape.name(): shape for shape in (sums.Shape(3, 7, (3, 7), 2, 4), sums.Shape(2, 9, (5,), 3, 2))}
CASES = [
    (operator, form, shape)
    for operator, shapes in ((attention.OPERATOR, SMALL | STRIDED), (sums.OPERATOR, SMALL_SUMS))
    for form in operator.forms
    for shape in shapes.values()
    if form not in (FLEX, NATTEN) and operator.forms[form].fits(shape)
]
EVERY_SHAPE = pytest.mark.parametrize("shape", (SMALL | STRIDED).values(), ids=SMALL | STRIDED)

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """The benchmark at small shapes; NATTEN's published figures for each, and a peer's that had no memory."""
    published = {OURS: dict.fromkeys(SMALL, (0.5, 2.5)), FLEX: dict.fromkeys(SMALL, ("out of memory",) * 2)}
    for name, operator, shapes, figures in (
        ("neighborhood_attention", attention.OPERATOR, SMALL, published),
        ("neighborhood_sum", sums.OPERATOR, SMALL_SUMS, {}),
    ):
        sets = operator.sets | {"default": lambda shapes=shapes: shapes}
        monkeypatch.setitem(ops.OPERATORS, name, operator._replace(sets=sets, published=figures))
    monkeypatch.setitem(sys.modules, "natten", None)  # importing it fails


def natten(monkeypatch, na2d):
    """The package with this function in it."""
    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=na2d))


def our_na2d(query, key, value, kernel_size, stride, dilation):
    return neighborhood_attention(query, key, value, kernel_size, dilation, stride=stride)


@pytest.mark.parametrize("at_once", [1, 2**27], ids=["image by image", "all images"])
@pytest.mark.parametrize(("operator", "form", "shape"), CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_output_and_gradients_agree_with_float64(operator, form, shape, at_once, monkeypatch):
    monkeypatch.setattr(operator_forms, "_EXACT_NUMBERS", at_once)
    data, found = operator.inputs(shape, torch.float64, "cpu"), operator.forms[form]
    assert check(form, found, found.prepare(data, shape), data, shape) < 1e-12


@EVERY_SHAPE
def test_natten_is_asked_for_the_same_windows(shape, monkeypatch):
    natten(monkeypatch, our_na2d)
    assert attention.no_natten() == ""
    data, found = attention.inputs(shape, torch.float64, "cpu"), attention.OPERATOR.forms[NATTEN]
    assert check(NATTEN, found, found.prepare(data, shape), data, shape) < 1e-12


@EVERY_SHAPE
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_form_is_neighborhood_attention(shape):
    data = attention.inputs(shape, torch.float64, "cpu")
    packed = data.batched[0].detach()
    prepared = attention.flex_form(data._replace(batched=(packed,)), shape)
    expected = neighborhood_attention(*packed.unbind(3), shape.kernel, shape.dilation, stride=shape.stride)
    assert torch.allclose(prepared.restore(prepared.attend(*prepared.inputs)), expected, atol=1e-12)


@EVERY_SHAPE
@pytest.mark.parametrize("tile", [(1, 24), (8, 16), (2, 3)])
def test_blocks_of_flex_hold_every_pair_of_a_window(shape, tile):
    """What the compiled kernels walk over; the uncompiled form asks the mask alone."""
    order = attention.token_order(shape, tile, torch.device("cpu"))
    assert torch.equal(order.sort().values, torch.arange(shape.side**2))
    mask, tokens = attention.block_mask(shape, order), torch.arange(shape.side**2)
    listed = mask.mask_mod(torch.tensor(0), torch.tensor(0), tokens[:, None], tokens)
    assert (listed.sum(dim=1) == shape.kernel**2).all()
    blocks = torch.zeros(mask.to_dense().shape[2:], dtype=torch.bool)
    blocks[tuple((listed.nonzero() // 128).T)] = True
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)
    assert mask.full_kv_num_blocks is None and mask.seq_lengths == (shape.side**2,) * 2


def test_order_of_tokens():
    order = attention.token_order(Shape(1, 4, 1, 8, 1), (2, 2), torch.device("cpu"))
    assert order.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    order = attention.token_order(Shape(1, 4, 1, 8, 1, 2), (1, 4), torch.device("cpu"))
    assert order.tolist() == [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15]


@pytest.mark.parametrize(
    ("operator", "form", "shape", "entry"),
    [(attention.OPERATOR, BIAS, Shape(3, 9, 2, 8, 5), 3), (sums.OPERATOR, OURS, sums.Shape(3, 7, (3, 7), 2, 4), 2)],
    ids=["attention", "sum"],
)
def test_a_wrong_gradient_of_a_bias_is_not_timed(operator, form, shape, entry):
    data, found = operator.inputs(shape, torch.float64, "cpu"), operator.forms[form]
    prepared = found.prepare(data, shape)

    def attend(*inputs):
        inputs = list(inputs)
        inputs[entry] = 0.9 * inputs[entry].detach() + 0.1 * inputs[entry]
        return prepared.attend(*inputs)

    with pytest.raises(ValueError, match=rf"{re.escape(form)}, Shape.*: error (8\.9|9\.0)e-01"):
        check(form, found, prepared._replace(attend=attend), data, shape)
    without = prepared._replace(attend=lambda *x: prepared.attend(*(y.detach() if y is x[entry] else y for y in x)))
    with pytest.raises(ValueError, match="error inf"):
        check(form, found, without, data, shape)


def test_shapes_of_windows_are_those_of_davit():
    from visionattn.layers import WindowAttention
    from visionattn.tasks.network_shapes import stage_modules

    found = set()
    for _, side, layer in stage_modules(("davit_t",), WindowAttention):
        dim = layer.proj.in_features // layer.num_heads
        found.add(Shape(128, side, layer.num_heads, dim, layer.window_size, 1, layer.window_size))
    assert set(attention.WINDOWS.values()) < found
    assert next(iter(attention.WINDOWS)) == "B128 56x56 heads 3x32 kernel 7 stride 7"


def test_rows_of_windows(clocks, monkeypatch):
    sets = attention.OPERATOR.sets | {"windows": lambda: STRIDED}
    monkeypatch.setitem(ops.OPERATORS, "neighborhood_attention", attention.OPERATOR._replace(sets=sets))
    table = benchmark_ops(None, [OURS, APART], 1, "neighborhood_attention", "windows")
    overlapping, apart = STRIDED
    assert [line.split(" | ")[:2] for line in table.splitlines()[2:5]] == [
        [f"| {overlapping}", OURS], [f"| {apart}", OURS], [f"| {apart}", APART]
    ]  # fmt: skip


@pytest.mark.thorough
def test_shapes_are_those_of_the_networks():
    shapes = attention.network_shapes()
    assert len(shapes) == len(set(shapes.values())) == 28
    assert shapes["dinat_mini stage 2: B128 28x28 heads 4x32 kernel 7 dilation 4"] == Shape(128, 28, 4, 32, 7, 4)
    assert shapes["nat_s stage 4: B128 7x7 heads 24x32 kernel 7"] == Shape(128, 7, 24, 32, 7)
    five = list(attention.SHAPES.values())[:5]
    assert set(five) < set(shapes.values())
    network_sums = sums.network_shapes()
    assert len(network_sums) == 7  # the first two share their third stage
    overlock_t = list(sums.SHAPES.values())[:2]
    assert network_sums["overlock_xt stage 3: B128 14x14 kernels 5+13 groups 8x16"] == overlock_t[0]
    assert network_sums["overlock_t stage 4: B128 7x7 kernels 5+7 groups 16x16"] == overlock_t[1]
    # at 512 pixels the maps are larger, and nothing else
    assert [shape._replace(batch=128, side=shape.side * 7 // 16) for shape in sums.SHAPES.values()][2:] == overlock_t


def test_published_figures():
    figures = attention.OPERATOR.published
    assert set(figures) <= set(attention.OPERATOR.forms) and all(
        set(x) == set(attention.SHAPES) for x in figures.values()
    )
    last = attention.Shape(4, 256, 4, 128, 13).name()
    assert figures[NATTEN][last] == figures[OURS][last] == (2.334, 9.56)
    assert figures[FLEX][last] == ("out of memory", "out of memory") and figures[DENSE][last] == ("-", "-")


def test_floors():
    forward, both = attention.floors(Shape(128, 56, 2, 32, 7), 2)
    copies = 4 * 2 * 128 * 56 * 56 * 2 * 32 / 3e9
    assert (forward, both) == (pytest.approx(copies), pytest.approx(3 * copies))
    exps = 128 * 56 * 56 * 4 * 169 / 3.7e9
    assert attention.floors(Shape(128, 56, 4, 8, 13), 1) == (pytest.approx(exps), pytest.approx(2 * exps))
    pixels = 128 * 14 * 14
    copies = 2 * pixels * (8 * 194 + 2 * 256) / 3e9
    assert sums.floors(sums.Shape(128, 14, (5, 13), 8, 16), 2) == (pytest.approx(copies), pytest.approx(3 * copies))


def read(path):
    with path.open(newline="") as file:
        return {(row["shape"], row["form"]): row for row in csv.DictReader(file)}


def test_rows_of_attention(clocks, flex_fails, tmp_path, monkeypatch):
    natten(monkeypatch, lambda query, key, value, **window: 1.2 * query)
    seen = []
    table = benchmark_ops(tmp_path / "a.csv", None, 1, "neighborhood_attention", report=seen.append)
    rows = read(tmp_path / "a.csv")
    assert list(rows) == [(name, form) for name in SMALL for form in (OURS, BIAS, NATTEN, FLEX, DENSE, EAGER)]
    assert len(seen) == len(rows) and seen[0] == f"{next(iter(SMALL))}, visionattn: 0.25 / 0.25 ms"
    for (_, form), row in rows.items():
        assert (row["both_ms"] == "") == (form in (NATTEN, FLEX))
        assert form in (NATTEN, FLEX) or float(row["error"]) < 0.02
        assert row["forward_to_published"] == ("0.5" if form == OURS else "")
        assert row["note"].startswith("ValueError: NATTEN, Shape") == (form == NATTEN)
    assert table.count("| flex_attention | - | - | out of memory | - | ") == 3
    assert table.splitlines()[2].startswith("| B3 9x9 heads 2x8 kernel 5 | visionattn | 0.25 / 0.25 | ")


def test_natten_is_left_out_where_it_cannot_be_imported(clocks, capsys):
    main(["benchmark", "--ops", "--operator", "neighborhood_attention", "--forms", "NATTEN,visionattn + bias"])
    out, progress = capsys.readouterr()
    line = "NATTEN is left out: ModuleNotFoundError: import of natten halted; None in sys.modules"
    assert out.splitlines()[-1] == progress.splitlines()[0] == line
    assert out.count("| visionattn + bias |") == 3 and "| NATTEN |" not in out


def test_rows_of_the_sum(clocks, tmp_path):
    main(
        ["benchmark", "--ops", "--operator", "neighborhood_sum", "--dtype", "fp32", "--output", str(tmp_path / "s.csv")]
    )
    rows = read(tmp_path / "s.csv")
    assert list(rows) == [(name, form) for name in SMALL_SUMS for form in (OURS, EAGER, WINDOWS)]
    assert all(row["both_ms"] == "0.25" and row["dtype"] == "fp32" for row in rows.values())
    assert all(float(row["error"]) < 2e-5 for row in rows.values())


def test_an_operator_without_memory_is_a_row(clocks, monkeypatch):
    def no_memory(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    natten(monkeypatch, no_memory)
    table = benchmark_ops(None, [NATTEN, OURS], 1, "neighborhood_attention")
    assert table.count("OutOfMemoryError: CUDA out of memory. Tried to allocate 80 GiB") == 3
    assert table.count("| visionattn | 0.25 / 0.25 |") == 3
