"""What the ranks of a torch.distributed group tell each other: how many rows each holds, all rows, and sums.

Every function here is a collective: all ranks of the group call it, in the same order. The gradients are those of the
sum of what all ranks differentiate: DistributedDataParallel, which averages the parameters' gradients over W ranks,
turns W identical losses into the gradient of one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from .arguments import compute_dtype


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) where torch.distributed is not in use. Raises ValueError in a
    process outside of the group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    if (rank := dist.get_rank(group)) < 0:
        raise ValueError(
            f"rank_and_world: process {dist.get_rank()} is not in the group that was given. "
            "Only the group's own processes call what it does together."
        )
    return rank, dist.get_world_size(group)


def everyones(numbers: list[int], device: torch.device, group: dist.ProcessGroup | None = None) -> list[list[int]]:
    """The same few integers of every rank, in rank order. On a GPU the host waits for them."""
    world = rank_and_world(group)[1]
    if world == 1:
        return [numbers]
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    gathered = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(gathered, own, group=group)
    return torch.stack(gathered).tolist()


def from_first(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Overwrite these on every rank by the first one's."""
    if rank_and_world(group)[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, group=group, group_src=0)


@dataclass(frozen=True)
class Shares:
    """How many rows each rank holds. Rows are numbered through, rank after rank."""

    counts: list[int]
    rank: int
    group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts)

    def first(self, rank: int | None = None) -> int:
        """The number of a rank's first row; this rank's by default."""
        return sum(self.counts[: self.rank if rank is None else rank])


def shares(count: int, device: torch.device, group: dist.ProcessGroup | None = None) -> Shares:
    """Tell everyone how many rows this rank holds."""
    rank, _ = rank_and_world(group)
    return Shares([each[0] for each in everyones([count], device, group)], rank, group)


def gather_rows(rows: Tensor, of: Shares) -> Tensor:
    """(n, ...) of every rank, n as it may be -> (total, ...), without gradients where there are several."""
    if of.world == 1:
        return rows
    rows, most = rows.detach(), max(of.counts)
    padded = torch.zeros((most, *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in of.counts]
    if padded.numel():
        dist.all_gather(gathered, padded, group=of.group)
    return torch.cat([each[:count] for each, count in zip(gathered, of.counts, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, of):
        ctx.of = of
        return gather_rows(rows, of)

    @staticmethod
    def backward(ctx, grad):
        everyone = total(grad.to(compute_dtype(grad.dtype)), ctx.of.group)  # what every rank wants of every row
        first = ctx.of.first()
        return everyone[first : first + ctx.of.counts[ctx.of.rank]].to(grad.dtype), None


def gather_rows_with_grad(rows: Tensor, of: Shares) -> Tensor:
    """(n, ...) of every rank -> (total, ...); a row's gradient is the sum of what all ranks ask of it.

    Backward is a collective, so every rank's result requires a gradient, whether its rows do or not.
    """
    if of.world == 1:
        return rows
    return _GatherRows.apply(rows if rows.requires_grad else rows.detach().requires_grad_(), of)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        value = value.detach().clone(memory_format=torch.contiguous_format)
        if value.numel():
            dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx, grad):
        return total(grad, ctx.group), None


def total(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The sum over all ranks, the same on each; the gradient is the sum of what all ranks ask of it."""
    return value if rank_and_world(group)[1] == 1 else _Total.apply(value, group)


class _Averaged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, group):
        ctx.group = group
        return value.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return total(grad, ctx.group) / dist.get_world_size(ctx.group), None


def averaged(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The same value, whose gradient becomes the mean over all ranks: what DistributedDataParallel makes of it."""
    return value if rank_and_world(group)[1] == 1 else _Averaged.apply(value, group)
