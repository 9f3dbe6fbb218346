"""The better the model, the smaller the loss; its gradient must not become noise. bf16 inputs, against float64.

What computes 1 - p loses its digits as p nears 1: kernels/README.md says why ours does not.
"""

import pytest
import torch
from torch.nn import functional as F

from cpc_kernels import chunked_info_nce
from cpc_kernels.capabilities import find_triton
from cpc_kernels.ring_info_nce import backward_block, forward_block

TRITON = find_triton()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy

# how far the positive stands out, and the loss that this makes
TABLE = [(0.0, 3.4), (11.5, 1.3e-3), (23.0, 9e-8), (41.0, 7e-14)]
# Of the relative error of dq: with float32 all through, 3e-6 was measured; where P is rounded to bf16 once, for matrix
# units or for pairs of bf16 on a CPU, 4e-4 (in C++): each weight errs by up to 2^-9, and O by a mean of them.
LIMIT, ROUNDED = 1e-5, 1e-3


def problem(margin):
    """32 anchors of unit length, 48 candidates of which row i's own is q_i margin / scale, and noise; scale 10."""
    g = torch.Generator().manual_seed(1)
    q = F.normalize(torch.randn(32, 64, generator=g), dim=1).bfloat16()
    k = F.normalize(torch.randn(48, 64, generator=g), dim=1)
    k[:32] = k[:32] * (margin == 0) + q.float() * margin / 10
    return q.to(DEVICE), k.bfloat16().to(DEVICE), torch.arange(32, device=DEVICE)


def exact(q, k, p):
    """The loss and dq of its sum, in float64."""
    scores = 10 * q.double() @ k.double().T
    others = scores.scatter(1, p[:, None], -torch.inf)
    gap = others.logsumexp(1) - scores.gather(1, p[:, None])[:, 0]
    w, share = (torch.sigmoid(gap) * 10)[:, None], others.softmax(1)
    pulls = (w * share).scatter(1, p[:, None], -w)
    return F.softplus(gap), w * (share @ k.double() - k[p].double()), pulls.T @ q.double()


def wrong(ours, true):
    return float((ours.double() - true).norm() / true.norm())


def judge(impl, margin, size, dtype, limit):
    """Loss, dq and dk of one row of the table; the products are of bf16 numbers, in `dtype`."""
    q, k, p = problem(margin)
    true_loss, true, true_dk = exact(q, k, p)
    assert size / 3 < float(true_loss.median()) < size * 3, float(true_loss.median())
    scale = torch.tensor([10.0], device=DEVICE)
    loss, lse, _, _, o = forward_block(impl, q.to(dtype), k.to(dtype), p, scale, None, None, True)
    w = -torch.expm1(-loss) * scale
    dq = w[:, None] * (o - k[p].float())
    dk = backward_block(impl, w, lse, q.to(dtype), k.to(dtype), p, scale, None, None)
    assert wrong(loss, true_loss) < 2e-5
    assert wrong(dq, true) < limit
    # w P is rounded to bf16 where P is, and dk with it
    assert wrong(dk, true_dk) < (limit if limit == LIMIT else limit + 2**-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("margin", "size"), TABLE)
def test_gradients_of_small_losses_in_torch(monkeypatch, margin, size, dtype):
    monkeypatch.setattr(chunked_info_nce, "in_cpp", lambda *_: None)
    judge("chunked", margin, size, dtype, LIMIT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("margin", "size"), TABLE)
def test_gradients_of_small_losses_in_cpp(margin, size, dtype):
    q, k, p = problem(margin)
    taken = chunked_info_nce.in_cpp(q.to(dtype), k.to(dtype), p, torch.ones(1), None, None)
    if taken is None:
        pytest.skip(f"the C++ kernels take no {dtype} here")
    judge("chunked", margin, size, dtype, ROUNDED if taken[0][0].dtype == torch.bfloat16 else LIMIT)


@pytest.mark.skipif(not TRITON.available, reason=TRITON.reason)
@pytest.mark.parametrize(("margin", "size"), TABLE)
def test_gradients_of_small_losses_in_triton(margin, size):
    judge("triton", margin, size, torch.bfloat16, ROUNDED)


def test_what_others_compute_is_noise_by_then():
    """So that the table above shows something: cross entropy of the scores, in float32 even."""
    q, k, p = problem(TABLE[-1][0])
    leaf = q.float().requires_grad_()
    F.cross_entropy(10 * leaf @ k.float().T, p, reduction="sum").backward()
    assert wrong(leaf.grad, exact(q, k, p)[1]) > 0.5
