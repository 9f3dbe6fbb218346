"""The simulation of the ring, where its answer is known."""

import json

import pytest

from benchmarks.ranks import FOLDER, Machine, predicted_seconds, sent_bytes, simulate

INSTANT = Machine(flops=1e12, link=1e30, latency=0)


def test_nothing_waits_on_an_instant_link():
    step = simulate([100] * 8, 64, INSTANT)
    assert step.total == pytest.approx(8 * 800 * 100 * 64 / 1e12)
    assert step.exposed == pytest.approx(0, abs=1e-9)


def test_a_slow_link_is_all_there_is():
    slow = Machine(flops=1e30, link=1e9, latency=0)
    step = simulate([100] * 8, 64, slow)
    assert step.total == pytest.approx(sent_bytes(100, 64, 8) / 1e9)
    assert step.total == pytest.approx(step.link)
    assert step.exposed == pytest.approx(1)


def test_the_threshold_of_the_page():
    """Above rate / (2 link) anchors forward hides, above three times as many backward does too."""
    each = Machine(flops=1e12, link=1e9, latency=0)  # 500 and 1500
    assert simulate([1600] * 64, 32, each).exposed < 0.02
    assert simulate([1200] * 64, 32, each).exposed > 0.05
    assert simulate([400] * 64, 32, each).exposed > 0.5


def test_uneven_ranks_wait_for_the_largest():
    each = Machine(flops=1e12, link=1e10, latency=1e-6)
    even, almost = simulate([1000] * 4, 64, each), simulate([1000, 1000, 1000, 999], 64, each)
    assert almost.total == pytest.approx(even.total, rel=5e-3)
    assert simulate([3997, 1, 1, 1], 64, INSTANT).total > simulate([1000] * 4, 64, INSTANT).total
    assert simulate([100], 64, each).total == pytest.approx(8 * 100 * 100 * 64 / 1e12)
    assert simulate([4000, 0, 0, 0], 64, each).total > 0


def test_the_simulation_is_near_what_was_measured():
    """Between the processes of one machine, that is; and in the ring a rank's memory falls as ranks rise."""
    files = sorted(FOLDER.glob("*.json"))
    assert files
    for file in files:
        told = json.loads(file.read_text())
        for row in told["measured"][1:]:
            assert 0.9 < row["seconds"] / predicted_seconds(told, row) < 1.25, (file.stem, row)
        peaks = [row["peak"] for row in told["measured"] if row["exchange"] != "gathered"]
        assert peaks == sorted(peaks, reverse=True), file.stem
