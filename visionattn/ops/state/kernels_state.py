"""Attention through a state: sums over the pixels of a stretch, their total, and the output.

A program holds the channels of several heads side by side, so that rows of small heads are read in long pieces, and
treats their states as the blocks on the diagonal of one matrix. A head has ``DP`` columns, the power of two above its
``D`` channels. Sums of the stretches are added by a launch of its own, always in the same order.
"""

import triton
import triton.language as tl


@triton.jit
def block_channels(block, heads, D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr):
    """Head and channel within it of each column of a program, and whether there is such a channel."""
    c = tl.arange(0, BC)
    head, inner = block * (BC // DP) + c // DP, c % DP
    return head, inner, (head < heads) & (inner < D)


@triton.jit
def load_rows(ptr, n, W, s_row, s_col, columns, mask):
    """Pixels ``n`` of an image in float32."""
    return tl.load(ptr + ((n // W) * s_row + (n % W) * s_col)[:, None] + columns[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_table(ptr, n, N, block, heads, D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr):
    """Cosines or sines of the pairs of channels of a program."""
    p = tl.arange(0, BC // 2)
    head, inner = block * (BC // DP) + p // (DP // 2), p % (DP // 2)
    mask = (n < N)[:, None] & ((head < heads) & (inner < D // 2))[None, :]
    return tl.load(ptr + n[:, None] * (heads * D // 2) + (head * (D // 2) + inner)[None, :], mask=mask, other=0.0)


@triton.jit
def turn(x, cos, sin, BN: tl.constexpr, BC: tl.constexpr):
    """Pairs of columns as complex numbers, times ``cos + j sin``."""
    real, imaginary = tl.split(tl.reshape(x, [BN, BC // 2, 2]))
    return tl.reshape(tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos), [BN, BC])


@triton.jit
def features(x):
    """``elu(x) + 1``."""
    return tl.where(x > 0, x + 1, tl.exp(x))  # what is not finite passes through


@triton.jit
def sum_heads(x, BN: tl.constexpr, BC: tl.constexpr, DP: tl.constexpr):
    """Sum over the channels of each head, in all of its columns."""
    if DP == BC:
        return tl.broadcast_to(tl.sum(x, 1)[:, None], [BN, BC])
    parts = tl.sum(tl.reshape(x, [BN, BC // DP, DP]), 2)
    return tl.reshape(tl.broadcast_to(parts[:, :, None], [BN, BC // DP, DP]), [BN, BC])


@triton.jit
def product(x, y, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """Matrix product in float32, of operands rounded to bfloat16 where ``HALF``."""
    return tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16)) if HALF else tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def diagonal(block, heads, D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, TURNED: tl.constexpr):
    """Offsets and mask of a program's states ``[heads, D, D]`` as a matrix with blocks on its diagonal."""
    head, inner, ok = block_channels(block, heads, D, DP, BC)
    rows, columns = (head * D * D)[:, None], inner[None, :]
    offsets = rows + columns * D + inner[:, None] if TURNED else rows + inner[:, None] * D + columns
    return offsets, ok[:, None] & ok[None, :] & (head[:, None] == head[None, :])


@triton.jit
def state_kernel(
    key_ptr, value_ptr, cos_ptr, sin_ptr, partial_ptr, sums_ptr,
    k_b, k_row, k_col, k_head, v_b, v_row, v_col, v_head, N, W, heads, splits, chunk, blocks,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    SOFTMAX: tl.constexpr, ROTATED: tl.constexpr, DENSE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``k^T v`` and the sum of ``phi(k)`` over a stretch of pixels, ``[B, splits, heads, D, D]`` and ``[..., D]``."""
    pid = tl.program_id(0)
    block, split, b = pid % blocks, (pid // blocks) % splits, pid // (blocks * splits)
    head, inner, ok = block_channels(block, heads, D, DP, BC)
    if DENSE:  # heads lie side by side: one run of channels, which the compiler can see
        k_columns = block * BC + tl.arange(0, BC)
        v_columns = k_columns
    else:
        k_columns, v_columns = head * k_head + inner, head * v_head + inner
    key_ptr += b.to(tl.int64) * k_b
    value_ptr += b.to(tl.int64) * v_b
    state, total = tl.zeros([BC, BC], tl.float32), tl.zeros([BC], tl.float32)
    for start in range(split * chunk, min(split * chunk + chunk, N), BN):
        n = start + tl.arange(0, BN)
        mask = (n < N)[:, None] & ok[None, :]
        k = load_rows(key_ptr, n, W, k_row, k_col, k_columns, mask)
        v = load_rows(value_ptr, n, W, v_row, v_col, v_columns, mask)
        if not SOFTMAX:
            k = tl.where(mask, features(k), 0.0)
            total += tl.sum(k, 0)
            if ROTATED:
                cos = load_table(cos_ptr, n, N, block, heads, D, DP, BC)
                sin = load_table(sin_ptr, n, N, block, heads, D, DP, BC)
                k = turn(k, cos, sin, BN, BC)
        state += product(tl.trans(k), v, HALF, PRECISION)
    offsets, same = diagonal(block, heads, D, DP, BC, False)
    place = (b * splits + split).to(tl.int64) * heads * D
    tl.store(partial_ptr + place * D + offsets, state, mask=same)
    if not SOFTMAX:
        tl.store(sums_ptr + place + head * D + inner, total, mask=ok)


@triton.jit
def finish_kernel(
    partial_ptr, sums_ptr, mix_ptr, state_ptr, norm_ptr, factor, C, splits, total,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Rows of the states from their sums over stretches.

    ``MODE`` 0: times ``factor``, and the vectors as well; 1: ``softmax(factor x)``; 2: the gradient of ``x`` where
    ``mix`` is that softmax.
    """
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    inside = row < total
    mask = inside[:, None] & (column < D)[None, :]
    first = ((row // C) * splits * C + row % C).to(tl.int64)
    state, norm = tl.zeros([ROWS, DP], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)
        places = first[None, :] + (s * C)[:, None]
        present = (s < splits)[:, None] & inside[None, :]
        both = present[:, :, None] & (column < D)[None, None, :]
        part = tl.load(partial_ptr + places[:, :, None] * D + column[None, None, :], mask=both, other=0.0)
        state += tl.sum(part, 0)
        if MODE == 0:
            norm += tl.sum(tl.load(sums_ptr + places, mask=present, other=0.0), 0)
    places = row.to(tl.int64)[:, None] * D + column[None, :]
    if MODE == 0:
        state *= factor
        tl.store(norm_ptr + row, norm * factor, mask=inside)
    elif MODE == 1:
        state = tl.where(mask, state * factor, float("-inf"))
        state = tl.exp(state - tl.where(inside, tl.max(state, 1), 0.0)[:, None])
        state /= tl.where(inside, tl.sum(state, 1), 1.0)[:, None]
    else:
        mix = tl.load(mix_ptr + places, mask=mask, other=0.0)
        state = factor * mix * (state - tl.sum(state * mix, 1)[:, None])
    tl.store(state_ptr + places, state, mask=mask)


@triton.jit
def output_kernel(
    query_ptr, cos_ptr, sin_ptr, state_ptr, norm_ptr, out_ptr, eps,
    q_b, q_row, q_col, q_head, N, W, heads, splits, chunk, blocks,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr,
    SOFTMAX: tl.constexpr, ROTATED: tl.constexpr, DENSE: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of a stretch of pixels."""
    pid = tl.program_id(0)
    block, split, b = pid % blocks, (pid // blocks) % splits, pid // (blocks * splits)
    head, inner, ok = block_channels(block, heads, D, DP, BC)
    if DENSE:
        q_columns = block * BC + tl.arange(0, BC)
        columns = q_columns
    else:
        q_columns, columns = head * q_head + inner, head * D + inner
    query_ptr += b.to(tl.int64) * q_b
    out_ptr += b.to(tl.int64) * N * heads * D
    offsets, same = diagonal(block, heads, D, DP, BC, SOFTMAX)
    state = tl.load(state_ptr + b.to(tl.int64) * heads * D * D + offsets, mask=same, other=0.0)
    if not SOFTMAX:
        norm = tl.load(norm_ptr + b * heads * D + head * D + inner, mask=ok, other=0.0)
    for start in range(split * chunk, min(split * chunk + chunk, N), BN):
        n = start + tl.arange(0, BN)
        mask = (n < N)[:, None] & ok[None, :]
        q = load_rows(query_ptr, n, W, q_row, q_col, q_columns, mask)
        if not SOFTMAX:
            q = features(q)
            z = 1 / (sum_heads(q * norm[None, :], BN, BC, DP) + eps)
            if ROTATED:
                cos = load_table(cos_ptr, n, N, block, heads, D, DP, BC)
                sin = load_table(sin_ptr, n, N, block, heads, D, DP, BC)
                q = turn(q, cos, sin, BN, BC)
            q *= z
        out = product(q, state, HALF, PRECISION)
        places = n[:, None] * (heads * D) + columns[None, :]
        tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=mask)
