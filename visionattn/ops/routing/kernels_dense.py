"""Triton kernels for small maps: one program has all keys of one image and head, and a mask says who meets whom.

Where regions hold only a few pixels, following lists would read every key many times and fill tiles badly. Here all
keys stay on the chip, the scores of a tile of queries are one product and one softmax, and those of regions that a
query does not list are dropped. A list is a bit mask of at most 64 regions; where it names a region several times, the
scores of that region are raised by the logarithm of that number. The backward pass gives all gradients in one launch.

Queries and keys are taken region by region, so that the keys of a region are neighbours in a tile.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _offsets(n, size, grid_w, rh, rw, LOG2_T: tl.constexpr, LOG2_RW: tl.constexpr, stride_h, stride_w):
    """Offset of pixel ``n``, counted region by region, inside one image's map."""
    if LOG2_T >= 0:
        region, pixel = n >> LOG2_T, n & ((1 << LOG2_T) - 1)
    else:
        region, pixel = n // size, n % size
    if LOG2_RW >= 0:
        y, x = pixel >> LOG2_RW, pixel & ((1 << LOG2_RW) - 1)
    else:
        y, x = pixel // rw, pixel % rw
    return ((region // grid_w) * rh + y) * stride_h + ((region % grid_w) * rw + x) * stride_w


@triton.jit
def _masked(scores, index_ptr, region, key_region, key_there, inside, K, key_regions):
    """Scores with -inf where a key's region is not in the list of the query's region."""
    low, high = tl.zeros_like(region), tl.zeros_like(region)
    repeated = tl.zeros_like(region)
    for i in range(K):
        entry = tl.load(index_ptr + region * K + i, mask=inside, other=-1)
        valid = (entry >= 0) & (entry < key_regions)
        bit = tl.where(valid, 1 << (entry & 31), 0)
        low_bit, high_bit = tl.where(entry < 32, bit, 0), tl.where(entry < 32, 0, bit)
        repeated |= (low & low_bit) | (high & high_bit)
        low |= low_bit
        high |= high_bit
    word = tl.where((key_region < 32)[None, :], low[:, None], high[:, None])
    listed = ((word >> (key_region & 31)[None, :]) & 1) != 0
    if tl.max((repeated != 0).to(tl.int32), 0) != 0:
        times = tl.zeros(scores.shape, tl.int32)
        for i in range(K):
            entry = tl.load(index_ptr + region * K + i, mask=inside, other=-1)
            times += (entry[:, None] == key_region[None, :]).to(tl.int32)
        scores += tl.log2(tl.maximum(times, 1).to(tl.float32))
    return tl.where(listed & key_there[None, :], scores, float("-inf"))


@triton.jit
def dense_forward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    heads, H, W, grid_w, rh, rw, N, NK, key_regions, key_grid_w, kh, kw, K,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG2_RW: tl.constexpr, LOG2_T: tl.constexpr, LOG2_KW: tl.constexpr, LOG2_TK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of all queries of one image and head."""
    head, batch = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    there, channels = n < NK, d < D
    kv_mask = there[:, None] & channels[None, :]
    k_off = _offsets(n, kh * kw, key_grid_w, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
    v_off = _offsets(n, kh * kw, key_grid_w, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
    k = tl.load(k_ptr + batch * k_sb + head * k_sn + k_off, mask=kv_mask, other=0.0)
    v = tl.load(v_ptr + batch * v_sb + head * v_sn + v_off, mask=kv_mask, other=0.0)
    key_region = n // (kh * kw)
    q_ptr += batch * q_sb + head * q_sn
    index_ptr += batch * i_sb + head * i_sn
    plane, image = (batch * heads + head) * N, batch * (N * heads * D)
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < N
        mask = inside[:, None] & channels[None, :]
        q_off = _offsets(m, rh * rw, grid_w, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
        q = tl.load(q_ptr + q_off, mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = _masked(scores, index_ptr, m // (rh * rw), key_region, there, inside, K, key_regions)
        top = tl.max(scores, 1)
        p = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top)[:, None])
        total = tl.sum(p, 1)
        empty = total == 0.0
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) / tl.where(empty, 1.0, total)[:, None]
        pixels = _offsets(m, rh * rw, grid_w, rh, rw, LOG2_T, LOG2_RW, W, 1)
        where = image + (pixels * heads + head)[:, None] * D + d[None, :]
        tl.store(out_ptr + where, out.to(out_ptr.dtype.element_ty), mask=mask)
        lse = tl.where(empty, float("-inf"), top / LOG2_E + tl.log(tl.where(empty, 1.0, total)))
        tl.store(lse_ptr + plane + pixels, lse, mask=inside)


@triton.jit
def dense_backward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, dq_ptr, dk_ptr, dv_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    heads, H, W, grid_w, rh, rw, N, NK, WK, key_regions, key_grid_w, kh, kw, K,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG2_RW: tl.constexpr, LOG2_T: tl.constexpr, LOG2_KW: tl.constexpr, LOG2_TK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """All three gradients of one image and head."""
    head, batch = tl.program_id(0) % heads, (tl.program_id(0) // heads).to(tl.int64)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    there, channels = n < NK, d < D
    kv_mask = there[:, None] & channels[None, :]
    k_off = _offsets(n, kh * kw, key_grid_w, kh, kw, LOG2_TK, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
    v_off = _offsets(n, kh * kw, key_grid_w, kh, kw, LOG2_TK, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
    k = tl.load(k_ptr + batch * k_sb + head * k_sn + k_off, mask=kv_mask, other=0.0)
    v = tl.load(v_ptr + batch * v_sb + head * v_sn + v_off, mask=kv_mask, other=0.0)
    key_region = n // (kh * kw)
    q_ptr += batch * q_sb + head * q_sn
    index_ptr += batch * i_sb + head * i_sn
    plane, image = (batch * heads + head) * N, batch * (N * heads * D)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m0 in range(0, N, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        inside = m < N
        mask = inside[:, None] & channels[None, :]
        q_off = _offsets(m, rh * rw, grid_w, rh, rw, LOG2_T, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
        pixels = _offsets(m, rh * rw, grid_w, rh, rw, LOG2_T, LOG2_RW, W, 1)
        where = image + (pixels * heads + head)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + q_off, mask=mask, other=0.0)
        do = tl.load(do_ptr + where, mask=mask, other=0.0)
        out = tl.load(out_ptr + where, mask=mask, other=0.0)
        lse = tl.load(lse_ptr + plane + pixels, mask=inside, other=float("inf")) * LOG2_E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # an empty list: probabilities 0
        dlse = tl.load(dlse_ptr + plane + pixels, mask=inside, other=0.0)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1) - dlse
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        scores = _masked(scores, index_ptr, m // (rh * rw), key_region, there, inside, K, key_regions)
        p = tl.exp2(scores - lse[:, None])
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        ds = (p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        tl.store(dq_ptr + where, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    keys = _offsets(n, kh * kw, key_grid_w, kh, kw, LOG2_TK, LOG2_KW, WK, 1)
    where = batch * (NK * heads * D) + (keys * heads + head)[:, None] * D + d[None, :]
    tl.store(dk_ptr + where, (dk * scale).to(dk_ptr.dtype.element_ty), mask=kv_mask)
    tl.store(dv_ptr + where, dv.to(dv_ptr.dtype.element_ty), mask=kv_mask)
