"""Options, the results file and the table at the end of `pytest benchmarks --benchmark-only`.

--tiny      small shapes: does it run, not how fast
--results   where <device>.json goes (default: benchmarks/results; with --tiny: nowhere)
"""

import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks import ledger as ledgers
from benchmarks import measure
from benchmarks.cases import Case

DEVICE = torch.device("cpu")
SECONDS = 8  # of timed rounds, per case


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption("--tiny", action="store_true", help="small shapes: does it run, not how fast")
    group.addoption("--results", type=Path, help="folder of <device>.json (default: benchmarks/results)")


def pytest_configure(config):
    # the table below says what pytest-benchmark's own would say, beside the others
    if not config.getoption("benchmark_save", None):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]


@pytest.fixture(scope="session")
def tiny(request) -> bool:
    return request.config.getoption("--tiny")


@pytest.fixture(scope="session")
def ledger(request, tiny):
    folder = request.config.getoption("--results") or (
        Path(tempfile.mkdtemp(prefix="cpc_fast_benchmarks")) if tiny else ledgers.RESULTS
    )
    environment = measure.environment(DEVICE)
    book = ledgers.Ledger(folder / f"{ledgers.slug(environment['device'])}.json", environment)
    request.config.stash[BOOK] = book
    return book


@pytest.fixture(scope="session")
def ceilings(ledger, tiny):
    """Copy and matrix product, measured in the session that uses them."""
    found = measure.ceilings(DEVICE, small=tiny)
    ledger.add("ceilings", None, found | {"environment": ledger.told["environment"]})
    return found


@pytest.fixture
def race(benchmark, ledger, ceilings, tiny):
    """Times a case: ours by pytest-benchmark, everybody else in the same rounds, just before."""

    def run(case: Case) -> dict:
        shown = case.tiny() if tiny else case
        running = measure.Race(
            shown, DEVICE, 1 if tiny else SECONDS, only=lambda provider: not (tiny and provider.compiles)
        )
        assert running.base is not None, (
            f"none of ours ran: {[(lane.provider.name, lane.why) for lane in running.lanes]}"
        )
        benchmark.pedantic(running.ours, setup=running.others, rounds=running.rounds)
        if benchmark.stats is not None:
            running.base.samples = {i: 1e3 * seconds for i, seconds in enumerate(benchmark.stats.stats.data)}
        record = running.record(ceilings)
        if benchmark.stats is not None:
            ledger.add("cases", case.name, record)
        ours = [row for row in record["rows"] if row["ours"]]
        assert not [row for row in ours if row["status"] in ("wrong", "failed")], ours
        return record

    return run


BOOK: pytest.StashKey[ledgers.Ledger] = pytest.StashKey()


@pytest.hookimpl(trylast=True)  # ours is the last word
def pytest_terminal_summary(terminalreporter, config):
    book = config.stash.get(BOOK, None)
    if book is None or not book.touched:
        return
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(book.table())
    terminalreporter.write_line(f"\nRatios are to ours (the first row of a case). Written to {book.path}.")
    terminalreporter.write_line(
        "Open next: `python -m benchmarks.report` puts this into README.md and docs/performance.md."
    )
