"""lightly 1.6: `NTXentLoss`, between two views (SimCLR) or against a memory bank (MoCo), across processes.

Two views a, b of n images, world processes: each of the 2 n local vectors has its other view as the positive and every
other vector of both views and all processes, except itself, as a negative. With a bank: a is scored against b (the
positive) and the bank, which then takes b in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from cpc_kernels import info_nce, info_nce_across_ranks
from cpc_kernels.arguments import spell
from cpc_kernels.exchange import Shares, gather_rows, rank_and_world, shares

from .arguments import check_tensors, inverse, one_number


class MemoryBank(nn.Module):
    """The last `size` = (rows, features) keys, in `bank`; `bank_ptr` is where the next ones go. Starts as random unit
    vectors, from torch's generator. size 0: no bank."""

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int] = 0, gather_distributed: bool = False) -> None:
        super().__init__()
        shape = (size,) if isinstance(size, int) else tuple(size)
        if shape != (0,) and len(shape) != 2:
            hint = f"; for {shape[0]} rows of 128 features say ({shape[0]}, 128)" if len(shape) == 1 else ""
            raise ValueError(
                f"NTXentLoss: memory_bank_size must be (rows, features), or 0 for no bank. Got {size}{hint}."
            )
        if min(shape) < 0:
            raise ValueError(f"NTXentLoss: memory_bank_size cannot be negative. Got {size}.")
        self.size = shape
        self.gather_distributed = gather_distributed
        bank = F.normalize(torch.randn(shape), dim=-1) if len(shape) == 2 else torch.empty(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def add(self, keys: Tensor) -> None:
        """Writes (n, D) over the oldest rows; what reaches past the end is dropped and the next keys start at 0."""
        if self.gather_distributed and rank_and_world()[1] > 1:
            keys = gather_rows(keys, shares(len(keys), keys.device))
        start, rows = int(self.bank_ptr), self.size[0]
        end = min(start + len(keys), rows)
        self.bank[start:end] = keys[: end - start].to(self.bank.dtype)
        self.bank_ptr.fill_(end % rows)


class NTXentLoss(nn.Module):
    """The normalised, temperature-scaled cross entropy of SimCLR and MoCo, as lightly computes it.

    temperature: divides the cosine similarities. memory_bank_size: 0, or (rows, features). gather_distributed: take
    negatives (and keys for the bank) from all processes of torch.distributed; gradients go back to them. Processes may
    hold different numbers of images; a row weighs the same everywhere.
    Call it with out0, out1: (N, D), the two views. Returns the mean over 2 N rows (N with a bank), float32 for 16-bit
    inputs. The bank takes out1 in only when out0 requires a gradient. Raises ValueError for arguments that do not fit.
    Source: Chen et al. 2020 (arXiv 2002.05709), He et al. 2019 (arXiv 1911.05722).

    >>> NTXentLoss(temperature=0.5)(torch.randn(8, 16), torch.randn(8, 16)).shape
    torch.Size([])
    """

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        self.temperature = one_number("NTXentLoss", "temperature", temperature)
        if abs(self.temperature) < 1e-8:
            raise ValueError(f"NTXentLoss: abs(temperature) must be at least 1e-8; it divides. Got {temperature}.")
        if gather_distributed and not dist.is_available():
            raise ValueError(
                "NTXentLoss: gather_distributed needs a torch with torch.distributed, and this one has none. "
                "Set gather_distributed=False."
            )
        self.gather_distributed = gather_distributed
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        check_tensors("NTXentLoss", out0=out0, out1=out1)
        if out0.ndim != 2 or out0.shape != out1.shape:
            raise ValueError(f"NTXentLoss: the two views must both be (N, D). {spell(out0=out0, out1=out1)}")
        if self.memory_bank.size[0]:
            return self.against_bank(out0, out1)
        n = out0.shape[0]
        here, there = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        vectors = torch.cat([here, there])
        of = self.everyones(n, out0.device)
        # in 32 bits, which kernels compare twice as fast as 64
        own = torch.arange(2 * n, device=out0.device, dtype=torch.int32) + (0 if of is None else 2 * of.first())
        others = own.roll(n)  # the other view of each
        scale = inverse("NTXentLoss", self.temperature)
        options = {"scale": scale, "anchor_ids": own, "candidate_ids": own}  # none is its own negative
        if of is None:
            return info_nce(vectors, vectors, others, **options)
        loss = info_nce_across_ranks(vectors, vectors, others, reduction="none", **options)
        return loss.sum() * (of.world / max(2 * of.total, 1))  # so that their mean over the processes is the whole's

    def everyones(self, n: int, device: torch.device) -> Shares | None:
        """How many images each process holds; None where this one is alone."""
        return shares(n, device) if self.gather_distributed and rank_and_world()[1] > 1 else None

    def against_bank(self, out0: Tensor, out1: Tensor) -> Tensor:
        rows, features = self.memory_bank.bank.shape
        if out0.shape[1] != features:
            raise ValueError(
                f"NTXentLoss: the memory bank holds {features} features, the views have {out0.shape[1]}. "
                f"Build it with memory_bank_size=({rows}, {out0.shape[1]})."
            )
        of = self.everyones(out0.shape[0], out0.device)
        query, key = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        bank = self.memory_bank.bank.to(query.device, query.dtype, copy=True)  # as it was before this batch enters it
        if out0.requires_grad:
            self.memory_bank.add(key)
        scale = inverse("NTXentLoss", self.temperature)
        if of is None:
            return info_nce(query, bank, key, scale=scale)
        return info_nce(query, bank, key, scale=scale, reduction="sum") * (of.world / max(of.total, 1))

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_distributed={self.gather_distributed}"
