"""The built wheel works without the checkout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_installed_wheel_trains_in_an_empty_folder(tmp_path):
    root = Path(__file__).parent.parent
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(tmp_path / "dist"), str(root)],
        check=True,
        capture_output=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    overrides = ["experiment=digits", "model=test_biformer", "trainer.max_epochs=1"]
    overrides += ["+trainer.limit_train_batches=2", "+trainer.limit_val_batches=2"]
    program = "import visionattn, sys; print(visionattn.__file__); from visionattn.cli import main; main(sys.argv[1:])"
    result = subprocess.run(
        [sys.executable, "-c", program, "train", *overrides],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(site))
    assert (empty / "outputs" / "digits" / "checkpoints" / "best.ckpt").is_file()
