"""The timm contract (``tests/contract``) for every test model; for one published variant of each family what its widths
and depth may change.
"""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import visionattn

TOOL = Path(__file__).parent.parent / "contract" / "timm_contract.py"
VARIANTS = [
    "biformer_t",
    "davit_t",
    "lgvit_d96",
    "litv2_s",
    "nat_mini",
    "overlock_xt",
    "patnet_t0",
    "ninformer_p4_32",
    "activator_p4_32",
]

POINTS = ["registry.*", "cfg.*", "features.*", "size.*", "in_chans.*"]

EXPORTS = {"graph.export_dynamic_batch", "extra.export_dynamic_hw", "extra.onnx"}
TRAINED = {"graph.compile_training_fullgraph"}
IMPLIED = {
    # their own tests export with batch and sizes free at once, to ONNX with a free batch, and compile with gradients
    "test_biformer": EXPORTS,
    "test_overlock": EXPORTS,
    "test_litv2": EXPORTS | TRAINED,
    "test_activator": EXPORTS | TRAINED,
    "test_ninformer": {"extra.onnx"} | TRAINED,
    # exported with free sizes and compiled with a free batch by other points, and to ONNX by its own test
    "test_patnet": {"graph.export_dynamic_batch", "extra.onnx"},
    "test_davit": {"graph.export_dynamic_batch"},
    "test_nat": {"graph.export_dynamic_batch"},
    "test_lgvit": {"graph.export_dynamic_batch", "extra.onnx"},  # exported by a thorough test of test_export.py
}


def _load_tool():
    spec = importlib.util.spec_from_file_location("timm_contract", TOOL)
    spec.loader.exec_module(tool := importlib.util.module_from_spec(spec))
    return tool


tool = _load_tool()


def _first_points(name):
    """All points but those that take long and that other tests imply."""
    # compiled with gradients by another point or test; an exported batch may be of any size in the next point
    implied = {"graph.compile_fullgraph", "graph.export_static"} | IMPLIED.get(name, set())
    if name == "test_patnet":
        implied.remove("graph.export_static")  # also saves and loads a program
    if importlib.util.find_spec("timm.models._input") is None:
        implied.add("weights.hub_folder_round_trip")  # timm 1.0.29 loses in_chans; test_hub.py says it for it
    return [point for point, _ in tool.POINTS if point not in implied]


@pytest.mark.slow
@pytest.mark.parametrize(
    "names, points, least",
    [
        *(([name], _first_points(name), 65) for name in visionattn.list_models("test_*") if name != "test_dinat"),
        # with DiNAT, which is NAT with other numbers
        pytest.param(visionattn.list_models("test_*"), ["*"], 700, marks=pytest.mark.thorough),
        pytest.param(VARIANTS, POINTS, 200, marks=pytest.mark.thorough),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_models_keep_the_contract(names, points, least, monkeypatch):
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    settings = SimpleNamespace(points=points, size=64, limit=180, extra=True)
    rows = [row for name in names for row in tool.check(name, settings, import_warnings=[])]
    torch.compiler.reset()
    broken = [f"{name} {point}: {message}" for name, point, holds, message, _ in rows if holds is False]
    assert not broken, "\n".join(broken)
    assert sum(holds is True for *_, holds, _, _ in rows) >= least


@pytest.mark.thorough
def test_tool_runs_by_itself():
    command = [sys.executable, str(TOOL), "--import", "visionattn", "--points=registry.*", "test_biformer"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    held, _, count = result.stdout.split()[-5:-2]
    assert held == count and int(held) >= 5
