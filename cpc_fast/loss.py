"""predictions + latents -> losses: InfoNCE for all directions and steps in one call of the kernels.

    loss_n = -log( exp(p_n . z_t(n)) / (exp(p_n . z_t(n)) + sum over negatives j of exp(p_n . z_j)) )

The scores are the bilinear z^T W_k c of CPC (van den Oord et al. 2018, arXiv 1807.03748): W_k is inside p_n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_kernels import Negatives, info_nce, info_nce_stats, sampled_info_nce

from .shapes import Latents, Losses, Predictions, Targets


def cpc_loss(
    predictions: Predictions,
    latents: Latents,
    targets: Targets,
    *,
    negatives: str = "batch",
    count: int = 16,
    seed: int = 0,
    shifted: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The contrastive loss of a batch.

    Args:
        predictions: (n, d).
        latents: (b, gy, gx, d); every patch of the batch is a candidate.
        targets: (n,), the flat index of each prediction's own patch.
        negatives: "batch", all other patches; "other-images", all patches of other images; "sampled", `count` patches
            drawn at random for each prediction.
        count: how many to draw; for "sampled".
        seed: of the draw; the same seed draws the same patches on every device.
        shifted: (m, d) latents of transformed images, further wrong answers; for "batch" and "other-images".
        reduction: "none" gives (n,), "mean" and "sum" a scalar.

    >>> z = torch.randn(2, 3, 3, 8)
    >>> cpc_loss(torch.randn(6, 8), z, torch.arange(6), reduction="none").shape
    torch.Size([6])
    """
    candidates = latents.flatten(0, 2)
    if negatives == "sampled":
        drawn = Negatives(count, seed)
        return sampled_info_nce(predictions, candidates, targets, drawn, reduction=reduction)
    patches = latents.shape[1] * latents.shape[2]
    images = None
    if negatives == "other-images":
        images = torch.arange(len(candidates), device=latents.device, dtype=torch.int32) // patches
    anchor_images = None if images is None else images[targets]
    if shifted is not None:
        candidates = torch.cat([candidates, shifted])
        if images is not None:
            images = torch.cat([images, images.new_full((len(shifted),), -1)])
    return info_nce(
        predictions, candidates, targets, anchor_ids=anchor_images, candidate_ids=images, reduction=reduction
    )


def bank_losses(predictions: Predictions, latents: Latents, targets: Targets, bank: Tensor) -> Losses:
    """How surprising each patch is: its loss against a fixed bank of normal latents, (m, d) -> (n,).

    The positive is the patch itself, the negatives are the bank, so an image's losses do not depend on other images.

    >>> bank_losses(torch.randn(6, 8), torch.randn(1, 3, 3, 8), torch.arange(6), torch.randn(50, 8)).shape
    torch.Size([6])
    """
    return info_nce_stats(predictions, bank, latents.flatten(0, 2)[targets]).loss
