"""predictions + latents -> losses: InfoNCE for all directions and steps in one call of the kernels.

    loss_n = -log( exp(p_n . z_t(n)) / (exp(p_n . z_t(n)) + sum over negatives j of exp(p_n . z_j)) )

The scores are the bilinear z^T W_k c of CPC (van den Oord et al. 2018, arXiv 1807.03748): p_n = W_k c_n is made inside.
Right answers and negatives are indices into the latents, which nobody copies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_kernels import Negatives, bilinear_info_nce, bilinear_info_nce_stats

from .predictions import Predictions
from .shapes import Latents, Losses


def cpc_loss(
    predictions: Predictions,
    latents: Latents,
    *,
    negatives: str = "batch",
    count: int = 16,
    seed: int = 0,
    shifted: int = 0,
    reduction: str = "mean",
) -> Tensor:
    """The contrastive loss of a batch.

    Args:
        predictions: n of them, about patches of the images that are not shifted.
        latents: (b, gy, gx, d); every patch of the batch is a candidate.
        negatives: "batch", all other patches; "other-images", all patches of other images; "sampled", `count` patches
            drawn at random for each prediction.
        count: how many to draw; for "sampled".
        seed: of the draw; the same seed draws the same patches on every device.
        shifted: how many of the b images, the last ones, are transformed copies. Their patches are further wrong
            answers for "batch" and "other-images", and never drawn for "sampled".
        reduction: "none" gives (n,), "mean" and "sum" a scalar.

    >>> from cpc_fast.predictions import Predictor
    >>> z = torch.randn(2, 3, 3, 8)
    >>> cpc_loss(Predictor(8, (2,), directions=1)(z[None]), z, reduction="none").shape
    torch.Size([6])
    """
    contexts, weight, sources, targets, counts = predictions
    drawn = anchor_images = candidate_images = None
    if negatives == "sampled":
        drawn = Negatives(count, seed)
        latents = latents[: len(latents) - shifted]
    elif negatives == "other-images":
        patches = latents.shape[1] * latents.shape[2]
        candidate_images = torch.arange(latents.shape[0] * patches, device=latents.device) // patches
        anchor_images = targets // patches
    return bilinear_info_nce(
        contexts, weight, latents.flatten(0, 2), targets, drawn, sources=sources, counts=counts,
        anchor_ids=anchor_images, candidate_ids=candidate_images, reduction=reduction,
    )  # fmt: skip


def bank_losses(predictions: Predictions, latents: Latents, bank: Tensor) -> Losses:
    """How surprising each patch is: its loss against a fixed bank of normal latents, (m, d) -> (n,).

    The positive is the patch itself, the negatives are the bank, so an image's losses do not depend on other images.

    >>> from cpc_fast.predictions import Predictor
    >>> z = torch.randn(1, 3, 3, 8)
    >>> bank_losses(Predictor(8, (2,), directions=2)(z[None]), z, torch.randn(50, 8)).shape
    torch.Size([6])
    """
    contexts, weight, sources, targets, counts = predictions
    own = latents.flatten(0, 2)[targets]
    return bilinear_info_nce_stats(contexts, weight, bank, own, sources=sources, counts=counts).loss


def accuracy(predictions: Predictions, latents: Latents, most: int = 256) -> Tensor:
    """How often (0..1) a prediction ranks its own patch first among all of `latents`, from at most `most` of them.

    >>> from cpc_fast.predictions import Predictor
    >>> z = torch.randn(1, 3, 3, 8)
    >>> accuracy(Predictor(8, (2,), directions=2)(z[None]), z).shape
    torch.Size([])
    """
    contexts, weight, sources, targets, counts = predictions.thinned(most)
    stats = bilinear_info_nce_stats(contexts, weight, latents.flatten(0, 2), targets, sources=sources, counts=counts)
    return (stats.rank == 0).float().mean()
