"""Greedy InfoMax: the vision `InfoNCE_Loss`, each patch predicting the patches below it.

    p = softmax_0( c^T W_k z_target, c^T W_k z_1 ... c^T W_k z_S )
    loss = mean over the steps k of the mean over patches of -log(p + eps)

z, c: (B, C, H, W) latents and contexts. Step k predicts k + skip rows further down. W_k is applied to z, as a 1 x 1
convolution; the S negatives are drawn with replacement from all targets of the step, the positive among them.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cpc_kernels import sampled_info_nce
from cpc_kernels.arguments import check_indices

from .arguments import check_tensors


class GreedyInfoMaxLoss(nn.Module):
    """The loss of a Greedy InfoMax vision module, without gathering the negatives' vectors.

    opt: any object with `negative_samples` (S) and `prediction_step` (K), as Greedy InfoMax parses them; a true
    `opt.weight_init` starts the weights orthogonal. in_channels, out_channels: of z and of c. The weights are
    `W_k.0.weight` ... (out, in, 1, 1), so published checkpoints load. eps: inside the logarithm; the published code
    has 1e-11, which caps each patch's loss at 25.3 and starves the patches that are most wrong of gradient.
    Source: Löwe et al. 2019 (arXiv 1905.11786).

    >>> from types import SimpleNamespace
    >>> loss = GreedyInfoMaxLoss(SimpleNamespace(negative_samples=16, prediction_step=3), 8, 8)
    >>> loss(torch.randn(2, 8, 7, 7), torch.randn(2, 8, 7, 7)).shape
    torch.Size([])
    """

    def __init__(self, opt: Any, in_channels: int, out_channels: int, *, eps: float = 0.0) -> None:
        super().__init__()
        for name in ("negative_samples", "prediction_step"):
            if int(getattr(opt, name, 0) or 0) < 1:
                raise ValueError(f"GreedyInfoMaxLoss: opt.{name} must be 1 or more. Got {getattr(opt, name, None)}.")
        self.opt = opt
        self.negative_samples = int(opt.negative_samples)
        self.k_predictions = int(opt.prediction_step)
        self.eps = eps
        self.W_k = nn.ModuleList(nn.Conv2d(in_channels, out_channels, 1, bias=False) for _ in range(self.k_predictions))
        if getattr(opt, "weight_init", False):
            for conv in self.W_k:
                nn.init.orthogonal_(conv.weight)  # type: ignore[arg-type]

    def forward(self, z: Tensor, c: Tensor, skip_step: int = 1, negatives: Sequence[Tensor] | None = None) -> Tensor:
        """z: (B, in, H, W). c: (B, out, H, W). skip_step: rows left out between a patch and its first target.
        negatives: for each step, n_k S indices into the step's n_k targets in (y, x, image) order; by default
        torch.randint draws them, as the published code does: the same seed, the same draws. Returns a scalar."""
        first = cast(Tensor, self.W_k[0].weight)
        check_tensors("GreedyInfoMaxLoss", z=z, c=c, weight=first)
        if z.ndim != 4 or c.ndim != 4 or z.shape[0] != c.shape[0] or z.shape[2:] != c.shape[2:]:
            raise ValueError(
                "GreedyInfoMaxLoss: z and c must be (B, C, H, W) with the same B, H, W. "
                f"Got z {tuple(z.shape)}, c {tuple(c.shape)}."
            )
        outs, ins = first.shape[:2]
        if (z.shape[1], c.shape[1]) != (ins, outs):
            raise ValueError(
                f"GreedyInfoMaxLoss: built with in_channels={ins}, out_channels={outs}, it needs as many channels of z "
                f"and of c. Got z {tuple(z.shape)}, c {tuple(c.shape)}."
            )
        if skip_step < 0:
            raise ValueError(f"GreedyInfoMaxLoss: skip_step must be 0 or more. Got {skip_step}.")
        height = z.shape[2]
        if height <= self.k_predictions + skip_step:
            raise ValueError(
                f"GreedyInfoMaxLoss: {self.k_predictions} steps after skipping {skip_step} need at least "
                f"{self.k_predictions + skip_step + 1} rows of patches. Got {height}."
            )
        if negatives is not None and len(negatives) != self.k_predictions:
            raise ValueError(
                f"GreedyInfoMaxLoss: negatives must be one tensor for each of the {self.k_predictions} steps. "
                f"Got {len(negatives)}."
            )
        below, contexts = z.permute(2, 3, 0, 1), c.permute(2, 3, 0, 1)  # (H, W, B, C)
        total = z.new_zeros(())
        for step, conv in enumerate(self.W_k):
            rows = step + 1 + skip_step
            weight: Tensor = conv.weight[:, :, 0, 0]  # type: ignore[index, assignment]
            targets = (below[rows:] @ weight.T).flatten(0, 2)  # (n, out)
            anchors = contexts[: height - rows].flatten(0, 2)
            if negatives is None:
                drawn = torch.randint(max(len(targets), 1), (len(targets) * self.negative_samples, 1), device=z.device)
            else:
                drawn = negatives[step]
                if drawn.numel() != len(targets) * self.negative_samples:
                    raise ValueError(
                        f"GreedyInfoMaxLoss: step {step + 1} needs {len(targets)} x {self.negative_samples} negatives. "
                        f"Got {tuple(drawn.shape)}."
                    )
                check_indices("GreedyInfoMaxLoss", f"negatives of step {step + 1}", drawn, len(targets), 0, "pool")
            own = torch.arange(len(targets), device=z.device)
            drawn = drawn.view(len(targets), self.negative_samples)
            loss = sampled_info_nce(anchors, targets, own, drawn, reduction="none")
            each = loss if self.eps == 0 else -torch.log(torch.exp(-loss) + self.eps)
            total = total + each.sum() / max(len(each), 1)
        return total / self.k_predictions

    def extra_repr(self) -> str:
        return f"negative_samples={self.negative_samples}, eps={self.eps}"
