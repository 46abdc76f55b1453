"""Comparison of tensors and runs, and the outputs of the published networks in ``reference/``."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from reference import fill
from torch import Tensor

from visionattn.cli import main

GOLDEN = 1e-8  # of the standard deviation, for float64 against the published code


def train_run(settings: Sequence[str], folder: Path, name: str, *changes: str) -> Path:
    """The folder of a run of ``visionattn train`` below ``folder``."""
    main(["train", *settings, f"output_dir={folder}", f"name={name}", *changes])
    return folder / name


def checkpoint(run: Path, which: str = "last") -> dict[str, Any]:
    """A run's checkpoint, the ``last`` or the ``best``."""
    return torch.load(run / "checkpoints" / f"{which}.ckpt", weights_only=True)


def assert_same_weights(expected: Path, actual: Path) -> None:
    """The last weights of two runs are the same to the bit."""
    first, second = (checkpoint(run)["state_dict"] for run in (expected, actual))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _compared(name: str, expected: Any, actual: Any) -> tuple[Tensor, Tensor]:
    """Both as float64, with the infinite entries, which must be the same, set to zero."""
    expected, actual = (torch.as_tensor(x).detach().cpu().double() for x in (expected, actual))
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    for label, x in (("expected", expected), ("actual", actual)):
        assert not x.isnan().any(), f"{name}: {label} has {int(x.isnan().sum())} NaN among {x.numel()} values"
    infinite = expected.isinf() | actual.isinf()
    wrong = int((expected != actual)[infinite].sum())
    assert not wrong, f"{name}: {wrong} infinite values differ"
    return expected.masked_fill(infinite, 0.0), actual.masked_fill(infinite, 0.0)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_close(name: str, expected: Any, actual: Any, rel: float) -> None:
    """RMS of the error at most ``rel`` times the RMS of ``expected``; shapes equal, no NaN, infinities in place."""
    expected, actual = _compared(name, expected, actual)
    error, scale = _rms(actual - expected), _rms(expected)
    assert error <= rel * scale, (
        f"{name}: RMS error {error:.3e} is {error / scale if scale else float('inf'):.3e} of the expected RMS "
        f"{scale:.3e}, allowed {rel:.0e}; largest error {(actual - expected).abs().max():.3e}"
    )


def assert_golden(name: str, expected: Any, actual: Any, rel: float = GOLDEN) -> float:
    """Largest error at most ``rel`` times the standard deviation of ``expected``; returns the share."""
    expected, actual = _compared(name, expected, actual)
    error, std = (actual - expected).abs().max().item(), expected.std(correction=0).item()
    assert error <= rel * std, f"{name}: largest error {error:.3e} is {error / std:.3e} of the std, allowed {rel:.0e}"
    return error / std


def load_reference(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Manifest and stored tensors of ``reference/<name>``, for example ``"layers/bra_topk4"``."""
    manifest, arrays = fill.load(name)
    return manifest, {key: torch.from_numpy(array) for key, array in arrays.items()}


def published_weights(manifest: dict[str, Any], rename: dict[str, str] | None = None) -> dict[str, Tensor]:
    """State dict of a manifest in float64, with parts of its keys replaced as ``rename`` says."""
    weights = {}
    for key, array in fill.fill_state_dict(manifest).items():
        weights[renamed(key, rename)] = torch.from_numpy(array)
    return weights


def renamed(key: str, rename: dict[str, str] | None) -> str:
    """``key`` with every part replaced as ``rename`` says."""
    for old, new in (rename or {}).items():
        key = key.replace(old, new)
    return key


def inputs(shape: Any, seed: int = 0) -> Tensor:
    """The float64 input of a reference."""
    return torch.from_numpy(fill.inputs(shape, seed))


def record_agreement(model: str, reference: str, errors: dict[str, float]) -> None:
    """Put the largest error of a comparison into the table that VISIONATTN_AGREEMENT names, if it does."""
    if not os.environ.get("VISIONATTN_AGREEMENT"):
        return
    path = Path(os.environ["VISIONATTN_AGREEMENT"])
    rows = {row["reference"]: row for row in csv.DictReader(path.open())} if path.is_file() else {}
    largest = f"{max(errors.values()):.0e}"
    rows[reference] = dict(reference=reference, model=model, outputs=len(errors), largest_error=largest)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["reference", "model", "outputs", "largest_error"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def assert_same(expected, actual, where=""):
    """Two nests of plain values and tensors are equal to the last bit."""
    assert type(expected) is type(actual), where
    if isinstance(expected, dict):
        assert expected.keys() == actual.keys(), where
        for key in expected:
            assert_same(expected[key], actual[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(actual), where
        for i, (one, other) in enumerate(zip(expected, actual, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert expected.dtype == actual.dtype and torch.equal(expected, actual), where
    else:
        assert expected == actual, where
