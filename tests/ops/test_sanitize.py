"""The script for compute-sanitizer leaves no kernel out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
# in a process of its own: the interpreter, which sees every launch, must be chosen before Triton is imported
PROGRAM = """
import importlib, json, pkgutil, runpy, sys, torch
from triton.runtime.interpreter import InterpretedFunction
import visionattn.ops

launched = set()
def name_of(kernel):
    return kernel.fn.__module__ + "." + kernel.fn.__name__
def note(self, *args, **kwargs):
    launched.add(name_of(self))  # which is the question; to compute takes minutes

InterpretedFunction.run = note
for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
    make = getattr(owner, name)  # the script refuses what is not finite
    setattr(owner, name, lambda *args, make=make, **kwargs: make(*args, **kwargs).zero_())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
found = pkgutil.walk_packages(visionattn.ops.__path__, "visionattn.ops.")
modules = [importlib.import_module(m.name) for m in found if ".kernels_" in m.name]
kernels = {name_of(x) for m in modules for name, x in vars(m).items() if name.endswith("_kernel")}
print(json.dumps(dict(kernels=sorted(kernels), launched=sorted(launched))))
"""


@pytest.mark.slow
def test_every_kernel_is_launched():
    script = Path(__file__).with_name("sanitize.py")
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(script.parents[2])}
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(script)], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["kernels"] and not set(found["kernels"]) - set(found["launched"])
