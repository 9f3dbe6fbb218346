"""contexts -> predictions: for each direction and step, and for the place, a linear map W_k of the context.

The geometry is arithmetic: looking `offset` cells in a direction from every patch whose target lies in the grid.
Predictions come in the order (direction, step, image, row, column), those from places last. They are named here and
computed inside the loss, which needs no copy of a context.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .contexts import DIRECTIONS
from .shapes import Contexts, Latents, Sources, Targets
from .stages import stage


class Predictions(NamedTuple):
    """Row i says W_k contexts[sources[i]] about latent targets[i]; counts[k] rows in turn belong to step k."""

    contexts: Tensor  # (m, d)
    weight: Tensor  # (directions * K, d, d), one more with places
    sources: Sources
    targets: Targets
    counts: list[int]

    def thinned(self, most: int) -> Predictions:
        """Every n-th row, of the smallest n that leaves at most `most` of them."""
        every = max(1, -(-len(self.sources) // most))
        before = [-(-end // every) for end in accumulate(self.counts, initial=0)]
        counts = [end - start for start, end in pairwise(before)]
        return self._replace(sources=self.sources[::every], targets=self.targets[::every], counts=counts)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what scoring made first, training can use too
def geometry(
    shape: tuple[int, int, int],
    offsets: tuple[int, ...],
    directions: int,
    device: torch.device,
    apart: bool = False,
    place: bool = False,
) -> tuple[Tensor, Tensor, list[int]]:
    """Which context speaks about which target, for a grid of (b, gy, gx) patches.

    Returns sources (n,) and targets (n,), flat indices into (b, gy, gx), and how many predictions each
    (direction, step) makes, in the order of the predictions. apart: the directions have contexts of their own, and
    sources are indices into (directions, b, gy, gx). place: one more context of each patch, behind all others, speaks
    about that patch itself.

    >>> sources, targets, counts = geometry((1, 7, 7), (2, 3), 1, torch.device("cpu"))
    >>> counts, (targets - sources).unique()
    ([35, 28], tensor([14, 21]))
    """
    b, gy, gx = shape
    cells = torch.arange(b * gy * gx, device=device).view(b, gy, gx)
    sources, targets, counts = [], [], []
    for i, (dy, dx) in enumerate(DIRECTIONS[:directions]):
        for offset in offsets:
            y, x = dy * offset, dx * offset
            source = cells[:, max(0, -y) : gy - max(0, y), max(0, -x) : gx - max(0, x)] if abs(y) < gy and abs(x) < gx \
                else cells[:, :0]  # fmt: skip
            source = source.reshape(-1)
            sources.append(source + i * cells.numel() if apart else source)
            targets.append(source + y * gx + x)
            counts.append(source.numel())
    if place:
        sources.append(cells.flatten() + (directions if apart else 1) * cells.numel())
        targets.append(cells.flatten())
        counts.append(cells.numel())
    return torch.cat(sources), torch.cat(targets), counts


def seen_turned(direction: int, axes: tuple[int, ...]) -> int:
    """What a direction is in a mirror image, whose axes of (c, h, w) are turned over: down is up where 1 is.

    >>> seen_turned(0, (1,)), seen_turned(3, (1, 2)), seen_turned(0, (2,))
    (1, 2, 0)
    """
    return direction ^ 1 if direction // 2 + 1 in axes else direction


class Predictor(nn.Module):
    """W of all directions and steps, bias-free as in CPC: weight (directions * K, D, D); the last is of places.

    >>> Predictor(features=8, offsets=(2, 3), directions=1)(torch.zeros(1, 1, 7, 7, 8)).counts
    [35, 28]
    """

    def __init__(self, features: int, offsets: tuple[int, ...], directions: int, place: bool = False) -> None:
        super().__init__()
        self.offsets, self.directions = offsets, directions
        self.weight = nn.Parameter(torch.empty(directions * len(offsets) + place, features, features))
        for weight in self.weight:
            nn.init.orthogonal_(weight.data)

    @stage("predictions")
    def forward(
        self, contexts: Contexts, apart: int = 1, placed: Latents | None = None, axes: tuple[int, ...] = ()
    ) -> Predictions:
        """apart: how many rows or columns lie between neighbours, for a grid that is finer than that of training.
        placed: contexts from places, (b, gy, gx, d). axes: those that were turned over when contexts were made, which
        lie as in the image again: the predictions are about that."""
        a, b, gy, gx, _ = contexts.shape
        weight, steps = self.weight, len(self.offsets)
        if axes:
            turned = [seen_turned(direction, axes) for direction in range(self.directions)]
            ahead = [direction * steps + step for direction in turned for step in range(steps)]
            contexts = contexts[turned] if a > 1 else contexts
            weight = weight[[*ahead, *range(len(ahead), len(weight))]]
        offsets = tuple(apart * offset for offset in self.offsets)
        where = geometry((b, gy, gx), offsets, self.directions, contexts.device, a > 1, placed is not None)
        rows = contexts.flatten(0, 3)
        if placed is not None:
            rows = torch.cat([rows, placed.flatten(0, 2).to(rows.dtype)])
        return Predictions(rows, weight, *where)
