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

The gradient of the logits is a walk like the forward one, with a product of the gradient and the values turned back
into taps. That of the values takes a row of keys and walks over the queries that see it. That of the bias is the sum of
the logits' over the images, by tap and pixel, and then over pixels, in a fixed order.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _start(i, n, K: tl.constexpr):
    """First position of the window of position ``i`` on an axis of ``n``."""
    return tl.minimum(tl.maximum(i - K // 2, 0), n - K)


@triton.jit
def _scores(lp, bp, l_st, K: tl.constexpr, L_ST: tl.constexpr, BIAS: tl.constexpr):
    """Logits of the taps of one row of the windows, and bias where there is one."""
    logits, found = (), ()
    for i in tl.static_range(K):
        logits += (tl.load(lp + i * (L_ST if L_ST > 0 else l_st)),)
        if BIAS:
            found += (tl.load(bp + i),)
    scores = ()
    for i in tl.static_range(K):
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
def _taken(places, shift, BITS: tl.constexpr, K: tl.constexpr):
    """The way back: place ``i + shift`` of the keys to tap ``i``."""
    for b in tl.static_range(BITS - 1, -1, -1):
        bit = ((shift >> b) & 1) != 0
        taken = ()
        for i in tl.static_range(min(len(places), K + (1 << b) - 1)):
            there = places[i + (1 << b)] if i + (1 << b) < len(places) else places[i]
            taken += (tl.where(bit, there, places[i]),)
        places = taken
    taps = ()
    for i in tl.static_range(K):
        taps += (places[i],)
    return taps


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
def _columns(x, BM: tl.constexpr, KX: tl.constexpr):
    """The columns of a matrix ``[BM, KX]``, 16 or 32 of them."""
    parts = (tl.reshape(x, [BM, 2, 2, 2, 2]),) if KX == 16 else (tl.reshape(x, [BM, 2, 2, 2, 2, 2]),)
    for _ in tl.static_range(5):
        if len(parts) < KX:
            even, odd = (), ()
            for i in tl.static_range(len(parts)):
                first, second = tl.split(parts[i])
                even += (first,)
                odd += (second,)
            parts = even + odd
    return parts


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
    D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr,
    SOFTMAX: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
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
                dy = tl.minimum(tl.maximum(ky - wy, 0), K - 1)  # a row counted twice is no harm
                scores = _scores(lq + dy * tap_row, bq + dy * (2 * K - 1), l_st, K, L_ST, BIAS)
                for i in tl.static_range(K):
                    shift = tl.maximum(shift, scores[i] * LOG2_E)
            shift = tl.where(shift == float("-inf"), 0.0, shift)
        total, acc = tl.zeros([BM], tl.float32), tl.zeros([BM, BLOCK_D], tl.float32)
        for ky in range(first, first + rows):
            dy = ky - wy
            offset = tl.where(inside & (dy >= 0) & (dy < K), -shift, float("-inf"))
            dy = tl.minimum(tl.maximum(dy, 0), K - 1)
            scores = _scores(lq + dy * tap_row, bq + dy * (2 * K - 1), l_st, K, L_ST, BIAS)
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
    BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, SOFTMAX: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp: one program for every tile, slice of channels, group, kernel and image."""
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    part, pid = pid % tl.cdiv(D, BLOCK_D), pid // tl.cdiv(D, BLOCK_D)
    group, pid = pid % groups, pid // groups
    kernel, batch = pid % len(KERNELS), (pid // len(KERNELS)).to(tl.int64)
    heads = len(KERNELS) * groups
    head = kernel * groups + group
    l_ptr += batch * l_sb + group * l_sg
    v_ptr += batch * v_sb + head * v_sn
    b_ptr += group * entries
    out_ptr += batch * (H * W * heads * D)
    lse_ptr += (batch * heads + head) * (H * W)
    for i in tl.static_range(len(KERNELS)):
        if kernel == i:
            _forward(
                l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, tile, part, head, l_sh, l_sw, l_st, v_sh, v_sw, v_sd, H, W,
                heads, KERNELS[i], KX[i], BITS[i], TH, TW, BM, D, BLOCK_D, L_ST, ROWS, BIAS, SOFTMAX, EXACT, PRECISION,
            )  # fmt: skip
        l_ptr += KERNELS[i] * KERNELS[i] * (L_ST if L_ST > 0 else l_st)
        b_ptr += (2 * KERNELS[i] - 1) * (2 * KERNELS[i] - 1)


@triton.jit
def _weight_grad(
    l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, delta_ptr, dl_ptr, tile, head, l_sh, l_sw, l_st,
    v_sh, v_sw, v_sd, g_sh, g_sw, g_sd, t_sh, t_sw, t_st, H, W, heads,
    K: tl.constexpr, KX: tl.constexpr, BITS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, T_ST: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, SOFTMAX: tl.constexpr, LSE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits of a tile of one image, kernel and group; pointers are those of the group."""
    y, x, inside, wy, wx, first, rows, origin = _tile(tile, H, W, K, TH, TW, BM, ROWS)
    kx = origin + tl.arange(0, KX)
    pixel = y * W + x
    delta = tl.zeros([BM], tl.float32)
    dq = do_ptr + (y * g_sh + x * g_sw)
    do = tl.zeros([BM, BLOCK_D], do_ptr.dtype.element_ty)
    for c in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        do = tl.load(dq[:, None] + d[None, :] * g_sd, mask=mask, other=0.0)
        if SOFTMAX:
            out = tl.load(out_ptr + (pixel * heads + head)[:, None] * D + d[None, :], mask=mask, other=0.0)
            delta += tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    shift = tl.zeros([BM], tl.float32)
    if SOFTMAX:
        shift = tl.load(lse_ptr + pixel) * LOG2_E
        # by way of memory: as the sum of rows of a matrix it would impose that matrix' layout on all that follows
        tl.store(delta_ptr + pixel, delta, mask=inside)
        tl.debug_barrier()
        delta = tl.load(delta_ptr + pixel)
        if LSE_GRAD:
            delta -= tl.load(dlse_ptr + pixel)
    tap_row = K * (L_ST if L_ST > 0 else l_st)
    lq = l_ptr + (y * l_sh + x * l_sw)
    bq = b_ptr + ((wy - y + K - 1) * (2 * K - 1) + wx - x + K - 1)
    tq = dl_ptr + (y * t_sh + x * t_sw)
    for ky in range(first, first + rows):
        dy = ky - wy
        valid = inside & (dy >= 0) & (dy < K)
        dy = tl.minimum(tl.maximum(dy, 0), K - 1)
        dp = tl.zeros([BM, KX], tl.float32)
        for part in range(0, tl.cdiv(D, BLOCK_D)):  # at run time, lest all slices be in registers at once
            channel = part * BLOCK_D + tl.arange(0, BLOCK_D)
            seen = (kx < W)[:, None] & (channel < D)[None, :]
            v = tl.load(v_ptr + ky * v_sh + kx[:, None] * v_sw + channel[None, :] * v_sd, mask=seen, other=0.0)
            if D > BLOCK_D:
                where = dq[:, None] + channel[None, :] * g_sd
                do = tl.load(where, mask=inside[:, None] & (channel < D)[None, :], other=0.0)
            dp = tl.dot(do, tl.trans(v), dp, input_precision=PRECISION)
        ds = _taken(_columns(dp, BM, KX), wx - origin, BITS, K)
        if SOFTMAX:
            scores = _scores(lq + dy * tap_row, bq + dy * (2 * K - 1), l_st, K, L_ST, BIAS)
            weights = _weights(scores, -shift, SOFTMAX)
        tp = tq + dy * (K * (T_ST if T_ST > 0 else t_st))
        for i in tl.static_range(K):
            grad = ds[i]
            if SOFTMAX:
                grad = weights[i] * (grad - delta)
            tl.store(tp + i * (T_ST if T_ST > 0 else t_st), grad.to(dl_ptr.dtype.element_ty), mask=valid)


@triton.jit
def sum_weight_grad_kernel(
    l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, delta_ptr, dl_ptr,
    l_sb, l_st, l_sg, l_sh, l_sw, v_sb, v_sh, v_sw, v_sn, v_sd, g_sb, g_sh, g_sw, g_sn, g_sd,
    t_sb, t_st, t_sg, t_sh, t_sw, H, W, groups, entries, tiles,
    KERNELS: tl.constexpr, KX: tl.constexpr, BITS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, T_ST: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, LSE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the logits: one program for every tile, group, kernel and image."""
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    group, pid = pid % groups, pid // groups
    kernel, batch = pid % len(KERNELS), (pid // len(KERNELS)).to(tl.int64)
    heads = len(KERNELS) * groups
    head = kernel * groups + group
    l_ptr += batch * l_sb + group * l_sg
    dl_ptr += batch * t_sb + group * t_sg
    v_ptr += batch * v_sb + head * v_sn
    do_ptr += batch * g_sb + head * g_sn
    b_ptr += group * entries
    out_ptr += batch * (H * W * heads * D)
    lse_ptr += (batch * heads + head) * (H * W)
    dlse_ptr += (batch * heads + head) * (H * W)
    delta_ptr += (batch * heads + head) * (H * W)
    for i in tl.static_range(len(KERNELS)):
        if kernel == i:
            _weight_grad(
                l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, delta_ptr, dl_ptr, tile, head, l_sh, l_sw,
                l_st, v_sh, v_sw, v_sd, g_sh, g_sw, g_sd, t_sh, t_sw, t_st, H, W, heads,
                KERNELS[i], KX[i], BITS[i], TH, TW, BM, D, BLOCK_D, L_ST, T_ST, ROWS, BIAS, SOFTMAX, LSE_GRAD,
                PRECISION,
            )  # fmt: skip
        l_ptr += KERNELS[i] * KERNELS[i] * (L_ST if L_ST > 0 else l_st)
        dl_ptr += KERNELS[i] * KERNELS[i] * (T_ST if T_ST > 0 else t_st)
        b_ptr += (2 * KERNELS[i] - 1) * (2 * KERNELS[i] - 1)


@triton.jit
def _value_grad(
    l_ptr, b_ptr, lse_ptr, do_ptr, dv_ptr, tile, part, l_sh, l_sw, l_st, g_sh, g_sw, g_sd, n_sh, n_sw, n_sd, H, W,
    K: tl.constexpr, KX: tl.constexpr, BITS: tl.constexpr, SKIP: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a stretch of ``KX`` values of one row, image, kernel and group; pointers are those of the group."""
    columns = 1 if ROWS else tl.cdiv(W, KX)
    ky, origin = tile // columns, (tile % columns) * KX
    m, d = tl.arange(0, BM), part * BLOCK_D + tl.arange(0, BLOCK_D)
    # queries whose windows have the row, and the stretch
    y_first = tl.where(ky < K, 0, ky - K // 2)
    y_last = tl.where(ky >= H - K, H - 1, ky + K // 2)
    x_first = 0 if ROWS else tl.where(origin < K, 0, origin - K // 2)
    x_end = tl.minimum(origin + KX, W) - 1
    x_last = W - 1 if ROWS else tl.where(x_end >= W - K, W - 1, x_end + K // 2)
    across = 1 if ROWS else (x_last - x_first) // TW + 1
    down = (y_last - y_first) // TH + 1
    acc = tl.zeros([KX, BLOCK_D], tl.float32)
    for step in range(down * across):
        y, x = y_first + (step // across) * TH + m // TW, x_first + (step % across) * TW + m % TW
        inside = (m < TH * TW) & (y <= y_last) & (x <= x_last)
        do = tl.load(
            do_ptr + (y * g_sh + x * g_sw)[:, None] + d[None, :] * g_sd,
            mask=inside[:, None] & (d < D)[None, :],
            other=0.0,
        )
        y, x = tl.minimum(y, H - 1), tl.minimum(x, W - 1)
        wy, wx = _start(y, H, K), _start(x, W, K)
        dy, shift = ky - wy, wx - origin + SKIP
        valid = inside & (dy >= 0) & (dy < K) & (shift >= 0) & (shift < KX + SKIP)
        dy = tl.minimum(tl.maximum(dy, 0), K - 1)
        offset = tl.zeros([BM], tl.float32)
        if SOFTMAX:
            offset -= tl.load(lse_ptr + y * W + x) * LOG2_E
        offset = tl.where(valid, offset, float("-inf"))
        lp = l_ptr + (y * l_sh + x * l_sw) + dy * (K * (L_ST if L_ST > 0 else l_st))
        bp = b_ptr + ((wy + dy - y + K - 1) * (2 * K - 1) + wx - x + K - 1)
        weights = _weights(_scores(lp, bp, l_st, K, L_ST, BIAS), offset, SOFTMAX)
        p = _joined(_moved(weights, shift, BITS, SKIP, KX), BM)
        acc = tl.dot(tl.trans(p.to(do.dtype)), do, acc, input_precision=PRECISION)
    kx = origin + tl.arange(0, KX)
    where = ky * n_sh + kx[:, None] * n_sw + d[None, :] * n_sd
    tl.store(dv_ptr + where, acc.to(dv_ptr.dtype.element_ty), mask=(kx < W)[:, None] & (d < D)[None, :])


@triton.jit
def sum_value_grad_kernel(
    l_ptr, b_ptr, lse_ptr, do_ptr, dv_ptr,
    l_sb, l_st, l_sg, l_sh, l_sw, g_sb, g_sh, g_sw, g_sn, g_sd, n_sb, n_sh, n_sw, n_sn, n_sd,
    H, W, groups, entries, tiles,
    KERNELS: tl.constexpr, KX: tl.constexpr, BITS: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, L_ST: tl.constexpr, ROWS: tl.constexpr,
    BIAS: tl.constexpr, SOFTMAX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the values: one program for every stretch of a row, slice of channels, group, kernel and image."""
    pid = tl.program_id(0)
    tile, pid = pid % tiles, pid // tiles
    part, pid = pid % tl.cdiv(D, BLOCK_D), pid // tl.cdiv(D, BLOCK_D)
    group, pid = pid % groups, pid // groups
    kernel, batch = pid % len(KERNELS), (pid // len(KERNELS)).to(tl.int64)
    head = kernel * groups + group
    l_ptr += batch * l_sb + group * l_sg
    do_ptr += batch * g_sb + head * g_sn
    dv_ptr += batch * n_sb + head * n_sn
    b_ptr += group * entries
    lse_ptr += (batch * len(KERNELS) * groups + head) * (H * W)
    for i in tl.static_range(len(KERNELS)):
        if kernel == i:
            _value_grad(
                l_ptr, b_ptr, lse_ptr, do_ptr, dv_ptr, tile, part, l_sh, l_sw, l_st, g_sh, g_sw, g_sd,
                n_sh, n_sw, n_sd, H, W,
                KERNELS[i], KX[i], BITS[i], 0 if ROWS else KERNELS[i] - 1, TH, TW, BM, D, BLOCK_D, L_ST, ROWS,
                BIAS, SOFTMAX, PRECISION,
            )  # fmt: skip
        l_ptr += KERNELS[i] * KERNELS[i] * (L_ST if L_ST > 0 else l_st)
        b_ptr += (2 * KERNELS[i] - 1) * (2 * KERNELS[i] - 1)


@triton.jit
def sum_images_kernel(dl_ptr, partial_ptr, t_sb, B, images, numbers, BLOCK: tl.constexpr):
    """Sum over ``images`` images of all numbers of an image, in memory's order: float32 ``[chunks, numbers]``."""
    chunk = tl.program_id(1)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = chunk * images
    dl_ptr += first.to(tl.int64) * t_sb + n
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(tl.minimum(images, B - first)):
        total += tl.load(dl_ptr, mask=n < numbers, other=0.0).to(tl.float32)
        dl_ptr += t_sb
    tl.store(partial_ptr + chunk * numbers + n, total, mask=n < numbers)


@triton.jit
def sum_bias_grad_kernel(
    partial_ptr, db_ptr, t_st, t_sg, t_sh, t_sw, H, W, chunks, numbers, entries,
    KERNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One entry of one group's table: the sum over all pixels of the tap that it was added to, where there is one."""
    entry, group = tl.program_id(0), tl.program_id(1)
    k, start, tap0 = 0, 0, 0
    at, taps = 0, 0
    for i in tl.static_range(len(KERNELS)):
        side = 2 * KERNELS[i] - 1
        mine = (entry >= at) & (entry < at + side * side)
        k, start, tap0 = tl.where(mine, KERNELS[i], k), tl.where(mine, at, start), tl.where(mine, taps, tap0)
        at += side * side
        taps += KERNELS[i] * KERNELS[i]
    ry, rx = (entry - start) // (2 * k - 1), (entry - start) % (2 * k - 1)
    total = tl.zeros([BLOCK], tl.float32)
    for n0 in range(0, H * W, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        y, x = n // W, n % W
        dy = ry + y - (k - 1) - tl.minimum(tl.maximum(y - k // 2, 0), H - k)
        dx = rx + x - (k - 1) - tl.minimum(tl.maximum(x - k // 2, 0), W - k)
        mask = (n < H * W) & (dy >= 0) & (dy < k) & (dx >= 0) & (dx < k)
        where = (tap0 + dy * k + dx) * t_st + group * t_sg + y * t_sh + x * t_sw
        for chunk in range(chunks):
            total += tl.load(partial_ptr + chunk * numbers + where, mask=mask, other=0.0)
    tl.store(db_ptr + group * entries + entry, tl.sum(total, 0).to(db_ptr.dtype.element_ty))
