"""Negatives by index or by seed: forward and backward of the mean loss."""

import pytest

from benchmarks import cases
from benchmarks.cases import Case

RESOLUTION_MB = 4  # of resident memory: pages, thread stacks, the odd library


@pytest.mark.parametrize("case", cases.for_cpu("sampled"), ids=lambda case: case.name)
def test_sampled(case, race):
    record = race(case)
    measured = Case.from_json(record["case"])
    allowed = (measured.input_bytes + measured.gradient_bytes + measured.scores_bytes) / 1e6 + RESOLUTION_MB
    extra = {row["provider"]: row["extra_mb"] for row in record["rows"] if row.get("extra_mb") is not None}
    if "ours: cpp" in extra:
        assert extra["ours: cpp"] <= allowed, "more than inputs, gradients and N x (S + 1) floats"
