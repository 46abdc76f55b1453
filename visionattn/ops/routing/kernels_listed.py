"""Triton kernels that follow the region table: one program holds a tile of rows and walks over the rows they meet.

Forward and query gradient: the tile is some query rows of one region and head, and the walk goes over all pixels of the
regions in its list, ``BLOCK_N`` at a time whatever the size of a region. Key gradient: the tile is some key rows of one
region, and the walk goes over all pixels of the query regions that list it (``kernels_tables.invert_kernel``). So no
sum crosses programs: there are no atomics, and results do not change from run to run.

Rows are read where they lie in ``[B, H, W, heads, d]``, with strides, so slices of a packed projection need no copy.
Scores, softmax and sums are float32; for the backward pass the log-sum-exp is kept and probabilities are computed anew.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _offsets(region, pixel, GRID_W: tl.constexpr, rh, rw, LOG2_RW: tl.constexpr, stride_h, stride_w):
    """Offset of a pixel of a region inside one image's map."""
    if LOG2_RW >= 0:
        y, x = pixel >> LOG2_RW, pixel & ((1 << LOG2_RW) - 1)
    else:
        y, x = pixel // rw, pixel % rw
    return ((region // GRID_W) * rh + y) * stride_h + ((region % GRID_W) * rw + x) * stride_w


@triton.jit
def _split(n, size, LOG2: tl.constexpr):
    """Number of the list's entry that row ``n`` of a walk belongs to, and its pixel there."""
    if LOG2 >= 0:
        return n >> LOG2, n & ((1 << LOG2) - 1)
    return n // size, n % size


@triton.jit
def _listed(list_ptr, n0, length, size, regions, ALIGNED: tl.constexpr, LOG2: tl.constexpr, BLOCK: tl.constexpr):
    """Regions and pixels of rows ``n0 ... n0 + BLOCK`` of a walk, and which of them exist.

    With ALIGNED all of them belong to one entry, so region and existence are scalars.
    """
    if ALIGNED:
        entry, first = _split(n0, size, LOG2)
        region = tl.load(list_ptr + entry)
        pixel = first + tl.arange(0, BLOCK)
        there = (region >= 0) & (region < regions)
    else:
        n = n0 + tl.arange(0, BLOCK)
        entry, pixel = _split(n, size, LOG2)
        region = tl.load(list_ptr + entry, mask=n < length, other=-1)
        there = (region >= 0) & (region < regions)
    return tl.where(there, region, 0), pixel, there


@triton.jit
def _read(
    ptr, list_ptr, n0, length, size, regions, rh, rw, stride_h, stride_w, channels, d,
    ALIGNED: tl.constexpr, LOG2_T: tl.constexpr, LOG2_RW: tl.constexpr, GRID_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows ``n0 ... n0 + BLOCK`` of a walk, 0 where there is none, and which of them exist, to go with scores."""
    listed, pixel, there = _listed(list_ptr, n0, length, size, regions, ALIGNED, LOG2_T, BLOCK)
    offsets = _offsets(listed, pixel, GRID_W, rh, rw, LOG2_RW, stride_h, stride_w)[:, None] + d[None, :]
    rows = tl.load(ptr + offsets, mask=(there if ALIGNED else there[:, None]) & channels[None, :], other=0.0)
    return rows, there if ALIGNED else there[None, :]


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, regions, rh, rw, key_regions, kh, kw, K, tiles,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_RW: tl.constexpr, LOG2_KW: tl.constexpr, PRECISION: tl.constexpr,
    LOG2_TK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr, SINGLE: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of ``BLOCK_M`` query rows of one region and head."""
    pid = tl.program_id(0)  # heads run fastest: they read the same list and neighbouring channels
    head, pid = pid % HEADS, pid // HEADS
    tile, pid = pid % tiles, pid // tiles
    region, batch = pid % regions, (pid // regions).to(tl.int64)
    rows, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside, channels = rows < rh * rw, d < D
    offsets = _offsets(region, rows, GRID_W, rh, rw, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
    mask = inside[:, None] & channels[None, :]
    q = tl.load(q_ptr + batch * q_sb + head * q_sn + offsets, mask=mask, other=0.0)
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    index_ptr += batch * i_sb + head * i_sn + region * K
    factor = scale * LOG2_E
    size = kh * kw
    length = K * size
    if SINGLE:  # one tile of keys is the whole list of most networks
        listed, pixel, there = _listed(index_ptr, 0, length, size, key_regions, ALIGNED, LOG2_TK, BLOCK_N)
        k_off = _offsets(listed, pixel, KEY_GRID_W, kh, kw, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
        v_off = _offsets(listed, pixel, KEY_GRID_W, kh, kw, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
        kv_mask = (there if ALIGNED else there[:, None]) & channels[None, :]
        k = tl.load(k_ptr + k_off, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + v_off, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores = tl.where(there if ALIGNED else there[None, :], scores, float("-inf"))
        shift = tl.max(scores, 1) * factor
        shift = tl.where(shift == float("-inf"), 0.0, shift)
        p = tl.exp2(scores * factor - shift[:, None])
        total = tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    else:
        # Exponentials of the scores as they are, which spares a maximum and a rescaling per score. Only if a row's sum
        # is too large or too small for float32 is the tile computed again with its maxima subtracted; in float16,
        # whose range is too small for that, this comes first always.
        FIRST: tl.constexpr = min(BLOCK_N, 64)
        shift = tl.zeros([BLOCK_M], tl.float32)
        total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        attempt = 0
        while attempt < 2:
            if (attempt == 1) | EXACT:
                attempt = 1
                shift += float("-inf")
                for f0 in range(0, length, FIRST):
                    some, known = _read(k_ptr, index_ptr, f0, length, size, key_regions, kh, kw, k_sh, k_sw, channels,
                                        d, ALIGNED, LOG2_TK, LOG2_KW, KEY_GRID_W, FIRST)  # fmt: skip
                    exact = tl.where(known, tl.dot(q, tl.trans(some), input_precision=PRECISION), float("-inf"))
                    shift = tl.maximum(shift, tl.max(exact, 1) * factor)
                shift = tl.where(shift == float("-inf"), 0.0, shift)
            total, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for n0 in range(0, length, BLOCK_N):
                listed, pixel, there = _listed(index_ptr, n0, length, size, key_regions, ALIGNED, LOG2_TK, BLOCK_N)
                k_off = _offsets(listed, pixel, KEY_GRID_W, kh, kw, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
                v_off = _offsets(listed, pixel, KEY_GRID_W, kh, kw, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
                kv_mask = (there if ALIGNED else there[:, None]) & channels[None, :]
                k = tl.load(k_ptr + k_off, mask=kv_mask, other=0.0)
                v = tl.load(v_ptr + v_off, mask=kv_mask, other=0.0)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if ALIGNED:  # a huge shift makes the probabilities of a missing region 0, at no cost per score
                    p = tl.exp2(scores * factor - tl.where(there, shift, 1e30)[:, None])
                else:
                    p = tl.exp2(tl.where(there[None, :], scores, float("-inf")) * factor - shift[:, None])
                total += tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            bad = tl.max((inside & ((total < 1e-24) | (total > 1e30))).to(tl.int32), 0)
            attempt += tl.where((bad > 0) & (attempt == 0), 1, 2)
    empty = total == 0.0
    acc *= (1.0 / tl.where(empty, 1.0, total))[:, None]
    pixels = _offsets(region, rows, GRID_W, rh, rw, LOG2_RW, W, 1)
    out_off = (pixels * HEADS + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + batch * (H * W * HEADS * D) + out_off, acc.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(empty, float("-inf"), shift / LOG2_E + tl.log(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + (batch * HEADS + head) * (H * W) + pixels, lse, mask=inside)


@triton.jit
def query_grad_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, dq_ptr, delta_ptr, scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, i_sb, i_sn,
    H, W, regions, rh, rw, key_regions, kh, kw, K, tiles,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_RW: tl.constexpr, LOG2_KW: tl.constexpr, PRECISION: tl.constexpr,
    LOG2_TK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr, LSE_GRAD: tl.constexpr,
    SPREAD: tl.constexpr,
):  # fmt: skip
    """Gradient of ``BLOCK_M`` query rows, and their ``delta = sum(out * grad_out) - grad_lse`` for the keys' gradient.

    Output and its gradient are contiguous, the pixels of the query's gradient ``SPREAD`` times as far apart.
    """
    pid = tl.program_id(0)
    head, pid = pid % HEADS, pid // HEADS
    tile, pid = pid % tiles, pid // tiles
    region, batch = pid % regions, (pid // regions).to(tl.int64)
    rows, d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside, channels = rows < rh * rw, d < D
    mask = inside[:, None] & channels[None, :]
    pixels = _offsets(region, rows, GRID_W, rh, rw, LOG2_RW, W, 1)
    where = batch * (H * W * HEADS * D) + (pixels * HEADS + head)[:, None] * D + d[None, :]
    do = tl.load(do_ptr + where, mask=mask, other=0.0)
    out = tl.load(out_ptr + where, mask=mask, other=0.0)
    row = (batch * HEADS + head) * (H * W) + pixels
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if LSE_GRAD:
        delta -= tl.load(dlse_ptr + row, mask=inside, other=0.0)
    tl.store(delta_ptr + row, delta, mask=inside)
    lse = tl.load(lse_ptr + row, mask=inside, other=float("inf")) * LOG2_E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # an empty list: probabilities 0
    offsets = _offsets(region, rows, GRID_W, rh, rw, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
    q = tl.load(q_ptr + batch * q_sb + head * q_sn + offsets, mask=mask, other=0.0)
    k_ptr += batch * k_sb + head * k_sn
    v_ptr += batch * v_sb + head * v_sn
    index_ptr += batch * i_sb + head * i_sn + region * K
    factor = scale * LOG2_E
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    size = kh * kw
    length = K * size
    for n0 in range(0, length, BLOCK_N):
        listed, pixel, there = _listed(index_ptr, n0, length, size, key_regions, ALIGNED, LOG2_TK, BLOCK_N)
        k_off = _offsets(listed, pixel, KEY_GRID_W, kh, kw, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
        v_off = _offsets(listed, pixel, KEY_GRID_W, kh, kw, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
        if ALIGNED:
            kv_mask = there & channels[None, :]
            shift = tl.where(there, lse, float("inf"))
        else:
            kv_mask = there[:, None] & channels[None, :]
            shift = lse
        k = tl.load(k_ptr + k_off, mask=kv_mask, other=0.0)
        v = tl.load(v_ptr + v_off, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not ALIGNED:
            scores = tl.where(there[None, :], scores, float("-inf"))
        p = tl.exp2(scores * factor - shift[:, None])
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    where = batch * (H * W * HEADS * D * SPREAD) + (pixels * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
    tl.store(dq_ptr + where, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(
    lse_ptr, delta_ptr, list_ptr, n0, length, size, rh, rw, W,
    ALIGNED: tl.constexpr, LOG2_T: tl.constexpr, LOG2_RW: tl.constexpr, GRID_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp in powers of 2 and delta of rows ``n0 ... n0 + BLOCK`` of a walk over queries.

    A region that lists this one several times counts several times: the log-sum-exp is lowered by the logarithm.
    """
    packed, pixel, inside = _queries(list_ptr, n0, length, size, ALIGNED, LOG2_T, BLOCK)
    pixels = _offsets(packed & 65535, pixel, GRID_W, rh, rw, LOG2_RW, W, 1)
    lse = tl.load(lse_ptr + pixels, mask=inside, other=float("inf")) * LOG2_E
    lse -= tl.log2(tl.maximum(packed >> 16, 1).to(tl.float32))
    return lse, tl.load(delta_ptr + pixels, mask=inside, other=0.0)


@triton.jit
def _queries(list_ptr, n0, length, size, ALIGNED: tl.constexpr, LOG2_T: tl.constexpr, BLOCK: tl.constexpr):
    """Entries of the inverted list and pixels of rows ``n0 ... n0 + BLOCK`` of a walk, and which of them exist.

    With ALIGNED all of them belong to one entry, a scalar.
    """
    if ALIGNED:
        entry, first = _split(n0, size, LOG2_T)
        packed = tl.load(list_ptr + entry, mask=n0 < length, other=0)
        pixel = first + tl.arange(0, BLOCK)
        inside = n0 + tl.arange(0, BLOCK) < length
    else:
        n = n0 + tl.arange(0, BLOCK)
        inside = n < length
        entry, pixel = _split(n, size, LOG2_T)
        packed = tl.load(list_ptr + entry, mask=inside, other=0)
    return packed, pixel, inside


@triton.jit
def key_grad_kernel(
    q_ptr, k_ptr, v_ptr, list_ptr, count_ptr, out_ptr, lse_ptr, do_ptr, dlse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    scale,
    q_sb, q_sh, q_sw, q_sn, k_sb, k_sh, k_sw, k_sn, v_sb, v_sh, v_sw, v_sn, l_sb, l_sn, c_sb, c_sn,
    H, W, regions, rh, rw, HK, WK, key_regions, kh, kw, tiles,
    HEADS: tl.constexpr, GRID_W: tl.constexpr, KEY_GRID_W: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, LOG2_RW: tl.constexpr, LOG2_KW: tl.constexpr, PRECISION: tl.constexpr,
    LOG2_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
    ONE_PASS: tl.constexpr, FULL: tl.constexpr, LSE_GRAD: tl.constexpr, SPREAD: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BLOCK_N`` key and value rows of one region and head.

    An entry of the inverted list is ``region + 65536 * times``, for a region that lists this one several times.
    With ONE_PASS every query region lists at most one region and a tile holds all its keys, so the queries' gradient
    is complete here too and is written on the way; a last program per image gives 0 to those that list none.
    """
    pid = tl.program_id(0)
    head, pid = pid % HEADS, pid // HEADS
    tile, pid = pid % tiles, pid // tiles
    groups = key_regions + 1 if ONE_PASS else key_regions
    region, batch = pid % groups, (pid // groups).to(tl.int64)
    cols, d = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    present = (cols < kh * kw) & (region < key_regions)
    channels = d < D
    kv_mask = present[:, None] & channels[None, :]
    k_off = _offsets(region, cols, KEY_GRID_W, kh, kw, LOG2_KW, k_sh, k_sw)[:, None] + d[None, :]
    v_off = _offsets(region, cols, KEY_GRID_W, kh, kw, LOG2_KW, v_sh, v_sw)[:, None] + d[None, :]
    k = tl.load(k_ptr + batch * k_sb + head * k_sn + k_off, mask=kv_mask, other=0.0)
    v = tl.load(v_ptr + batch * v_sb + head * v_sn + v_off, mask=kv_mask, other=0.0)
    count = tl.load(count_ptr + batch * c_sb + head * c_sn + region)
    list_ptr += batch * l_sb + head * l_sn + region * regions
    q_ptr += batch * q_sb + head * q_sn
    plane, image = (batch * HEADS + head) * (H * W), batch * (H * W * HEADS * D)
    lse_ptr += plane
    delta_ptr += plane
    dlse_ptr += plane
    factor = scale * LOG2_E
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    size = rh * rw
    length = count * size
    if not ONE_PASS:  # read a step ahead, for the pipeline takes care of whole rows only
        next_lse, next_delta = _statistics(lse_ptr, delta_ptr, list_ptr, 0, length, size, rh, rw, W,
                                           ALIGNED, LOG2_T, LOG2_RW, GRID_W, BLOCK_M)  # fmt: skip
    for n0 in range(0, length, BLOCK_M):
        packed, pixel, inside = _queries(list_ptr, n0, length, size, ALIGNED, LOG2_T, BLOCK_M)
        listed = packed & 65535
        mask = inside[:, None] & channels[None, :]
        q_off = _offsets(listed, pixel, GRID_W, rh, rw, LOG2_RW, q_sh, q_sw)[:, None] + d[None, :]
        pixels = _offsets(listed, pixel, GRID_W, rh, rw, LOG2_RW, W, 1)
        where = image + (pixels * HEADS + head)[:, None] * D + d[None, :]
        q = tl.load(q_ptr + q_off, mask=mask, other=0.0)
        do = tl.load(do_ptr + where, mask=mask, other=0.0)
        if ONE_PASS:
            out = tl.load(out_ptr + where, mask=mask, other=0.0)
            delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
            if LSE_GRAD:
                delta -= tl.load(dlse_ptr + pixels, mask=inside, other=0.0)
            lse = tl.load(lse_ptr + pixels, mask=inside, other=float("inf")) * LOG2_E
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
        else:
            lse, delta = next_lse, next_delta
            next_lse, next_delta = _statistics(lse_ptr, delta_ptr, list_ptr, n0 + BLOCK_M, length, size, rh, rw, W,
                                               ALIGNED, LOG2_T, LOG2_RW, GRID_W, BLOCK_M)  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(scores * factor - lse[:, None])
        if ONE_PASS and not FULL:  # keys that are not there must not reach the queries' gradient
            p = tl.where(present[None, :], p, 0.0)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        ds = (p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])).to(q.dtype)
        dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        if ONE_PASS:
            dq = tl.dot(ds, k, input_precision=PRECISION) * scale
            where = image * SPREAD + (pixels * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
            tl.store(dq_ptr + where, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    keys = _offsets(region, cols, KEY_GRID_W, kh, kw, LOG2_KW, WK, 1)
    where = batch * (HK * WK * HEADS * D * SPREAD) + (keys * (HEADS * SPREAD) + head)[:, None] * D + d[None, :]
    tl.store(dk_ptr + where, (dk * scale).to(dk_ptr.dtype.element_ty), mask=kv_mask)
    tl.store(dv_ptr + where, dv.to(dv_ptr.dtype.element_ty), mask=kv_mask)
