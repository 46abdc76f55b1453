"""The benchmark of attention through a state: its forms, floors and rows."""

import csv

import pytest
import torch

from visionattn.cli import main
from visionattn.tasks import benchmark_ops as ops
from visionattn.tasks.benchmark_state import COMPILED, OPERATOR, SHAPES, Shape
from visionattn.tasks.operator_forms import OURS, check

SMALL = {shape.name(): shape for shape in (Shape(2, 5, 3, 4), Shape(3, 4, 2, 6, "channel_softmax", False))}

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("form", OPERATOR.forms)  # nothing is compiled here
def test_output_and_gradients_agree_with_float64(form, shape):
    data, found = OPERATOR.inputs(shape, torch.float64, "cpu"), OPERATOR.forms[form]
    assert check(form, found, found.prepare(data, shape), data, shape) < 1e-6  # tables are float32


def test_floor_is_every_tensor_once():
    forward, both = OPERATOR.floors(SHAPES["B16 64x64 heads 12x16 linear rotated"], 2)
    size = 16 * 64 * 64 * 192 * 2
    assert forward == pytest.approx(4 * size / 3e9) and both == pytest.approx(11 * size / 3e9)


def test_rows_come_from_the_command(clocks, tmp_path, monkeypatch):
    monkeypatch.setitem(ops.OPERATORS, "state_attention", OPERATOR._replace(sets={"default": lambda: SMALL}))
    path = tmp_path / "rows.csv"
    arguments = ["--forms", f"{OURS},{COMPILED}", "--dtype", "fp32", "--rounds", "3", "--output", str(path)]
    main(["benchmark", "--ops", "--operator", "state_attention", *arguments])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["shape"], row["form"]) for row in rows] == [
        (name, form) for name in SMALL for form in (OURS, COMPILED)
    ]
    assert all(float(row["both_ms"]) > 0 and float(row["error"]) < 2e-5 for row in rows)
