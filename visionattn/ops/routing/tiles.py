"""Tile sizes of the routed kernels: measured ones where there are some, a rule elsewhere, a search on request."""

import torch
import triton

from visionattn.ops._tiles import Tile

# (kernel, head dim at most, bytes of a number, compute capability's first digit, columns at least): tile. Measured on
# an H100. 64 rows are the smallest tile of Hopper's matrix instructions for a whole group of four warps.
_TUNED = {
    ("forward", 32, 2, 9, 512): Tile(64, 128, 4, 2, 128),
    ("query_grad", 32, 2, 9, 512): Tile(64, 64, 4, 3),
    ("dense_forward", 32, 2, 9, 0): Tile(64, 64, 4, 1, 128),
    ("dense_grad", 32, 2, 9, 0): Tile(64, 64, 4, 1),
    ("dense_query_grad", 32, 2, 9, 0): Tile(64, 64, 4, 1, 128),
    ("dense_key_grad", 32, 2, 9, 0): Tile(64, 64, 4, 2, 128),
}


def block(n: int, largest: int) -> int:
    """Smallest side of a tile that holds ``n`` and that matrix instructions take, but no more than ``largest``."""
    return min(largest, max(16, triton.next_power_of_2(n)))


def _rule(kernel: str, rows: int, columns: int, row_bytes: int) -> Tile:
    """Four warps for 64 x 64 scores, fewer for less, no pipeline for walks of about a step."""
    if row_bytes > 256:  # rows of queries and keys must fit into 99 KiB of shared memory
        rows, columns = min(rows, 32), min(columns, 16)
    if kernel == "query_grad" and rows <= 16:
        columns = min(columns, 32)
    if kernel == "key_grad" and columns <= 16:  # programs of one warp: more of them fit with few registers
        rows = min(rows, 16)
    m, n = block(rows, 64), block(columns, 64)
    if kernel == "query_grad" and m == 16:
        return Tile(m, n, 1, 3)
    walks = kernel not in ("one_pass", "dense_grad", "dense_query_grad") and not (kernel == "forward" and n >= columns)
    return Tile(m, n, max(1, min(4, m * n // 1024)), 2 if walks else 1)


def choose(kernel: str, rows: int, columns: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """Tile for ``rows`` query and ``columns`` key rows, of which the kernel holds one kind and walks over the other."""
    rule = _rule(kernel, rows, columns, head_dim * dtype.itemsize)
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    for (name, dim, size, capability, least), tile in _TUNED.items():
        fits = rows >= tile.rows and columns >= max(least, tile.columns)
        if (name, size, capability) == (kernel, dtype.itemsize, major) and head_dim <= dim and fits:
            return tile
    return rule


def candidates(tile: Tile) -> list[Tile]:
    """Tiles to try in a search around ``tile``, itself first."""
    found = [tile]
    for rows in {max(16, tile.rows // 2), tile.rows, 2 * tile.rows}:
        for columns in {max(16, tile.columns // 2), tile.columns, 2 * tile.columns}:
            for warps in {max(1, tile.warps // 2), tile.warps}:
                found.append(Tile(rows, columns, warps, tile.stages))
    found += [tile._replace(stages=stages) for stages in (1, 2, 3)] + [tile._replace(registers=128)]
    return list(dict.fromkeys(found))
