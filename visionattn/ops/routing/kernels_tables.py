"""Triton kernels of the steps around routed attention: region means, their ranking, and the inverted table."""

import triton
import triton.language as tl


@triton.jit
def region_mean_kernel(
    x_ptr, out_ptr, x_sb, x_sh, x_sw, C, regions, grid_w, rh, rw,
    LOG2_RW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Means of ``BLOCK_R`` regions over ``BLOCK_C`` channels; every value is read once and summed in float32.

    The sum is a matrix product with ones and zeros, which costs fewer instructions than adding up rows.
    """
    groups = tl.cdiv(regions, BLOCK_R)
    group, batch = tl.program_id(0) % groups, (tl.program_id(0) // groups).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.arange(0, BLOCK_R * BLOCK_T)
    region = group * BLOCK_R + rows // BLOCK_T
    corner = (region // grid_w) * rh * x_sh + (region % grid_w) * rw * x_sw
    x_ptr += batch * x_sb
    first = tl.arange(0, 16)  # regions of this program; matrix instructions have no fewer rows
    total = tl.zeros([16, BLOCK_C], tl.float32)
    own = (first[:, None] == (rows // BLOCK_T)[None, :]).to(x_ptr.dtype.element_ty)
    for t0 in range(0, rh * rw, BLOCK_T):
        t = t0 + rows % BLOCK_T
        if LOG2_RW >= 0:
            y, x = t >> LOG2_RW, t & ((1 << LOG2_RW) - 1)
        else:
            y, x = t // rw, t % rw
        mask = ((t < rh * rw) & (region < regions))[:, None] & (channel < C)[None, :]
        values = tl.load(x_ptr + (corner + y * x_sh + x * x_sw)[:, None] + channel[None, :], mask=mask, other=0.0)
        total = tl.dot(own, values, total, input_precision=PRECISION)
    region = group * BLOCK_R + first
    out = (batch * regions + region)[:, None] * C + channel[None, :]
    mask = ((first < BLOCK_R) & (region < regions))[:, None] & (channel < C)[None, :]
    tl.store(out_ptr + out, total / (rh * rw), mask=mask)


@triton.jit
def topk_kernel(
    q_ptr, k_ptr, scores_ptr, index_ptr, q_sb, q_sp, k_sb, k_sp, C, P, PK, K,
    BLOCK_P: tl.constexpr, BLOCK_PK: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The ``K`` best key regions of ``BLOCK_P`` query regions, best first, of equal scores the lower index first.

    ``scores`` is room for a float32 ``[B, P rounded up to BLOCK_P, BLOCK_PK]``.
    """
    batch = tl.program_id(1).to(tl.int64)
    rows, cols = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_PK)
    scores = tl.zeros([BLOCK_P, BLOCK_PK], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        there = (c < C)[None, :]
        q = tl.load(
            q_ptr + batch * q_sb + rows[:, None] * q_sp + c[None, :], mask=(rows < P)[:, None] & there, other=0.0
        )
        k = tl.load(
            k_ptr + batch * k_sb + cols[:, None] * k_sp + c[None, :], mask=(cols < PK)[:, None] & there, other=0.0
        )
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    # Through memory into rows that belong to one warp each: the many small reductions below then need no barrier. The
    # least a real score can be is the lowest number, for -inf marks those that are not there or were chosen.
    where = scores_ptr + (batch * tl.cdiv(P, BLOCK_P) * BLOCK_P + rows)[:, None] * BLOCK_PK + cols[None, :]
    scores = tl.where(scores == scores, tl.maximum(scores, -3.4e38), -3.4e38)
    tl.store(where, tl.where((cols < PK)[None, :], scores, float("-inf")))
    tl.debug_barrier()
    left = tl.load(where)
    for i in range(K):
        best = tl.max(left, 1)
        choice = tl.min(tl.where(left == best[:, None], cols[None, :], BLOCK_PK), 1)
        tl.store(index_ptr + (batch * P + rows) * K + i, choice, mask=rows < P)
        left = tl.where(cols[None, :] == choice[:, None], float("-inf"), left)


@triton.jit
def invert_kernel(
    index_ptr, list_ptr, count_ptr, P, K, groups, key_regions, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Query regions that list key region ``program_id(0)``, in ascending order, as ``region + 65536 * times``.

    The group after the last region collects the query regions with a missing entry.
    """
    group, table = tl.program_id(0), tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, BLOCK_K)
    index_ptr += table * P * K
    list_ptr += (table * groups + group) * P
    found = 0
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        inside = (p < P)[:, None] & (slot < K)[None, :]
        entry = tl.load(index_ptr + p[:, None] * K + slot[None, :], mask=inside, other=0)
        entry = tl.where((entry < 0) | (entry >= key_regions), key_regions, entry)
        times = tl.sum(((entry == group) & inside).to(tl.int32), 1)
        hit = (times > 0).to(tl.int32)
        place = found + tl.cumsum(hit, 0) - hit
        tl.store(list_ptr + place, p + times * 65536, mask=times > 0)
        found += tl.sum(hit, 0)
    tl.store(count_ptr + table * groups + group, found)
