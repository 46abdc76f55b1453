"""Triton kernels of the neighbourhood sum with given weights.

Weights differ from pixel to pixel, so there is nothing to share but the values; what costs time is reading the logits.
A lane of a warp holds a query pixel and walks over its taps, so that a load is a run of neighbouring pixels of one tap,
read once; the taps of one row of the window lie side by side in the lane's registers. The weights of a row become one
dense matrix of queries and keys of a row of the map by shifting each lane's taps to where its window begins: one
selection for every binary digit of the shift, no exchange between lanes. The sum is then a product of matrices.

A program serves a tile of ``BM`` queries (one for each lane) for one image, group and kernel; all kernels run in one
launch. Rows of keys are taken in turn, from the first that a query of the tile reaches to the last; a query whose
window lacks the row gets weights of 0. Reads beyond the tile or the window are moved to the nearest pixel or tap of the
same query rather than masked, since an offset of -inf to the exponent drops them with the same instruction.

As in ``routing/kernels_dense.py`` the forward pass takes exponentials as they are, computes a tile again with maxima
only if a sum leaves the range of float32, and always looks for the maxima first in float16.

Logits of the next row are on their way while those of one are worked on. ``kernels_sum_grads.py`` has the gradients.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(i, n, K: tl.constexpr):
    """First position of the window of position ``i`` on an axis of ``n``."""
    return tl.minimum(tl.maximum(i - K // 2, 0), n - K)


@triton.jit
def _within(i, n: tl.constexpr):
    """The nearest of ``[0, n)``."""
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def _logits(lp, l_st, K: tl.constexpr, L_ST: tl.constexpr):
    """Logits of the taps of one row of the windows."""
    logits = ()
    for i in tl.static_range(K):
        logits += (tl.load(lp + i * (L_ST if L_ST > 0 else l_st)),)
    return logits


@triton.jit
def _scores(logits, bp, BIAS: tl.constexpr):
    """The same in float32, with the bias if there is one."""
    found, scores = (), ()
    if BIAS:
        for i in tl.static_range(len(logits)):
            found += (tl.load(bp + i),)
    for i in tl.static_range(len(logits)):
        score = logits[i].to(tl.float32)
        if BIAS:
            score += found[i].to(tl.float32)
        scores += (score,)
    return scores


@triton.jit
def _weights(scores, offset, SOFTMAX: tl.constexpr):
    """Weights of taps, 0 where the offset is -inf."""
    weights = ()
    for i in tl.static_range(len(scores)):
        if SOFTMAX:
            weights += (tl.exp2(scores[i] * LOG2_E + offset),)
        else:
            weights += (tl.where(offset == 0.0, scores[i], 0.0),)
    return weights


@triton.jit
def _moved(taps, shift, BITS: tl.constexpr, SKIP: tl.constexpr, KX: tl.constexpr):
    """Values of taps moved to the places ``[0, KX)`` of keys: tap ``i`` to ``i + shift - SKIP``, 0 at other places."""
    zero = tl.zeros_like(taps[0])
    for b in tl.static_range(BITS):
        bit = ((shift >> b) & 1) != 0
        moved = ()
        for i in tl.static_range(min(KX + SKIP, len(taps) + (1 << b))):
            here = taps[i] if i < len(taps) else zero
            there = taps[i - (1 << b)] if (i >= (1 << b)) and (i - (1 << b) < len(taps)) else zero
            moved += (tl.where(bit, there, here),)
        taps = moved
    places = ()
    for i in tl.static_range(KX):
        places += (taps[i + SKIP] if i + SKIP < len(taps) else zero,)
    return places


@triton.jit
def _joined(columns, BM: tl.constexpr):
    """A matrix ``[BM, n]`` of its ``n`` columns."""
    n: tl.constexpr = len(columns)
    for _ in tl.static_range(5):
        if len(columns) > 1:
            pairs = ()
            for i in tl.static_range(len(columns) // 2):
                pairs += (tl.join(columns[i], columns[i + len(columns) // 2]),)
            columns = pairs
    return tl.reshape(columns[0], [BM, n])


@triton.jit
def _tile(tile, H, W, K: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr, ROWS: tl.constexpr):
    """Pixels of a tile and where their windows begin: rows, columns, whether inside, window rows, window columns, and
    the first key row, the number of key rows and the first key column of the tile."""
    m = tl.arange(0, BM)
    columns = 1 if ROWS else tl.cdiv(W, TW)
    y0 = (tile // columns) * TH
    x0 = (tile % columns) * TW
    y, x = y0 + m // TW, x0 + m % TW
    inside = (m < TH * TW) & (y < H) & (x < W)
    y, x = tl.minimum(y, H - 1), tl.minimum(x, W - 1)
    first = _start(y0, H, K)
    rows = _start(tl.minimum(y0 + TH, H) - 1, H, K) + K - first
    origin = 0 if ROWS else _start(x0, W, K)
    return y, x, inside, _start(y, H, K), _start(x, W, K), first, rows, origin


@triton.jit
def _forward(
    l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, tile, part, head, l_sh, l_sw, l_st, v_sh, v_sw, v_sd, H, W, heads,
    K: tl.constexpr, KX: tl.constexpr, BITS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, PAIRS: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, SOFTMAX: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of one image, kernel and group; pointers are those of the group."""
    y, x, inside, wy, wx, first, rows, origin = _tile(tile, H, W, K, TH, TW, BM, ROWS)
    kx, d = origin + tl.arange(0, KX), part * BLOCK_D + tl.arange(0, BLOCK_D)
    tap_row = K * (L_ST if L_ST > 0 else l_st)
    lq = l_ptr + (y * l_sh + x * l_sw)
    bq = b_ptr + ((wy - y + K - 1) * (2 * K - 1) + wx - x + K - 1)
    v_ptr += kx[:, None] * v_sw + d[None, :] * v_sd
    seen = (kx < W)[:, None] & (d < D)[None, :]
    shift = tl.zeros([BM], tl.float32)  # subtracted from the scores in powers of 2
    total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, BLOCK_D], tl.float32)
    attempt = 0
    while attempt < 2:
        if (attempt == 1) | (EXACT and SOFTMAX):
            attempt = 1
            shift += float("-inf")
            for ky in range(first, first + rows):
                dy = _within(ky - wy, K)  # a row counted twice is no harm
                lp = lq + dy * tap_row
                if PAIRS:
                    lp = tl.max_contiguous(tl.multiple_of(lp, 2 * lp.dtype.element_ty.primitive_bitwidth // 8), 2)
                scores = _scores(_logits(lp, l_st, K, L_ST), bq + dy * (2 * K - 1), BIAS)
                for i in tl.static_range(K):
                    shift = tl.maximum(shift, scores[i] * LOG2_E)
            shift = tl.where(shift == float("-inf"), 0.0, shift)
        total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, BLOCK_D], tl.float32)
        lp = lq + _within(first - wy, K) * tap_row
        if PAIRS:
            lp = tl.max_contiguous(tl.multiple_of(lp, 2 * lp.dtype.element_ty.primitive_bitwidth // 8), 2)
        ahead = _logits(lp, l_st, K, L_ST)
        for ky in range(first, first + rows):
            dy = ky - wy
            offset = tl.where(inside & (dy >= 0) & (dy < K), -shift, float("-inf"))
            lp = lq + _within(dy + 1, K) * tap_row
            if PAIRS:
                lp = tl.max_contiguous(tl.multiple_of(lp, 2 * lp.dtype.element_ty.primitive_bitwidth // 8), 2)
            logits = ahead
            ahead = _logits(lp, l_st, K, L_ST)
            scores = _scores(logits, bq + _within(dy, K) * (2 * K - 1), BIAS)
            v = tl.load(v_ptr + ky * v_sh, mask=seen, other=0.0)
            weights = _weights(scores, offset, SOFTMAX)
            for i in tl.static_range(K):
                total += weights[i]
            p = _joined(_moved(weights, wx - origin, BITS, 0, KX), BM)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if SOFTMAX:
            bad = tl.max((inside & ((total < 1e-24) | (total > 1e30))).to(tl.int32), 0)
            attempt += tl.where((bad > 0) & (attempt == 0), 1, 2)
        else:
            attempt = 2
    lse = tl.zeros([BM], tl.float32)
    if SOFTMAX:
        total = tl.where(inside, total, 1.0)
        lse = shift / LOG2_E + tl.log(total)
        acc *= (1.0 / total)[:, None]
    pixel = y * W + x
    where = (pixel * heads + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + pixel, lse, mask=inside & (part == 0))


@triton.jit
def sum_forward_kernel(
    l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr,
    l_sb, l_st, l_sg, l_sh, l_sw, v_sb, v_sh, v_sw, v_sn, v_sd, H, W, groups, entries, tiles,
    KERNELS: tl.constexpr, KX: tl.constexpr, BITS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, V_UNIT: tl.constexpr,
    PAIRS: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp: one program for every tile, slice of channels, group, kernel and image."""
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    part, pid = pid % tl.cdiv(D, BLOCK_D), pid // tl.cdiv(D, BLOCK_D)
    group, pid = pid % groups, pid // groups
    kernel, batch = pid % len(KERNELS), (pid // len(KERNELS)).to(tl.int64)
    heads = len(KERNELS) * groups
    head = kernel * groups + group
    # strides come divided by a power of two, so that the compiler knows of it and loads as many channels at once
    v_sh, v_sw, v_sn = v_sh * V_UNIT, v_sw * V_UNIT, v_sn * V_UNIT
    l_ptr += batch * l_sb + group * l_sg
    v_ptr += batch * v_sb * V_UNIT + head * v_sn
    b_ptr += group * entries
    out_ptr += batch * (H * W * heads * D)
    lse_ptr += (batch * heads + head) * (H * W)
    for i in tl.static_range(len(KERNELS)):
        if kernel == i:
            _forward(
                l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, tile, part, head, l_sh, l_sw, l_st, v_sh, v_sw, v_sd, H, W,
                heads, KERNELS[i], KX[i], BITS[i], TH, TW, BM, D, BLOCK_D, L_ST, PAIRS, ROWS, BIAS, SOFTMAX, EXACT,
                PRECISION,
            )  # fmt: skip
        l_ptr += KERNELS[i] * KERNELS[i] * (L_ST if L_ST > 0 else l_st)
        b_ptr += (2 * KERNELS[i] - 1) * (2 * KERNELS[i] - 1)
