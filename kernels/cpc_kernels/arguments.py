"""What every op asks of its arguments, in one voice, and the form of what it returns."""

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .capabilities import FAST_BF16

REDUCTIONS = ("none", "sum", "mean")  # their order is that of the C++


class InfoNCEStats(NamedTuple):
    """Per row: loss, log-sum-exp of the negatives' scores, positive's score, and how many negatives beat it."""

    loss: Tensor
    lse: Tensor
    positive: Tensor
    rank: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def spell(**tensors: Tensor) -> str:
    return "Got " + ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items()) + "."


def spell_other(name: str, value: object) -> str:
    """Of what is no tensor: its type, and what makes a tensor of it."""
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
        return f"Got {type(value).__name__}; write torch.stack({name})."
    listed = isinstance(value, (list, tuple)) or hasattr(value, "__array__")
    return f"Got {type(value).__name__}" + (f"; write torch.tensor({name})." if listed else ".")


def need_tensors(op: str, **given: object) -> None:
    """Before anything is asked of them."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor. {spell_other(name, value)}")
        if value.layout is not torch.strided or value.is_nested:
            kind = "a nested tensor; pad it" if value.is_nested else f"{value.layout}; write {name}.to_dense()"
            raise TypeError(f"{op}: {name} must be an ordinary, dense tensor. Got {kind}.")


def check_reduction(op: str, reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be none, sum or mean. Got {reduction!r}.")


def check_types(op: str, anchors: Tensor, impl: str, impls: tuple[str, ...], reduction: str, **others: Tensor) -> None:
    """What both ops ask of their arguments."""
    if impl not in impls:
        raise ValueError(f"{op}: impl must be one of {', '.join(impls)}. Got {impl!r}.")
    check_reduction(op, reduction)
    if not anchors.is_floating_point():
        raise TypeError(f"{op}: anchors must be floating point. Got {anchors.dtype}.")
    for name, tensor in others.items():
        if tensor.is_floating_point() and tensor.dtype != anchors.dtype:
            raise TypeError(
                f"{op}: {name} must have the anchors' dtype (or run under autocast). "
                f"Got anchors {anchors.dtype}, {name} {tensor.dtype}."
            )
        if tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise TypeError(f"{op}: {name} cannot be {tensor.dtype}.")
        if tensor.device != anchors.device:
            raise ValueError(
                f"{op}: {name} must be on the anchors' device. "
                f"Got anchors on {anchors.device}, {name} on {tensor.device}."
            )


def check_ids(
    op: str, name: str, ids: Tensor | None, size: int, other: Tensor | None, other_name: str, device: torch.device
) -> None:
    if ids is None:
        if other is not None:
            raise ValueError(f"{op}: {other_name} was given without {name}; ids are given for both or for neither.")
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor. {spell_other(name, ids)}")
    if ids.device != device:
        raise ValueError(f"{op}: {name} must be on the anchors' device. Got {ids.device}, anchors on {device}.")
    if ids.is_floating_point() or ids.ndim != 1 or ids.shape[0] != size:
        raise ValueError(f"{op}: {name} must be ({size},) integers. Got {tuple(ids.shape)} {ids.dtype}.")


def check_indices(op: str, what: str, indices: Tensor, size: int, lowest: int = -1, pool: str = "candidates") -> None:
    """On the CPU, where looking is free."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < lowest or high >= size:
        where = "the pool has" if pool == "pool" else f"{pool} have"
        ignored = "; -1 is ignored" if lowest < 0 else ""
        raise IndexError(
            f"{op}: {what} must lie between {lowest} and {size - 1} ({where} {size} rows{ignored}). "
            f"Got values from {low} to {high}."
        )


def need_finite(op: str, scale: float | Tensor, dtype: torch.dtype) -> None:
    """In the compute dtype. Not of a tensor, as looking may wait for a GPU, nor under compile, where it may be any."""
    if not isinstance(scale, (int, float)) or torch.compiler.is_compiling():
        return
    if isinstance(scale, float) and not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite. Got {scale}.")
    if abs(scale) > (most := torch.finfo(dtype).max):
        got = scale if isinstance(scale, float) else "a whole number beyond that"
        raise ValueError(f"{op}: scale must be within {most:.3g}, as {dtype} is. Got {got}.")


def plain_number(scale: float | Tensor) -> float | Tensor:
    """NumPy's scalars as Python's."""
    known = isinstance(scale, (int, float, Tensor)) or torch.compiler.is_compiling()
    return float(scale) if not known and isinstance(scale, Real) else scale


def scale_tensor(op: str, scale: float | Tensor, anchors: Tensor) -> Tensor:
    """(1,) in the compute dtype, differentiable when scale is a tensor."""
    dtype = compute_dtype(anchors.dtype)
    scale = plain_number(scale)
    if not isinstance(scale, Tensor):
        if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{op}: scale must be a number or a tensor of one element. Got {scale!r}.")
        need_finite(op, scale, dtype)
        scale = float(scale) if isinstance(scale, int) else scale
        return torch.full((1,), scale, dtype=dtype, device=anchors.device)
    if scale.numel() != 1 or scale.is_complex():
        got = f"{scale.dtype}" if scale.is_complex() else f"shape {tuple(scale.shape)}"
        raise ValueError(f"{op}: scale must be a number or a tensor of one element. Got {got}.")
    return scale.reshape(1).to(device=anchors.device, dtype=dtype)


def autocast(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Under autocast, floats take its dtype; on a CPU that is slow at it, float32, which is exact for both."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cpu" and not (dtype == torch.bfloat16 and FAST_BF16.available):
        dtype = torch.float32
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def own_vectors(positives: Tensor, candidates: Tensor, past: bool = False) -> Tensor:
    """The positives as vectors (..., D), whichever way they were given.

    past: an index past the candidates, which nobody refuses on a GPU, reads the last one. The row's loss is NaN;
    reading on would end the process.
    """
    if positives.is_floating_point():
        return positives
    if len(candidates) == 0:
        return candidates.new_zeros(*positives.shape, candidates.shape[1])
    return candidates[positives.clamp(0, len(candidates) - 1 if past else None)]


def count_active(positives: Tensor) -> Tensor | int:
    """How many rows the mean is over, at least 1."""
    if positives.is_floating_point():
        return max(positives.shape[:-1].numel(), 1)
    return (positives >= 0).sum().clamp(min=1)


def reduce(loss: Tensor, positives: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / count_active(positives)
