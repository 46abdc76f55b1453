"""Gradients of attention through a state, in two passes: one over queries, one over keys and values.

The first gives the gradient of the queries and, over its stretch of pixels, the sums that make up that of the state;
``finish_kernel`` adds these; the second pass spreads the gradient of the state over keys and values. Every tensor is
read or written once.
"""

import triton
import triton.language as tl

from visionattn.ops.state.kernels_state import (
    block_channels,
    diagonal,
    features,
    load_rows,
    load_table,
    product,
    sum_heads,
    turn,
)


@triton.jit
def query_grad_kernel(
    query_ptr, grad_ptr, cos_ptr, sin_ptr, state_ptr, norm_ptr, dquery_ptr, partial_ptr, sums_ptr, eps,
    q_b, q_row, q_col, q_head, g_b, g_row, g_col, g_head, N, W, heads, splits, chunk, blocks,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    SOFTMAX: tl.constexpr, ROTATED: tl.constexpr, DENSE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries of a stretch, and its share of those of the state and of the mean of ``phi(key)``."""
    pid = tl.program_id(0)
    block, split, b = pid % blocks, (pid // blocks) % splits, pid // (blocks * splits)
    head, inner, ok = block_channels(block, heads, D, DP, BC)
    if DENSE:
        q_columns = block * BC + tl.arange(0, BC)
        g_columns, columns = q_columns, q_columns
    else:
        q_columns, g_columns, columns = head * q_head + inner, head * g_head + inner, head * D + inner
    query_ptr += b.to(tl.int64) * q_b
    grad_ptr += b.to(tl.int64) * g_b
    dquery_ptr += b.to(tl.int64) * N * heads * D
    offsets, same = diagonal(block, heads, D, DP, BC, not SOFTMAX)
    state = tl.load(state_ptr + b.to(tl.int64) * heads * D * D + offsets, mask=same, other=0.0)
    if not SOFTMAX:
        norm = tl.load(norm_ptr + b * heads * D + head * D + inner, mask=ok, other=0.0)
    dstate, total = tl.zeros([BC, BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in range(split * chunk, min(split * chunk + chunk, N), BN):
        n = start + tl.arange(0, BN)
        mask = (n < N)[:, None] & ok[None, :]
        x = load_rows(query_ptr, n, W, q_row, q_col, q_columns, mask)
        g = load_rows(grad_ptr, n, W, g_row, g_col, g_columns, mask)
        dq = product(g, state, HALF, PRECISION)
        if SOFTMAX:
            dstate += product(tl.trans(g), x, HALF, PRECISION)
        else:
            q = features(x)
            z = 1 / (sum_heads(q * norm[None, :], BN, BC, DP) + eps)
            turned = q
            if ROTATED:
                cos = load_table(cos_ptr, n, N, block, heads, D, DP, BC)
                sin = load_table(sin_ptr, n, N, block, heads, D, DP, BC)
                turned = turn(q, cos, sin, BN, BC)
            turned *= z
            dz = -z * sum_heads(turned * dq, BN, BC, DP)
            dq *= z
            if ROTATED:
                dq = turn(dq, cos, -sin, BN, BC)
            total += tl.sum(tl.where(mask, dz * q, 0.0), 0)
            dq = (dq + dz * norm[None, :]) * tl.minimum(q, 1.0)
            dstate += product(tl.trans(turned), g, HALF, PRECISION)
        places = n[:, None] * (heads * D) + columns[None, :]
        tl.store(dquery_ptr + places, dq.to(dquery_ptr.dtype.element_ty), mask=mask)
    offsets, same = diagonal(block, heads, D, DP, BC, False)
    place = (b * splits + split).to(tl.int64) * heads * D
    tl.store(partial_ptr + place * D + offsets, dstate, mask=same)
    if not SOFTMAX:
        tl.store(sums_ptr + place + head * D + inner, total, mask=ok)


@triton.jit
def key_grad_kernel(
    key_ptr, value_ptr, cos_ptr, sin_ptr, dstate_ptr, dnorm_ptr, dkey_ptr, dvalue_ptr,
    k_b, k_row, k_col, k_head, v_b, v_row, v_col, v_head, N, W, heads, splits, chunk, blocks,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    SOFTMAX: tl.constexpr, ROTATED: tl.constexpr, DENSE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values of a stretch from those of the state and of the mean of ``phi(key)``."""
    pid = tl.program_id(0)
    block, split, b = pid % blocks, (pid // blocks) % splits, pid // (blocks * splits)
    head, inner, ok = block_channels(block, heads, D, DP, BC)
    if DENSE:
        k_columns = block * BC + tl.arange(0, BC)
        v_columns, columns = k_columns, k_columns
    else:
        k_columns, v_columns, columns = head * k_head + inner, head * v_head + inner, head * D + inner
    key_ptr += b.to(tl.int64) * k_b
    value_ptr += b.to(tl.int64) * v_b
    dkey_ptr += b.to(tl.int64) * N * heads * D
    dvalue_ptr += b.to(tl.int64) * N * heads * D
    dstate_ptr += b.to(tl.int64) * heads * D * D
    offsets, same = diagonal(block, heads, D, DP, BC, False)
    dstate = tl.load(dstate_ptr + offsets, mask=same, other=0.0)
    offsets, same = diagonal(block, heads, D, DP, BC, True)
    flipped = tl.load(dstate_ptr + offsets, mask=same, other=0.0)
    if not SOFTMAX:
        dnorm = tl.load(dnorm_ptr + b * heads * D + head * D + inner, mask=ok, other=0.0)
    for start in range(split * chunk, min(split * chunk + chunk, N), BN):
        n = start + tl.arange(0, BN)
        mask = (n < N)[:, None] & ok[None, :]
        k = load_rows(key_ptr, n, W, k_row, k_col, k_columns, mask)
        v = load_rows(value_ptr, n, W, v_row, v_col, v_columns, mask)
        dk = product(v, flipped, HALF, PRECISION)
        if not SOFTMAX:
            k = features(k)
            if ROTATED:
                cos = load_table(cos_ptr, n, N, block, heads, D, DP, BC)
                sin = load_table(sin_ptr, n, N, block, heads, D, DP, BC)
                dk = turn(dk, cos, -sin, BN, BC)
            dk = (dk + dnorm[None, :]) * tl.minimum(k, 1.0)
            if ROTATED:
                k = turn(k, cos, sin, BN, BC)
        dv = product(k, dstate, HALF, PRECISION)
        places = n[:, None] * (heads * D) + columns[None, :]
        tl.store(dkey_ptr + places, dk.to(dkey_ptr.dtype.element_ty), mask=mask)
        tl.store(dvalue_ptr + places, dv.to(dvalue_ptr.dtype.element_ty), mask=mask)
