"""predictions + latents -> losses: InfoNCE for all directions and steps in one call of the kernels.

    loss_n = -log( exp(p_n . z_t(n)) / (exp(p_n . z_t(n)) + sum over negatives j of exp(p_n . z_j)) )

The scores are the bilinear z^T W_k c of CPC (van den Oord et al. 2018, arXiv 1807.03748): p_n = W_k c_n is made inside.
Right answers and negatives are indices into the latents, which nobody copies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_kernels import (
    Negatives,
    bilinear_info_nce,
    bilinear_info_nce_across_ranks,
    bilinear_info_nce_stats,
)
from cpc_kernels.exchange import everyones, rank_and_world

from .predictions import Predictions
from .shapes import Latents
from .stages import stage


@stage("loss")
def cpc_loss(
    predictions: Predictions,
    latents: Latents,
    *,
    negatives: str = "batch",
    count: int = 16,
    seed: int = 0,
    shifted: int = 0,
    reduction: str = "mean",
    across_ranks: str = "auto",
) -> Tensor:
    """The contrastive loss of a batch, which may lie across the ranks of torch.distributed.

    Args:
        predictions: n of them, about patches of the images that are not shifted.
        latents: (b, gy, gx, d); every patch of the batch is a candidate.
        negatives: "batch", all other patches; "other-images", all patches of other images; "sampled", `count` patches
            drawn at random for each prediction; "hard", the `count` others that a prediction scores highest.
        count: how many; for "sampled" and "hard".
        seed: of the draw; the same seed draws the same patches on every device.
        shifted: how many of the b images, the last ones, are transformed copies. Their patches are further wrong
            answers for "batch", "other-images" and "hard", and never drawn for "sampled".
        reduction: "none" gives (n,), "mean" and "sum" a scalar, of all ranks.
        across_ranks: where there are several, whose patches are candidates: "local", this rank's own; "gathered" or
            "ring", everybody's; "auto" chooses between those by size, and is "local" for "hard". All ranks call this
            together.

    >>> from cpc_fast.predictions import Predictor
    >>> z = torch.randn(2, 3, 3, 8)
    >>> cpc_loss(Predictor(8, (2,), directions=1)(z[None]), z, reduction="none").shape
    torch.Size([6])
    """
    contexts, weight, sources, targets, counts = predictions
    drawn = anchor_images = candidate_images = None
    images, patches = len(latents), latents.shape[1] * latents.shape[2]
    if negatives == "sampled":
        drawn = Negatives(count, seed)
        images -= shifted
        latents = latents[:images]
    elif negatives == "hard":
        if across_ranks not in ("auto", "local"):
            raise ValueError(
                "cpc_loss: hard negatives are looked for among a rank's own patches, so across_ranks must be auto or "
                f"local. Got {across_ranks!r}."
            )
        drawn, across_ranks = hardest(predictions, latents, count), "local"
    elif negatives == "other-images":
        # in 32 bits, which kernels compare twice as fast as 64
        candidate_images = (torch.arange(images * patches, device=latents.device) // patches).int()
        anchor_images = (targets // patches).int()
    options = {"sources": sources, "counts": counts, "reduction": reduction}
    rank, world = rank_and_world()
    if world == 1:
        tags = {"anchor_ids": anchor_images, "candidate_ids": candidate_images}
        return bilinear_info_nce(contexts, weight, latents.flatten(0, 2), targets, drawn, **tags, **options)
    held = [each[0] for each in everyones([images], latents.device)]  # images of each rank
    before = sum(held[:rank])
    if anchor_images is not None and candidate_images is not None:
        anchor_images, candidate_images = anchor_images + before, candidate_images + before
    if drawn is not None and across_ranks != "local":
        options["rows"] = rows_of_all(counts, images, before, sum(held), latents.device)
    return bilinear_info_nce_across_ranks(
        contexts, weight, latents.flatten(0, 2), targets + before * patches, drawn,
        anchor_ids=anchor_images, candidate_ids=candidate_images, exchange=across_ranks, **options,
    )  # fmt: skip


@torch.no_grad()
def hardest(predictions: Predictions, latents: Latents, count: int, rows: int = 4096) -> Tensor:
    """(n, count) the wrong answers, of all `latents`, that each prediction scores highest; fewer where there are fewer.

    Scores are made for `rows` predictions at a time, in float32, and forgotten.

    >>> from cpc_fast.predictions import Predictor
    >>> z = torch.randn(2, 3, 3, 8)
    >>> hardest(Predictor(8, (2,), directions=1)(z[None]), z, count=5).shape
    torch.Size([6, 5])
    """
    contexts, weight, sources, targets, counts = predictions
    dtype = torch.promote_types(latents.dtype, torch.float32)
    candidates, found = latents.flatten(0, 2).to(dtype), []
    with torch.autocast(latents.device.type, enabled=False):
        for matrix, own, right in zip(weight, sources.split(counts), targets.split(counts), strict=True):
            for some, answer in zip(own.split(rows), right.split(rows), strict=True):
                scores = F.linear(contexts[some].to(dtype), matrix.to(dtype)) @ candidates.T
                scores.scatter_(1, answer[:, None], -torch.inf)
                found.append(scores.topk(max(0, min(count, len(candidates) - 1))).indices)
    return torch.cat(found)


def rows_of_all(counts: list[int], images: int, before: int, total: int, device: torch.device) -> Tensor:
    """(n,) which prediction of the whole batch, of `total` images, each of these is; `before` come before ours.

    >>> rows_of_all([4, 2], images=2, before=1, total=3, device=torch.device("cpu"))
    tensor([2, 3, 4, 5, 7, 8])
    """
    parts, start = [], 0
    for count in counts:  # of a direction and step; images follow each other within it
        each = count // max(images, 1)
        parts.append(torch.arange(count, device=device) + start + before * each)
        start += total * each
    return torch.cat(parts)


@stage("accuracy")
def accuracy(predictions: Predictions, latents: Latents, most: int = 256) -> Tensor:
    """How often (0..1) a prediction ranks its own patch first among all of `latents`, from at most `most` of them.

    A patch that shares the first place was not told from the others, and does not count.

    >>> from cpc_fast.predictions import Predictor
    >>> z = torch.randn(1, 3, 3, 8)
    >>> accuracy(Predictor(8, (2,), directions=2)(z[None]), z).shape
    torch.Size([])
    """
    contexts, weight, sources, targets, counts = predictions.thinned(most)
    candidates = latents.flatten(0, 2)
    below = bilinear_info_nce_stats(
        contexts, weight, candidates, targets, sources=sources, counts=counts, scale=-1.0
    ).rank  # under a negative scale the rank counts who scores less
    return (below == len(candidates) - 1).float().mean()
