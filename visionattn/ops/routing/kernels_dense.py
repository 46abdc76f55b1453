"""Triton kernels for small maps: all queries of an image and head meet all keys, and a mask drops those not listed.

Where regions hold only a few pixels, following lists would read every key many times and fill tiles badly; a map of at
most ``launch.DENSE_TOKENS`` pixels is cheaper to compute whole. A list is a bit mask of at most 64 regions, made once
for all heads. Where lists name a region several times, the walk over the keys has a further round for these.

Queries and keys are taken region by region, so that the keys of a region are neighbours in a tile and a tile of keys
needs at most 32 bits of the mask.
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
    rounds = tl.max(tl.max(tl.where(valid, before + 1, 0), 1), 0)
    for r in range(rounds):
        bits = tl.sum(tl.where(valid & (before == r), bit, 0), 1)
        tl.store(mask_ptr + (table * K + r) * P + p, bits, mask=p < P)
    tl.store(rounds_ptr + table, rounds)


@triton.jit
def _offsets(n, size, GRID_W: tl.constexpr, rh, rw, LOG2_T: tl.constexpr, LOG2_RW: tl.constexpr, stride_h, stride_w):
    """Offset of pixel ``n``, counted region by region, inside one image's map."""
    if LOG2_T >= 0:
        region, pixel = n >> LOG2_T, n & ((1 << LOG2_T) - 1)
    else:
        region, pixel = n // size, n % size
    if LOG2_RW >= 0:
        y, x = pixel >> LOG2_RW, pixel & ((1 << LOG2_RW) - 1)
    else:
        y, x = pixel // rw, pixel % rw
    return ((region // GRID_W) * rh + y) * stride_h + ((region % GRID_W) * rw + x) * stride_w


@triton.jit
def _listed(scores, bits, n0, n, key_size, LOG2_TK: tl.constexpr):
    """Scores with -inf where a key's region is not in the list of the query's region."""
    if LOG2_TK >= 0:
        first, key_region = n0 >> LOG2_TK, n >> LOG2_TK
    else:
        first, key_region = n0 // key_size, n // key_size
    word = (bits >> first).to(tl.int32)
    return tl.where(((word[:, None] >> (key_region - first)[None, :]) & 1) != 0, scores, float("-inf"))


@triton.jit
def dense_forward_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, rounds_ptr, out_ptr, lse_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, rh, rw, N, NK, WK, kh, kw, P, K,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG2_RW: tl.constexpr, LOG2_T: tl.constexpr, LOG2_KW: tl.constexpr, LOG2_TK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of ``BLOCK_M`` queries of one image and head."""
    tiles = tl.cdiv(N, BLOCK_M)
    tile, pid = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch = pid % HEADS, (pid // HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    channels = d < D
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < N
    mask = inside[:, None] & channels[None, :]
    q_off = _offsets(m, rh * rw, GRID_W, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
    q = tl.load(q_ptr + batch * q_sb + head * q_sn + q_off, mask=mask, other=0.0)
    region = tl.where(inside, m // (rh * rw), 0)
    table = batch * i_sb + head * i_sn
    mask_ptr += table * K * P + region
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    walk = tl.cdiv(NK, BLOCK_N)
    for step in range(tl.load(rounds_ptr + table) * walk):
        n0 = (step % walk) * BLOCK_N
        bits = tl.load(mask_ptr + (step // walk) * P)
        n = n0 + tl.arange(0, BLOCK_N)
        kv_mask = (n < NK)[:, None] & channels[None, :]
        k_off = _offsets(n, kh * kw, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
        v_off = _offsets(n, kh * kw, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
        k = tl.load(k_ptr + k_off, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = _listed(scores, bits, n0, n, kh * kw, LOG2_TK)
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(scores * factor - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(p, 1)
        v = tl.load(v_ptr + v_off, mask=kv_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    pixels = _offsets(m, rh * rw, GRID_W, rh, rw, LOG2_T, LOG2_RW, W, 1)
    where = batch * (N * HEADS * D) + (pixels * HEADS + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + where, acc.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(empty, float("-inf"), top / LOG2_E + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + (batch * HEADS + head) * N + pixels, lse, mask=inside)


@triton.jit
def dense_query_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, rounds_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, dq_ptr, delta_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, rh, rw, N, NK, WK, kh, kw, P, K,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG2_RW: tl.constexpr, LOG2_T: tl.constexpr, LOG2_KW: tl.constexpr, LOG2_TK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BLOCK_M`` queries, and their ``delta = sum(out * grad_out) - grad_lse``."""
    tiles = tl.cdiv(N, BLOCK_M)
    tile, pid = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch = pid % HEADS, (pid // HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    channels = d < D
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < N
    mask = inside[:, None] & channels[None, :]
    q_off = _offsets(m, rh * rw, GRID_W, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
    q = tl.load(q_ptr + batch * q_sb + head * q_sn + q_off, mask=mask, other=0.0)
    pixels = _offsets(m, rh * rw, GRID_W, rh, rw, LOG2_T, LOG2_RW, W, 1)
    where = batch * (N * HEADS * D) + (pixels * HEADS + head)[:, None] * D + d[None, :]
    do = tl.load(do_ptr + where, mask=mask, other=0.0)
    out = tl.load(out_ptr + where, mask=mask, other=0.0)
    row = (batch * HEADS + head) * N + pixels
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1) - tl.load(dlse_ptr + row, mask=inside, other=0.0)
    tl.store(delta_ptr + row, delta, mask=inside)
    lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # an empty list: probabilities 0
    region = tl.where(inside, m // (rh * rw), 0)
    table = batch * i_sb + head * i_sn
    mask_ptr += table * K * P + region
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = scale * LOG2_E
    walk = tl.cdiv(NK, BLOCK_N)
    for step in range(tl.load(rounds_ptr + table) * walk):
        n0 = (step % walk) * BLOCK_N
        bits = tl.load(mask_ptr + (step // walk) * P)
        n = n0 + tl.arange(0, BLOCK_N)
        kv_mask = (n < NK)[:, None] & channels[None, :]
        k_off = _offsets(n, kh * kw, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
        v_off = _offsets(n, kh * kw, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
        k = tl.load(k_ptr + k_off, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + v_off, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = _listed(scores, bits, n0, n, kh * kw, LOG2_TK)
        p = tl.exp2(scores * factor - lse[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(dq_ptr + where, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dense_key_grad_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, rounds_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, rh, rw, N, NK, WK, kh, kw, P, K,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG2_RW: tl.constexpr, LOG2_T: tl.constexpr, LOG2_KW: tl.constexpr, LOG2_TK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_N`` keys and values of one image and head."""
    tiles = tl.cdiv(NK, BLOCK_N)
    tile, pid = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch = pid % HEADS, (pid // HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    channels = d < D
    n0 = tile * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    kv_mask = (n < NK)[:, None] & channels[None, :]
    k_off = _offsets(n, kh * kw, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
    v_off = _offsets(n, kh * kw, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
    k = tl.load(k_ptr + batch * k_sb + head * k_sn + k_off, mask=kv_mask, other=0.0)
    v = tl.load(v_ptr + batch * v_sb + head * v_sn + v_off, mask=kv_mask, other=0.0)
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
        mask = inside[:, None] & channels[None, :]
        q_off = _offsets(m, rh * rw, GRID_W, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
        pixels = _offsets(m, rh * rw, GRID_W, rh, rw, LOG2_T, LOG2_RW, W, 1)
        q = tl.load(q_ptr + q_off, mask=mask, other=0.0)
        do = tl.load(do_ptr + image + (pixels * HEADS + head)[:, None] * D + d[None, :], mask=mask, other=0.0)
        lse = tl.load(lse_ptr + plane + pixels, mask=inside, other=float("inf")) * LOG2_E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        delta = tl.load(delta_ptr + plane + pixels, mask=inside, other=0.0)
        region = tl.where(inside, m // (rh * rw), 0)
        bits = tl.load(mask_ptr + (step // walk) * P + region)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = _listed(scores, bits, n0, n, kh * kw, LOG2_TK)
        p = tl.exp2(scores * factor - lse[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        ds = (p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    keys = _offsets(n, kh * kw, KEY_GRID_W, kh, kw, LOG2_TK, LOG2_KW, WK, 1)
    where = batch * (NK * HEADS * D) + (keys * HEADS + head)[:, None] * D + d[None, :]
    tl.store(dk_ptr + where, (dk * scale).to(dk_ptr.dtype.element_ty), mask=kv_mask)
    tl.store(dv_ptr + where, dv.to(dv_ptr.dtype.element_ty), mask=kv_mask)
