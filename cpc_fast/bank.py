"""A bank of normal latents: what test patches are compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def reservoir(rows: Iterable[Tensor], size: int, seed: int = 0) -> Tensor:
    """A uniform random sample of `size` rows from blocks of rows, in one pass and O(size) memory.

    Every row gets a random key from a seeded generator and the `size` smallest keys stay, so the sample depends on the
    seed and the order of the rows, not on how they are cut into blocks.

    Args:
        rows: blocks (m_i, d).
        size: how many rows to keep; fewer come back when there are fewer.

    >>> reservoir([torch.arange(6.0).view(3, 2), torch.ones(4, 2)], size=5).shape
    torch.Size([5, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    kept: Tensor | None = None
    keys = torch.empty(0, dtype=torch.float64)
    for block in rows:
        new = torch.rand(len(block), generator=generator, dtype=torch.float64)
        kept = block if kept is None else torch.cat([kept, block])
        keys = torch.cat([keys, new])
        if len(keys) > size:
            keys, index = torch.topk(keys, size, largest=False)
            kept = kept[index.to(kept.device)]
    if kept is None:
        raise ValueError("reservoir: there are no rows to sample from.")
    return kept.clone()
