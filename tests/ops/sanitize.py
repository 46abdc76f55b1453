"""Every Triton kernel once or more at small awkward sizes, for NVIDIA's compute-sanitizer.

The first call compiles, so that the sanitizer only watches::

    python tests/ops/sanitize.py
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1    # each tensor an allocation of its own, or a neighbour hides an overrun
    compute-sanitizer --tool memcheck --error-exitcode 1 python tests/ops/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/ops/sanitize.py
    compute-sanitizer --tool initcheck --error-exitcode 1 python tests/ops/sanitize.py

Words after the file's name choose the cases that contain one of them. Without a GPU it runs in Triton's interpreter,
TRITON_INTERPRET=1, with float16 for bfloat16.
"""

import sys

import torch

from visionattn.ops import (
    add_layer_norm,
    affine_add,
    affine_join,
    depthwise_conv,
    layer_norm,
    linear,
    mlp,
    neighborhood_attention,
    neighborhood_sum,
    region_mean,
    rotation_table,
    routed_attention,
    state_attention,
    topk_regions,
    use_backend,
)
from visionattn.ops.depthwise.branches import branch_sum
from visionattn.ops.neighborhood.packed import packed_attention as packed_window_attention
from visionattn.ops.routing.packed import packed_attention

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


def leaf(*shape: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    """A random tensor that wants a gradient."""
    return torch.randn(shape).to(DEVICE, dtype).requires_grad_()


def norms(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    """Layer norm alone and behind an addition, in inference and training."""
    x, delta, weight, bias = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype), leaf(shape[-1]), leaf(shape[-1])
    out = [layer_norm(x, weight, bias), *add_layer_norm(x, delta, weight, bias)]
    with torch.no_grad():
        layer_norm(x, weight, bias)
        add_layer_norm(x, delta, weight, bias)
    return [*out, *torch.autograd.grad([y.float().sin().sum() for y in out], (x, delta, weight, bias))]


def affine_sums(dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
    """Two scaled maps, the second as wide as the first or not, and one of which images are dropped."""
    x, y, parameters = leaf(*shape, dtype=dtype), leaf(*shape[:-1], 2 * shape[-1], dtype=dtype), leaf(4, shape[-1])
    keep = torch.arange(shape[0]).to(DEVICE, dtype) % 2
    out = [affine_add(x, *parameters[:2], y[..., : shape[-1]]), affine_join(y, x, *parameters)]
    out.append(affine_add(x, *parameters[:2], y[..., : shape[-1]], keep, 2.0))
    return [*out, *torch.autograd.grad([y.float().sin().sum() for y in out], (x, y, parameters))]


def convolutions(
    dtype: torch.dtype, size: tuple[int, int, int], C: int, kernel: tuple[int, int], dilation: int = 1
) -> list[torch.Tensor]:
    """A convolution of a slice of a packed map with all its terms, one without any and one on itself."""
    packed, weight, bias = leaf(*size, 3 * C, dtype=dtype), leaf(C, 1, *kernel), leaf(C)
    x, residual = packed[..., C : 2 * C], packed[..., 2 * C :]
    out = [depthwise_conv(x, weight, bias, residual, dilation), depthwise_conv(x, weight, dilation=dilation)]
    out.append(depthwise_conv(x, weight, None, x, dilation))
    return [*out, *torch.autograd.grad([y.float().sin().sum() for y in out], (packed, weight, bias))]


def branches(dtype: torch.dtype, size: tuple[int, int, int], C: int) -> list[torch.Tensor]:
    """Convolutions with a batch norm each, in training."""
    kernels = [(7, 1), (5, 1), (3, 2), (3, 3)]
    x, weights = leaf(*size, C, dtype=dtype), [leaf(C, 1, k, k) for k, _ in kernels]
    scales, shifts = [leaf(C) for _ in kernels], [leaf(C) for _ in kernels]
    means, variances = torch.zeros(len(kernels), C, device=DEVICE), torch.ones(len(kernels), C, device=DEVICE)
    running = means.unbind(), variances.unbind(), [torch.tensor(0, device=DEVICE) for _ in kernels]
    out = branch_sum(x, weights, [d for _, d in kernels], scales, shifts, running, 1e-5, 0.1)
    grads = torch.autograd.grad(out.float().sin().sum(), (x, *weights, *scales, *shifts))
    return [out, means, variances, *grads]


def layers(dtype: torch.dtype, rows: int, C: int, hidden: int) -> list[torch.Tensor]:
    """A linear layer and an MLP under autocast, and both in the dtype of their parameters."""
    x, w1, b1, w2, b2 = leaf(rows, C, dtype=dtype), leaf(hidden, C), leaf(hidden), leaf(C, hidden), leaf(C)
    with torch.autocast(DEVICE, HALF, enabled=dtype == HALF):
        out = [linear(x, w1, b1), mlp(x, w1, b1, w2, b2), mlp(x, w1, None, w2, b2)]
    return [*out, *torch.autograd.grad([y.float().sin().sum() for y in out], (x, w1, b1, w2, b2))]


def packed(dtype: torch.dtype, side: int, heads: int, d: int, region: int, kernel: int) -> list[torch.Tensor]:
    """Attention and the convolution of the values as one node."""
    C, count = heads * d, (side // region) ** 2
    qkv, weight, bias = leaf(1, side, side, 3 * C, dtype=dtype), leaf(C, 1, kernel, kernel), leaf(C)
    index = torch.arange(count, dtype=torch.int32, device=DEVICE).reshape(1, 1, count, 1)
    out = packed_attention(qkv, index, weight, bias, heads, (region, region), d**-0.5)
    return [out, *torch.autograd.grad(out.float().sin().sum(), (qkv, weight, bias))]


def neighbours(
    dtype: torch.dtype,
    size: tuple[int, int, int],
    heads: int,
    d: int,
    kernel: int,
    dilation: int,
    biased: bool,
    stride: int = 1,
) -> list[torch.Tensor]:
    """Neighbourhood attention on slices of a packed projection."""
    qkv, bias = leaf(*size, 3, heads, d, dtype=dtype), leaf(heads, 2 * kernel - 1, 2 * kernel - 1)
    out = neighborhood_attention(*qkv.unbind(3), kernel, dilation, bias if biased else None, stride=stride)
    grads = torch.autograd.grad(out.float().sin().sum(), (qkv, bias) if biased else (qkv,))
    return [out, *grads]


def packed_neighbours(dtype: torch.dtype, size: tuple[int, int, int], heads: int, d: int) -> list[torch.Tensor]:
    """The same of a packed projection as one node."""
    qkv, bias = leaf(*size, 3 * heads * d, dtype=dtype), leaf(heads, 13, 13)
    out = packed_window_attention(qkv, bias, heads, [7, 7], [1, 1], d**-0.5)
    return [out, *torch.autograd.grad(out.float().sin().sum(), (qkv, bias))]


def sums(
    dtype: torch.dtype, size: tuple[int, int, int], groups: int, d: int, kernels: list[int], softmax: bool
) -> list[torch.Tensor]:
    """Sums of windows with given weights, as logits with a bias where there is a softmax."""
    B, H, W = size
    logits = leaf(B, sum(k * k for k in kernels), groups, H, W, dtype=dtype)
    value, biases = leaf(B, H, W, len(kernels) * groups, d, dtype=dtype), []
    if softmax:
        biases = [leaf(groups, 2 * k - 1, 2 * k - 1) for k in kernels]
    out = neighborhood_sum(logits, value, kernels, biases or None, softmax)
    return [out, *torch.autograd.grad(out.float().sin().sum(), (logits, value, *biases))]


def states(
    dtype: torch.dtype, size: tuple[int, int, int], heads: int, d: int, rotated: bool, mode: str = "linear"
) -> list[torch.Tensor]:
    """Attention through a state, on slices of a packed projection."""
    qkv = leaf(*size, 3, heads, d, dtype=dtype)
    rotation = rotation_table(*size[1:], heads * d, device=DEVICE) if rotated else None
    out = state_attention(*qkv.unbind(3), mode=mode, rotation=rotation)
    return [out, *torch.autograd.grad(out.float().sin().sum(), (qkv,))]


OTHERS = {
    "norm": lambda: norms(HALF, 2, 5, 64),
    "norm, ragged": lambda: norms(FULL, 3, 33),
    "affine sums": lambda: affine_sums(HALF, 2, 5, 64),
    "affine sums, ragged": lambda: affine_sums(FULL, 3, 7, 33),
    "convolution": lambda: convolutions(HALF, (1, 6, 8), 64, (3, 3)),
    "convolution, ragged": lambda: convolutions(FULL, (2, 5, 7), 10, (5, 3)),
    "large convolution": lambda: convolutions(HALF, (1, 6, 5), 16, (7, 7)),
    "large convolution, ragged": lambda: convolutions(FULL, (2, 30, 3), 5, (9, 7)),
    "dilated convolution": lambda: convolutions(FULL, (1, 7, 5), 33, (3, 3), 2),
    "dilation beyond the map": lambda: convolutions(HALF, (1, 4, 5), 3, (3, 3), 7),
    "branches": lambda: branches(HALF, (2, 7, 6), 16),
    "branches, ragged": lambda: branches(FULL, (2, 5, 9), 5),
    "linear": lambda: layers(HALF, 40, 32, 96),
    "linear, ragged": lambda: layers(FULL, 9, 10, 33),
    "packed attention": lambda: packed(HALF, 8, 2, 16, 4, 3),
    "packed attention, ragged": lambda: packed(FULL, 10, 1, 10, 5, 5),
    "neighbours": lambda: neighbours(HALF, (1, 8, 8), 2, 16, 3, 1, False),
    "neighbours, bias, ragged": lambda: neighbours(FULL, (2, 7, 9), 1, 10, 5, 1, True),
    "neighbours, dilated": lambda: neighbours(FULL, (1, 7, 8), 1, 8, 3, 2, False),
    "neighbours, dilated, bias": lambda: neighbours(HALF, (1, 9, 7), 2, 24, 3, 2, True),
    "neighbours, stride, ragged": lambda: neighbours(HALF, (1, 8, 7), 1, 16, 3, 1, True, 2),
    "neighbours, windows apart": lambda: neighbours(HALF, (2, 6, 9), 1, 16, 3, 1, False, 3),
    "neighbours, packed": lambda: packed_neighbours(HALF, (3, 9, 8), 1, 32),
    "window sums": lambda: sums(HALF, (2, 7, 7), 2, 16, [3, 5], True),
    "window sums, ragged": lambda: sums(FULL, (1, 5, 9), 1, 10, [3, 5], True),
    "window sums, no softmax": lambda: sums(FULL, (1, 6, 5), 2, 7, [3], False),
    "state": lambda: states(HALF, (2, 8, 8), 4, 16, True),
    "state, ragged": lambda: states(FULL, (1, 9, 15), 3, 12, True),
    "state, small heads": lambda: states(HALF, (2, 7, 7), 6, 4, True),
    "state, channels": lambda: states(HALF, (2, 7, 7), 3, 32, False, "channel_softmax"),
    "state, channels, ragged": lambda: states(FULL, (1, 13, 11), 1, 7, False, "channel_softmax"),
}


if __name__ == "__main__":
    wanted = [name for name in (*CASES, *OTHERS) if not sys.argv[1:] or any(word in name for word in sys.argv[1:])]
    with use_backend("triton"):
        for case in wanted:
            if case in CASES:
                run(case)
            elif not all(x.isfinite().all() for x in OTHERS[case]()):
                raise ValueError(f"{case}: values that are not finite")
            print(case)
