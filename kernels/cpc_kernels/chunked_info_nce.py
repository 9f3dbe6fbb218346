"""The chunked schedule of info_nce: one chunk of rows of scores at a time, in torch, or on a CPU in C++.

The formulas are those of info_nce.py. Products: 2 NMD flops for the loss, 2 more for O, 2 more for dk where it is
folded into forward; 4 NMD for dk alone. The C++ is kernels/csrc/info_nce.cpp.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import compute_dtype, own_vectors
from .capabilities import CPP
from .ranges import stage

CHUNK_SCORES = 3 * 2**20  # 12 MB of float32: fits beside its operands in an L3 cache; set by measurement
CHUNK_ROWS = (256, 1024)  # below, products are thin and dk is read and written too often; above, nothing is gained
DENSE = CPP.available  # the chunk in C++ (kernels/csrc/info_nce.cpp)


def in_cpp(anchors, candidates, positives, scale, anchor_ids, candidate_ids):
    """What the C++ takes, or None where torch runs: contiguous tensors of one type, bf16 where the C++ multiplies it,
    and the rows of a chunk."""
    if not DENSE or anchors.device.type != "cpu" or len(candidates) == 0:
        return None
    dtype = compute_dtype(anchors.dtype)
    if anchors.dtype == torch.bfloat16 and torch.ops.cpc_kernels_cpu.dense_has_bf16():
        dtype = torch.bfloat16
    q, k, p = (t.to(dtype) if t.is_floating_point() else t for t in (anchors, candidates, positives))
    ids = (None if t is None else t.long().contiguous() for t in (anchor_ids, candidate_ids))
    return (q.contiguous(), k.contiguous(), p.contiguous(), scale.item(), *ids), chunk_rows(len(candidates))


def chunk_rows(m: int) -> int:
    low, high = CHUNK_ROWS
    return min(max(CHUNK_SCORES // max(m, 1) // 64 * 64, low), high)


class Chunks:
    """Walks over the rows; holds the one buffer of scores, which every method edits in place.

    elsewhere: an index of M stands for a positive that is not among these candidates; its score reads 0.
    """

    def __init__(self, anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere=False):
        self.dtype = compute_dtype(anchors.dtype)
        self.anchors, self.candidates = anchors, candidates.to(self.dtype)
        self.indexed = not positives.is_floating_point()
        self.positives, self.scale = positives, scale
        self.anchor_ids, self.candidate_ids = anchor_ids, candidate_ids
        self.here = positives < len(candidates) if elsewhere and self.indexed else None
        # no row is masked where none is ignored; on a GPU, asking would wait
        self.ignoring = self.indexed and (positives.device.type != "cpu" or bool((positives < 0).any()))
        self.rows = chunk_rows(len(candidates))
        self.buffer = torch.empty(
            min(self.rows, len(anchors)), len(candidates), dtype=self.dtype, device=anchors.device
        )
        # Folded into the product on a CPU; on a GPU, reading it would wait. A NaN must not be: BLAS may take it for 1.
        self.alpha = None
        if scale.device.type == "cpu" and math.isfinite(number := scale.item()):
            self.alpha = number

    def __iter__(self):
        for start in range(0, len(self.anchors), self.rows):
            yield slice(start, min(start + self.rows, len(self.anchors)))

    def active(self, i):  # (R,)
        return self.positives[i] >= 0 if self.ignoring else None

    def place(self, i):  # (R,) among these candidates; anything where ignored or elsewhere
        if self.here is None and not self.ignoring:
            return self.positives[i]
        return self.positives[i].clamp(min=0, max=None if self.here is None else len(self.candidates) - 1)

    def q(self, i):  # (R, D), zero where ignored
        q = self.anchors[i].to(self.dtype)
        return q.where(self.active(i)[:, None], 0.0) if self.ignoring else q

    def own(self, i):  # (R, D) the positives' vectors
        return own_vectors(self.positives[i], self.candidates).to(self.dtype)

    def scores(self, i, q):
        """(R, M) scores with -inf where j is no negative of i, and (R,) the positive's score."""
        s = self.buffer[: len(q)]
        if self.alpha is None:
            torch.mm(q, self.candidates.T, out=s).mul_(self.scale)
        else:
            torch.addmm(s, q, self.candidates.T, beta=0, alpha=self.alpha, out=s)
        if self.indexed:
            index = self.place(i).long()[:, None]
            positive = s.gather(1, index)
            if self.here is None:
                s.scatter_(1, index, -torch.inf)
            else:
                s.scatter_(1, index, positive.masked_fill(self.here[i, None], -torch.inf))
                positive = positive.where(self.here[i, None], 0.0)
            positive = positive[:, 0].where(self.active(i), 0.0) if self.ignoring else positive[:, 0]
        else:
            positive = (q * self.own(i)).sum(1).mul_(self.scale)
        if self.anchor_ids is not None:
            s.masked_fill_(self.anchor_ids[i, None] == self.candidate_ids, -torch.inf)
        return s, positive


def sigmoid_weight(lse: Tensor, positive: Tensor, active: Tensor | None) -> Tensor:
    """d loss / d lse (R,): zero for a row that is ignored or has no negatives (lse = -inf)."""
    weight = torch.sigmoid(lse - positive).where(lse != -torch.inf, 0.0)
    return weight if active is None else weight.where(active, 0.0)


def chunked_forward(
    anchors, candidates, positives, scale, anchor_ids, candidate_ids, need_expectation, need_rank, fold=None,
    elsewhere=False,
):  # fmt: skip
    """loss, lse, positive, rank (N,) and O (N, D); with `fold` = (dq, dk, dv, dscale; empty where not needed), the
    gradients of the sum of losses go there, those of dk and dscale onto what there is, and O is not kept."""
    n, m, device = len(anchors), len(candidates), anchors.device
    dtype = compute_dtype(anchors.dtype)
    if n and (cpp := in_cpp(anchors, candidates, positives, scale, anchor_ids, candidate_ids)):
        given, rows = cpp
        same = fold is None or fold[0].dtype == given[0].dtype  # half precision is computed in another type
        into = fold if same else [t.to(given[0].dtype) for t in fold[:3]] + [fold[3]]
        result = torch.ops.cpc_kernels_cpu.dense_forward(*given, need_expectation, need_rank, into, rows)
        if not same:
            for t, made in zip(fold, into, strict=True):
                t.copy_(made)
        return result
    loss, positive = (torch.zeros(n, dtype=dtype, device=device) for _ in range(2))
    lse = torch.full((n,), -torch.inf, dtype=dtype, device=device)
    rank = torch.zeros(n if need_rank else 0, dtype=torch.int64, device=device)
    keep = need_expectation and fold is None
    expectation = torch.zeros(anchors.shape if keep else (0,), dtype=dtype, device=device)
    if n == 0 or m == 0:
        if m == 0 and positives.is_floating_point():
            positive.copy_(torch.linalg.vecdot(anchors.to(dtype), positives.to(dtype)) * scale)
        for gradient in fold or ():
            gradient.zero_()
        return loss, lse, positive, rank, expectation
    chunks = Chunks(anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere)
    for i in chunks:
        with stage("info_nce", "scores", device):
            q, active = chunks.q(i), chunks.active(i)
            s, own_score = chunks.scores(i, q)
        with stage("info_nce", "loss", device):
            if need_rank:
                rank[i] = (s > own_score[:, None]).sum(1)
            top = s.amax(1).nan_to_num_(torch.nan, 0.0, 0.0)  # infinity is no reference
            total = s.sub_(top[:, None]).exp_().sum(1)  # s is now P times total
            row_lse = top + total.log()
            total = total.where(total > 0, 1.0)
            if active is not None:
                row_lse = row_lse.where(active, -torch.inf)
                if need_rank:
                    rank[i] *= active
            positive[i], lse[i] = own_score, row_lse
            loss[i] = (-F.logsigmoid(own_score - row_lse)).where(row_lse != -torch.inf, 0.0)
        if not need_expectation:
            continue
        with stage("info_nce", "expectation", device):
            o = torch.mm(s, chunks.candidates).div_(total[:, None])
        if keep:
            expectation[i] = o
            continue
        with stage("info_nce", "gradients", device):
            dq, dk, dv, dscale = fold  # pyright: ignore[reportGeneralTypeIssues]
            weight = sigmoid_weight(row_lse, own_score, active)
            difference = o.sub_(chunks.own(i))
            if dscale.numel():
                dscale += (weight * torch.linalg.vecdot(q, difference)).sum()
            weight = weight * scale
            torch.mul(difference, weight[:, None], out=o)
            dq[i] = o if active is None else o.where(active[:, None], 0.0)
            if dk.numel():
                dk.addmm_(s.T, q * (weight / total)[:, None])
            copied = chunks.ignoring or anchors.dtype != dtype
            pull = q.mul_(-weight[:, None]) if copied else q * -weight[:, None]
            if dk.numel() and chunks.indexed:
                dk.index_add_(0, chunks.place(i), pull)
            elif dv.numel():
                dv[i] = pull
    return loss, lse, positive, rank, expectation


def chunked_backward_candidates(
    weight, lse, anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere=False
):
    """dk (M, D) from w (N,): the scores of each chunk computed again."""
    if len(anchors) and (cpp := in_cpp(anchors, candidates, positives, scale, anchor_ids, candidate_ids)):
        given, rows = cpp
        return torch.ops.cpc_kernels_cpu.dense_backward(weight.contiguous(), lse.contiguous(), *given, rows)
    dk = torch.zeros(candidates.shape, dtype=compute_dtype(anchors.dtype), device=anchors.device)
    if dk.numel() == 0 or len(anchors) == 0:
        return dk
    lse = lse.where(lse != -torch.inf, 0.0)
    chunks = Chunks(anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere)
    for i in chunks:
        with stage("info_nce", "scores", anchors.device):
            q = chunks.q(i)
            s, _ = chunks.scores(i, q)
        with stage("info_nce", "gradients", anchors.device):
            pull = q * weight[i, None]
            if chunks.ignoring:
                pull = pull.where(chunks.active(i)[:, None], 0.0)
            dk.addmm_(s.sub_(lse[i, None]).exp_().T, pull)
            if chunks.indexed:
                pull = pull.neg_() if chunks.here is None else pull.neg_().where(chunks.here[i, None], 0.0)
                dk.index_add_(0, chunks.place(i), pull)
    return dk
