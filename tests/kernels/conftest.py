"""Uninitialised memory is NaN in every test here, so that an element nobody wrote cannot pass by luck; and it lies
between sentinels, as zeros do, so that a write beyond the end shows."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `from tolerance import assert_as_good_as_naive`
from guards import Guarded


@pytest.fixture
def unpoisoned():
    """Ask for this where torch.compile must trace the real functions."""


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch, request):
    """torch.empty, empty_like, empty_strided and new_empty return NaN (a huge negative for integers); these and zeros
    lie between sentinels, which are looked at in the end."""
    if "unpoisoned" in request.fixturenames:
        yield
        return
    guarded = Guarded()
    for owner, names, poisoned in (
        (torch, ("empty", "empty_like", "empty_strided"), True),
        (torch.Tensor, ("new_empty",), True),
        (torch, ("zeros", "zeros_like"), False),
        (torch.Tensor, ("new_zeros",), False),
    ):
        for name in names:
            real = getattr(owner, name)
            monkeypatch.setattr(
                owner, name, lambda *a, _real=real, _p=poisoned, **k: guarded.between(_real(*a, **k), _p)
            )
    yield
    guarded.check()
