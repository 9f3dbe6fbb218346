"""contexts -> predictions: for each direction and step, a linear map W_k of the context.

The geometry is arithmetic: looking `offset` cells in a direction from every patch whose target lies in the grid.
Predictions come in the order (direction, step, image, row, column).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contexts import DIRECTIONS
from .shapes import Contexts, Predictions


@lru_cache(maxsize=64)
def geometry(
    shape: tuple[int, int, int], offsets: tuple[int, ...], directions: int, device: torch.device
) -> tuple[Tensor, Tensor, list[int]]:
    """Which context speaks about which target, for a grid of (b, gy, gx) patches.

    Returns sources (n,) and targets (n,), flat indices into (b, gy, gx), and how many predictions each
    (direction, step) makes, in the order of the predictions.

    >>> sources, targets, counts = geometry((1, 7, 7), (2, 3), 1, torch.device("cpu"))
    >>> counts, (targets - sources).unique()
    ([35, 28], tensor([14, 21]))
    """
    b, gy, gx = shape
    cells = torch.arange(b * gy * gx, device=device).view(b, gy, gx)
    sources, targets, counts = [], [], []
    for dy, dx in DIRECTIONS[:directions]:
        for offset in offsets:
            y, x = dy * offset, dx * offset
            source = cells[:, max(0, -y) : gy - max(0, y), max(0, -x) : gx - max(0, x)] if abs(y) < gy and abs(x) < gx \
                else cells[:, :0]  # fmt: skip
            sources.append(source.reshape(-1))
            targets.append(sources[-1] + y * gx + x)
            counts.append(sources[-1].numel())
    return torch.cat(sources), torch.cat(targets), counts


class Predictor(nn.Module):
    """W of all directions and steps, bias-free as in CPC: weight (directions * K, D, D).

    >>> Predictor(features=8, offsets=(2, 3), directions=1)([torch.zeros(1, 7, 7, 8)]).shape
    torch.Size([63, 8])
    """

    def __init__(self, features: int, offsets: tuple[int, ...], directions: int) -> None:
        super().__init__()
        self.offsets, self.directions = offsets, directions
        self.weight = nn.Parameter(torch.empty(directions * len(offsets), features, features))
        for weight in self.weight:
            nn.init.orthogonal_(weight.data)

    def geometry(self, latents: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        b, gy, gx, _ = latents.shape
        return geometry((b, gy, gx), self.offsets, self.directions, latents.device)

    def forward(self, contexts: list[Contexts]) -> Predictions:
        sources, _, counts = self.geometry(contexts[0])
        rows = sources.split(counts)
        flat = [context.flatten(0, 2) for context in contexts]
        steps = len(self.offsets)
        return torch.cat([F.linear(flat[i // steps][rows[i]], self.weight[i]) for i in range(len(counts))])
