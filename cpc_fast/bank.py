"""A bank of normal latents: what test patches are compared with.

A bank is scored in blocks of BLOCK_ROWS rows, whose log-sum-exps are then merged in one way, wherever the blocks are:
on the device, in host memory, in a safetensors file, or on other ranks. So the scores are the same to the bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_kernels import bilinear_info_nce_stats
from cpc_kernels.exchange import gather_rows, rank_and_world, shares

from .predictions import Predictions
from .shapes import Latents, Losses
from .stages import stage

BLOCK_ROWS = 2**15  # another number changes the last bits of scores against larger banks
DEVICE_SHARE = 0.5  # of a GPU's free memory; a larger bank stays outside and is streamed


class StreamedBank:
    """Rows (m, d) that stay where they are and come to the device one block at a time.

    On a GPU up to three blocks are there at once: the one that is scored, the one before it, and the one being copied.

    Args:
        rows: a tensor on the CPU, or what StreamedBank.open reads.
        device: where they are scored.
        across_ranks: every rank of torch.distributed reads its share of the blocks, and all score the same image
            together.
    """

    def __init__(self, rows: Any, device: str | torch.device = "cpu", across_ranks: bool = False) -> None:
        shape = tuple(rows.shape if isinstance(rows, Tensor) else rows.get_shape())
        if len(shape) != 2:
            raise ValueError(f"StreamedBank: a bank must be (m, d). Got {shape}.")
        self.rows, self.shape, self.device, self.across_ranks = rows, shape, torch.device(device), across_ranks

    @classmethod
    def open(
        cls, path: Path, name: str = "bank", device: str | torch.device = "cpu", across_ranks: bool = False
    ) -> StreamedBank:
        """The tensor `name` of a safetensors file, mapped into memory: only the blocks in use are read."""
        from safetensors import safe_open  # late: scoring against a bank in memory needs none

        return cls(safe_open(path, framework="pt").get_slice(name), device, across_ranks)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def blocks(self) -> range:
        """The blocks of this rank: all, or its share."""
        count = -(-len(self) // BLOCK_ROWS)
        rank, world = rank_and_world() if self.across_ranks else (0, 1)
        return range(count * rank // world, count * (rank + 1) // world)

    def read(self, block: int) -> Tensor:
        rows = self.rows[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
        return rows if isinstance(self.rows, Tensor) else rows.clone()  # begins where products are fastest

    def __iter__(self) -> Iterator[Tensor]:
        """The blocks of this rank, on the device."""
        if self.device.type != "cuda":
            yield from (self.read(block).to(self.device) for block in self.blocks)
            return
        copies, coming = torch.cuda.Stream(self.device), None
        scored = deque(maxlen=2)
        for block in [*self.blocks, None]:
            here = coming
            if here is not None:
                torch.cuda.current_stream(self.device).wait_stream(copies)
                here.record_stream(torch.cuda.current_stream(self.device))
            if block is not None:
                if len(scored) == 2:
                    scored[0].synchronize()  # or the host would run ahead, and blocks would pile up
                with torch.cuda.stream(copies):
                    coming = self.read(block).pin_memory().to(self.device, non_blocking=True)
            if here is not None:
                yield here
                scored.append(torch.cuda.current_stream(self.device).record_event())


Bank = Tensor | StreamedBank  # (m, d)


def host_blocks(bank: Bank) -> Iterator[Tensor]:
    """All rows (b, d) on the CPU, BLOCK_ROWS at a time, wherever they are and whoever scores them."""
    if isinstance(bank, Tensor):
        yield from (rows.detach().cpu() for rows in bank.split(BLOCK_ROWS))
    else:
        yield from (bank.read(block).cpu() for block in range(-(-len(bank) // BLOCK_ROWS)))


def host_rows(bank: Bank) -> Tensor:
    """All rows (m, d) on the CPU, where there must be room for them."""
    if isinstance(bank, Tensor):
        return bank.detach().cpu()
    return bank.rows.cpu() if isinstance(bank.rows, Tensor) else bank.rows[:]


def bank_blocks(bank: Bank) -> Iterable[Tensor]:
    """The bank in blocks of BLOCK_ROWS rows; at least one, of a bank in memory."""
    return bank.split(BLOCK_ROWS) if isinstance(bank, Tensor) else bank


@stage("loss")
def bank_losses(examined: Sequence[tuple[Latents, Predictions]], bank: Bank) -> Losses:
    """How surprising each patch is: its loss against a fixed bank of normal latents, (m, members * d) -> (n,).

    The positive is the patch itself, the negatives are the bank, so an image's losses do not depend on other images.

    Args:
        examined: of each member the latents, and its predictions about them; and the same of further views.
        bank: the latents of all members of a patch stand side by side in a row.

    Returns the losses of the first one's predictions, then of the next.

    >>> from cpc_fast.predictions import Predictor
    >>> z = torch.randn(1, 3, 3, 8)
    >>> bank_losses([(z, Predictor(8, (2,), directions=2)(z[None]))], torch.randn(50, 8)).shape
    torch.Size([6])
    """
    latents, predictions = examined[0]
    dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
    parts = [torch.empty(0, 3, len(examined) * len(predictions.targets), dtype=dtype, device=latents.device)]
    own = [latents.flatten(0, 2)[predictions.targets] for latents, predictions in examined]
    for block in bank_blocks(bank):
        found = [
            bilinear_info_nce_stats(p.contexts, p.weight, rows, patches, sources=p.sources, counts=p.counts)
            for (_, p), patches, rows in zip(examined, own, cycle(block.split(latents.shape[-1], 1)), strict=False)
        ]
        parts.append(torch.cat([torch.stack([one.loss, one.lse, one.positive]) for one in found], 1)[None])
    all_parts = torch.cat(parts)  # (blocks, 3, n)
    if isinstance(bank, StreamedBank) and bank.across_ranks:
        all_parts = gather_rows(all_parts, shares(len(all_parts), all_parts.device))
    if len(all_parts) == 1:
        return all_parts[0, 0]
    lse = all_parts[:, 1].logsumexp(0)
    return (-F.logsigmoid(all_parts[0, 2] - lse)).where(lse != -torch.inf, 0.0)


def place_bank(rows: Tensor, device: torch.device) -> Bank:
    """On the device where it fits in DEVICE_SHARE of what is free, else streamed to it."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if rows.numel() * rows.element_size() > DEVICE_SHARE * free:
            return StreamedBank(rows.cpu(), device)
    return rows.to(device)


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
