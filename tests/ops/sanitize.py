"""Every Triton kernel of the routing operators once or more at small awkward sizes, for NVIDIA's compute-sanitizer.

The first call compiles, so that the sanitizer only watches::

    python tests/ops/sanitize.py
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1    # each tensor an allocation of its own, or a neighbour hides an overrun
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/ops/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/ops/sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/ops/sanitize.py

Without a GPU it runs in Triton's interpreter, TRITON_INTERPRET=1, with float16 for bfloat16.
"""

import torch

from visionattn.ops import region_mean, routed_attention, topk_regions, use_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
FULL = torch.float32

# dtype, batch, map, heads, head_dim, query regions, key regions, entries of a list, tables, the list's special entries
CASES = {
    "one pass": (HALF, 2, (16, 16), 2, 32, (8, 8), (8, 8), 1, 1, ""),
    "one pass, ragged, missing": (FULL, 1, (10, 21), 1, 24, (5, 7), (5, 7), 1, 1, "missing"),
    "one pass, small regions": (HALF, 1, (20, 20), 3, 16, (4, 5), (4, 5), 1, 3, "missing"),
    "listed, whole tiles": (HALF, 1, (16, 24), 2, 32, (8, 8), (8, 8), 3, 1, ""),
    "listed, whole tiles, missing": (FULL, 1, (16, 24), 1, 16, (8, 8), (8, 8), 3, 1, "missing"),
    "listed, long regions": (HALF, 1, (32, 16), 1, 16, (16, 16), (16, 16), 2, 1, "repeated"),
    "listed, one tile": (FULL, 2, (12, 8), 2, 8, (4, 4), (4, 4), 2, 2, "repeated"),
    "listed, ragged": (HALF, 1, (10, 21), 3, 10, (5, 7), (5, 7), 2, 1, "missing"),
    "listed, other key regions": (FULL, 1, (16, 16), 1, 16, (4, 4), (8, 2), 4, 1, ""),
    "listed, wide heads": (HALF, 1, (10, 6), 1, 77, (5, 6), (5, 3), 3, 1, "missing"),
    "one region": (FULL, 1, (17, 17), 1, 5, (17, 17), (17, 17), 1, 1, ""),
    "dense": (HALF, 1, (14, 14), 2, 32, (2, 2), (2, 2), 16, 1, ""),
    "dense, missing": (FULL, 2, (9, 15), 2, 16, (3, 1), (3, 3), 3, 2, "missing"),
    "dense, repeated": (HALF, 1, (7, 7), 1, 24, (1, 1), (7, 1), 9, 1, "repeated"),
    "dense, single pixel": (FULL, 1, (1, 1), 1, 1, (1, 1), (1, 1), 1, 1, ""),
}


def run(name: str) -> None:
    """Region means, their ranking, attention and all gradients of one case, on slices of a packed projection."""
    dtype, B, (H, W), heads, d, region, kv_region, K, tables, special = CASES[name]
    qkv = torch.randn(B, H, W, 3, heads, d).to(DEVICE, dtype).requires_grad_()
    q, k, v = qkv.unbind(3)
    q_mean, k_mean = region_mean(q.flatten(3), region), region_mean(k.flatten(3), kv_region)
    index = topk_regions(q_mean, k_mean, min(K, k_mean.shape[1])).expand(-1, tables, -1, -1).clone()
    if special == "repeated":
        index = torch.randint(k_mean.shape[1], (*index.shape[:3], K), dtype=torch.int32).to(DEVICE)
    if special == "missing":
        index[:, :, ::2, -1] = -1
        index[:, :, 0] = -1
    out, lse = routed_attention(q, k, v, index, region, kv_region)
    (grad,) = torch.autograd.grad((out, lse), qkv, (torch.randn_like(out), torch.randn_like(lse)))
    if not (out.isfinite().all() and grad.isfinite().all()):
        raise ValueError(f"{name}: values that are not finite")


if __name__ == "__main__":
    with use_backend("triton"):
        for case in CASES:
            run(case)
            print(case)
