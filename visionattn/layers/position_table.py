"""A table of one-dimensional positions whose cosines fall off with distance, and its reading at any row.

Paper: OAT, arXiv:2407.13335. Code: HKUST-NISL/oat_eccv24, ``positionalEncodingLearned.py``, which descends
``[sum_ij (cos(P_i, P_j) - exp(-(i - j)^2 / (2 s^2)))^2 + mean_i (|P_i| - mean |P|)^2] / (L (L - 1))`` from a random
matrix with 10,000 steps of Adam. The matrix of targets is positive definite, so the minimum, 0, is known: rows of
one length with exactly those cosines. Departure: the minimum is computed, the one nearest to the random matrix, in
place of the descent.
"""

from functools import lru_cache

import torch
from torch import Tensor


def target_cosines(rows: int, sigma: float) -> Tensor:
    """``exp(-(i - j)^2 / (2 sigma^2))``, ``[rows, rows]`` float64."""
    i = torch.arange(rows, dtype=torch.float64, device="cpu")
    return torch.exp(-((i[:, None] - i) ** 2) / (2 * sigma**2))


def table_loss(table: Tensor, sigma: float) -> Tensor:
    """The published objective of a table ``[L, dim]``; a scalar."""
    rows = len(table)
    lengths = table.norm(dim=1)
    cosines = (table @ table.T) / (lengths[:, None] * lengths)
    error = (cosines - target_cosines(rows, sigma).to(table)).square().sum()
    return (error + (lengths - lengths.mean()).square().mean()) / (rows * (rows - 1))


@lru_cache(maxsize=32)
def _table(rows: int, dim: int, sigma: float, seed: int) -> Tensor:
    # kept between calls, so never on the device of a context such as torch.device("meta")
    generator = torch.Generator("cpu").manual_seed(seed)
    start = torch.randn(rows, dim, generator=generator, dtype=torch.float64, device="cpu")
    values, vectors = torch.linalg.eigh(target_cosines(rows, sigma))
    rank = min(rows, dim)
    # columns by falling eigenvalue; beyond dim rows the smallest ones, next to nothing, are left out
    root = (vectors * values.clamp_min(0).sqrt()).flip(1)[:, :rank]
    left, _, right = torch.linalg.svd(root.T @ start, full_matrices=False)
    table = root @ (left @ right)
    return start.norm(dim=1).mean() * table / table.norm(dim=1, keepdim=True)


def position_table(rows: int, dim: int = 86, sigma: float = 2.0, seed: int = 0) -> Tensor:
    """The table, the same for the same arguments.

    Args:
        rows: Positions L, at least 2.
        dim: Numbers for each.
        sigma: Width s of the target, in positions.
        seed: Of the random matrix.

    Returns:
        ``[rows, dim]`` float64.

    Raises:
        ValueError: Fewer than two rows or one number, or a width that is not positive.
    """
    if rows < 2 or dim < 1 or sigma <= 0:
        raise ValueError(f"rows={rows}, dim={dim}, sigma={sigma}: expected rows >= 2, dim >= 1, sigma > 0")
    return _table(rows, dim, float(sigma), seed).clone()


def read_table(table: Tensor, place: Tensor) -> Tensor:
    """Rows of a table at places that may lie between two of them (linear interpolation).

    Args:
        table: ``[L, dim]``.
        place: Any shape, in [0, L - 1]; places outside are moved to the first or last row.

    Returns:
        ``[*place.shape, dim]``.
    """
    place = place.to(table.dtype).clamp(0, len(table) - 1)
    low = place.floor()
    high = (low + 1).clamp_max(len(table) - 1)
    share = (place - low)[..., None]
    return table[low.long()] * (1 - share) + table[high.long()] * share
