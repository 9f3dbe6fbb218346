"""The watch over memory finds what it is there for: one kernel for each fault."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, and nobody watches there")


@triton.jit
def double(p_in, p_out, n, REACH: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < n if MASKED else o_n >= 0
    b_x = tl.load(p_in + o_n + REACH, mask=m_n & (o_n + REACH >= 0), other=0.0)
    tl.store(p_out + o_n // STEP, b_x * 2, mask=m_n)


@triton.jit
def count(p_out, p_told, READ: tl.constexpr, BN: tl.constexpr):
    tl.atomic_add(p_out + tl.arange(0, BN), 1.0)
    if READ:
        tl.store(p_told + tl.program_id(0), tl.load(p_out))


def run(n=64, *, place=None, reach=0, step=1, masked=True):
    x = torch.rand(n)
    double[(2,)](x, torch.empty(n) if place is None else x, n, REACH=reach, STEP=step, MASKED=masked, BN=32)


def test_what_is_allowed_passes():
    run()
    run(50)
    run(place="in")
    count[(3,)](torch.zeros(16), torch.zeros(3), READ=False, BN=16)


@pytest.mark.parametrize(("fault", "told"), [
    ({"reach": 1}, "load of 1 elements outside of its arrays, the first 0 bytes from an end"),
    ({"n": 50, "masked": False}, "outside of its arrays"),
    ({"step": 2}, "double writes 32 elements more than once"),
    ({"place": "in", "reach": -1}, "double reads 1 elements that it may have written"),
])  # fmt: skip
def test_faults_are_found(fault, told):
    with pytest.raises(Exception, match=told):
        run(**fault)


def test_reading_what_others_add_to_is_found():
    with pytest.raises(AssertionError, match="count reads and adds to 1 elements"):
        count[(2,)](torch.zeros(16), torch.zeros(2), READ=True, BN=16)
