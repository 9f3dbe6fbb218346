"""What every drop-in asks of its arguments, in the words of the package that it stands in for."""

import math
from numbers import Real

import torch
from torch import Tensor

from cpc_kernels.arguments import compute_dtype, need_tensors


def check_tensors(loss: str, **given: Tensor) -> None:
    """Raises TypeError or ValueError unless these are floating-point tensors of one device and, where autocast does not
    unite them, of one dtype.

    >>> check_tensors("ClipLoss", image_features=torch.ones(2, 3), text_features=torch.ones(2, 3, dtype=torch.half))
    Traceback (most recent call last):
    TypeError: ClipLoss: text_features must have the dtype of image_features. Got torch.float16 and torch.float32.
    """
    need_tensors(loss, **given)
    lead, first = next(iter(given.items()))
    for name, value in given.items():
        if not value.is_floating_point():
            raise TypeError(f"{loss}: {name} must be floating point. Got {value.dtype}.")
        if value.device != first.device:
            raise ValueError(f"{loss}: {name} must be on the device of {lead}. Got {value.device} and {first.device}.")
        united = value.device.type != "meta" and torch.is_autocast_enabled(value.device.type)
        united = united and torch.float64 not in (value.dtype, first.dtype)  # which autocast leaves as it is
        if value.dtype != first.dtype and not united:
            raise TypeError(f"{loss}: {name} must have the dtype of {lead}. Got {value.dtype} and {first.dtype}.")


def one_number(loss: str, name: str, value: object) -> float | Tensor:
    """A finite number, or a tensor of one element, which is not looked at: that might wait for a GPU.

    >>> one_number("InfoNCE", "temperature", torch.ones(3))
    Traceback (most recent call last):
    ValueError: InfoNCE: temperature must be a number or a tensor of one element. Got shape (3,).
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{loss}: {name} must be a number or a tensor of one element. Got shape {tuple(value.shape)}."
            )
        return value
    if isinstance(value, bool) or not isinstance(value, Real):  # NumPy's scalars are
        raise TypeError(f"{loss}: {name} must be a number or a tensor of one element. Got {value!r}.")
    if not torch.compiler.is_compiling() and not math.isfinite(value):  # there it may be any number
        raise ValueError(f"{loss}: {name} must be finite. Got {value}.")
    return float(value)


def inverse(loss: str, temperature: object) -> float | Tensor:
    """1 / temperature, what scores are multiplied by.

    >>> inverse("InfoNCE", 0.5)
    2.0
    """
    value = one_number(loss, "temperature", temperature)
    if isinstance(value, Tensor):  # of one element, whatever its shape; 16 bits would round the inverse
        value = value.reshape(()).to(compute_dtype(value.dtype))
    elif value == 0:
        raise ValueError(f"{loss}: temperature must not be 0; it divides.")
    return 1 / value
