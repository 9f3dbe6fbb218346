"""InfoNCE against listed or drawn negatives in Triton: gathered tile by tile, never stored.

    r_nkj  = <q_nk, z_j>, s = scale r        q: anchors (N, K, D), z: pool (M, D), j in the S negatives of (n, k)
    gap_nk = log sum_j exp(s_nkj) - s_nk,p          loss_nk = softplus(gap_nk),  P_nkj = exp(s_nkj - lse_nk)
    O_nk   = sum_j P_nkj z_j                        dq_nk = w_nk (O_nk - z_p),  w_nk = g_nk sigmoid(gap_nk) scale
    dz_j   = sum over (n, k, s) with negative j of w_nk P_nks q_nk  -  sum over (n, k) with positive j of w_nk q_nk

Three schedules, chosen by size (`sampled_tiles`), with one meaning:

    gathered   one program per (n, k): S D elements read, 4 S D flops on the ordinary units. Each slot of the tile keeps
               its own running maximum, sum and share of O, so that the loop needs no exchange between threads.
    steps      K steps that share their negatives: one program per n, (K x D) (D x S) on matrix units, each gathered row
               read once for all steps.
    dense      a pool so small that scoring all of it beats gathering: matrix products over chunks of rows, masked by
               how often each row lists each candidate (integer counts, exact whatever the order).

The pool's gradient has the same three, in which "gathered" and "steps" add atomically (fp32; the order of additions,
and so the last bits, change from run to run), and a fourth: "segments" sorts the entries by candidate, and one program
per candidate adds its own in their order. It is taken when `torch.are_deterministic_algorithms_enabled()` and the pool
is not small; it is the only one that holds an index tensor, N S (or N K S) int64, while backward runs.

Drawn negatives come from Philox4x32-10, counter (s // 4, n, k or 0, 0), key = seed, word s % 4 (negatives.py), in
forward and again in backward. The seed is read on the device. A drawn entry equal to the row's positive is skipped, as
is an entry -1 or one with the anchor's id; a *listed* copy of the positive ties with it. Skipped rows of the pool are
not read, so what they hold reaches nobody ("dense" reads them all: there a NaN in the pool reaches every gradient).

Memory: O (N, K, D) fp32; dz (M, D) fp32; dense: chunks of `tiles.CHUNK_ELEMENTS`. Accuracy as in triton_info_nce.py.

This file is long because a primitive is one file here: three schedules, each forward and backward, and the sorted sum.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import sampled_tiles, tiles
from .launching import Launch
from .triton_info_nce import _dot, _finish, _logs, _rescaled, _scales, exponentials_kernel

# fmt: off
# Kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _negatives(
    p_negatives,  # (N, K or 1, S) when not DRAWN
    p_seed,  # (1,) int64 when DRAWN
    p_pool_ids,  # (M,) when HAS_IDS
    aid, base, n, k, start, count, m, stride_nn, stride_nk, stride_ns,
    DRAWN: tl.constexpr, INDEXED: tl.constexpr, HAS_IDS: tl.constexpr, BS: tl.constexpr,
):
    """[BS] pool rows of the entries start.. of row n, step k (0 when shared), int64; -1 where there is none, it has the
    anchor's id, or lies past the pool. A draw may still be the positive."""
    o_s = start + tl.arange(0, BS)
    if DRAWN:
        b_zero = tl.zeros([BS // 4], dtype=tl.int32)
        b_block = start // 4 + tl.arange(0, BS // 4)
        w0, w1, w2, w3 = tl.philox(tl.load(p_seed), b_block, b_zero + n, b_zero + k, b_zero)
        b_u = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        # out of M - 1 others, counted from the row's positive; the launcher sets count to 0 where there are none
        choices = m - 1 if INDEXED else m
        b_j = (b_u % (tl.zeros([BS], dtype=tl.int32) + choices).to(tl.uint32, bitcast=True)).to(tl.int64)
        if INDEXED:
            b_j += base + 1
            b_j = tl.where(b_j >= m, b_j - m, b_j)
        b_j = tl.where(o_s < count, b_j, -1)
    else:
        p_entry = p_negatives + n.to(tl.int64) * stride_nn + (n * 0 + k).to(tl.int64) * stride_nk
        b_j = tl.load(p_entry + o_s.to(tl.int64) * stride_ns, mask=o_s < count, other=-1).to(tl.int64)
    b_j = tl.where(b_j < m, b_j, -1)  # nobody looked: that would wait for the device
    if HAS_IDS:
        b_j = tl.where(tl.load(p_pool_ids + b_j, mask=b_j >= 0, other=0) != aid, b_j, -1)
    return b_j


@triton.jit
def _tag(p_anchor_ids, n, HAS_IDS: tl.constexpr):
    """The anchor's id, when there is one."""
    if HAS_IDS:
        return tl.load(p_anchor_ids + n)
    else:
        return 0


@triton.jit
def _own(p_index, row, first, INDEXED: tl.constexpr, PER_STEP: tl.constexpr):
    """The positive of a row (-1: ignored, or a vector), and the one its draws are counted from: the first step's where
    the steps share them."""
    own = row * 0 - 1
    base = own
    if INDEXED:
        own = tl.load(p_index + row)
        base = tl.maximum(own if PER_STEP else tl.load(p_index + first), 0)
    return own, base


@triton.jit
def _features(o_d, d, EVEN_D: tl.constexpr):
    if EVEN_D:
        return tl.full(o_d.shape, 1, tl.int1)
    else:
        return o_d < d


@triton.jit
def gathered_forward_kernel(
    p_anchors,  # (N, K, D)
    p_pool,  # (M, D)
    p_index,  # (N, K) int64 when INDEXED
    p_vectors,  # (N, K, D) when not INDEXED
    p_negatives, p_seed,  # see _negatives
    p_scale,  # (1,)
    p_anchor_ids,  # (N,) when HAS_IDS
    p_pool_ids,  # (M,) when HAS_IDS
    p_loss, p_lse, p_positive, p_rank,  # (N, K) out
    p_expectation,  # (N, K, D) out, when EXPECTATION
    steps, m, d, count,
    stride_an, stride_ak, stride_ad, stride_zm, stride_zd, stride_vn, stride_vk, stride_vd,
    stride_nn, stride_nk, stride_ns,
    INDEXED: tl.constexpr, DRAWN: tl.constexpr, PER_STEP: tl.constexpr, HAS_IDS: tl.constexpr,
    EXPECTATION: tl.constexpr, EVEN_D: tl.constexpr, ACC: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr,
):
    i_row = tl.program_id(0)
    n = i_row // steps
    k = i_row % steps
    row = i_row.to(tl.int64)
    row_n = n.to(tl.int64)
    row_k = k.to(tl.int64)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = _features(o_d, d, EVEN_D)
    scale, sign, scale2 = _scales(p_scale, ACC)
    own, base = _own(p_index, row, row_n * steps, INDEXED, PER_STEP)
    kept = own >= 0 if INDEXED else own < 0
    if INDEXED:
        p_v = p_pool + own * stride_zm + o_d * stride_zd
    else:
        p_v = p_vectors + row_n * stride_vn + row_k * stride_vk + o_d * stride_vd
    aid = _tag(p_anchor_ids, n, HAS_IDS)
    # [BD]
    m_q = o_d < tl.where(kept & (own < m), d, 0)
    b_q = tl.load(p_anchors + row_n * stride_an + row_k * stride_ak + o_d * stride_ad, mask=m_q, other=0.0)
    b_q = b_q.to(ACC) * sign
    raw_p = tl.sum(b_q * tl.load(p_v, mask=m_q, other=0.0).to(ACC))
    raw_p = tl.where(own < m, raw_p, float("nan"))

    b_max = tl.full([BS], float("-inf"), dtype=ACC)  # of raw scores, one for each slot
    b_sum = tl.zeros([BS], dtype=ACC)
    b_rank = tl.zeros([BS], dtype=tl.int32)
    if EXPECTATION:
        b_o = tl.zeros([BS, BD], dtype=ACC)
    for i_s in range(0, tl.where(kept, count, 0), BS):
        b_j = _negatives(p_negatives, p_seed, p_pool_ids, aid, base, n, k if PER_STEP else 0, i_s, count, m,
                         stride_nn, stride_nk, stride_ns, DRAWN, INDEXED, HAS_IDS, BS)
        m_j = b_j >= 0
        if INDEXED and DRAWN:
            m_j &= b_j != own
        p_z = p_pool + b_j[:, None] * stride_zm + o_d[None, :] * stride_zd
        b_z = tl.load(p_z, mask=m_j[:, None] & m_d[None, :], other=0.0).to(ACC)  # [BS, BD]
        b_raw = tl.sum(b_z * b_q[None, :], 1)
        if INDEXED and not DRAWN:
            b_raw = tl.where(b_j == own, raw_p, b_raw)
        b_raw = tl.where(m_j, b_raw, float("-inf"))
        b_rank += (b_raw > raw_p).to(tl.int32)
        b_new = tl.maximum(b_max, b_raw)
        b_ref, b_alpha = _rescaled(b_max, b_new, scale2)
        b_prob = tl.exp2(b_raw * scale2 - b_ref)
        b_sum = b_sum * b_alpha + b_prob
        if EXPECTATION:
            b_o = b_o * b_alpha[:, None] + b_prob[:, None] * b_z
        b_max = b_new

    top = tl.max(b_max, 0)
    _, b_share = _rescaled(b_max, top, scale2)
    total = tl.sum(b_sum * b_share, 0)
    gap, lse = _logs(top, total, raw_p, scale2)
    _finish(p_loss, p_lse, p_positive, gap, lse, raw_p * sign * scale, kept, row, True)
    tl.store(p_rank + row, tl.where(scale == 0, 0, tl.sum(b_rank, 0)))
    if EXPECTATION:
        b_e = tl.sum(b_o * b_share[:, None], 0) / tl.where(total == 0, 1.0, total)
        b_e = tl.where(total == 0, 0.0, b_e)
        tl.store(p_expectation + row * d + o_d, b_e, mask=m_d)


@triton.jit
def gathered_backward_kernel(
    p_anchors, p_pool, p_index, p_negatives, p_seed, p_scale, p_anchor_ids, p_pool_ids,  # as in forward
    p_weights, p_lse,  # (N, K)
    p_grad,  # (M, D) zeros, added to
    steps, m, d, count,
    stride_an, stride_ak, stride_ad, stride_zm, stride_zd, stride_nn, stride_nk, stride_ns,
    INDEXED: tl.constexpr, DRAWN: tl.constexpr, PER_STEP: tl.constexpr, HAS_IDS: tl.constexpr,
    EVEN_D: tl.constexpr, ACC: tl.constexpr,
    BS: tl.constexpr, BD: tl.constexpr,
):
    i_row = tl.program_id(0)
    n = i_row // steps
    k = i_row % steps
    row = i_row.to(tl.int64)
    row_n = n.to(tl.int64)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = _features(o_d, d, EVEN_D)
    scale = tl.load(p_scale).to(ACC)
    w = tl.load(p_weights + row)
    lse = tl.load(p_lse + row)
    own, base = _own(p_index, row, row_n * steps, INDEXED, PER_STEP)
    kept = w != 0
    if INDEXED:
        kept &= own >= 0
    aid = _tag(p_anchor_ids, n, HAS_IDS)
    m_q = o_d < tl.where(kept & (own < m), d, 0)
    b_q = tl.load(p_anchors + row_n * stride_an + k.to(tl.int64) * stride_ak + o_d * stride_ad, mask=m_q, other=0.0)
    b_q = b_q.to(ACC)  # [BD]
    for i_s in range(0, tl.where(kept, count, 0), BS):
        b_j = _negatives(p_negatives, p_seed, p_pool_ids, aid, base, n, k if PER_STEP else 0, i_s, count, m,
                         stride_nn, stride_nk, stride_ns, DRAWN, INDEXED, HAS_IDS, BS)
        m_j = b_j >= 0
        if INDEXED and DRAWN:
            m_j &= b_j != own
        m_z = m_j[:, None] & m_d[None, :]
        b_z = tl.load(p_pool + b_j[:, None] * stride_zm + o_d[None, :] * stride_zd, mask=m_z, other=0.0).to(ACC)
        b_raw = tl.sum(b_z * b_q[None, :], 1)
        b_c = tl.exp(b_raw * scale - lse) * w
        tl.atomic_add(p_grad + b_j[:, None] * d + o_d[None, :], b_c[:, None] * b_q[None, :], mask=m_z, sem="relaxed")
    if INDEXED:
        tl.atomic_add(p_grad + own * d + o_d, -w * b_q, mask=m_q, sem="relaxed")


@triton.jit
def _load_rows(p_rows, o_row, m_row, o_d, m_d, stride_row, stride_d):
    """[B, BD], zero where not m_row."""
    return tl.load(p_rows + o_row.to(tl.int64)[:, None] * stride_row + o_d[None, :] * stride_d,
                   mask=m_row[:, None] & m_d[None, :], other=0.0)


@triton.jit
def steps_forward_kernel(
    p_anchors, p_pool, p_index, p_vectors, p_negatives, p_seed, p_scale, p_anchor_ids, p_pool_ids,
    p_loss, p_lse, p_positive, p_rank, p_expectation,  # all as in gathered_forward_kernel
    steps, m, d, count, blocks,
    stride_an, stride_ak, stride_ad, stride_zm, stride_zd, stride_vn, stride_vk, stride_vd, stride_nn, stride_ns,
    INDEXED: tl.constexpr, DRAWN: tl.constexpr, HAS_IDS: tl.constexpr, EXPECTATION: tl.constexpr,
    EVEN_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BK: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):
    n = tl.program_id(0) // blocks
    row_n = n.to(tl.int64)
    o_k = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    m_k = o_k < steps
    o_row = row_n * steps + o_k
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = _features(o_d, d, EVEN_D)
    scale, sign, scale2 = _scales(p_scale, ACC)
    m_kept = m_k
    base = row_n * 0
    if INDEXED:
        b_own = tl.load(p_index + o_row, mask=m_k, other=-1)
        m_kept = b_own >= 0
        base = tl.maximum(tl.load(p_index + row_n * steps), 0)
        b_v = _load_rows(p_pool, b_own, m_kept & (b_own < m), o_d, m_d, stride_zm, stride_zd)
    else:
        b_v = _load_rows(p_vectors + row_n * stride_vn, o_k, m_k, o_d, m_d, stride_vk, stride_vd)
    aid = _tag(p_anchor_ids, n, HAS_IDS)
    b_q = _load_rows(p_anchors + row_n * stride_an, o_k, m_kept, o_d, m_d, stride_ak, stride_ad)
    # the diagonal of a product: the positive takes the negatives' precision path
    b_all = _dot(b_q, tl.trans(b_v), tl.zeros([BK, BK], dtype=ACC), PRECISION, UPCAST)
    m_diagonal = tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :]
    b_raw_p = tl.sum(tl.where(m_diagonal, b_all, 0.0), 1) * sign
    if INDEXED:
        b_raw_p = tl.where(b_own < m, b_raw_p, float("nan"))

    b_max = tl.full([BK], float("-inf"), dtype=ACC)
    b_sum = tl.zeros([BK], dtype=ACC)
    b_rank = tl.zeros([BK], dtype=tl.int32)
    if EXPECTATION:
        b_o = tl.zeros([BK, BD], dtype=ACC)
    for i_s in range(0, count, BS):
        b_j = _negatives(p_negatives, p_seed, p_pool_ids, aid, base, n, 0, i_s, count, m,
                         stride_nn, 0, stride_ns, DRAWN, INDEXED, HAS_IDS, BS)
        m_j = b_j >= 0
        b_z = _load_rows(p_pool, b_j, m_j, o_d, m_d, stride_zm, stride_zd)  # [BS, BD]
        b_raw = _dot(b_q, tl.trans(b_z), tl.zeros([BK, BS], dtype=ACC), PRECISION, UPCAST) * sign
        m_negative = m_j[None, :] & m_k[:, None]
        if INDEXED:
            m_copy = b_j[None, :] == b_own[:, None]
            if DRAWN:
                m_negative &= m_copy == 0
            else:
                b_raw = tl.where(m_copy, b_raw_p[:, None], b_raw)
        b_raw = tl.where(m_negative, b_raw, float("-inf"))
        b_rank += tl.sum((b_raw > b_raw_p[:, None]).to(tl.int32), 1)
        b_new = tl.maximum(b_max, tl.max(b_raw, 1))
        b_ref, b_alpha = _rescaled(b_max, b_new, scale2)
        b_prob = tl.exp2(b_raw * scale2 - b_ref[:, None])
        b_sum = b_sum * b_alpha + tl.sum(b_prob, 1)
        if EXPECTATION:
            b_o = _dot(b_prob.to(b_z.dtype), b_z, b_o * b_alpha[:, None], PRECISION, UPCAST)
        b_max = b_new

    b_gap, b_lse = _logs(b_max, b_sum, b_raw_p, scale2)
    _finish(p_loss, p_lse, p_positive, b_gap, b_lse, b_raw_p * sign * scale, m_kept, o_row, m_k)
    m_ranked = m_kept & (tl.zeros([BK], ACC) + scale != 0)  # raw scores differ where scores do not
    tl.store(p_rank + o_row, tl.where(m_ranked, b_rank, 0), mask=m_k)
    if EXPECTATION:
        m_empty = (b_sum == 0) | (m_kept == 0)
        b_o = b_o * (1.0 / tl.where(m_empty, 1.0, b_sum))[:, None]
        b_o = tl.where(m_empty[:, None], 0.0, b_o)
        tl.store(p_expectation + o_row[:, None] * d + o_d[None, :], b_o, mask=m_k[:, None] & m_d[None, :])


@triton.jit
def steps_backward_kernel(
    p_anchors, p_pool, p_index, p_negatives, p_seed, p_scale, p_anchor_ids, p_pool_ids,
    p_weights,  # (N, K) w, divided by norm
    p_norm,  # (1,) so that fp16 holds w P
    p_lse,  # (N, K)
    p_grad,  # (M, D) zeros, added to
    steps, m, d, count, blocks,
    stride_an, stride_ak, stride_ad, stride_zm, stride_zd, stride_nn, stride_ns,
    INDEXED: tl.constexpr, DRAWN: tl.constexpr, HAS_IDS: tl.constexpr, NORMALISED: tl.constexpr,
    EVEN_D: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BK: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):
    n = tl.program_id(0) // blocks
    row_n = n.to(tl.int64)
    o_k = tl.program_id(0) % blocks * BK + tl.arange(0, BK)
    m_k = o_k < steps
    o_row = row_n * steps + o_k
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = _features(o_d, d, EVEN_D)
    scale = tl.load(p_scale).to(ACC)
    norm = tl.full([], 1.0, ACC)
    if NORMALISED:
        norm = tl.load(p_norm).to(ACC)
    b_w = tl.load(p_weights + o_row, mask=m_k, other=0.0)
    b_lse = tl.load(p_lse + o_row, mask=m_k, other=float("-inf"))
    # no negatives, ignored or beyond the end: P = exp(r - inf) = 0
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    m_kept = m_k
    base = row_n * 0
    if INDEXED:
        b_own = tl.load(p_index + o_row, mask=m_k, other=-1)
        b_own = tl.where(b_own < m, b_own, -1)
        m_kept = b_own >= 0
        base = tl.maximum(tl.load(p_index + row_n * steps), 0)
    aid = _tag(p_anchor_ids, n, HAS_IDS)
    b_q = _load_rows(p_anchors + row_n * stride_an, o_k, m_kept, o_d, m_d, stride_ak, stride_ad)  # [BK, BD]
    for i_s in range(0, count, BS):
        b_j = _negatives(p_negatives, p_seed, p_pool_ids, aid, base, n, 0, i_s, count, m,
                         stride_nn, 0, stride_ns, DRAWN, INDEXED, HAS_IDS, BS)
        m_j = b_j >= 0
        b_z = _load_rows(p_pool, b_j, m_j, o_d, m_d, stride_zm, stride_zd)
        b_raw = _dot(b_z, tl.trans(b_q), tl.zeros([BS, BK], dtype=ACC), PRECISION, UPCAST)
        b_c = tl.exp(b_raw * scale - b_lse[None, :]) * b_w[None, :]
        if INDEXED and DRAWN:
            b_c = tl.where(b_j[:, None] == b_own[None, :], 0.0, b_c)
        # [BS, BD] reduced over the steps before it is added to memory
        b_each = _dot(b_c.to(b_q.dtype), b_q, tl.zeros([BS, BD], dtype=ACC), PRECISION, UPCAST) * norm
        tl.atomic_add(p_grad + b_j[:, None] * d + o_d[None, :], b_each, mask=m_j[:, None] & m_d[None, :], sem="relaxed")
    if INDEXED:
        b_pull = b_q.to(ACC) * (-b_w * norm)[:, None]
        m_pull = m_kept[:, None] & m_d[None, :]
        tl.atomic_add(p_grad + b_own[:, None] * d + o_d[None, :], b_pull, mask=m_pull, sem="relaxed")


@triton.jit
def resolve_kernel(
    p_index,  # (N, K) when INDEXED
    p_negatives, p_seed, p_anchor_ids, p_pool_ids,
    p_entries,  # (N, KD, S) out, when not COUNTS: pool rows, -1 where skipped; KD: steps that draw for themselves
    p_counts,  # (N, KD, M) zeros, added to, when COUNTS: how often each candidate is an entry
    first, steps, own_steps, m, count, stride_nn, stride_nk, stride_ns,
    COUNTS: tl.constexpr, INDEXED: tl.constexpr, DRAWN: tl.constexpr, HAS_IDS: tl.constexpr, BS: tl.constexpr,
):
    """Rows first.. of the negatives, as the other kernels see them."""
    row = tl.program_id(0).to(tl.int64)
    n = first + tl.program_id(0) // own_steps
    k = tl.program_id(0) % own_steps
    aid = _tag(p_anchor_ids, n, HAS_IDS)
    base = row * 0
    if INDEXED:
        base = tl.maximum(tl.load(p_index + n.to(tl.int64) * steps + k), 0)
    for i_s in range(0, count, BS):
        b_j = _negatives(p_negatives, p_seed, p_pool_ids, aid, base, n, k, i_s, count, m,
                         stride_nn, stride_nk, stride_ns, DRAWN, INDEXED, HAS_IDS, BS)
        o_s = i_s + tl.arange(0, BS)
        if COUNTS:
            tl.atomic_add(p_counts + row * m + b_j, tl.full([BS], 1, tl.int32), mask=b_j >= 0, sem="relaxed")
        else:
            tl.store(p_entries + row * count + o_s, b_j, mask=o_s < count)


@triton.jit
def segments_kernel(
    p_anchors, p_pool, p_index, p_scale,
    p_order,  # (E,) entries, sorted by their candidate
    p_starts,  # (M + 1,) where each candidate's entries begin
    p_own_order,  # (N K,) rows, sorted by their positive, when INDEXED
    p_own_starts,  # (M + 1,)
    p_weights, p_lse,  # (N, K)
    p_grad,  # (M, D) out
    steps, d, count, width,  # width: rows that share an entry
    stride_an, stride_ak, stride_ad, stride_zm, stride_zd,
    INDEXED: tl.constexpr, DRAWN: tl.constexpr, EVEN_D: tl.constexpr, ACC: tl.constexpr,
    BE: tl.constexpr, BD: tl.constexpr,
):
    """One candidate: its rows' w P q, added in the order of the rows."""
    j = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_d = _features(o_d, d, EVEN_D)
    scale = tl.load(p_scale).to(ACC)
    b_z = tl.load(p_pool + j * stride_zm + o_d * stride_zd, mask=m_d, other=0.0).to(ACC)
    b_grad = tl.zeros([BE, BD], dtype=ACC)
    start = tl.load(p_starts + j) * width
    stop = tl.load(p_starts + j + 1) * width
    for i_e in range(start, stop, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < stop
        b_entry = tl.load(p_order + o_e // width, mask=m_e, other=0)
        o_row = b_entry // count * width + o_e % width
        b_w = tl.load(p_weights + o_row, mask=m_e, other=0.0)
        m_e &= b_w != 0
        if INDEXED:
            b_own = tl.load(p_index + o_row, mask=m_e, other=-1)
            m_e &= b_own >= 0
            if DRAWN:
                m_e &= b_own != j
        b_lse = tl.load(p_lse + o_row, mask=m_e, other=0.0)
        p_q = p_anchors + (o_row // steps * stride_an + o_row % steps * stride_ak)[:, None] + o_d[None, :] * stride_ad
        b_q = tl.load(p_q, mask=m_e[:, None] & m_d[None, :], other=0.0).to(ACC)  # [BE, BD]
        b_c = tl.exp(tl.sum(b_q * b_z[None, :], 1) * scale - b_lse) * b_w
        b_grad += tl.where(m_e, b_c, 0.0)[:, None] * b_q
    if INDEXED:
        stop = tl.load(p_own_starts + j + 1)
        for i_e in range(tl.load(p_own_starts + j), stop, BE):
            o_e = i_e + tl.arange(0, BE)
            o_row = tl.load(p_own_order + o_e, mask=o_e < stop, other=0)
            b_w = tl.load(p_weights + o_row, mask=o_e < stop, other=0.0)
            m_e = b_w != 0
            o_q = o_row // steps * stride_an + o_row % steps * stride_ak
            p_q = p_anchors + o_q[:, None] + o_d[None, :] * stride_ad
            b_grad -= b_w[:, None] * tl.load(p_q, mask=m_e[:, None] & m_d[None, :], other=0.0).to(ACC)
    tl.store(p_grad + j * d + o_d, tl.sum(b_grad, 0), mask=m_d)


@triton.jit
def dense_coefficients_kernel(
    p_scores,  # (R, M) raw scores of a chunk of rows
    p_counts,  # (R // WIDTH, M)
    p_coefficients,  # (R, M) out: count w P, less w where the positive sits
    p_index,  # (R,) when INDEXED
    p_weights, p_lse,  # (R,)
    p_scale,  # (1,)
    m, width,
    INDEXED: tl.constexpr, DRAWN: tl.constexpr, ACC: tl.constexpr, BM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_m = o_m < m
    scale = tl.load(p_scale).to(ACC)
    w = tl.load(p_weights + row)
    lse = tl.load(p_lse + row)
    own = row * 0 - 1
    if INDEXED:
        own = tl.load(p_index + row)
    p_count = p_counts + (tl.program_id(0) // width).to(tl.int64) * m
    b_count = tl.load(p_count + o_m, mask=o_m < tl.where(w != 0, m, 0), other=0)
    if INDEXED and DRAWN:
        b_count = tl.where(o_m == own, 0, b_count)
    b_raw = tl.load(p_scores + row * m + o_m, mask=b_count > 0, other=0.0)
    b_c = tl.where(b_count > 0, b_count.to(ACC) * tl.exp(b_raw * scale - lse) * w, 0.0)
    if INDEXED:
        b_c = tl.where(o_m == own, b_c - w, b_c)
    tl.store(p_coefficients + row * m + o_m, b_c.to(p_coefficients.dtype.element_ty), mask=m_m)


# fmt: on
# Launchers --------------------------------------------------------------------------------------------------------


class Problem:
    """What forward and backward share: sizes, flags, the negatives however given, and the schedule."""

    def __init__(
        self, anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids, input_precision
    ):
        self.launch = Launch("sampled_info_nce", anchors, input_precision)
        self.anchors, self.pool, self.positives = anchors, pool, positives
        self.n, self.steps, self.d = anchors.shape
        self.m = len(pool)
        self.indexed = not positives.is_floating_point()
        self.drawn = seed is not None
        self.scale = scale.contiguous()
        if self.drawn:
            self.per_step = per_step
            self.count = count if self.m - self.indexed > 0 else 0
            self.seed, self.negatives, self.negative_strides = seed, self.scale, (0, 0, 0)
        else:
            self.per_step = negatives.ndim == 3
            self.count = negatives.shape[-1] if self.m > 0 else 0
            strides = negatives.stride()
            self.negative_strides = strides if self.per_step else (strides[0], 0, strides[1])
            self.seed, self.negatives = self.scale, negatives
        self.index = positives.contiguous() if self.indexed else self.scale
        self.has_ids = anchor_ids is not None
        self.ids = (anchor_ids.contiguous(), pool_ids.contiguous()) if self.has_ids else (self.scale, self.scale)
        self.width = 1 if self.per_step else self.steps  # rows that share an entry
        self.flags = {"INDEXED": self.indexed, "DRAWN": self.drawn}

    def schedule(self, asked: str | None) -> str:
        most = sampled_tiles.steps_max_d(self.launch.width)
        if asked is not None:
            if asked == "steps" and self.per_step:
                raise ValueError('sampled_info_nce: schedule "steps" needs negatives that the steps share.')
            if asked == "steps" and self.d > most:
                raise ValueError(
                    f'sampled_info_nce: schedule "steps" holds up to {most} features of {self.launch.dtype} in '
                    f'registers. Got {self.d}; "gathered" takes any number.'
                )
            return asked
        fast = self.launch.width == 16 or self.launch.precision == "tf32"
        limit = sampled_tiles.DENSE if fast else sampled_tiles.DENSE_FP32
        if self.count and self.m * self.width <= limit * self.count:
            return "dense"
        shared = not self.per_step and self.steps >= sampled_tiles.STEPS
        return "steps" if shared and self.d <= most else "gathered"

    def resolve(self, part: slice, *, counts: bool) -> Tensor:
        """Rows `part` of the negatives: pool rows (R, KD, S), -1 where skipped; or counts (R, KD, M) int32."""
        own_steps = self.steps if self.per_step else 1
        shape = (part.stop - part.start, own_steps)
        if counts:
            out = torch.zeros((*shape, self.m), dtype=torch.int32, device=self.pool.device)
        else:
            out = self.pool.new_empty((*shape, self.count), dtype=torch.int64)
        tile = sampled_tiles.resolve(self.launch.arch)
        self.launch(
            "entries", resolve_kernel, (shape[0] * own_steps,),
            self.index, self.negatives, self.seed, *self.ids, out, out, part.start, self.steps, own_steps, self.m,
            self.count, *self.negative_strides, COUNTS=counts, HAS_IDS=self.has_ids, BS=tile.columns, **self.flags,
            **tile.options(),
        )  # fmt: skip
        return out

    def chunks(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """Of the dense schedule: rows n, rows (n, k), counts, anchors (R, D) and raw scores (R, M)."""
        size = tiles.chunk(self.n, self.m * self.steps)
        for start in range(0, self.n, size):
            part = slice(start, min(start + size, self.n))
            rows = slice(part.start * self.steps, part.stop * self.steps)
            counts = self.resolve(part, counts=True)
            q = self.anchors[part].reshape(-1, self.d)
            if self.indexed:
                q = q.where((self.index[part] >= 0).reshape(-1, 1), 0.0)
            with self.launch.range("scores"):
                scores = self.launch.product(q, self.pool.t())
            yield part, rows, counts, q, scores


def forward(
    anchors: Tensor,
    pool: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    seed: Tensor | None,
    count: int,
    per_step: bool,
    scale: Tensor,
    anchor_ids: Tensor | None = None,
    pool_ids: Tensor | None = None,
    need_expectation: bool = True,
    *,
    schedule: str | None = None,
    input_precision: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, positive score, rank (N, K) and O (N, K, D), in float32 (float64 for float64; rank int64).

    anchors (N, K, D), pool (M, D): one dtype, any strides. positives: (N, K) int64, -1 ignored, or (N, K, D) vectors.
    negatives: (N, S) or (N, K, S) int64; or None: `count` are drawn by seed (1,) int64, for each step when `per_step`.
    scale (1,). O is empty (0,) when not needed. schedule: "gathered", "steps" or "dense" (default: by size).
    """
    problem = Problem(
        anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids, input_precision
    )
    launch, n, steps, d, m = problem.launch, problem.n, problem.steps, problem.d, problem.m
    acc = launch.accumulator
    loss, lse, positive = (anchors.new_empty((n, steps), dtype=acc) for _ in range(3))
    rank = anchors.new_empty((n, steps), dtype=torch.int64)
    expectation = anchors.new_empty((n, steps, d) if need_expectation else (0,), dtype=acc)
    if n * steps == 0:
        return loss, lse, positive, rank, expectation
    schedule = problem.schedule(schedule)
    if schedule == "dense" and m > 0:
        index = problem.index.view(-1) if problem.indexed else problem.index
        outputs = [t.view(-1) for t in (loss, lse, positive, rank)]
        columns = min(launch.tile("exponentials", d).columns, triton.next_power_of_2(m))
        options = launch.tile("exponentials", d).options()
        for part, rows, counts, q, scores in problem.chunks():
            raw = scores
            if not problem.indexed:
                raw = torch.linalg.vecdot(q.to(acc), positives[part].reshape(-1, d).to(acc))
            probabilities = scores if scores.dtype == pool.dtype else torch.empty_like(scores, dtype=pool.dtype)
            launch(
                "exponentials", exponentials_kernel, (len(q),),
                scores, counts, probabilities, index[rows] if problem.indexed else index, raw, problem.scale,
                problem.scale, problem.scale, *(t[rows] for t in outputs), m, problem.width,
                INDEXED=problem.indexed, HAS_IDS=False, COUNTED=True, EXCLUDED=problem.indexed and problem.drawn,
                RANK=True, EXPECTATION=need_expectation, ACC=launch.acc, BM=columns, **options,
            )  # fmt: skip
            if need_expectation:
                with launch.range("expectation"):
                    expectation.view(-1, d)[rows] = launch.product(probabilities, pool)
        return loss, lse, positive, rank, expectation

    vectors = pool[:0, None] if problem.indexed else positives
    given = (
        anchors, pool, problem.index, vectors, problem.negatives, problem.seed, problem.scale, *problem.ids,
        loss, lse, positive, rank, expectation, steps, m, d, problem.count,
    )  # fmt: skip
    strides = (*anchors.stride(), *pool.stride(), *vectors.stride())
    flags = problem.flags | {"HAS_IDS": problem.has_ids, "EXPECTATION": need_expectation}
    if schedule == "steps":
        tile = sampled_tiles.steps("forward", d, launch.width, launch.arch)
        blocks = triton.cdiv(steps, tile.rows)
        launch(
            "forward", steps_forward_kernel, (n * blocks,), *given, blocks, *strides, *problem.negative_strides[::2],
            EVEN_D=d == tile.features, BK=tile.rows, BS=tile.columns, BD=tile.features, **flags, **launch.dot(),
            **tile.options(),
        )  # fmt: skip
    else:
        tile = sampled_tiles.gathered(d, problem.count, launch.arch)
        launch(
            "forward", gathered_forward_kernel, (n * steps,), *given, *strides, *problem.negative_strides,
            PER_STEP=problem.per_step, EVEN_D=d == tile.features, ACC=launch.acc, BS=tile.columns, BD=tile.features,
            **flags, **tile.options(),
        )  # fmt: skip
    return loss, lse, positive, rank, expectation


def backward_pool(
    weights: Tensor,
    lse: Tensor,
    anchors: Tensor,
    pool: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    seed: Tensor | None,
    count: int,
    per_step: bool,
    scale: Tensor,
    anchor_ids: Tensor | None = None,
    pool_ids: Tensor | None = None,
    *,
    schedule: str | None = None,
    input_precision: str | None = None,
) -> Tensor:
    """The pool's gradient dz (M, D), in float32 (float64 for float64).

    weights (N, K): w = g sigmoid(lse - s_p) scale. The rest as `forward`. schedule: "gathered" or "steps" (atomics),
    "segments" (deterministic) or "dense" (deterministic); default: by size and by
    `torch.are_deterministic_algorithms_enabled()`.
    """
    problem = Problem(
        anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids, input_precision
    )
    launch, n, steps, d, m = problem.launch, problem.n, problem.steps, problem.d, problem.m
    acc, count = launch.accumulator, problem.count
    if n * steps == 0 or m == 0:
        return torch.zeros((m, d), dtype=acc, device=pool.device)
    asked = schedule
    schedule = problem.schedule(None if asked == "segments" else asked)
    if asked == "segments" or (asked is None and schedule != "dense" and torch.are_deterministic_algorithms_enabled()):
        schedule = "segments"
    weights, lse = weights.contiguous(), lse.contiguous()
    norm = problem.scale
    normalised = anchors.dtype == torch.float16 and schedule in ("steps", "dense")
    if normalised:  # the largest |w| becomes 2^14, so that w P does not fall below what fp16 holds
        norm = weights.abs().amax().reshape(1) / 2**14
        norm = torch.where(norm == 0, 1.0, norm)
        weights = weights / norm

    if schedule == "dense":
        grad = torch.zeros((m, d), dtype=acc, device=pool.device)
        tile = launch.tile("coefficients", d)
        columns = min(tile.columns, triton.next_power_of_2(m))
        index, flat_weights, flat_lse = problem.index.view(-1), weights.view(-1), lse.view(-1)
        for _part, rows, counts, q, scores in problem.chunks():
            coefficients = scores if scores.dtype == anchors.dtype else torch.empty_like(scores, dtype=anchors.dtype)
            launch(
                "coefficients", dense_coefficients_kernel, (len(q), triton.cdiv(m, columns)),
                scores, counts, coefficients, index[rows] if problem.indexed else index, flat_weights[rows],
                flat_lse[rows], problem.scale, m, problem.width, ACC=launch.acc, BM=columns, **problem.flags,
                **tile.options(),
            )  # fmt: skip
            with launch.range("gradient"):
                grad += launch.product(coefficients.t(), q)
        return grad.mul_(norm) if normalised else grad

    if schedule == "segments":
        entries = problem.resolve(slice(0, n), counts=False).view(-1)
        with launch.range("sort"):
            candidates = torch.arange(m + 1, device=pool.device)
            values, order = entries.sort(stable=True)
            starts = torch.searchsorted(values, candidates)
            own_order, own_starts = order, starts
            if problem.indexed:
                values, own_order = problem.index.view(-1).sort(stable=True)
                own_starts = torch.searchsorted(values, candidates)
        grad = pool.new_empty((m, d), dtype=acc)
        tile = sampled_tiles.segments(d, launch.arch)
        launch(
            "backward", segments_kernel, (m,),
            anchors, pool, problem.index, problem.scale, order, starts, own_order, own_starts, weights, lse, grad,
            steps, d, count, problem.width, *anchors.stride(), *pool.stride(),
            EVEN_D=d == tile.features, ACC=launch.acc, BE=tile.columns, BD=tile.features, **problem.flags,
            **tile.options(),
        )  # fmt: skip
        return grad

    grad = torch.zeros((m, d), dtype=acc, device=pool.device)
    shared = (anchors, pool, problem.index, problem.negatives, problem.seed, problem.scale, *problem.ids)
    strides = (*anchors.stride(), *pool.stride())
    flags = problem.flags | {"HAS_IDS": problem.has_ids}
    if schedule == "steps":
        tile = sampled_tiles.steps("backward", d, launch.width, launch.arch)
        blocks = triton.cdiv(steps, tile.rows)
        launch(
            "backward", steps_backward_kernel, (n * blocks,), *shared, weights, norm, lse, grad,
            steps, m, d, count, blocks, *strides, *problem.negative_strides[::2],
            NORMALISED=normalised, EVEN_D=d == tile.features, BK=tile.rows, BS=tile.columns, BD=tile.features,
            **flags, **launch.dot(), **tile.options(),
        )  # fmt: skip
    else:
        tile = sampled_tiles.gathered(d, count, launch.arch)
        launch(
            "backward", gathered_backward_kernel, (n * steps,), *shared, weights, lse, grad,
            steps, m, d, count, *strides, *problem.negative_strides,
            PER_STEP=problem.per_step, EVEN_D=d == tile.features, ACC=launch.acc, BS=tile.columns, BD=tile.features,
            **flags, **tile.options(),
        )  # fmt: skip
    return grad


# Ahead of time ----------------------------------------------------------------------------------------------------


def aot_entries(arch: str) -> Iterator[tiles.Entry]:
    """Every compiled form of the kernels above for one architecture, worst cases of each tile included."""
    pointers = {
        "p_index": "*i64", "p_negatives": "*i64", "p_seed": "*i64", "p_scale": "*fp32", "p_anchor_ids": "*i64",
        "p_pool_ids": "*i64", "p_loss": "*fp32", "p_lse": "*fp32", "p_positive": "*fp32", "p_rank": "*i64",
        "p_expectation": "*fp32", "p_weights": "*fp32", "p_norm": "*fp32", "p_grad": "*fp32", "p_entries": "*i64",
        "p_counts": "*i32", "p_order": "*i64", "p_starts": "*i64", "p_own_order": "*i64", "p_own_starts": "*i64",
        "p_scores": "*fp32", "p_raw": "*fp32",
    }  # fmt: skip
    numbers = ("steps", "own_steps", "m", "d", "count", "blocks", "first", "width", "stride_an", "stride_ak",
               "stride_zm", "stride_vn", "stride_vk", "stride_nn", "stride_nk")  # fmt: skip
    sizes = dict.fromkeys(numbers, "i32")
    divisible = ("d", "stride_an", "stride_ak", "stride_zm", "stride_vn", "stride_vk")
    unit = {"stride_ad": 1, "stride_zd": 1, "stride_vd": 1, "stride_ns": 1, "INDEXED": True, "ACC": tl.float32}

    def entry(name, kernel, tile, element, matrix=False, **constexprs):
        inputs = ("p_anchors", "p_pool", "p_vectors", "p_probabilities", "p_coefficients")
        given = pointers | sizes | dict.fromkeys(inputs, f"*{element}")
        constexprs = unit | constexprs
        signature = {a: given[a] for a in kernel.arg_names if a in given}
        even = constexprs.get("EVEN_D", True)
        ours = tuple(a for a in signature if signature[a].startswith("*") or (a in divisible and (even or a != "d")))
        constexprs = {a: v for a, v in constexprs.items() if a in kernel.arg_names}
        return tiles.Entry(name, kernel, signature, constexprs, tile.options(), ours, matrix, tile)

    listed = {"DRAWN": False, "HAS_IDS": False, "PER_STEP": True}
    drawn = {"DRAWN": True, "HAS_IDS": True, "PER_STEP": False}
    float32 = "tf32x3" if tiles.compiles(arch, "tf32x3") else "ieee"  # the default of that chip
    for element, width, precision in (("bf16", 16, "ieee"), ("fp32", 32, float32)):
        label = precision if width == 32 else element
        products = {"PRECISION": precision, "UPCAST": False, "EXPECTATION": True, "NORMALISED": False}
        for d in (b for b in tiles.BUCKETS if b <= sampled_tiles.steps_max_d(width)):
            for op, kernel in (("forward", steps_forward_kernel), ("backward", steps_backward_kernel)):
                tile = sampled_tiles.steps(op, d, width, arch)
                # drawing with ids takes the most registers; and at the largest D, a mask over features
                for variant, flags in (("listed", listed), ("drawn", drawn)) if d == 64 else (("drawn", drawn),):
                    yield entry(
                        f"steps_{op} D={d} K={tile.rows} {label} {variant}", kernel, tile, element, label != "ieee",
                        **products, **flags, EVEN_D=d < sampled_tiles.STEPS_MAX_D,
                        BK=tile.rows, BS=tile.columns, BD=tile.features,
                    )  # fmt: skip
    # float32 or not, these compute in float32; every D holds as many elements, but for the warps of the largest
    for d in (64, 256, 2048):
        tile = sampled_tiles.gathered(d, 128, arch)
        sizes_of = {"EVEN_D": True, "BD": tile.features}
        for op, kernel in (("forward", gathered_forward_kernel), ("backward", gathered_backward_kernel)):
            yield entry(f"gathered_{op} D={d} fp32 drawn", kernel, tile, "fp32", EXPECTATION=True, **drawn, **sizes_of,
                        BS=tile.columns)  # fmt: skip
        tile = sampled_tiles.segments(d, arch)
        yield entry(f"segments D={d} fp32", segments_kernel, tile, "fp32", DRAWN=True, **sizes_of, BE=tile.columns)
    tile = sampled_tiles.resolve(arch)
    for counts in (False, True):
        name = "counts" if counts else "entries"
        yield entry(name, resolve_kernel, tile, "bf16", **drawn, COUNTS=counts, BS=tile.columns)
    tile = tiles.tile("coefficients", 64, 16, arch)
    yield entry("dense_coefficients", dense_coefficients_kernel, tile, "bf16", DRAWN=True, BM=tile.columns)
