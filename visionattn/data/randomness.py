"""Random numbers that depend on where training is, not on how it got there.

A run that is killed and resumed must draw what the uninterrupted run would have drawn, with any number of workers. So
each sample's transforms and each training step run under generators seeded from (seed, epoch, position) alone.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_from(*parts: int) -> int:
    """A 64-bit seed from integers; nearby integers give unrelated seeds."""
    return int(np.random.SeedSequence([part % 2**32 for part in parts]).generate_state(1, np.uint64)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (CPU and the current accelerators)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under freshly seeded CPU generators and put the former states back."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
