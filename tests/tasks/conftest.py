"""The operators' benchmark without a GPU."""

from importlib.util import find_spec

import made_up_coco
import pytest
import torch

from visionattn.data import trees
from visionattn.tasks import benchmark_ops
from visionattn.tasks.operator_forms import FLEX
from visionattn.tasks.records import ORIGIN


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Forms on the CPU, uncompiled."""
    monkeypatch.setattr(benchmark_ops, "_DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.fixture
def flex_fails(small_shapes, monkeypatch):
    """A peer that cannot run, in the operators of the test's ``small_shapes``."""

    def prepare(data, shape):
        raise NotImplementedError("no kernel | of a kind\nand more of it")

    for name, operator in benchmark_ops.OPERATORS.items():
        if FLEX in operator.forms:
            forms = operator.forms | {FLEX: operator.forms[FLEX]._replace(prepare=prepare)}
            monkeypatch.setitem(benchmark_ops.OPERATORS, name, operator._replace(forms=forms))


@pytest.fixture
def clocks(on_the_cpu, monkeypatch):
    """Clocks that need no GPU; calls are made, and those that give two gradients (the gather form's) have no graph."""

    def graph(call, repeats, rounds, warm_ups):
        result = call()
        if isinstance(result, tuple) and len(result) == 2:
            raise RuntimeError("not captured: a reason\nand more of it")
        return 0.25

    monkeypatch.setattr(benchmark_ops, "events_ms", lambda call, rounds, warm_ups: call() is not None and 2.0)
    monkeypatch.setattr(benchmark_ops, "host_us", lambda call, number: 40.0)
    monkeypatch.setattr(benchmark_ops, "extra_mib", lambda call, results: 3.2)
    monkeypatch.setattr(benchmark_ops, "graph_ms", graph)
    monkeypatch.setattr(benchmark_ops, "origin", lambda device: dict.fromkeys(ORIGIN, "x") | dict(device="NVIDIA H100"))


@pytest.fixture
def tree_package(tmp_path, monkeypatch):
    """What data.wheel is: null for the installed package with its real pictures, else a made-up one of its layout."""
    if find_spec("deepforest") is not None:
        return "null"
    monkeypatch.setattr(trees, "PICTURES", dict.fromkeys(trees.PICTURES, len(made_up_coco.CROWNS)))
    return made_up_coco.tree_wheel(tmp_path)
