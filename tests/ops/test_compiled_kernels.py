"""All Triton kernels compile for GPUs that need not be there, and fit into their shared memory."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import visionattn.ops

pytest.importorskip("triton")
KERNELS = {
    f"{path.stem.removeprefix('kernels_')}.{node.name}"
    for path in Path(visionattn.ops.__file__).parent.rglob("kernels_*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}


@pytest.mark.slow
# the least shared memory (that of 120, more than 80 would need), and wgmma; without --once each takes 8 minutes
@pytest.mark.parametrize("capability, shared", [(86, 99), pytest.param(90, 227, marks=pytest.mark.thorough)])
def test_kernels_compile_for_gpus(capability, shared):
    script = Path(__file__).with_name("compile_kernels.py")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(script), str(capability), "--once"]
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    kernels = json.loads(result.stdout)
    assert {name.split()[0] for name in kernels} == KERNELS
    for name, used in kernels.items():
        assert used <= shared * 1024, f"{name} needs {used} bytes of shared memory"
