"""All candidates are negatives: forward and backward of the mean loss."""

import pytest

from benchmarks import cases


@pytest.mark.parametrize("case", cases.for_cpu("dense"), ids=lambda case: case.name)
def test_dense(case, race):
    race(case)
