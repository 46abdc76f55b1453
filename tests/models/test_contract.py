"""The whole timm contract (``tests/contract``) for every test model; for one published variant of each family all but
its graphs, whose making takes minutes with the depth and shows nothing that the test model of the family does not.
"""

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


POINTS = [
    "registry",
    "cfg",
    "forward",
    "size",
    "classifier",
    "in_chans",
    "features",
    "intermediates",
    "training",
    "weights",
    "device",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, groups, least",
    [*((name, ["*"], 75) for name in visionattn.list_models("test_*")), *((name, POINTS, 60) for name in VARIANTS)],
)
def test_model_keeps_the_contract(name, groups, least):
    points = [f"--points={group}.*" for group in groups]
    command = [sys.executable, str(TOOL), "--import", "visionattn", "--extra", *points, name]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    last = result.stdout.strip().splitlines()[-1].split()
    assert last[0] == last[2] and int(last[0]) >= least  # N of N points hold
