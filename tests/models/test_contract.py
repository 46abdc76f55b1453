"""The whole timm contract (``tests/contract``) for every test model and one published variant of each family."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.slow
@pytest.mark.parametrize("name", [*visionattn.list_models("test_*"), *VARIANTS])
def test_model_keeps_the_contract(name):
    command = [sys.executable, str(TOOL), "--import", "visionattn", "--extra", name]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    last = result.stdout.strip().splitlines()[-1].split()
    assert last[0] == last[2] and int(last[0]) >= 75  # N of N points hold
