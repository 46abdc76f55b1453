"""The tool that trains with two backends, shortened."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

TOOL = Path(__file__).parents[2] / "tools" / "compare_backends.py"


def run(*arguments):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TOOL), "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.thorough
def test_backends_start_alike_and_another_order_does_not(tmp_path):
    small = ["--model", "test_biformer", "--steps", "3", "--size", "64", "--batch", "8", "--precision", "fp32"]
    result = run(*small, "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    with (tmp_path / "losses.csv").open(newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert list(rows[0]) == ["step", "eager", "reference", "reference, other order"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["eager"] == pytest.approx(row["reference"], rel=1e-4)
        assert row["eager"] != pytest.approx(row["reference, other order"], rel=1e-3)
    for name in list(rows[0])[1:]:
        mean = sum(row[name] for row in rows) / 3
        assert f"{name}: mean loss of the last 3 steps {mean:.4f}" in result.stdout
    low, high = Image.open(tmp_path / "losses.png").convert("L").getextrema()
    assert low < 128 and high == 255


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps, --batch and --size must be 1 or more, got 0"),
        (["--model", "biformer_x"], "unknown model 'biformer_x'; did you mean"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), "--device", "cpu", *arguments])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert message in capsys.readouterr().err
