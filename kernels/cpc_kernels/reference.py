"""The spec: InfoNCE over all candidates, over sampled ones, and CPC made of them, in the plainest float64-safe torch.

    s_ij   = scale <q_i, k_j>                         q: anchors (N, D), k: candidates (M, D)
    lse_i  = log sum over negatives j of exp(s_ij)    loss_i = softplus(lse_i - s_i,p(i))

Everything else in this package computes these numbers faster; tests, documents and benchmarks call this file, kernels
never do. It builds the full (N, M) or (N, K, S, D) arrays and lets autograd differentiate them. 16-bit inputs are
computed in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .autograd import as_written


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows(scores: Tensor, negative: Tensor, positive: Tensor, active: Tensor) -> dict[str, Tensor]:
    """Loss, lse, positive score and rank of each row from its scores (..., M), and which of them are negatives."""
    masked = scores.masked_fill(~negative, -torch.inf)
    live = active & (masked.detach() != -torch.inf).any(-1)  # a NaN score is live: NaN in, NaN out
    lse = torch.logsumexp(masked.where(live[..., None], 0.0), -1)  # a row of -inf has no gradient to take
    loss = -F.logsigmoid(positive.where(live, 0.0) - lse).where(live, 0.0)  # softplus(lse - s_p), accurate when tiny
    return {
        "loss": loss.where(live, 0.0),
        "lse": lse.where(live, -torch.inf),
        "positive": positive.where(active, 0.0),
        "rank": ((masked > positive[..., None]) & active[..., None]).sum(-1),
    }


def reduce(loss: Tensor, active: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    return total if reduction == "sum" else total / active.sum().clamp(min=1)


@as_written
def info_nce_rows(anchors, candidates, positives, *, scale=1.0, anchor_ids=None, candidate_ids=None):
    """All candidates: (N, D), (M, D), (N,) or (N, D) -> a dict of (N,), and which rows are not ignored."""
    dtype = compute_dtype(anchors.dtype)
    q, k = anchors.to(dtype), candidates.to(dtype)
    n, m = len(q), len(k)
    scale = scale.to(dtype).reshape(()) if isinstance(scale, Tensor) else scale
    negative = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if positives.is_floating_point():
        active = torch.ones(n, dtype=torch.bool, device=q.device)
        own = positives.to(dtype)
    else:
        active = positives >= 0
        negative = negative & (torch.arange(m, device=q.device) != positives[:, None])  # not in place: vmap
        own = None
    if anchor_ids is not None:
        negative = negative & (anchor_ids[:, None] != candidate_ids)
    q = q.where(active[:, None], 0.0)  # whatever an ignored row holds reaches nobody
    scores = scale * (q @ k.T)
    if own is not None:
        positive = scale * (q * own).sum(-1)
    elif m:
        positive = scores.gather(1, positives.clamp(min=0)[:, None])[:, 0]
    else:
        positive = q.sum(-1) * 0
    return rows(scores, negative, positive, active), active


def info_nce(anchors, candidates, positives, *, scale=1.0, anchor_ids=None, candidate_ids=None, reduction="mean"):
    """`cpc_kernels.info_nce`, spelled out."""
    result, active = info_nce_rows(
        anchors, candidates, positives, scale=scale, anchor_ids=anchor_ids, candidate_ids=candidate_ids
    )
    return reduce(result["loss"], active, reduction)


@as_written
def sampled_info_nce_rows(
    anchors, pool, positives, negatives, *, scale=1.0, anchor_ids=None, pool_ids=None, exclude_positives=False
):
    """Listed negatives: (N, K, D), (M, D), (N, K) or (N, K, D), (N, S) or (N, K, S) -> a dict of (N, K), and which
    rows are not ignored. `exclude_positives` drops entries equal to the row's positive, as drawn negatives ask."""
    dtype = compute_dtype(anchors.dtype)
    q, k = anchors.to(dtype), pool.to(dtype)
    scale = scale.to(dtype).reshape(()) if isinstance(scale, Tensor) else scale
    listed = negatives if negatives.ndim == 3 else negatives[:, None].expand(-1, q.shape[1], -1)  # (N, K, S)
    negative = listed >= 0
    if positives.is_floating_point():
        active = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        own = positives.to(dtype)
    else:
        active = positives >= 0
        own = k[positives.clamp(min=0)] if len(k) else torch.zeros_like(q)
        if exclude_positives:
            negative = negative & (listed != positives[..., None])
    gathered = k[listed.clamp(min=0)] if len(k) else q.new_zeros(*listed.shape, q.shape[-1])  # (N, K, S, D)
    if anchor_ids is not None and len(k):
        negative = negative & (anchor_ids[:, None, None] != pool_ids[listed.clamp(min=0)])
    q = q.where(active[..., None], 0.0)
    scores = scale * torch.einsum("nkd,nksd->nks", q, gathered)
    positive = scale * (q * own).sum(-1)
    if not positives.is_floating_point():  # a listed copy of the positive ties with it, whatever the rounding
        scores = torch.where(listed == positives[..., None], positive[..., None], scores)
    return rows(scores, negative, positive, active), active


def sampled_info_nce(
    anchors,
    pool,
    positives,
    negatives,
    *,
    scale=1.0,
    anchor_ids=None,
    pool_ids=None,
    exclude_positives=False,
    reduction="mean",
):
    """`cpc_kernels.sampled_info_nce` for (N, K, D) anchors and listed negatives, spelled out."""
    result, active = sampled_info_nce_rows(
        anchors,
        pool,
        positives,
        negatives,
        scale=scale,
        anchor_ids=anchor_ids,
        pool_ids=pool_ids,
        exclude_positives=exclude_positives,
    )
    return reduce(result["loss"], active, reduction)


def bilinear_info_nce(contexts, weights, candidates, positives, negatives=None, *, reduction="mean", **options):
    """CPC: step k predicts W_k c, scored against the candidates.

    contexts (N, C), weights (K, D, C), candidates (M, D), positives (N, K), negatives None (all candidates), (N, S) or
    (N, K, S) -> (N, K) or its reduction.
    """
    predictions = torch.einsum("kdc,nc->nkd", weights, contexts)
    if negatives is not None:
        return sampled_info_nce(predictions, candidates, positives, negatives, reduction=reduction, **options)
    steps = [info_nce_rows(predictions[:, k], candidates, positives[:, k], **options) for k in range(len(weights))]
    loss = torch.stack([result["loss"] for result, _ in steps], 1)
    return reduce(loss, torch.stack([active for _, active in steps], 1), reduction)


def greedy_infomax(
    latents: Tensor, contexts: Tensor, weights: Tensor, negatives: Sequence[Tensor], *, skip: int = 1, eps: float = 0.0
) -> Tensor:
    """The vertical CPC loss of Greedy InfoMax (Löwe et al. 2019): each patch predicts the patches below it.

    latents, contexts (B, C, H, W); weights (K, C, C), applied to the latents; negatives: for each step k = 1..K the
    drawn rows (n_k, S), counted over the step's predicted patches in (y, x, image) order. The published code takes
    log(p + 1e-11); `eps` puts that in. Returns the mean over patches, then over steps.
    """
    total = latents.new_zeros(())
    for step, (weight, drawn) in enumerate(zip(weights, negatives, strict=True), start=1):
        below = latents[:, :, step + skip :].permute(2, 3, 0, 1)  # (y, x, B, C)
        targets = (below @ weight.T).flatten(0, 2)  # (n_k, C)
        anchors = contexts[:, :, : latents.shape[2] - step - skip].permute(2, 3, 0, 1).flatten(0, 2)
        own = torch.arange(len(targets), device=targets.device)
        loss = sampled_info_nce(anchors[:, None], targets, own[:, None], drawn.view(len(targets), -1), reduction="none")
        total = total + (loss if eps == 0 else -torch.log(torch.exp(-loss) + eps)).mean()
    return total / len(weights)
