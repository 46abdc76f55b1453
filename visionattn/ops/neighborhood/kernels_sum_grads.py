"""Triton kernels of the gradients of the neighbourhood sum; ``kernels_sum.py`` has the plan and the forward pass.

The gradient of the logits is a walk like the forward one, with a product of the gradient and the values turned back
into taps; that of the values takes a row of keys and walks over the queries that see it. That of the bias is the sum of
the logits' over the images, by tap and pixel, and then over pixels, in a fixed order.
"""

import triton
import triton.language as tl

from visionattn.ops.neighborhood.kernels_sum import (
    LOG2_E,
    _joined,
    _logits,
    _moved,
    _scores,
    _start,
    _tile,
    _weights,
    _within,
)


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
        delta = tl.load(delta_ptr + pixel, mask=inside, other=0.0)  # of another tile's pixels it may not be there yet
        if LSE_GRAD:
            delta -= tl.load(dlse_ptr + pixel)
    tap_row = K * (L_ST if L_ST > 0 else l_st)
    lq = l_ptr + (y * l_sh + x * l_sw)
    bq = b_ptr + ((wy - y + K - 1) * (2 * K - 1) + wx - x + K - 1)
    tq = dl_ptr + (y * t_sh + x * t_sw)
    ahead = _logits(lq + _within(first - wy, K) * tap_row, l_st, K, L_ST)
    for ky in range(first, first + rows):
        dy = ky - wy
        valid = inside & (dy >= 0) & (dy < K)
        logits = ahead
        ahead = _logits(lq + _within(dy + 1, K) * tap_row, l_st, K, L_ST)
        dy = _within(dy, K)
        weights = ()
        if SOFTMAX:
            weights = _weights(_scores(logits, bq + dy * (2 * K - 1), BIAS), -shift, SOFTMAX)
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
        tp = tq + dy * (K * (T_ST if T_ST > 0 else t_st))
        for i in tl.static_range(K):
            grad = ds[i]
            if SOFTMAX:
                grad = weights[i] * (grad - delta)
            tl.store(tp + i * (T_ST if T_ST > 0 else t_st), grad.to(dl_ptr.dtype.element_ty), mask=valid)


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
    tap_row = K * (L_ST if L_ST > 0 else l_st)
    y, x = y_first + m // TW, x_first + m % TW
    lp = l_ptr + tl.minimum(y, H - 1) * l_sh + tl.minimum(x, W - 1) * l_sw
    ahead = _logits(lp + _within(ky - _start(tl.minimum(y, H - 1), H, K), K) * tap_row, l_st, K, L_ST)
    for step in range(down * across):
        inside = (m < TH * TW) & (y <= y_last) & (x <= x_last)
        where = (y * g_sh + x * g_sw)[:, None] + d[None, :] * g_sd
        do = tl.load(do_ptr + where, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        y, x = tl.minimum(y, H - 1), tl.minimum(x, W - 1)
        offset = tl.zeros([BM], tl.float32)
        if SOFTMAX:
            offset -= tl.load(lse_ptr + y * W + x) * LOG2_E
        wy, wx = _start(y, H, K), _start(x, W, K)
        dy, shift = ky - wy, wx - origin + SKIP
        offset = tl.where(inside & (dy >= 0) & (dy < K) & (shift >= 0) & (shift < KX + SKIP), offset, float("-inf"))
        bp = b_ptr + ((wy + _within(dy, K) - y + K - 1) * (2 * K - 1) + wx - x + K - 1)
        logits = ahead
        y, x = y_first + ((step + 1) // across) * TH + m // TW, x_first + ((step + 1) % across) * TW + m % TW
        lp = l_ptr + tl.minimum(y, H - 1) * l_sh + tl.minimum(x, W - 1) * l_sw
        ahead = _logits(lp + _within(ky - _start(tl.minimum(y, H - 1), H, K), K) * tap_row, l_st, K, L_ST)
        p = _joined(_moved(_weights(_scores(logits, bp, BIAS), offset, SOFTMAX), shift, BITS, SKIP, KX), BM)
        acc = tl.dot(tl.trans(p.to(do.dtype)), do, acc, input_precision=PRECISION)
    kx = origin + tl.arange(0, KX)
    where = ky * n_sh + kx[:, None] * n_sw + d[None, :] * n_sd
    tl.store(dv_ptr + where, acc.to(dv_ptr.dtype.element_ty), mask=(kx < W)[:, None] & (d < D)[None, :])


@triton.jit
def sum_grads_kernel(
    l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, delta_ptr, dl_ptr, dv_ptr,
    l_sb, l_st, l_sg, l_sh, l_sw, v_sb, v_sh, v_sw, v_sn, v_sd, g_sb, g_sh, g_sw, g_sn, g_sd,
    t_sb, t_st, t_sg, t_sh, t_sw, n_sb, n_sh, n_sw, n_sn, n_sd, H, W, groups, entries, tiles, stretches,
    KERNELS: tl.constexpr, KX: tl.constexpr, BITS: tl.constexpr, KEYS: tl.constexpr, KEY_BITS: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    L_ST: tl.constexpr, T_ST: tl.constexpr, V_UNIT: tl.constexpr, G_UNIT: tl.constexpr, N_UNIT: tl.constexpr,
    ROWS: tl.constexpr, BIAS: tl.constexpr, SOFTMAX: tl.constexpr, LSE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of logits and values: for every group, kernel and image a program for every tile of queries, and one
    for every stretch of ``KEYS`` keys of a row and slice of channels. They are neighbours, so that what one kind reads
    of the logits the other finds in the cache."""
    pid = tl.program_id(0)
    each = tiles + stretches * tl.cdiv(D, BLOCK_D)
    tile, pid = pid % each, pid // each
    group, pid = pid % groups, pid // groups
    kernel, batch = pid % len(KERNELS), (pid // len(KERNELS)).to(tl.int64)
    heads = len(KERNELS) * groups
    head = kernel * groups + group
    v_sh, v_sw, v_sn = v_sh * V_UNIT, v_sw * V_UNIT, v_sn * V_UNIT
    g_sh, g_sw, g_sn = g_sh * G_UNIT, g_sw * G_UNIT, g_sn * G_UNIT
    n_sh, n_sw, n_sn = n_sh * N_UNIT, n_sw * N_UNIT, n_sn * N_UNIT
    l_ptr += batch * l_sb + group * l_sg
    dl_ptr += batch * t_sb + group * t_sg
    v_ptr += batch * v_sb * V_UNIT + head * v_sn
    do_ptr += batch * g_sb * G_UNIT + head * g_sn
    dv_ptr += batch * n_sb * N_UNIT + head * n_sn
    b_ptr += group * entries
    out_ptr += batch * (H * W * heads * D)
    lse_ptr += (batch * heads + head) * (H * W)
    dlse_ptr += (batch * heads + head) * (H * W)
    delta_ptr += (batch * heads + head) * (H * W)
    for i in tl.static_range(len(KERNELS)):
        if kernel == i:
            if tile < tiles:
                _weight_grad(
                    l_ptr, v_ptr, b_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, delta_ptr, dl_ptr, tile, head, l_sh, l_sw,
                    l_st, v_sh, v_sw, v_sd, g_sh, g_sw, g_sd, t_sh, t_sw, t_st, H, W, heads,
                    KERNELS[i], KX[i], BITS[i], TH, TW, BM, D, BLOCK_D, L_ST, T_ST, ROWS, BIAS, SOFTMAX, LSE_GRAD,
                    PRECISION,
                )  # fmt: skip
            else:
                _value_grad(
                    l_ptr, b_ptr, lse_ptr, do_ptr, dv_ptr, (tile - tiles) % stretches, (tile - tiles) // stretches,
                    l_sh, l_sw, l_st, g_sh, g_sw, g_sd, n_sh, n_sw, n_sd, H, W,
                    KERNELS[i], KEYS, KEY_BITS[i], 0 if ROWS else KERNELS[i] - 1, TH, TW, BM, D, BLOCK_D, L_ST, ROWS,
                    BIAS, SOFTMAX, PRECISION,
                )  # fmt: skip
        l_ptr += KERNELS[i] * KERNELS[i] * (L_ST if L_ST > 0 else l_st)
        dl_ptr += KERNELS[i] * KERNELS[i] * (T_ST if T_ST > 0 else t_st)
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
    tl.store(partial_ptr + chunk.to(tl.int64) * numbers + n, total, mask=n < numbers)


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
        sums = partial_ptr + where
        for _ in range(chunks):
            total += tl.load(sums, mask=mask, other=0.0)
            sums += numbers
    tl.store(db_ptr + group * entries + entry, tl.sum(total, 0).to(db_ptr.dtype.element_ty))
