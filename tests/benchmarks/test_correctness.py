"""The matrix passes what float32 can do and fails what is wrong; a lost device is not taken for a wrong kernel."""

from dataclasses import replace

import pytest
import torch

from benchmarks import correctness
from benchmarks.correctness import Probe

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# lse of hundreds, and gradients that are 0 but for rounding
HARD = [
    Probe("dense", 37, 45, 17, scale=100.0),
    Probe("sampled", 37, 45, 17, k=5, s=9, scale=100.0),
    Probe("sampled", 37, 45, 1, s=7),
    Probe("sampled", 5, 1, 17, s=7),
    Probe("sampled", 1, 1, 17, s=7),
]


def alter(monkeypatch, impl, index, change, of="compute"):
    """From now on that one of an implementation's results is changed."""
    compute = getattr(correctness, of)

    def altered(probe, made, device, dtype, by):
        found = compute(probe, made, device, dtype, by)
        return [change(x) if by == impl and i == index else x for i, x in enumerate(found)]

    monkeypatch.setattr(correctness, of, altered)


@pytest.mark.parametrize("probe", HARD, ids=lambda probe: probe.name)
def test_what_float32_can_do_passes(probe):
    assert set(HARD) <= set(correctness.probes())
    for impl in ("triton", "chunked" if probe.op == "dense" else "gather"):
        told = correctness.check(probe, DEVICE, impl)
        assert told["status"] == "passed", told


@pytest.mark.parametrize("probe", HARD[:3], ids=lambda probe: probe.name)
@pytest.mark.parametrize("index", range(4))
def test_one_per_cent_too_much_fails(monkeypatch, probe, index):
    impl = "chunked" if probe.op == "dense" else "gather"
    alter(monkeypatch, impl, index, lambda x: 1.01 * x)
    told = correctness.check(probe, DEVICE, impl)
    assert told["status"] == "failed", told
    assert told["why"] == f"{correctness.NAMES[index]} is off"


@pytest.mark.parametrize("index", range(4))
def test_statistics_that_are_wrong_fail(monkeypatch, index):
    name, compute = ("loss", "lse", "positive", "rank")[index], correctness.compute_stats
    for change in (lambda x: 1.01 * x + 2, *[lambda x: x * torch.nan] * (name != "rank")):
        monkeypatch.setattr(correctness, "compute_stats", compute)
        alter(monkeypatch, "chunked", index, change, of="compute_stats")
        told = correctness.check(HARD[0], DEVICE, "chunked")
        assert told["status"] == "failed", told
        assert told["why"] == f"{name} is off"


def test_a_gradient_where_there_is_none_fails(monkeypatch):
    alter(monkeypatch, "gather", 2, lambda x: x + 1e-4)
    assert correctness.check(HARD[3], DEVICE, "gather")["why"] == "dk is off"


def test_bfloat16_is_held_to_its_rounding(monkeypatch):
    probe = replace(HARD[0], scale=1.0, dtype="bfloat16")
    assert correctness.check(probe, DEVICE, "chunked")["status"] == "passed"
    alter(monkeypatch, "chunked", 2, lambda x: 1.03 * x)
    assert correctness.check(probe, DEVICE, "chunked")["why"] == "dk is off"


def test_a_lost_device_ends_its_process(monkeypatch):
    def broken(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(correctness, "compute", broken)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert correctness.check(HARD[0], torch.device("cuda"))["status"] == "raised"  # the next probe can be served
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        correctness.check(HARD[0], torch.device("cuda"))
