"""The spec against the published Greedy InfoMax loss, against arithmetic by hand, and against itself."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cpc_kernels import reference

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "greedy_infomax_infonce.npz"


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_greedy_infomax_golden(case):
    if not GOLDEN.exists():
        pytest.skip(f"the golden file is not beside this checkout: {GOLDEN}")
    golden = np.load(GOLDEN)
    _batch, _features, _h, _w, steps, count, skip = golden[f"{case}.meta"].tolist()
    z, c, weights = (torch.tensor(golden[f"{case}.{name}"], requires_grad=True) for name in ("z", "c", "W"))
    drawn = [torch.tensor(golden[f"{case}.idx{k}"]).long().view(-1, count) for k in range(1, steps + 1)]
    loss = reference.greedy_infomax(z, c, weights, drawn, skip=skip, eps=1e-11)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(golden[f"{case}.loss"]), rtol=1e-9, atol=0)
    for name, tensor in (("dz", z), ("dc", c), ("dW", weights)):
        truth = torch.tensor(golden[f"{case}.{name}"])
        torch.testing.assert_close(tensor.grad, truth, rtol=1e-9, atol=1e-9 * float(truth.abs().max()))


def test_cpc_composition_is_greedy_infomax():
    """The bilinear form with W_k on the contexts' side is the published form with W_k on the latents' side."""
    torch.manual_seed(0)
    b, features, h, w, count, skip = 2, 5, 6, 3, 4, 1
    z, c = torch.randn(2, b, features, h, w, dtype=torch.float64)
    weights = torch.randn(2, features, features, dtype=torch.float64)
    drawn = [torch.randint((h - k - skip) * w * b, ((h - k - skip) * w * b, count)) for k in (1, 2)]
    truth = reference.greedy_infomax(z, c, weights, drawn, skip=skip)
    total = 0
    pool = z.permute(2, 3, 0, 1).flatten(0, 2)
    for k in (1, 2):
        first = (k + skip) * w * b  # the step's predicted patches are the pool from here on
        contexts = c.permute(2, 3, 0, 1).flatten(0, 2)[: len(drawn[k - 1])]
        own = first + torch.arange(len(contexts))[:, None]
        transposed = weights[k - 1].T[None]
        total = total + reference.bilinear_info_nce(contexts, transposed, pool, own, drawn[k - 1] + first)
    torch.testing.assert_close(total / 2, truth, rtol=1e-12, atol=0)


def test_bilinear_over_all_candidates_is_dense():
    torch.manual_seed(0)
    contexts, weights, candidates = torch.randn(6, 3), torch.randn(2, 4, 3), torch.randn(7, 4)
    positives = torch.tensor([[0, 1], [1, 2], [2, -1], [3, 4], [4, 5], [6, 6]])
    rows = reference.bilinear_info_nce(contexts, weights, candidates, positives, reduction="none")
    for k in range(2):
        one = reference.info_nce(contexts @ weights[k].T, candidates, positives[:, k], reduction="none")
        torch.testing.assert_close(rows[:, k], one)


def test_by_hand():
    q = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    k = torch.tensor([[2.0, 1.0], [1.0, 5.0], [-1.0, 0.0]], dtype=torch.float64)
    scores = np.array([2.0, 1.0, -1.0])
    truth = -np.log(np.exp(scores[0]) / np.exp(scores).sum())
    assert float(reference.info_nce(q, k, torch.tensor([0]))) == pytest.approx(truth, rel=1e-14)
    own = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    truth = np.log(np.exp(3) + np.exp(scores).sum()) - 3
    assert float(reference.info_nce(q, k, own)) == pytest.approx(truth, rel=1e-14)
    repeated = torch.tensor([[1, 1, 0, -1]])
    truth = np.log(np.exp(2) + 2 * np.exp(1) + np.exp(2)) - 2
    value = reference.sampled_info_nce(q[:, None], k, torch.tensor([[0]]), repeated)
    assert float(value) == pytest.approx(truth, rel=1e-14)


def test_rows_that_do_not_count():
    q, k = torch.randn(3, 2, requires_grad=True), torch.randn(1, 2, requires_grad=True)
    positives = torch.tensor([0, -1, 0])
    loss = reference.info_nce(q, k, positives, reduction="none")
    assert loss.tolist() == [0, 0, 0]
    loss.sum().backward()
    assert not q.grad.any()
    assert not k.grad.any()
    assert reference.info_nce(q, k, torch.full((3,), -1)).item() == 0


def test_gradients():
    torch.manual_seed(0)
    q, k = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5))
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    positives = torch.tensor([0, -1, 4, 2])

    def loss(q, k, scale):
        return reference.info_nce(q, k, positives, scale=scale, reduction="none")

    torch.autograd.gradcheck(loss, (q, k, scale))
