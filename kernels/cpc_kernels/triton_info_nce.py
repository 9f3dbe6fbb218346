"""InfoNCE over all candidates in Triton: one pass forward, one pass backward, nothing of size N x M in memory.

Symbols: q (N, D) anchors, k (M, D) candidates, p(i) the positive of row i (an index into k, or a vector of its own),
r_ij = <q_i, k_j> the raw score, s_ij = scale * r_ij. Candidate j is a negative of i iff j != p(i) and the ids differ.

    gap_i  = log sum_{j negative} exp(s_ij) - s_i,p(i)          loss_i = softplus(gap_i)
    O_i    = sum_{j negative} P_ij k_j,  P_ij = exp(s_ij - lse_i)
    dq_i   = w_i (O_i - k_p(i)),         w_i = g_i sigmoid(gap_i) scale = -g_i expm1(-loss_i) scale
    dk_j   = sum_i w_i P_ij q_i - sum_{i: p(i) = j} w_i q_i
    dscale = sum_i (w_i / scale) (<q_i, O_i> - r_i,p(i))

`forward` is attention with V = K: lse and O in one pass (4 NMD), scores only (2 NMD) when no gradient is wanted.
`backward_candidates` has the same shape with the roles swapped (4 NMD). Neither uses atomics: deterministic.
Above `tiles.one_pass_max_d` features a [rows, D] accumulator no longer fits: chunks of rows go through matrix products
and one Triton kernel makes the exponentials in between (4 NMD, then 4; 6 in all where the losses are summed, as dk is
then made from the same P); scores alone take features in steps. Memory: O (N, D) fp32, of each piece where the
candidates are split (dk (M, D) alike); above that also one chunk x M of scores in fp32 and, of 16-bit inputs, once more
in 16 bits. Copied are inputs that tiles cannot read as they lie (`Launch.rows`), the candidates' ids, and for dk, where
positives are indices, the anchors, without what ignored rows hold. dk also takes two numbers for each anchor, and its
id.

How the accuracy is kept. The positive never enters the sum, and is never subtracted from one. The gap is formed from
raw scores, log2(sum) - fma(r_p, c, -m), and so does not see how large the scores are. The positive's score is the
diagonal of a tile product, so that it takes the same precision path as the negatives and ties stay ties in the rank.
The sign of the scale goes into the raw scores (exact), so that padding with -inf before the maximum is safe. The
maximum drops NaN but the sum keeps it: NaN reaches the loss.

This file is long because a primitive is one file here: three matrix kernels (positive, forward, candidates' gradient),
what the last reads of each anchor, the combine, and the two elementwise kernels of the chunked schedule, with their
launchers.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .launching import Launch, sixteens

LOG2_E = tl.constexpr(1.4426950408889634)

# fmt: off
# Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _softplus(b_x):
    """log(1 + exp(x)), accurate where it is tiny: log1p(t) = 2 artanh(t / (2 + t)), as a series (t <= 1)."""
    b_t = tl.exp(-tl.abs(b_x))
    b_z = b_t / (2.0 + b_t)
    b_z2 = b_z * b_z
    b_sum = tl.zeros_like(b_z)
    for k in tl.static_range(17):
        b_sum = b_sum * b_z2 + 1.0 / (33 - 2 * k)
    # where, not maximum: a maximum may drop NaN
    return tl.where(b_x < 0, 0.0, b_x) + 2.0 * b_z * b_sum


@triton.jit
def _load_tile(
    source, o_row, m_row, o_d, stride_row, stride_d, d, i_row, DESCRIPTORS: tl.constexpr, EVEN_D: tl.constexpr
):
    """Rows [B] by features [BD]; zero outside. `source` is a pointer, or a descriptor read from row `i_row`."""
    if DESCRIPTORS:
        return source.load([i_row, 0])
    else:
        p_tile = source + o_row[:, None] * stride_row + o_d[None, :] * stride_d
        if EVEN_D:
            return tl.load(p_tile, mask=m_row[:, None], other=0.0)
        else:
            return tl.load(p_tile, mask=m_row[:, None] & (o_d < d)[None, :], other=0.0)


@triton.jit
def _dot(b_a, b_b, b_acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b. The interpreter cannot multiply bf16: UPCAST."""
    if UPCAST:
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION, out_dtype=b_acc.dtype)


@triton.jit
def _scales(p_scale, ACC: tl.constexpr):
    """The scale, its sign, and |scale| log2(e); scale 0 becomes the smallest normal number: 0 * -inf would be NaN."""
    scale = tl.load(p_scale).to(ACC)
    sign = tl.where(scale < 0, -1.0, 1.0).to(ACC)
    return scale, sign, tl.where(scale == 0, 1.1754943508222875e-38, tl.abs(scale)) * tl.full([], LOG2_E, ACC)


@triton.jit
def _rescaled(b_max, b_new, scale2):
    """What scores are taken relative to, once the largest raw one is b_new, and by what older sums shrink."""
    # an infinite maximum is no reference: nothing seen yet (-inf), or a score of +inf
    b_ref = tl.where(tl.abs(b_new) == float("inf"), 0.0, b_new * scale2)
    # from -inf the share is 0, whatever the reference: exp2(0 - reference) may overflow, and 0 * inf is NaN
    b_old = tl.where(b_max == float("inf"), 0.0, b_max * scale2)
    return b_ref, tl.exp2(b_old - b_ref)


@triton.jit
def _logs(b_max, b_sum, b_raw_p, scale2):
    """The gap log sum exp(s) - s_p of a row, and its log sum exp(s); -inf where there is no negative."""
    m_empty = b_sum == 0
    b_ref = tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max * scale2)
    b_log2 = tl.log2(tl.where(m_empty, 1.0, b_sum))
    # log2(sum) - (r_p c - m): one rounding, however large the scores
    b_gap = (b_log2 - tl.fma(b_raw_p, tl.zeros_like(b_raw_p) + scale2, -b_ref)) / LOG2_E
    # not gap + positive: that would carry the positive's rounding into lse
    b_lse = (b_log2 + b_ref) / LOG2_E
    return tl.where(m_empty, float("-inf"), b_gap), tl.where(m_empty, float("-inf"), b_lse)


@triton.jit
def _finish(p_loss, p_lse, p_positive, b_gap, b_lse, b_positive, m_kept, o_n, m_n):
    """Loss, lse and positive score of a row; an ignored row has 0, -inf and 0."""
    tl.store(p_loss + o_n, tl.where(m_kept, _softplus(b_gap), 0.0), mask=m_n)
    tl.store(p_lse + o_n, tl.where(m_kept, b_lse, float("-inf")), mask=m_n)
    tl.store(p_positive + o_n, tl.where(m_kept, b_positive, 0.0), mask=m_n)


@triton.jit
def positive_kernel(
    p_anchors,  # (N, D)
    p_vectors,  # (M, D) candidates when INDEXED, else (N, D) positive vectors
    p_index,  # (N,) int64 when INDEXED
    p_raw,  # (N,) out: <q_i, k_p(i)>, 0 for ignored rows, NaN for an index past the candidates
    n, m, d,
    stride_an, stride_ad, stride_vn, stride_vd,
    INDEXED: tl.constexpr, EVEN_D: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < n
    if INDEXED:
        o_v = tl.load(p_index + o_n, mask=m_n, other=-1).to(tl.int64)
        m_v = (o_v >= 0) & (o_v < m)
    else:
        o_v = o_n
        m_v = m_n
    b_raw = tl.zeros([BN, BN], dtype=ACC)
    for i_d in range(0, d, BD):
        o_d = i_d + tl.arange(0, BD).to(tl.int64)
        b_q = _load_tile(p_anchors, o_n, m_v, o_d, stride_an, stride_ad, d, 0, False, EVEN_D)
        b_v = _load_tile(p_vectors, o_v, m_v, o_d, stride_vn, stride_vd, d, 0, False, EVEN_D)
        b_raw = _dot(b_q, tl.trans(b_v), b_raw, PRECISION, UPCAST)
    m_diagonal = tl.arange(0, BN)[:, None] == tl.arange(0, BN)[None, :]
    b_own = tl.sum(tl.where(m_diagonal, b_raw, 0.0), 1)
    if INDEXED:
        b_own = tl.where(o_v < m, b_own, float("nan"))
    tl.store(p_raw + o_n, b_own, mask=m_n)


@triton.jit
def forward_kernel(
    anchors,  # (N, D); contexts (N, C) when PROJECTED: then a row is one of (K, N), step after step
    candidates,  # (M, D)
    p_maps,  # (K D, C) when PROJECTED
    p_index,  # (N,) int64 when INDEXED
    p_raw,  # (N,) from positive_kernel, unless PROJECTED
    p_scale,  # (1,)
    p_anchor_ids,  # (N,) when HAS_IDS
    p_candidate_ids,  # (M,) when HAS_IDS, and zeros to the end of the tile after the last
    p_loss, p_positive,  # (N,) out, when one split
    p_lse,  # (SPLITS, N) out
    p_gap,  # (SPLITS, N) out, when several
    p_rank,  # (SPLITS, N) out, when RANK
    p_expectation,  # (SPLITS, N, D) out, when EXPECTATION
    n, m, d, split_size, c, row_tiles,
    stride_an, stride_ad, stride_cm, stride_cd,
    INDEXED: tl.constexpr, HAS_IDS: tl.constexpr, RANK: tl.constexpr, EXPECTATION: tl.constexpr,
    PROJECTED: tl.constexpr, BC: tl.constexpr,  # features of a context per step
    STREAMED: tl.constexpr,  # features come in chunks of BD; else all D <= BD features stay resident
    SPLIT: tl.constexpr, EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):
    i_n = tl.program_id(0)
    i_split = tl.program_id(1)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    if PROJECTED:
        i_k = (i_n // row_tiles).to(tl.int64)
        o_context = o_n - i_k * row_tiles * BN
        o_n = i_k * n + o_context
        m_n = o_context < n
    else:
        m_n = o_n < n
    o_d = tl.arange(0, BD).to(tl.int64)
    start = i_split * split_size
    stop = tl.minimum(start + split_size, m)

    scale, sign, scale2 = _scales(p_scale, ACC)
    m_kept = m_n
    if INDEXED:
        b_p = tl.load(p_index + o_n, mask=m_n, other=-1).to(tl.int32)
        m_kept = b_p >= 0
        # only tiles between these two can hold a positive of this row tile
        first_p = tl.min(tl.where(m_kept, b_p, 2147483647))
        last_p = tl.max(b_p)
    if HAS_IDS:
        b_aid = tl.load(p_anchor_ids + o_n, mask=m_n, other=0)
    if PROJECTED:
        b_made = tl.zeros([BN, BD], dtype=ACC)
        for i_c in range(0, c, BC):
            o_c = i_c + tl.arange(0, BC).to(tl.int64)
            b_x = _load_tile(anchors, o_context, m_n, o_c, stride_an, stride_ad, c, 0, False, True)
            b_w = _load_tile(p_maps, i_k * d + o_d, o_d < d, o_c, c, 1, c, 0, False, True)
            b_made = _dot(b_x, tl.trans(b_w), b_made, PRECISION, UPCAST)
        b_q = b_made.to(p_maps.dtype.element_ty)  # [BN, BD] rounded as in memory
        m_v = m_kept & (b_p < m)
        b_v = _load_tile(candidates, b_p.to(tl.int64), m_v, o_d, stride_cm, stride_cd, d, 0, False, EVEN_D)
        b_all = _dot(b_q, tl.trans(b_v), tl.zeros([BN, BN], dtype=ACC), PRECISION, UPCAST)
        m_diagonal = tl.arange(0, BN)[:, None] == tl.arange(0, BN)[None, :]
        b_raw_p = tl.where(b_p < m, tl.sum(tl.where(m_diagonal, b_all, 0.0), 1) * sign, float("nan"))
    elif not STREAMED:
        b_q = _load_tile(anchors, o_n, m_n, o_d, stride_an, stride_ad, d, i_n * BN, DESCRIPTORS, EVEN_D)
    if RANK:
        b_beaten = b_raw_p if PROJECTED else tl.load(p_raw + o_n, mask=m_n, other=0.0) * sign
        b_beaten = tl.where(scale == 0, float("inf"), b_beaten)  # raw scores differ there where scores do not

    b_max = tl.full([BN], float("-inf"), dtype=ACC)  # of raw scores
    b_sum = tl.zeros([BN], dtype=ACC)
    b_rank = tl.zeros([BN], dtype=tl.int32)
    if EXPECTATION:
        b_o = tl.zeros([BN, BD], dtype=ACC)

    if HAS_IDS:  # read one tile ahead: the products hide their way here
        b_cid = tl.load(p_candidate_ids + start + tl.arange(0, BM))
    for i_m in range(start, stop, BM):
        o_m = i_m + tl.arange(0, BM)
        if STREAMED:
            b_raw = tl.zeros([BN, BM], dtype=ACC)
            for i_d in range(0, d, BD):
                b_q = _load_tile(anchors, o_n, m_n, i_d + o_d, stride_an, stride_ad, d, 0, False, EVEN_D)
                o_k = o_m.to(tl.int64)
                b_k = _load_tile(candidates, o_k, o_m < stop, i_d + o_d, stride_cm, stride_cd, d, 0, False, EVEN_D)
                b_raw = _dot(b_q, tl.trans(b_k), b_raw, PRECISION, UPCAST)
        else:
            o_k = o_m.to(tl.int64)
            b_k = _load_tile(candidates, o_k, o_m < stop, o_d, stride_cm, stride_cd, d, i_m, DESCRIPTORS, EVEN_D)
            b_raw = _dot(b_q, tl.trans(b_k), tl.zeros([BN, BM], dtype=ACC), PRECISION, UPCAST)

        # [BN, BM] what is not a negative becomes -inf; raw scores rise with the score: times the sign of the scale
        masked = (sign < 0) | (i_m + BM > stop)
        if INDEXED:
            masked |= (i_m <= last_p) & (i_m + BM > first_p)
        if masked:
            m_negative = (o_m < stop)[None, :]
            if INDEXED:
                m_negative &= b_p[:, None] != o_m[None, :]
            b_raw = tl.where(m_negative, b_raw * sign, float("-inf"))
        if HAS_IDS:  # noqa: SIM102 - one is known to the compiler, the other is not
            if d > 0:  # always; the branch keeps Triton from computing the scores in both warpgroups
                b_raw = tl.where(b_aid[:, None] != b_cid[None, :], b_raw, float("-inf"))
                b_cid = tl.load(p_candidate_ids + o_m + BM)

        if RANK:
            b_rank += tl.sum((b_raw > b_beaten[:, None]).to(tl.float32), 1).to(tl.int32)  # integers take twice as long
        b_new = tl.maximum(b_max, tl.max(b_raw, 1))
        b_ref, b_alpha = _rescaled(b_max, b_new, scale2)
        b_prob = tl.exp2(b_raw * scale2 - b_ref[:, None])
        b_sum = b_sum * b_alpha + tl.sum(b_prob, 1)
        if EXPECTATION:
            b_o = _dot(b_prob.to(b_k.dtype), b_k, b_o * b_alpha[:, None], PRECISION, UPCAST)
        b_max = b_new

    # not held over the loop where it lies in memory: registers
    if not PROJECTED:
        b_raw_p = tl.load(p_raw + o_n, mask=m_n, other=0.0) * sign
    b_gap, b_lse = _logs(b_max, b_sum, b_raw_p, scale2)
    o_out = i_split.to(tl.int64) * n + o_n
    if SPLIT:
        tl.store(p_gap + o_out, b_gap, mask=m_n)
        tl.store(p_lse + o_out, b_lse, mask=m_n)
    else:
        _finish(p_loss, p_lse, p_positive, b_gap, b_lse, b_raw_p * sign * scale, m_kept, o_n, m_n)
    if RANK:
        tl.store(p_rank + o_out, tl.where(m_kept, b_rank, 0), mask=m_n)
    if EXPECTATION:
        m_empty = b_sum == 0
        b_o = b_o * (1.0 / tl.where(m_empty, 1.0, b_sum))[:, None]
        b_o = tl.where((m_empty | (m_kept == 0))[:, None], 0.0, b_o)
        p_o = p_expectation + o_out[:, None] * d + o_d[None, :]
        tl.store(p_o, b_o, mask=m_n[:, None] & (o_d < d)[None, :])


@triton.jit
def combine_kernel(
    p_gaps, p_lses,  # (SPLITS, N)
    p_ranks,  # (SPLITS, N) when RANK
    p_expectations,  # (SPLITS, N, D) when EXPECTATION
    p_index,  # (N,) when INDEXED
    p_raw,  # (N,)
    p_scale,  # (1,)
    p_loss, p_lse, p_positive, p_rank,  # (N,) out
    p_expectation,  # (N, D) out
    n, d, splits,
    INDEXED: tl.constexpr, RANK: tl.constexpr, EXPECTATION: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < n
    m_kept = m_n
    if INDEXED:
        m_kept = tl.load(p_index + o_n, mask=m_n, other=-1) >= 0
    size = tl.cast(n, tl.int64)  # n = 1 is a constant to the compiler

    b_top = tl.full([BN], float("-inf"), dtype=ACC)
    for i_s in range(0, splits):
        b_top = tl.maximum(b_top, tl.load(p_gaps + i_s * size + o_n, mask=m_n, other=float("-inf")))
    b_top = tl.where(tl.abs(b_top) == float("inf"), 0.0, b_top)
    b_sum = tl.zeros([BN], dtype=ACC)
    for i_s in range(0, splits):
        b_sum += tl.exp(tl.load(p_gaps + i_s * size + o_n, mask=m_n, other=float("-inf")) - b_top)
    m_empty = b_sum == 0
    b_sum = tl.where(m_empty, 1.0, b_sum)

    if tl.program_id(1) == 0:
        b_gap = tl.where(m_empty, float("-inf"), b_top + tl.log(b_sum))
        # the same sum once more, around lse
        b_ref = tl.full([BN], float("-inf"), dtype=ACC)
        for i_s in range(0, splits):
            b_ref = tl.maximum(b_ref, tl.load(p_lses + i_s * size + o_n, mask=m_n, other=float("-inf")))
        b_ref = tl.where(tl.abs(b_ref) == float("inf"), 0.0, b_ref)
        b_total = tl.zeros([BN], dtype=ACC)
        for i_s in range(0, splits):
            b_total += tl.exp(tl.load(p_lses + i_s * size + o_n, mask=m_n, other=float("-inf")) - b_ref)
        b_lse = tl.where(m_empty, float("-inf"), b_ref + tl.log(tl.where(m_empty, 1.0, b_total)))
        b_positive = tl.load(p_raw + o_n, mask=m_n, other=0.0) * tl.load(p_scale).to(ACC)
        _finish(p_loss, p_lse, p_positive, b_gap, b_lse, b_positive, m_kept, o_n, m_n)
        if RANK:
            b_rank = tl.zeros([BN], dtype=tl.int32)
            for i_s in range(0, splits):
                b_rank += tl.load(p_ranks + i_s * size + o_n, mask=m_n, other=0)
            tl.store(p_rank + o_n, b_rank, mask=m_n)
    if EXPECTATION:
        o_d = tl.program_id(1) * BD + tl.arange(0, BD)
        m_o = m_n[:, None] & (o_d < d)[None, :]
        o_o = o_n[:, None] * d + o_d[None, :]
        b_o = tl.zeros([BN, BD], dtype=ACC)
        for i_s in range(0, splits):
            b_gap = tl.load(p_gaps + i_s * size + o_n, mask=m_n, other=float("-inf"))
            b_share = tl.exp(b_gap - b_top) / b_sum
            b_o += b_share[:, None] * tl.load(p_expectations + i_s * size * d + o_o, mask=m_o, other=0.0)
        tl.store(p_expectation + o_o, b_o, mask=m_o)


@triton.jit
def weigh_kernel(
    p_index,  # (N,) int64 when INDEXED
    p_weights,  # (N,) w
    p_lse,  # (N,)
    p_ids,  # (N,) when HAS_IDS
    p_lse2,  # (T BN,) out: lse log2(e), rounded; inf where there is no negative, as P = exp2(r - inf) = 0
    p_negative,  # (T BN,) out: w times what that rounding took from P
    p_padded_ids,  # (T BN,) out, when HAS_IDS
    p_first, p_last,  # (T,) int32 out when INDEXED: the least and the most positive of BN anchors
    n,
    INDEXED: tl.constexpr, HAS_IDS: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr,
):
    """What the candidates' gradient reads of every anchor, made once, and so that it is read without masks."""
    i_n = tl.program_id(0)
    o_n = i_n.to(tl.int64) * BN + tl.arange(0, BN)
    m_n = o_n < n
    log2_e = tl.full([], LOG2_E, ACC)
    b_w = tl.load(p_weights + o_n, mask=m_n, other=0.0)
    b_lse = tl.load(p_lse + o_n, mask=m_n, other=float("-inf"))
    m_none = b_lse == float("-inf")
    b_finite = tl.where(m_none, 0.0, b_lse)
    b_lse2 = b_finite * log2_e
    b_lost = tl.fma(b_finite, tl.zeros_like(b_finite) + log2_e, -b_lse2)
    tl.store(p_lse2 + o_n, tl.where(m_none, float("inf"), b_lse2))
    tl.store(p_negative + o_n, b_w * tl.exp2(-b_lost))
    if HAS_IDS:
        tl.store(p_padded_ids + o_n, tl.load(p_ids + o_n, mask=m_n, other=0))
    if INDEXED:
        b_p = tl.load(p_index + o_n, mask=m_n, other=-1).to(tl.int32)
        tl.store(p_first + i_n, tl.min(tl.where(b_p >= 0, b_p, 2147483647)))
        tl.store(p_last + i_n, tl.max(b_p))


@triton.jit
def backward_candidates_kernel(
    anchors,  # (N, D), zero where ignored
    candidates,  # (M, D)
    p_index,  # (N,) int64 when INDEXED
    p_weights,  # (N,) w
    p_lse2, p_negative,  # (T BN,) from weigh_kernel, T > cdiv(N, BN)
    p_first, p_last,  # (T,) from weigh_kernel, when INDEXED
    p_norm,  # (1,) when NORMALISED: w arrives divided by it, so that fp16 holds w P
    p_scale,  # (1,)
    p_anchor_ids,  # (T BN,) when HAS_IDS
    p_candidate_ids,  # (M,) when HAS_IDS
    p_grad,  # (SPLITS, M, D) out
    n, m, d, split_size,
    stride_an, stride_ad, stride_cm, stride_cd,
    INDEXED: tl.constexpr, HAS_IDS: tl.constexpr, NORMALISED: tl.constexpr,
    EVEN_D: tl.constexpr, DESCRIPTORS: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):
    i_m = tl.program_id(0)
    i_split = tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < m
    o_d = tl.arange(0, BD).to(tl.int64)
    start = i_split * split_size
    stop = tl.minimum(start + split_size, n)
    scale2 = tl.load(p_scale).to(ACC) * tl.full([], LOG2_E, ACC)
    if HAS_IDS:
        b_cid = tl.load(p_candidate_ids + o_m, mask=m_m, other=0)

    b_k = _load_tile(candidates, o_m.to(tl.int64), m_m, o_d, stride_cm, stride_cd, d, i_m * BM, DESCRIPTORS, EVEN_D)
    b_grad = tl.zeros([BM, BD], dtype=ACC)
    # what belongs to a tile of anchors is read one tile ahead: the products hide its way here
    o_n = start + tl.arange(0, BN)
    b_lse2, b_w = tl.load(p_lse2 + o_n), tl.load(p_negative + o_n)
    if HAS_IDS:
        b_aid = tl.load(p_anchor_ids + o_n)
    if INDEXED:
        first, last = tl.load(p_first + start // BN), tl.load(p_last + start // BN)
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < stop
        b_q = _load_tile(anchors, o_n.to(tl.int64), m_n, o_d, stride_an, stride_ad, d, i_n, DESCRIPTORS, EVEN_D)
        b_raw = _dot(b_k, tl.trans(b_q), tl.zeros([BM, BN], dtype=ACC), PRECISION, UPCAST)
        # [BM, BN] w P for negatives, -w where the positive sits, 0 elsewhere
        if INDEXED:  # only tiles between these two can hold a positive that is one of ours
            own = (first < (i_m + 1) * BM) & (last >= i_m * BM)
        if d > 0:  # always; the branch keeps Triton from computing the scores in both warpgroups
            b_raw = tl.exp2(b_raw * scale2 - b_lse2[None, :])
            if HAS_IDS:
                b_raw = tl.where(b_cid[:, None] != b_aid[None, :], b_raw, 0.0)
            b_raw *= b_w[None, :]
            o_next = o_n + BN
            b_lse2, b_w = tl.load(p_lse2 + o_next), tl.load(p_negative + o_next)
            if HAS_IDS:
                b_aid = tl.load(p_anchor_ids + o_next)
            if INDEXED:
                first, last = tl.load(p_first + i_n // BN + 1), tl.load(p_last + i_n // BN + 1)
        if INDEXED:  # noqa: SIM102
            if own:
                b_p = tl.load(p_index + o_n, mask=m_n, other=-1).to(tl.int32)
                b_own = tl.load(p_weights + o_n, mask=m_n, other=0.0)
                b_raw = tl.where(o_m[:, None] != b_p[None, :], b_raw, -b_own[None, :])
        b_grad = _dot(b_raw.to(b_q.dtype), b_q, b_grad, PRECISION, UPCAST)

    if NORMALISED:
        b_grad *= tl.load(p_norm)
    p_tile = p_grad + (i_split.to(tl.int64) * m + o_m)[:, None] * d + o_d[None, :]
    tl.store(p_tile, b_grad.to(p_grad.dtype.element_ty), mask=m_m[:, None] & (o_d < d)[None, :])


@triton.jit
def _times(p_count, p_candidate_ids, aid, own, o_m, stop,
           COUNTED: tl.constexpr, EXCLUDED: tl.constexpr, HAS_IDS: tl.constexpr):
    """[BM] how often each candidate is a negative of a row."""
    b_times = tl.load(p_count + o_m, mask=o_m < stop, other=0) if COUNTED else (o_m < stop).to(tl.int32)
    if HAS_IDS:
        b_times = tl.where(tl.load(p_candidate_ids + o_m, mask=o_m < stop, other=0) != aid, b_times, 0)
    if EXCLUDED:
        b_times = tl.where(o_m == own, 0, b_times)
    return b_times


@triton.jit
def exponentials_kernel(
    p_scores,  # (R, M) raw scores of a chunk of rows
    p_counts,  # (R // WIDTH, M) int32 when COUNTED: how often each candidate is a negative; else once
    p_probabilities,  # (R, M) out, when EXPECTATION: P, times the count
    p_index,  # (R,) when INDEXED
    p_raw,  # (R,) when not INDEXED: the positive's raw score
    p_scale,  # (1,)
    p_anchor_ids,  # (R,) when HAS_IDS
    p_candidate_ids,  # (M,) when HAS_IDS
    p_loss, p_lse, p_positive, p_rank,  # (R,) out
    m, width,  # width: rows that share their counts
    INDEXED: tl.constexpr, HAS_IDS: tl.constexpr, COUNTED: tl.constexpr, EXCLUDED: tl.constexpr,  # EXCLUDED: positive
    RANK: tl.constexpr, EXPECTATION: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
):
    """One row per program: a pass for maximum and sum, a pass that writes P."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row, p_count = p_scores + i_r * m, p_counts + i_r // width * m
    scale, sign, scale2 = _scales(p_scale, ACC)
    kept, own, aid = True, -1, 0
    if INDEXED:
        own = tl.load(p_index + i_r)
        kept = own >= 0
        raw_p = tl.load(p_row + own, mask=kept & (own < m), other=0.0) * sign
        # past the end; m itself stands for a positive on another rank, which counted rows do not have
        raw_p = tl.where(own >= (m if COUNTED else m + 1), float("nan"), raw_p)
    else:
        raw_p = tl.load(p_raw + i_r) * sign
    if HAS_IDS:
        aid = tl.load(p_anchor_ids + i_r)
    stop = tl.where(kept, m, 0)

    top = tl.full([], float("-inf"), ACC)
    total = tl.zeros([], ACC)
    rank = tl.zeros([], tl.int32)
    for i_m in range(0, stop, BM):
        o_m = i_m + tl.arange(0, BM)
        b_times = _times(p_count, p_candidate_ids, aid, own, o_m, stop, COUNTED, EXCLUDED, HAS_IDS)
        b_raw = tl.load(p_row + o_m, mask=b_times > 0, other=0.0)
        b_raw = tl.where(b_times > 0, b_raw * sign, float("-inf"))
        if RANK:
            rank += tl.sum(tl.where(b_raw > raw_p, b_times, 0))
        new = tl.maximum(top, tl.max(b_raw))
        ref, alpha = _rescaled(top, new, scale2)
        total = total * alpha + tl.sum(b_times.to(ACC) * tl.exp2(b_raw * scale2 - ref))
        top = new
    gap, lse = _logs(top, total, raw_p, scale2)
    _finish(p_loss, p_lse, p_positive, gap, lse, raw_p * sign * scale, kept, i_r, True)
    if RANK:
        tl.store(p_rank + i_r, tl.where(scale == 0, 0, rank))
    if EXPECTATION:
        ref, _ = _rescaled(top, top, scale2)
        total = tl.where(total == 0, 1.0, total)
        for i_m in range(0, m, BM):
            o_m = i_m + tl.arange(0, BM)
            b_times = _times(p_count, p_candidate_ids, aid, own, o_m, stop, COUNTED, EXCLUDED, HAS_IDS)
            b_raw = tl.load(p_row + o_m, mask=b_times > 0, other=0.0) * sign
            b_prob = tl.where(b_times > 0, b_times.to(ACC) * tl.exp2(b_raw * scale2 - ref) / total, 0.0)
            tl.store(p_probabilities + i_r * m + o_m, b_prob.to(p_probabilities.dtype.element_ty), mask=o_m < m)


@triton.jit
def coefficients_kernel(
    p_scores,  # (C, N) raw scores of a chunk of candidates
    p_coefficients,  # (C, N) out: w P, or -w where the positive sits
    p_index,  # (N,) when INDEXED
    p_weights,  # (N,)
    p_lse,  # (N,)
    p_scale,  # (1,)
    p_anchor_ids,  # (N,) when HAS_IDS
    p_candidate_ids,  # (C,) when HAS_IDS
    n, first,  # the candidate of row 0
    INDEXED: tl.constexpr, HAS_IDS: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_n = o_n < n
    log2_e = tl.full([], 1.4426950408889634, ACC)
    scale2 = tl.load(p_scale).to(ACC) * log2_e
    b_w = tl.load(p_weights + o_n, mask=m_n, other=0.0)
    b_lse2 = tl.load(p_lse + o_n, mask=m_n, other=float("-inf")) * log2_e
    b_lse2 = tl.where(b_lse2 == float("-inf"), float("inf"), b_lse2)
    b_raw = tl.load(p_scores + i_c * n + o_n, mask=m_n, other=0.0)
    b_c = tl.exp2(b_raw * scale2 - b_lse2) * b_w
    if HAS_IDS:
        b_c = tl.where(tl.load(p_anchor_ids + o_n, mask=m_n, other=0) != tl.load(p_candidate_ids + i_c), b_c, 0.0)
    if INDEXED:
        b_c = tl.where(tl.load(p_index + o_n, mask=m_n, other=-1) != first + i_c, b_c, -b_w)
    tl.store(p_coefficients + i_c * n + o_n, b_c.to(p_coefficients.dtype.element_ty), mask=m_n)


# fmt: on
# Launchers --------------------------------------------------------------------------------------------------------


def forward(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    need_expectation: bool = True,
    *,
    need_rank: bool = True,
    elsewhere: bool = False,
    pulls: Tensor | None = None,
    input_precision: str | None = None,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, positive score, rank (N,) int64 and O (N, D), in float32 (float64 for float64).

    anchors (N, D), candidates (M, D): one dtype, any strides (copied where tiles cannot read them as they lie).
    positives: (N,) int64, -1 ignored, or (N, D) vectors.
    scale (1,). Rank and O are empty (0,) when not needed. elsewhere: an index of M stands for a positive that is not
    among these candidates; its score reads 0. pulls: in the chunked schedule, the candidates' gradient of the sum of
    losses is added here, (M, D) in the type of O. input_precision: "tf32", "tf32x3" or "ieee" for float32 tiles
    (default: `launching.default_precision`; chunks multiply as torch is told to). splits: pieces of the candidates
    (default: as the device needs).
    """
    n, d = anchors.shape
    m = len(candidates)
    indexed = not positives.is_floating_point()
    if d % 16:
        wide = None if pulls is None else sixteens(pulls)
        *found, expectation = forward(
            sixteens(anchors), sixteens(candidates), positives if indexed else sixteens(positives), scale, anchor_ids,
            candidate_ids, need_expectation, need_rank=need_rank, elsewhere=elsewhere, pulls=wide,
            input_precision=input_precision, splits=splits,
        )  # fmt: skip
        if wide is not None:
            pulls.copy_(wide[:, :d])
        return *found, expectation[:, :d].contiguous() if need_expectation else expectation
    launch = Launch("info_nce", anchors, input_precision)
    acc = launch.accumulator
    loss, lse, positive = (anchors.new_empty(n, dtype=acc) for _ in range(3))
    one_pass = d <= tiles.one_pass_max_d(launch.width)
    if one_pass and need_expectation and need_rank:  # a tile that holds O has no registers for a count
        where = (anchors, candidates, positives, scale, anchor_ids, candidate_ids)
        how = {"elsewhere": elsewhere, "input_precision": input_precision, "splits": splits}
        loss, lse, positive, _, expectation = forward(*where, True, need_rank=False, **how)
        return loss, lse, positive, forward(*where, False, **how)[3], expectation
    rank = anchors.new_empty(n if need_rank else 0, dtype=torch.int64)
    expectation = anchors.new_empty((n, d) if need_expectation else (0,), dtype=acc)
    if n == 0:
        return loss, lse, positive, rank, expectation
    if m == 0 and need_expectation:
        expectation.zero_()
        need_expectation = False
    rows = positives.contiguous() if indexed else anchors
    scale = scale.contiguous()
    has_ids = anchor_ids is not None
    ids = (anchor_ids.contiguous(), candidate_ids.contiguous()) if has_ids else (scale, scale)
    flags = {"INDEXED": indexed, "HAS_IDS": has_ids, "RANK": need_rank, "ACC": launch.acc}
    chunked = need_expectation and not one_pass

    raw = anchors.new_empty(n, dtype=acc)
    if not (chunked and indexed):
        vectors = candidates if indexed else positives
        own = rows.where(rows < m, -1) if indexed and elsewhere else rows
        tile = launch.tile("positive", d)
        launch(
            "positive", positive_kernel, (triton.cdiv(n, tile.rows),),
            anchors, vectors, own, raw, n, m, d, *anchors.stride(), *vectors.stride(),
            INDEXED=indexed, EVEN_D=d % tile.features == 0, **launch.dot(),
            BN=tile.rows, BD=tile.features, **tile.options(),
        )  # fmt: skip
    if chunked:
        if indexed and not elsewhere:
            rows = rows.where(rows != m, m + 1)  # m itself would stand for a positive elsewhere
        # [rows, M] of raw scores, then of P
        size = tiles.chunk(n, m)
        tile = launch.tile("exponentials", d)
        for i in range(0, n, size):
            part = slice(i, min(i + size, n))
            with launch.range("scores"):
                scores = launch.product(anchors[part], candidates.t())
            # as wide as the scores when they can be overwritten in place
            probabilities = scores if scores.dtype == anchors.dtype else torch.empty_like(scores, dtype=anchors.dtype)
            launch(
                "exponentials", exponentials_kernel, (len(scores),),
                scores, rank, probabilities, rows[part] if indexed else rows, raw[part], scale,
                ids[0][part] if has_ids else scale, ids[1], loss[part], lse[part], positive[part],
                rank[part] if need_rank else rank, m, 1, COUNTED=False, EXCLUDED=indexed, EXPECTATION=True,
                BM=min(tile.columns, triton.next_power_of_2(m)), **flags, **tile.options(),
            )  # fmt: skip
            with launch.range("expectation"):
                expectation[part] = launch.product(probabilities, candidates)
            if pulls is None:
                continue
            with launch.range("gradient"):
                pull = (anchors[part] * (-torch.expm1(-loss[part]) * scale)[:, None]).to(anchors.dtype)
                if indexed:
                    active = rows[part, None] >= 0  # what an ignored row holds reaches nobody
                    pull = pull.where(active, 0.0)
                    probabilities.scatter_(1, rows[part, None].clamp(0, m - 1), -1.0)
                pulls.add_(launch.product(probabilities.t(), pull))
        return loss, lse, positive, rank, expectation

    op = "forward" if need_expectation else "scores" if one_pass else "streamed"
    tile = launch.tile(op, d, ids=has_ids)
    descriptors = tile.descriptors and m > 0  # none describes an empty array
    features = tile.features or max(16, triton.next_power_of_2(d))
    anchors, candidates = (launch.rows(t, features, descriptors) for t in (anchors, candidates))
    row_tiles = triton.cdiv(n, tile.rows)
    split_size, splits = launch.split(row_tiles, m, tile.columns, splits)
    gap, lses, ranks, expectations = loss, lse, rank, expectation  # written by the kernel when there is one
    if splits > 1:
        gap, lses = (anchors.new_empty((splits, n), dtype=acc) for _ in range(2))
        ranks = anchors.new_empty((splits, n) if need_rank else (0,), dtype=torch.int32)
        expectations = anchors.new_empty((splits, n, d) if need_expectation else (0,), dtype=acc)
    launch(
        op, forward_kernel, (row_tiles, splits),
        launch.describe(anchors, tile.rows, features) if descriptors else anchors,
        launch.describe(candidates, tile.columns, features) if descriptors else candidates,
        scale, rows, raw, scale, ids[0], _ahead(ids[1], tile) if has_ids else scale,
        loss, positive, lses, gap, ranks, expectations,
        n, m, d, split_size, 0, 0, *anchors.stride(), *candidates.stride(),
        PROJECTED=False, BC=0, EXPECTATION=need_expectation, STREAMED=tile.features > 0, SPLIT=splits > 1, EVEN_D=True,
        DESCRIPTORS=descriptors, PRECISION=launch.precision, UPCAST=launch.upcast,
        BN=tile.rows, BM=tile.columns, BD=features, **flags, **tile.options(),
    )  # fmt: skip
    if splits > 1:
        tile = launch.tile("combine", d)
        columns = triton.cdiv(d, tile.columns) if need_expectation else 1
        launch(
            "combine", combine_kernel, (triton.cdiv(n, tile.rows), columns),
            gap, lses, ranks, expectations, rows, raw, scale, loss, lse, positive, rank, expectation, n, d, splits,
            INDEXED=indexed, RANK=need_rank, EXPECTATION=need_expectation, ACC=launch.acc,
            BN=tile.rows, BD=tile.columns, **tile.options(),
        )  # fmt: skip
    return loss, lse, positive, rank, expectation


def forward_projected(
    contexts: Tensor,
    maps: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    *,
    input_precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, positive score and rank (K, N) of the predictions W_k c_n, which are made inside the kernel.

    contexts (N, C), maps (K, D, C), positives (K, N) int64, anchor_ids (N,); the rest as `forward`. Up to
    `tiles.projected_max_d` features D.
    """
    (n, c), (steps, d, _), m = contexts.shape, maps.shape, len(candidates)
    launch = Launch("bilinear_info_nce", contexts, input_precision)
    has_ids = anchor_ids is not None
    tile = launch.tile("projected", d, ids=has_ids)
    loss, lse, positive = (contexts.new_empty(steps, n, dtype=launch.accumulator) for _ in range(3))
    rank = contexts.new_empty(steps, n, dtype=torch.int64)
    if loss.numel() == 0:
        return loss, lse, positive, rank
    features, scale = max(16, triton.next_power_of_2(d)), scale.contiguous()
    maps = maps.reshape(steps * d, c).contiguous()  # rows that lie as far apart as they are wide
    contexts, maps = (launch.rows(t, tile.features, False) for t in (contexts, maps))
    candidates = launch.rows(candidates, features, False)
    ids = (anchor_ids.repeat(steps), _ahead(candidate_ids, tile)) if has_ids else (scale, scale)
    row_tiles, split_size = triton.cdiv(n, tile.rows), launch.split(1, m, tile.columns, 1)[0]
    launch(
        "forward", forward_kernel, (row_tiles * steps, 1),
        contexts, candidates, maps, positives.contiguous(), scale, scale, *ids,
        loss, positive, lse, lse, rank, lse, n, m, d, split_size, contexts.shape[1], row_tiles,
        *contexts.stride(), *candidates.stride(),
        INDEXED=True, HAS_IDS=has_ids, RANK=True, EXPECTATION=False, PROJECTED=True, BC=tile.features, STREAMED=False,
        SPLIT=False, EVEN_D=True, DESCRIPTORS=False, **launch.dot(),
        BN=tile.rows, BM=tile.columns, BD=features, **tile.options(),
    )  # fmt: skip
    return loss, lse, positive, rank


def _ahead(ids: Tensor, tile: tiles.Tile) -> Tensor:
    """With room for whole tiles and one more: each reads one tile ahead, and without masks."""
    return torch.nn.functional.pad(ids, (0, tile.columns + -len(ids) % tile.columns))


def backward_candidates(
    weights: Tensor,
    lse: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    input_precision: str | None = None,
    splits: int | None = None,
) -> Tensor:
    """The candidates' gradient (M, D): dk_j = sum_i w_i P_ij q_i - sum_{i: p(i) = j} w_i q_i.

    weights (N,): w = g sigmoid(lse - s_p) scale = -g expm1(-loss) scale. out_dtype: default the candidates'; float32
    where 16-bit gradients of several blocks of anchors are to be added up. The rest as `forward`.
    """
    n, d = anchors.shape
    m = len(candidates)
    out_dtype = out_dtype or candidates.dtype
    if n == 0 or m == 0:
        return candidates.new_zeros((m, d), dtype=out_dtype)
    indexed = not positives.is_floating_point()
    if d % 16:
        grad = backward_candidates(
            weights, lse, sixteens(anchors), sixteens(candidates), positives, scale, anchor_ids, candidate_ids,
            out_dtype=out_dtype, input_precision=input_precision, splits=splits,
        )  # fmt: skip
        return grad[:, :d].contiguous()
    launch = Launch("info_nce", anchors, input_precision)
    rows = positives.contiguous() if indexed else anchors
    scale, lse, weights = scale.contiguous(), lse.contiguous(), weights.contiguous()
    has_ids = anchor_ids is not None
    ids = (anchor_ids.contiguous(), candidate_ids.contiguous()) if has_ids else (scale, scale)
    flags = {"INDEXED": indexed, "HAS_IDS": has_ids, "ACC": launch.acc}
    normalised = anchors.dtype == torch.float16
    norm = scale
    if normalised:  # the largest |w| becomes 2^14, so that w P does not fall below what fp16 holds
        norm = weights.abs().amax(0, keepdim=True) / 2**14
        norm = torch.where(norm == 0, 1.0, norm)
        weights = weights / norm

    if d > tiles.one_pass_max_d(launch.width):
        anchors = anchors.where((positives >= 0)[:, None], 0.0) if indexed else anchors
        grad = candidates.new_empty((m, d), dtype=out_dtype)
        size = tiles.chunk(m, n)
        tile = launch.tile("coefficients", d)
        columns = min(tile.columns, triton.next_power_of_2(n))
        for i in range(0, m, size):
            part = slice(i, min(i + size, m))
            with launch.range("scores"):
                scores = launch.product(candidates[part], anchors.t())  # [C, N]
            coefficients = scores if scores.dtype == anchors.dtype else torch.empty_like(scores, dtype=anchors.dtype)
            launch(
                "coefficients", coefficients_kernel, (len(scores), triton.cdiv(n, columns)),
                scores, coefficients, rows, weights, lse, scale, ids[0], ids[1][part] if has_ids else scale, n, i,
                BN=columns, **flags, **tile.options(),
            )  # fmt: skip
            with launch.range("gradient"):
                product = launch.product(coefficients, anchors)
                grad[part] = product * norm if normalised else product
        return grad

    tile = launch.tile("backward", d, ids=has_ids)
    descriptors, features = tile.descriptors, max(16, triton.next_power_of_2(d))
    candidate_tiles = triton.cdiv(m, tile.rows)
    split_size, splits = launch.split(candidate_tiles, n, tile.columns, splits)
    if indexed:  # whatever an ignored row holds reaches nobody: 0 * NaN is NaN
        anchors = anchors.where((positives >= 0)[:, None], 0.0)
    anchors, candidates = (launch.rows(t, features, descriptors) for t in (anchors, candidates))
    grad = candidates.new_empty((splits, m, d), dtype=launch.accumulator if splits > 1 else out_dtype)
    anchor_tiles = triton.cdiv(n, tile.columns) + 1  # the last of nothing: each reads one tile ahead
    lse2, negative = (lse.new_empty(anchor_tiles * tile.columns) for _ in range(2))
    padded_ids = ids[0].new_empty(anchor_tiles * tile.columns if has_ids else 1)
    first, last = (rows.new_empty(anchor_tiles if indexed else 0, dtype=torch.int32) for _ in range(2))
    launch(
        "weigh", weigh_kernel, (anchor_tiles,),
        rows, weights, lse, ids[0], lse2, negative, padded_ids, first, last, n,
        BN=tile.columns, **flags, **launch.tile("weigh", d).options(),
    )  # fmt: skip
    launch(
        "backward", backward_candidates_kernel, (candidate_tiles, splits),
        launch.describe(anchors, tile.columns, features) if descriptors else anchors,
        launch.describe(candidates, tile.rows, features) if descriptors else candidates,
        rows, weights, lse2, negative, first, last, norm, scale, padded_ids, ids[1], grad, n, m, d, split_size,
        *anchors.stride(), *candidates.stride(),
        NORMALISED=normalised, EVEN_D=True, DESCRIPTORS=descriptors,
        PRECISION=launch.precision, UPCAST=launch.upcast,
        BN=tile.columns, BM=tile.rows, BD=features, **flags, **tile.options(),
    )  # fmt: skip
    return grad[0] if splits == 1 else grad.sum(0).to(out_dtype)


# Ahead of time ----------------------------------------------------------------------------------------------------


def aot_entries(arch: str) -> Iterator[tiles.Entry]:
    """Every compiled form of the kernels above for one architecture, worst cases of each tile included."""
    pointers = {
        "p_index": "*i64", "p_raw": "*fp32", "p_scale": "*fp32", "p_anchor_ids": "*i64", "p_candidate_ids": "*i64",
        "p_loss": "*fp32", "p_lse": "*fp32", "p_positive": "*fp32", "p_gap": "*fp32", "p_rank": "*i64",
        "p_expectation": "*fp32", "p_weights": "*fp32", "p_norm": "*fp32", "p_lse2": "*fp32", "p_negative": "*fp32",
        "p_first": "*i32", "p_last": "*i32",
    }  # fmt: skip
    names = ("n", "m", "d", "split_size", "c", "row_tiles", "stride_an", "stride_cm", "stride_vn")
    sizes = dict.fromkeys(names, "i32")
    divisible = (*pointers, "anchors", "candidates", "p_anchors", "p_vectors", "p_grad", "p_gaps", "p_lses", "p_ranks",
                 "p_expectations", "p_maps", "d", "c", "split_size", "stride_an", "stride_cm", "stride_vn")  # fmt: skip

    def entry(name, kernel, tile, extra, matrix=True, **constexprs):
        given = pointers | sizes | extra
        signature = {a: given[a] for a in kernel.arg_names if a in given and a not in constexprs}
        ours = tuple(a for a in signature if a in divisible and not signature[a].startswith("tensordesc"))
        constexprs = {a: v for a, v in constexprs.items() if a in kernel.arg_names}
        return tiles.Entry(name, kernel, signature, constexprs, tile.options(), ours, matrix, tile)

    unit = {"stride_ad": 1, "stride_cd": 1, "stride_vd": 1}
    float32 = "tf32x3" if tiles.compiles(arch, "tf32x3") else "ieee"  # the default of that chip
    for width, element, precision in ((16, "bf16", "ieee"), (32, "fp32", float32)):
        common = unit | {"ACC": tl.float32, "PRECISION": precision, "UPCAST": False, "EVEN_D": True}
        label = element if width == 16 else precision
        matrix = label != "ieee"
        source = dict.fromkeys(("anchors", "candidates", "p_anchors", "p_vectors", "p_grad", "p_maps"), f"*{element}")
        for bucket in (b for b in tiles.BUCKETS if b <= tiles.one_pass_max_d(width)):
            # ids, a rank and a split ask for the most registers; the plain forward is what most training runs
            for op, variant in (("forward", ""), ("forward", "+ids"), ("scores", "+ids"), ("backward", "+ids")):
                tile = tiles.tile(op + variant, bucket, width, arch, precision)
                if variant == "" and width == 32:
                    continue
                ids = variant == "+ids"
                sizes_of = ("BM", "BN") if op == "backward" else ("BN", "BM")  # resident, streamed
                blocks = dict(zip(sizes_of, (tile.rows, tile.columns), strict=True))
                described = {"anchors": f"tensordesc<{element}[{blocks['BN']}, {bucket}]>",
                             "candidates": f"tensordesc<{element}[{blocks['BM']}, {bucket}]>"}  # fmt: skip
                yield entry(
                    f"{op}{variant} D={bucket} {label}{' tma' if tile.descriptors else ''}",
                    backward_candidates_kernel if op == "backward" else forward_kernel, tile,
                    source | (described if tile.descriptors else {}), matrix,
                    **common, HAS_IDS=ids, SPLIT=ids, RANK=op == "scores", EXPECTATION=op == "forward",
                    **blocks, BD=bucket, INDEXED=True, NORMALISED=False, STREAMED=False, DESCRIPTORS=tile.descriptors,
                    PROJECTED=False, BC=0,
                )  # fmt: skip
        for bucket in (b for b in tiles.BUCKETS if b <= tiles.projected_max_d(width)):
            tile = tiles.tile("projected+ids", bucket, width, arch, precision)
            yield entry(
                f"projected+ids D={bucket} {label}", forward_kernel, tile, source, matrix,
                **common, HAS_IDS=True, RANK=True, INDEXED=True, EXPECTATION=False, STREAMED=False, SPLIT=False,
                DESCRIPTORS=False, PROJECTED=True, BC=tile.features, BN=tile.rows, BM=tile.columns, BD=bucket,
            )  # fmt: skip
        tile = tiles.tile("streamed", 1024, width, arch, precision)
        yield entry(
            f"streamed D>{tiles.one_pass_max_d(width)} {label}", forward_kernel, tile, source, matrix,
            **common, HAS_IDS=True, RANK=True, INDEXED=True, EXPECTATION=False, STREAMED=True, SPLIT=True,
            DESCRIPTORS=False, PROJECTED=False, BC=0, BN=tile.rows, BM=tile.columns, BD=tile.features,
        )  # fmt: skip
        for tile in dict.fromkeys(tiles.tile("positive", d, width, arch, precision) for d in (64, 1024)):
            yield entry(
                f"positive {label}, {tile.features} at a time", positive_kernel, tile, source, matrix,
                **common, INDEXED=True, BN=tile.rows, BD=tile.features,
            )  # fmt: skip
    plain = {"ACC": tl.float32, "INDEXED": True, "HAS_IDS": True, "RANK": True, "EXPECTATION": True}
    yield entry(
        "weigh",
        weigh_kernel,
        tiles.tile("weigh", 64, 16, arch),
        {"p_ids": "*i64", "p_padded_ids": "*i64"},
        False,
        **plain,
        BN=64,
    )
    tile = tiles.tile("combine", 256, 32, arch)
    partial = {"p_gaps": "*fp32", "p_lses": "*fp32", "p_ranks": "*i32", "p_expectations": "*fp32", "splits": "i32"}
    yield entry("combine", combine_kernel, tile, partial, False, **plain, BN=tile.rows, BD=tile.columns)
    tile = tiles.tile("exponentials", 1024, 16, arch)
    chunk = {"p_scores": "*fp32", "p_counts": "*i32", "p_probabilities": "*bf16", "p_coefficients": "*bf16",
             "first": "i32", "width": "i32"}  # fmt: skip
    for name, flags in (("", {"COUNTED": False, "HAS_IDS": True}), (", counted", {"COUNTED": True, "HAS_IDS": False})):
        yield entry("exponentials" + name, exponentials_kernel, tile, chunk, False, **plain | flags, EXCLUDED=True,
                    BM=tile.columns)  # fmt: skip
    tile = tiles.tile("coefficients", 1024, 16, arch)
    yield entry("coefficients", coefficients_kernel, tile, chunk, False, **plain, BN=tile.columns)
