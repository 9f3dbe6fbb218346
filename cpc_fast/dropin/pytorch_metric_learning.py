"""pytorch-metric-learning 2: `SupConLoss` and `NTXentLoss`, with labels and optional reference embeddings.

    q: embeddings (N, D), k: reference embeddings (M, D) or the embeddings again, s_ij = similarity / temperature
    P_i = {j: same label, j is not i itself}        N_i = {j: another label}

    SupCon  loss_i  = mean over p in P_i of -log( exp(s_ip) / sum over j in P_i and N_i of exp(s_ij) )     per row
    NTXent  loss_ip = -log( exp(s_ip) / (exp(s_ip) + sum over j in N_i of exp(s_ij)) )        per positive pair

Neither needs the N x M scores:

    SupCon  loss_i  = info_nce(i, any one positive p; all others are negatives) + scale <q_i, k_p - mean of P_i>
            as log-sum-exp over everybody = info_nce + s_ip, and the mean of scores is the score of the mean.
    NTXent  loss_ip = softplus(lse_i - s_ip), lse_i over N_i. One positive per row: info_nce itself, ids = labels.
            More: lse_i from info_nce, then the pairs, a block of rows of equal labels at a time (`PairSum`).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cpc_kernels import info_nce, info_nce_stats
from cpc_kernels.arguments import compute_dtype, spell

from .arguments import check_tensors, inverse, one_number

PAIR_ROWS = 256


class Groups:
    """Who is whose positive, in O(N + M): ids (N,), ref_ids (M,) and the places of each row's positives in `order`."""

    def __init__(self, labels: Tensor, ref_labels: Tensor, itself: bool) -> None:
        distinct, ids = torch.unique(torch.cat([labels, ref_labels]), return_inverse=True)
        self.ids, self.ref_ids = ids.split([len(labels), len(ref_labels)])
        self.itself = itself  # row i is candidate i, and no positive of its own
        self.classes = len(distinct)
        self.order = torch.argsort(self.ref_ids, stable=True)  # candidates by label
        ordered = self.ref_ids[self.order]
        self.start = torch.searchsorted(ordered, self.ids)  # (N,) same label: order[start:end]
        self.end = torch.searchsorted(ordered, self.ids, right=True)
        self.positives = (self.end - self.start - int(itself)).clamp(min=0)  # (N,); NaN: nobody's, nor its own
        self.negatives = len(ref_labels) - (self.end - self.start)

    def one_positive(self) -> Tensor:
        """(N,) the index of one positive of each row, -1 where there is none. The rows of a label take turns: if all
        took the same one, its gradient would be a small difference of large sums, in 16 bits mostly error."""
        rows = torch.argsort(self.ids, stable=True)  # by label
        turn = torch.empty_like(rows)
        turn[rows] = torch.arange(len(rows), device=rows.device)
        turn -= torch.searchsorted(self.ids[rows], self.ids)  # among its label's rows, from 0
        # where rows are candidates, row i is the turn-th of its label there too: it takes the next, round the circle
        place = self.start + (turn + int(self.itself)) % (self.end - self.start).clamp(min=1)
        return self.order[place.clamp(max=len(self.order) - 1)].where(self.positives > 0, -1)

    def any_loss(self) -> Tensor:
        """False where pytorch-metric-learning returns 0: no positive pair, no negative pair, or one of each."""
        pairs, others = self.positives.sum(), self.negatives.sum()
        return (pairs > 0) & (others > 0) & ((pairs > 1) | (others > 1))


class PairSum(torch.autograd.Function):
    """sum over all positive pairs of softplus(lse_i - s_ip), with its gradients, a block of rows at a time."""

    @staticmethod
    def forward(ctx, q, k, lse, scale, groups):  # (N, D), (M, D), (N,), (1,)
        q, k, lse, scale = (t.detach().to(lse.dtype) for t in (q, k, lse, scale))
        dq, dk, dlse, dscale = (torch.zeros_like(t) for t in (q, k, lse, scale))
        rows = torch.argsort(groups.ids, stable=True)  # rows by label: each block's positives are neighbours in order
        bounds = range(0, len(rows), PAIR_ROWS)
        lasts = [min(start + PAIR_ROWS, len(rows)) - 1 for start in bounds]
        low, high = groups.start[rows[list(bounds)]].tolist(), groups.end[rows[lasts]].tolist()
        total = lse.new_zeros(())
        with torch.autocast(q.device.type, enabled=False):  # the products stay in the dtype that they are added in
            for start, first, last in zip(bounds, low, high, strict=True):
                i, j = rows[start : start + PAIR_ROWS], groups.order[first:last]
                pair = groups.ids[i, None] == groups.ref_ids[j]  # (R, J)
                if groups.itself:
                    pair &= i[:, None] != j
                raw = q[i] @ k[j].T
                x = (lse[i, None] - raw * scale).masked_fill_(~pair, -torch.inf)
                total += F.softplus(x).sum()
                pull = torch.sigmoid(x)
                dlse[i] = pull.sum(1)
                dscale -= (pull * raw).sum()
                pull *= scale
                dq[i] = -(pull @ k[j])
                dk.index_add_(0, j, pull.T @ q[i], alpha=-1)
        ctx.save_for_backward(dq, dk, dlse, dscale)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(grad * each for each in ctx.saved_tensors), None


class LabelLoss(nn.Module):
    """What both losses take. temperature: a number or a one-element tensor, which may learn. distance: None (cosine),
    or pytorch-metric-learning's CosineSimilarity() or DotProductSimilarity(). Miners' indices_tuple is refused."""

    def __init__(self, temperature: float | Tensor, distance: Any = None, reducer: Any = None) -> None:
        super().__init__()
        name = type(self).__name__
        if distance is not None:
            settings = [getattr(distance, each, None) for each in ("is_inverted", "power", "p")]
            if type(distance).__name__ not in ("CosineSimilarity", "DotProductSimilarity") or settings != [True, 1, 2]:
                raise ValueError(
                    f"{name}: distance must be CosineSimilarity() or DotProductSimilarity(); others need the whole "
                    f"matrix of distances. Got {distance}."
                )
        self.temperature = one_number(name, "temperature", temperature)
        self.normalize_embeddings = bool(getattr(distance, "normalize_embeddings", True))
        self.distance = distance
        self.reducer = reducer

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """embeddings: (N, D), labels: (N,). ref_emb: (M, D), ref_labels: (M,): the candidates, when they are not the
        embeddings themselves; the very same labels object for both means that row i is candidate i."""
        name = type(self).__name__
        if indices_tuple is not None:
            raise ValueError(
                f"{name}: indices_tuple is not supported: positives and negatives come from the labels. "
                "Keep pytorch_metric_learning's loss for pairs that a miner picks."
            )
        if labels is None:
            raise ValueError(f"{name}: labels are needed. Call it as loss(embeddings, labels).")
        for what, tags in (("labels", labels), ("ref_labels", ref_labels)):
            if tags is not None and not isinstance(tags, Tensor):
                raise TypeError(f"{name}: {what} must be a torch.Tensor. Got {type(tags).__name__}.")
        check_tensors(name, embeddings=embeddings, **({} if ref_emb is None else {"ref_emb": ref_emb}))
        labels = labels.to(embeddings.device)
        if (ref_emb is None) != (ref_labels is None):
            raise ValueError(f"{name}: ref_emb and ref_labels are given together, or neither is.")
        if ref_emb is None or ref_labels is None:
            ref_emb, ref_labels = embeddings, labels
        itself = ref_labels is labels
        ref_labels = ref_labels.to(embeddings.device)
        got = {"embeddings": embeddings, "labels": labels, "ref_emb": ref_emb, "ref_labels": ref_labels}
        for vectors, tags in ((embeddings, labels), (ref_emb, ref_labels)):
            if vectors.ndim != 2 or tags.ndim != 1 or len(vectors) != len(tags):
                raise ValueError(f"{name}: embeddings must be (N, D) and labels (N,). {spell(**got)}")
        if ref_emb.shape[1] != embeddings.shape[1]:
            raise ValueError(f"{name}: ref_emb must have as many features as embeddings. {spell(**got)}")
        if len(embeddings) == 0 or len(ref_emb) == 0:
            return embeddings.sum(dtype=compute_dtype(embeddings.dtype)) * 0
        q = F.normalize(embeddings, dim=1) if self.normalize_embeddings else embeddings
        k = q if ref_emb is embeddings else F.normalize(ref_emb, dim=1) if self.normalize_embeddings else ref_emb
        dtype = compute_dtype(q.dtype)
        scale = torch.as_tensor(inverse(name, self.temperature), dtype=dtype, device=q.device).reshape(1)
        return self.compute(embeddings, labels, q, k, scale, Groups(labels, ref_labels, itself))

    def compute(
        self, embeddings: Tensor, labels: Tensor, q: Tensor, k: Tensor, scale: Tensor, groups: Groups
    ) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class SupConLoss(LabelLoss):
    """The supervised contrastive loss, as pytorch-metric-learning computes it (all positives in the denominator).

    temperature, distance: as `LabelLoss`. reducer: None, the mean over rows whose loss is not 0, as
    AvgNonZeroReducer; or any reducer of pytorch-metric-learning, which gets the N losses.
    Call it with embeddings (N, D), labels (N,), and ref_emb=(M, D), ref_labels=(M,) if there are any. Returns a scalar,
    float32 for 16-bit inputs. Raises ValueError for arguments that do not fit.
    Source: Khosla et al. 2020 (arXiv 2004.11362).

    >>> SupConLoss()(torch.randn(8, 16), torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])).shape
    torch.Size([])
    """

    def __init__(self, temperature: float | Tensor = 0.1, distance: Any = None, reducer: Any = None) -> None:
        super().__init__(temperature, distance, reducer)

    def compute(
        self, embeddings: Tensor, labels: Tensor, q: Tensor, k: Tensor, scale: Tensor, groups: Groups
    ) -> Tensor:
        p, count = groups.one_positive(), groups.positives
        rows, columns = (torch.arange(len(q), device=q.device),) * 2 if groups.itself else (None, None)
        sums = torch.zeros(groups.classes, k.shape[1], dtype=scale.dtype, device=k.device)
        sums = sums.index_add(0, groups.ref_ids, k.to(scale.dtype))[groups.ids]  # (N, D)
        mean = (sums - k.to(scale.dtype) if groups.itself else sums) / count.clamp(min=1)[:, None]
        offset = (q * (k[p.clamp(min=0)].to(scale.dtype) - mean)).sum(-1) * scale
        offset = offset.where(count > 1, 0)  # one positive is its own mean
        each = "sum" if self.reducer is None else "none"
        loss = info_nce(q, k, p, scale=scale, anchor_ids=rows, candidate_ids=columns, reduction=each)
        if self.reducer is None:
            active = (count > 0) & ((count > 1) | (groups.negatives > 0))
            return ((loss + offset.sum()) / active.sum().clamp(min=1)).where(groups.any_loss(), 0)
        losses: Any = loss + offset
        if not groups.any_loss():
            return self.reducer(
                {"loss": {"losses": 0, "indices": None, "reduction_type": "already_reduced"}}, embeddings, labels
            )
        listed = {"losses": losses, "indices": torch.arange(len(q), device=q.device), "reduction_type": "element"}
        return self.reducer({"loss": listed}, embeddings, labels)


class NTXentLoss(LabelLoss):
    """NT-Xent over all positive pairs, as pytorch-metric-learning computes it (other positives are in no denominator).

    temperature, distance: as `LabelLoss`. reducer: None or MeanReducer(), the mean over positive pairs; or
    SumReducer(). Call it with embeddings (N, D), labels (N,), and ref_emb=(M, D), ref_labels=(M,) if there are any.
    Returns a scalar, float32 for 16-bit inputs. Raises ValueError for arguments that do not fit.
    Source: Sohn 2016; Chen et al. 2020 (arXiv 2002.05709).

    >>> NTXentLoss()(torch.randn(8, 16), torch.arange(4).repeat(2)).shape
    torch.Size([])
    """

    def __init__(self, temperature: float | Tensor = 0.07, distance: Any = None, reducer: Any = None) -> None:
        super().__init__(temperature, distance, reducer)
        if reducer is not None and type(reducer).__name__ not in ("MeanReducer", "SumReducer"):
            raise ValueError(
                "NTXentLoss: reducer must be None, MeanReducer() or SumReducer(); others need the list of all pairs. "
                f"Got {reducer}."
            )
        self.sums = type(reducer).__name__ == "SumReducer"

    def compute(
        self, embeddings: Tensor, labels: Tensor, q: Tensor, k: Tensor, scale: Tensor, groups: Groups
    ) -> Tensor:
        if int(groups.positives.max()) <= 1:
            total = info_nce(
                q,
                k,
                groups.one_positive(),
                scale=scale,
                anchor_ids=groups.ids,
                candidate_ids=groups.ref_ids,
                reduction="sum",
            )
        else:
            lse = log_sum_exp(q, k, scale, groups, alike=self.normalize_embeddings)
            total = PairSum.apply(q, k, lse, scale, groups)
        total = total if self.sums else total / groups.positives.sum().clamp(min=1)
        return total.where(groups.any_loss(), 0)


def log_sum_exp(q: Tensor, k: Tensor, scale: Tensor, groups: Groups, alike: bool) -> Tensor:
    """log sum over j of another label of exp(s_ij) (N,), with gradients; -inf where there is none.

    info_nce against made-up positives of score s: x = lse - s, loss = softplus(x), so x = loss + log(1 - exp(-loss)),
    whose derivative undoes the loss's. Where all vectors are of one length (`alike`), s is the least that any candidate
    could score. Else a long one would make that lower than the digits of lse reach: s is lse itself, found first.
    """
    options = {"scale": scale, "anchor_ids": groups.ids, "candidate_ids": groups.ref_ids}
    some = groups.negatives > 0
    with torch.no_grad():
        length = torch.linalg.vector_norm(q, dim=1, dtype=scale.dtype).clamp(min=1e-12)
        reach = torch.linalg.vector_norm(k, dim=1, dtype=scale.dtype).max() * length * scale.abs()
        s = -reach if alike else info_nce_stats(q, k, torch.zeros_like(q), **options).lse.clamp(-reach, reach)
        made_up = (q * (s.where(some, 0) / (scale * length**2))[:, None]).to(q.dtype)
    loss = info_nce(q, k, made_up, reduction="none", **options).where(some, 1)
    s = (q.to(scale.dtype) * made_up).sum(-1) * scale
    return (loss + torch.log(-torch.expm1(-loss)) + s).where(some, -torch.inf)
