"""Rows of every process, in rank order, with or without the way back."""

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) where torch.distributed is not in use."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_rows(rows: Tensor) -> Tensor:
    """(n, D) of every process -> (world n, D), without gradients. Every process must hold as many rows."""
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.detach().contiguous())
    return torch.cat(gathered)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows):
        return gather_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = grad.contiguous().clone()
        dist.all_reduce(total)  # what every process wants of every row
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows_with_grad(rows: Tensor) -> Tensor:
    """(n, D) of every process -> (world n, D); a row's gradient is the sum of what all processes ask of it."""
    return _GatherRows.apply(rows)  # type: ignore[return-value]
