"""Triton kernels for small maps: all queries of an image and head meet all keys, and a mask drops those not listed.

Where regions hold only a few pixels, following lists would read every key many times and fill tiles badly; a map of at
most ``launch.DENSE_TOKENS`` pixels is cheaper to compute whole. A list is a bit mask of at most 64 regions, made once
for all heads. Where lists name a region several times, there is a further round for these.

Queries and keys are taken region by region, so that the keys of a region are neighbours in a tile and a tile of keys
needs at most 32 bits of the mask. Forward and query gradient hold the keys and values of the whole map, cut into parts
of 64 and a smaller last one, and walk over the queries. The backward pass does the same with the gradients of all keys
in registers, where there is room for them; elsewhere one program finds the gradients of the queries, and others, which
hold some keys each, those of the keys.

The forward pass takes exponentials of the scores as they are, without looking for the largest first, which is a quarter
of the work. Only if a row's sum comes out too large or too small for float32 is its tile computed again, with
its maxima. In float16, whose range is too small for that, the maxima come first always.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def mask_kernel(index_ptr, mask_ptr, rounds_ptr, P, K, key_regions, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr):
    """Bit masks of every list of one table: round ``r`` has the regions that a list names more than ``r`` times.

    Masks are int64 ``[tables, K, P]``, of which the first ``rounds[table]`` are written.
    """
    table, p, slot = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_K)
    index_ptr += table * P * K
    inside = (p < P)[:, None] & (slot < K)[None, :]
    entry = tl.load(index_ptr + p[:, None] * K + slot[None, :], mask=inside, other=-1)
    valid = (entry >= 0) & (entry < key_regions)
    before = tl.zeros([BLOCK_P, BLOCK_K], tl.int32)  # how often the list has named the same region already
    for j in range(K):
        other = tl.load(index_ptr + p * K + j, mask=p < P, other=-1)
        before += ((entry == other[:, None]) & (slot > j)[None, :]).to(tl.int32)
    bit = tl.full([BLOCK_P, BLOCK_K], 1, tl.int64) << (entry & 63).to(tl.int64)
    rounds = tl.maximum(tl.max(tl.max(tl.where(valid, before + 1, 0), 1), 0), 1)
    for r in range(rounds):
        bits = tl.sum(tl.where(valid & (before == r), bit, 0), 1)
        tl.store(mask_ptr + (table * K + r) * P + p, bits, mask=p < P)
    tl.store(rounds_ptr + table, rounds)


@triton.jit
def _region(n, size, LOG2_T: tl.constexpr):
    """Region of pixel ``n``, counted region by region."""
    if LOG2_T >= 0:
        return n >> LOG2_T
    return n // size


@triton.jit
def _offsets(n, size, GRID_W: tl.constexpr, rh, rw, LOG2_T: tl.constexpr, LOG2_RW: tl.constexpr, stride_h, stride_w):
    """Offset of pixel ``n``, counted region by region, inside one image's map."""
    region = _region(n, size, LOG2_T)
    pixel = n - region * size
    if LOG2_RW >= 0:
        y, x = pixel >> LOG2_RW, pixel & ((1 << LOG2_RW) - 1)
    else:
        y, x = pixel // rw, pixel % rw
    return ((region // GRID_W) * rh + y) * stride_h + ((region % GRID_W) * rw + x) * stride_w


@triton.jit
def _rows(
    ptr, n, N, d, D: tl.constexpr, size, GRID_W: tl.constexpr, rh, rw,
    LOG2_T: tl.constexpr, LOG2_RW: tl.constexpr, stride_h, stride_w,
):  # fmt: skip
    """Pixels ``n`` of one image and head, 0 beyond the map and beyond the head's channels."""
    offsets = _offsets(n, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, stride_h, stride_w)[:, None] + d[None, :]
    return tl.load(ptr + offsets, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _listed(scores, bits, n0, n, key_size, LOG2_TK: tl.constexpr):
    """Scores with -inf where the region of key ``n`` is not in the list of the query's region."""
    first = _region(n0, key_size, LOG2_TK)
    word = (bits >> first).to(tl.int32)
    column = 1 << (_region(n, key_size, LOG2_TK) - first)
    return tl.where((word[:, None] & column[None, :]) != 0, scores, float("-inf"))


@triton.jit
def dense_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, rounds_ptr, out_ptr, lse_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, rh, rw, N, NK, WK, kh, kw, P, K,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_RW: tl.constexpr, LOG2_KW: tl.constexpr,
    LOG2_T: tl.constexpr, LOG2_TK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of all queries of one image and head, ``BLOCK_M`` at a time."""
    head, batch = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q_ptr += batch * q_sb + head * q_sn
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    table = batch * i_sb + head * i_sn
    mask_ptr += table * K * P
    rounds = tl.load(rounds_ptr + table)
    size, key_size = rh * rw, kh * kw
    keys, values = (), ()
    for i in tl.static_range(len(PARTS)):
        n = i * PART + tl.arange(0, PARTS[i])
        keys += (_rows(k_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw),)
        values += (_rows(v_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw),)
    factor = scale * LOG2_E
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < N
        q = _rows(q_ptr, m, N, d, D, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)
        region = _region(m, size, LOG2_T)
        shift = tl.zeros([BLOCK_M], tl.float32)  # subtracted from the scores in powers of 2
        total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        attempt = 0
        while attempt < 2:
            if (attempt == 1) | EXACT:
                attempt = 1
                bits = tl.load(mask_ptr + region, mask=inside, other=0)  # the first round has every listed region
                shift += float("-inf")
                for i in tl.static_range(len(PARTS)):
                    scores = tl.dot(q, tl.trans(keys[i]), input_precision=PRECISION)
                    scores = _listed(scores, bits, i * PART, i * PART + tl.arange(0, PARTS[i]), key_size, LOG2_TK)
                    shift = tl.maximum(shift, tl.max(scores, 1) * factor)
                shift = tl.where(shift == float("-inf"), 0.0, shift)
            total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for r in range(rounds):
                bits = tl.load(mask_ptr + r * P + region, mask=inside, other=0)
                for i in tl.static_range(len(PARTS)):
                    scores = tl.dot(q, tl.trans(keys[i]), input_precision=PRECISION)
                    scores = _listed(scores, bits, i * PART, i * PART + tl.arange(0, PARTS[i]), key_size, LOG2_TK)
                    p = tl.exp2(scores * factor - shift[:, None])
                    total += tl.sum(p, 1)
                    acc = tl.dot(p.to(q.dtype), values[i], acc, input_precision=PRECISION)
            bad = tl.max((inside & ((total < 1e-24) | (total > 1e30))).to(tl.int32), 0)
            attempt += tl.where((bad > 0) & (attempt == 0), 1, 2)
        empty = total == 0.0
        acc *= (1.0 / tl.where(empty, 1.0, total))[:, None]
        pixels = _offsets(m, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, W, 1)
        where = batch * (N * HEADS * D) + (pixels * HEADS + head)[:, None] * D + d[None, :]
        tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])
        lse = tl.where(empty, float("-inf"), shift / LOG2_E + tl.log(tl.where(empty, 1.0, total)))
        tl.store(lse_ptr + (batch * HEADS + head) * N + pixels, lse, mask=inside)


@triton.jit
def dense_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, rounds_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, rh, rw, N, NK, WK, kh, kw, P, K,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_RW: tl.constexpr, LOG2_KW: tl.constexpr,
    LOG2_T: tl.constexpr, LOG2_TK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, LSE_GRAD: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Gradients of all queries, keys and values of one image and head; those of the keys stay in registers.

    The pixels of the gradients are ``SPREAD`` times as far apart as those of the output.
    """
    head, batch = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q_ptr += batch * q_sb + head * q_sn
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    table = batch * i_sb + head * i_sn
    mask_ptr += table * K * P
    rounds = tl.load(rounds_ptr + table)
    size, key_size = rh * rw, kh * kw
    keys, values, dk, dv = (), (), (), ()
    for i in tl.static_range(len(PARTS)):
        n = i * PART + tl.arange(0, PARTS[i])
        keys += (_rows(k_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw),)
        values += (_rows(v_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw),)
        dk += (tl.zeros_like(keys[i]).to(tl.float32),)
        dv += (tl.zeros_like(keys[i]).to(tl.float32),)
    factor = scale * LOG2_E
    plane, image = (batch * HEADS + head) * N, batch * (N * HEADS * D)
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < N
        mask = inside[:, None] & (d < D)[None, :]
        q = _rows(q_ptr, m, N, d, D, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)
        pixels = _offsets(m, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, W, 1)
        where = image + (pixels * HEADS + head)[:, None] * D + d[None, :]
        do = tl.load(do_ptr + where, mask=mask, other=0.0)
        out = tl.load(out_ptr + where, mask=mask, other=0.0)
        row = plane + pixels
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        if LSE_GRAD:
            delta -= tl.load(dlse_ptr + row, mask=inside, other=0.0)
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2_E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # an empty list: probabilities 0
        region = _region(m, size, LOG2_T)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for r in range(rounds):
            bits = tl.load(mask_ptr + r * P + region, mask=inside, other=0)
            more_k, more_v = (), ()
            for i in tl.static_range(len(PARTS)):
                n = i * PART + tl.arange(0, PARTS[i])
                scores = tl.dot(q, tl.trans(keys[i]), input_precision=PRECISION)
                scores = _listed(scores, bits, i * PART, n, key_size, LOG2_TK)
                p = tl.exp2(scores * factor - lse[:, None])
                more_v += (tl.dot(tl.trans(p.to(do.dtype)), do, dv[i], input_precision=PRECISION),)
                ds = (p * (tl.dot(do, tl.trans(values[i]), input_precision=PRECISION) - delta[:, None])).to(q.dtype)
                more_k += (tl.dot(tl.trans(ds), q, dk[i], input_precision=PRECISION),)
                dq = tl.dot(ds, keys[i], dq, input_precision=PRECISION)
            dk, dv = more_k, more_v
        where = image * SPREAD + (pixels * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
        tl.store(dq_ptr + where, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)
    for i in tl.static_range(len(PARTS)):
        n = i * PART + tl.arange(0, PARTS[i])
        pixels = _offsets(n, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, WK, 1)
        where = batch * (NK * HEADS * D * SPREAD) + (pixels * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
        mask = (n < NK)[:, None] & (d < D)[None, :]
        tl.store(dk_ptr + where, (dk[i] * scale).to(dk_ptr.dtype.element_ty), mask=mask)
        tl.store(dv_ptr + where, dv[i].to(dv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dense_query_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, rounds_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, dq_ptr, delta_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, rh, rw, N, NK, WK, kh, kw, P, K,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_RW: tl.constexpr, LOG2_KW: tl.constexpr,
    LOG2_T: tl.constexpr, LOG2_TK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, LSE_GRAD: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Gradient of all queries of one image and head, and their ``delta = sum(out * grad_out) - grad_lse``.

    The pixels of the gradient are ``SPREAD`` times as far apart as those of the output.
    """
    head, batch = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q_ptr += batch * q_sb + head * q_sn
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    table = batch * i_sb + head * i_sn
    mask_ptr += table * K * P
    rounds = tl.load(rounds_ptr + table)
    size, key_size = rh * rw, kh * kw
    keys, values = (), ()
    for i in tl.static_range(len(PARTS)):
        n = i * PART + tl.arange(0, PARTS[i])
        keys += (_rows(k_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw),)
        values += (_rows(v_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw),)
    factor = scale * LOG2_E
    plane, image = (batch * HEADS + head) * N, batch * (N * HEADS * D)
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < N
        mask = inside[:, None] & (d < D)[None, :]
        q = _rows(q_ptr, m, N, d, D, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)
        pixels = _offsets(m, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, W, 1)
        where = image + (pixels * HEADS + head)[:, None] * D + d[None, :]
        do = tl.load(do_ptr + where, mask=mask, other=0.0)
        out = tl.load(out_ptr + where, mask=mask, other=0.0)
        row = plane + pixels
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
        if LSE_GRAD:
            delta -= tl.load(dlse_ptr + row, mask=inside, other=0.0)
        tl.store(delta_ptr + row, delta, mask=inside)
        lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2_E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # an empty list: probabilities 0
        region = _region(m, size, LOG2_T)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for r in range(rounds):
            bits = tl.load(mask_ptr + r * P + region, mask=inside, other=0)
            for i in tl.static_range(len(PARTS)):
                scores = tl.dot(q, tl.trans(keys[i]), input_precision=PRECISION)
                scores = _listed(scores, bits, i * PART, i * PART + tl.arange(0, PARTS[i]), key_size, LOG2_TK)
                p = tl.exp2(scores * factor - lse[:, None])
                ds = p * (tl.dot(do, tl.trans(values[i]), input_precision=PRECISION) - delta[:, None])
                dq = tl.dot(ds.to(q.dtype), keys[i], dq, input_precision=PRECISION)
        where = image * SPREAD + (pixels * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
        tl.store(dq_ptr + where, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dense_key_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, rounds_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, rh, rw, N, NK, WK, kh, kw, P, K,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_RW: tl.constexpr, LOG2_KW: tl.constexpr,
    LOG2_T: tl.constexpr, LOG2_TK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_N`` keys and values of one image and head."""
    tiles = tl.cdiv(NK, BLOCK_N)
    tile, pid = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch = pid % HEADS, (pid // HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    size, key_size = rh * rw, kh * kw
    n0 = tile * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    k = _rows(k_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw)
    v = _rows(v_ptr, n, NK, d, D, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw)
    table = batch * i_sb + head * i_sn
    mask_ptr += table * K * P
    q_ptr += batch * q_sb + head * q_sn
    plane, image = (batch * HEADS + head) * N, batch * (N * HEADS * D)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    walk = tl.cdiv(N, BLOCK_M)
    for step in range(tl.load(rounds_ptr + table) * walk):
        m = (step % walk) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < N
        q = _rows(q_ptr, m, N, d, D, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)
        pixels = _offsets(m, size, GRID_W, rh, rw, LOG2_T, LOG2_RW, W, 1)
        where = image + (pixels * HEADS + head)[:, None] * D + d[None, :]
        do = tl.load(do_ptr + where, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        lse = tl.load(lse_ptr + plane + pixels, mask=inside, other=float("inf")) * LOG2_E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + plane + pixels, mask=inside, other=0.0)
        bits = tl.load(mask_ptr + (step // walk) * P + _region(m, size, LOG2_T), mask=inside, other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = _listed(scores, bits, n0, n, key_size, LOG2_TK)
        p = tl.exp2(scores * factor - lse[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        ds = (p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    keys = _offsets(n, key_size, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, WK, 1)
    where = batch * (NK * HEADS * D * SPREAD) + (keys * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
    mask = (n < NK)[:, None] & (d < D)[None, :]
    tl.store(dk_ptr + where, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + where, dv.to(dv_ptr.dtype.element_ty), mask=mask)
