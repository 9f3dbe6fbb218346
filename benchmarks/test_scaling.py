"""Time and memory as N, M, S, K and D grow by factors of two, with the fitted exponents; memory is linear in N + M."""

from dataclasses import replace
from itertools import takewhile

import pytest

from benchmarks import measure, providers
from benchmarks.cases import Case
from benchmarks.conftest import DEVICE

DENSE = Case("", 2048, 2048, 64)
SAMPLED = Case("", 2048, 4096, 128, k=2, s=16)
SWEEPS = {
    "dense, N": [replace(DENSE, n=n) for n in (1024, 2048, 4096, 8192)],
    "dense, M": [replace(DENSE, m=m) for m in (1024, 2048, 4096, 8192)],
    "dense, N = M": [replace(DENSE, n=n, m=n) for n in (1024, 2048, 4096, 8192)],
    "dense, D": [replace(DENSE, d=d) for d in (32, 64, 128, 256)],
    "sampled, N": [replace(SAMPLED, n=n) for n in (2048, 4096, 8192, 16384)],
    "sampled, M": [replace(SAMPLED, m=m) for m in (4096, 8192, 16384, 32768)],
    "sampled, S": [replace(SAMPLED, s=s) for s in (16, 32, 64, 128)],
    "sampled, K": [replace(SAMPLED, k=k) for k in (2, 4, 8, 16)],
    "sampled, D": [replace(SAMPLED, d=d) for d in (64, 128, 256, 512)],
}
EAGER_MB = 1500  # what the other side may gather or multiply out


@pytest.mark.parametrize("name", SWEEPS)
def test_scaling(name, benchmark, ledger, tiny):
    sweep = [case.tiny() for case in SWEEPS[name]][:2] if tiny else SWEEPS[name]
    axis = name.split(", ")[1]
    sizes = [getattr(case, axis[0].lower()) for case in SWEEPS[name]][: len(sweep)]
    eager = "eager" if sweep[0].op == "dense" else "eager gather"
    races: list[tuple[Case, measure.Race]] = []

    def run():
        for case in sweep:
            small = (case.scores_bytes if case.op == "dense" else case.gathered_bytes) < EAGER_MB * 1e6 / 4
            wanted = {"ours: chunked", "ours: cpp", "ours: gather"} | ({eager} if small else set())
            race = measure.Race(case, DEVICE, 1, only=lambda provider, wanted=wanted: provider.name in wanted)
            race.run()
            races.append((case, race))

    benchmark.pedantic(run, rounds=1)
    told: dict = {"axis": axis, "sizes": sizes, "environment": measure.environment(DEVICE), "series": {}}
    for provider in providers.PROVIDERS[sweep[0].op]:
        rows = [row for _, race in races for row in race.rows() if row["provider"] == provider.name]
        rows = list(takewhile(lambda row: "median_ms" in row, rows))  # behind a gap, sizes would be another's
        if len(rows) < 2:
            continue
        series = {"ms": [row["median_ms"] for row in rows], "extra_mb": [row.get("extra_mb") for row in rows]}
        x = sizes[: len(rows)]
        # the last three doublings: small sizes are all overhead
        series["time_exponent"] = measure.exponent(x[-3:], series["ms"][-3:])
        if None not in series["extra_mb"]:
            series["memory_exponent"] = measure.exponent(x[-3:], series["extra_mb"][-3:])
        told["series"][provider.name] = series
    told["scores_mb"] = [case.scores_bytes / 1e6 for case in sweep]
    ledger.add("scaling", name, told)
    if tiny:
        return
    for provider, series in told["series"].items():
        if provider in ("ours: chunked", "ours: cpp") and axis in ("N", "M", "N = M"):
            assert series.get("memory_exponent", 0) <= 1.15, f"{name}: the memory of {provider} is not linear"
