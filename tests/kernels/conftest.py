"""Uninitialised memory is NaN in every test here, so that an element nobody wrote cannot pass by luck; and it lies
between sentinels, as zeros do, so that a write beyond the end shows."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `from tolerance import assert_as_good_as_naive`
from guards import Guarded, poison


@pytest.fixture
def unpoisoned():
    """Ask for this where torch.compile must trace the real functions."""


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch, request):
    """torch.empty, empty_like, empty_strided and new_empty return NaN (a huge negative for integers). In the tests of
    Triton kernels, whose launchers allocate what is written, these and zeros lie between sentinels, which are looked at
    in the end; elsewhere torch.func and opcheck would stumble over arrays that do not begin where their storage does.
    """
    if "unpoisoned" in request.fixturenames:
        yield
        return
    guarded = Guarded()
    between = guarded.between if "triton" in request.module.__name__ else None
    for owner, names, poisoned in (
        (torch, ("empty", "empty_like", "empty_strided"), True),
        (torch.Tensor, ("new_empty",), True),
        (torch, ("zeros", "zeros_like"), False),
        (torch.Tensor, ("new_zeros",), False),
    ):
        for name in names if between or poisoned else ():
            real = getattr(owner, name)

            def allocate(*a, _real=real, _poisoned=poisoned, **k):
                tensor = between(_real(*a, **k)) if between else _real(*a, **k)
                return poison(tensor) if _poisoned else tensor

            monkeypatch.setattr(owner, name, allocate)
    yield
    guarded.check()


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Every address that an interpreted kernel touches is looked at: see traffic.py."""
    if importlib.util.find_spec("triton") and "TRITON_INTERPRET" in os.environ:
        from traffic import Traffic

        Traffic(monkeypatch)


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def level(request):
    """Each instruction set of the C++ that this CPU has."""
    best = torch.ops.cpc_kernels_cpu.instruction_set()
    try:
        torch.ops.cpc_kernels_cpu.use_instruction_set(request.param)
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    yield
    torch.ops.cpc_kernels_cpu.use_instruction_set(best)
