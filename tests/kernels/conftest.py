"""Uninitialised memory is NaN in every test here, so that an element nobody wrote cannot pass by luck."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # `from tolerance import assert_as_good_as_naive`


def poison(tensor):
    if tensor.is_floating_point() and tensor.layout == torch.strided and tensor.device.type != "meta":
        tensor.fill_(float("nan"))
    elif tensor.dtype in (torch.int32, torch.int64) and tensor.device.type != "meta":
        tensor.fill_(torch.iinfo(tensor.dtype).min // 3)
    return tensor


@pytest.fixture
def unpoisoned():
    """Ask for this where torch.compile must trace the real functions."""


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch, request):
    """torch.empty, empty_like and empty_strided return NaN (a huge negative for integers)."""
    if "unpoisoned" in request.fixturenames:
        return
    for name in ("empty", "empty_like", "empty_strided"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _real=real, **k: poison(_real(*a, **k)))
    real_new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poison(real_new(*a, **k)))
