"""Deterministic weights and inputs, so that two implementations of one network can be compared without a checkpoint.

A manifest (`NAME.json`) lists every tensor of the published network's state dict: its key, shape and kind.
`fill_state_dict` makes the same float64 values for those keys on every machine, and `NAME.npz` holds what the
published network returned for them. Only numpy's frozen legacy generator is used, so the values never change.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np

HERE = Path(os.environ.get("VISIONATTN_REFERENCE", Path(__file__).parent))


def fill(key: str, shape, kind: str = "param", seed: int = 0, depthwise_gain: float = 1.0) -> np.ndarray:
    """Values for one tensor. kind: 'param', 'running_mean' or 'running_var'.

    depthwise_gain: extra factor on depthwise kernels [C, 1, k, k], k > 1. Networks with many residual depthwise
    convolutions use 0.2, or their residual stream would drown the later branches.
    """
    rng = np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode()) & 0x7FFFFFFF)
    shape = tuple(shape)
    if kind == "running_var":
        return rng.uniform(0.5, 1.5, size=shape)
    x = rng.standard_normal(size=shape)
    if kind == "running_mean":
        return 0.1 * x
    if sum(d > 1 for d in shape) <= 1:  # a vector: norm weight, layer scale or bias
        return 0.1 * x if key.endswith(("bias", "beta")) else 1.0 + 0.1 * x
    if len(shape) == 4 and shape[1] == 1 and shape[2] > 1:
        x = x * depthwise_gain
    return x / np.sqrt(np.prod(shape[1:]))  # a matrix or kernel, by its fan-in


def fill_state_dict(manifest: dict, seed: int | None = None) -> dict:
    """The float64 tensors of a manifest, keyed as in the published checkpoint (numpy arrays).

    seed: None takes the manifest's own "weight_seed" (0 where it has none).
    """
    seed = manifest.get("weight_seed", 0) if seed is None else seed
    gain = manifest.get("depthwise_gain", 1.0)
    return {k: fill(k, t["shape"], t["kind"], seed, gain) for k, t in manifest["tensors"].items()}


def inputs(shape, seed: int = 0) -> np.ndarray:
    """A float64 input of the given shape (for images: batch, channels, height, width)."""
    return np.random.RandomState(seed).standard_normal(size=tuple(shape))


def load(name: str):
    """(manifest, outputs) of one reference, e.g. load('backbones/biformer_tiny')."""
    manifest = json.loads((HERE / f"{name}.json").read_text())
    with np.load(HERE / f"{name}.npz") as z:
        return manifest, {k: z[k] for k in z.files}
