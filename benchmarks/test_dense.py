"""All candidates are negatives: forward and backward of the mean loss."""

import pytest

from benchmarks import cases
from cpc_kernels.capabilities import FAST_BF16


@pytest.mark.parametrize("case", cases.for_cpu("dense"), ids=lambda case: case.name)
def test_dense(case, race):
    if case.dtype == "bfloat16" and not FAST_BF16.available:
        pytest.skip(f"float32 is the fast one here: {FAST_BF16.reason}")
    race(case)
