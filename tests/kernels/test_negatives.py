"""The seeded draw against a literal Philox, on the published vectors, and against its own promises."""

import itertools

import numpy as np
import pytest
import torch

from cpc_kernels import Negatives, draw_negatives
from cpc_kernels.capabilities import CPP
from cpc_kernels.negatives import philox

# Known answers published with the generator (kat_vectors): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def literal_philox(counter, key):
    c, k = list(counter), list(key)
    for _ in range(10):
        x, y = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(y >> 32) ^ c[1] ^ k[0], y % 2**32, (x >> 32) ^ c[3] ^ k[1], x % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def literal_draw(seed, n, k, s, base, size):
    seed %= 2**64
    u = literal_philox((s // 4, n, k, 0), (seed % 2**32, seed >> 32))[s % 4]
    return u % size if base is None else (base + 1 + u % (size - 1)) % size


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_known_answers(counter, key, output):
    assert literal_philox(counter, key) == output
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(w) for w in words) == output


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("indexed", [True, False])
def test_draw_is_the_literal_draw(per_step, seed, indexed):
    n, k, s, size = 3, 2, 7, 11
    positives = torch.tensor([[4, 5], [10, 0], [-1, 3]])
    drawn = draw_negatives(Negatives(s, seed, per_step), positives if indexed else None, size, n, k)
    assert drawn.shape == ((n, k, s) if per_step else (n, s))
    for row, step, draw in itertools.product(range(n), range(k if per_step else 1), range(s)):
        base = max(int(positives[row, step]), 0) if indexed else None
        truth = literal_draw(seed, row, step, draw, base, size)
        assert int((drawn[row, step] if per_step else drawn[row])[draw]) == truth


def test_large_pool_and_tensor_seed():
    size = 2**31 - 1
    positives = torch.tensor([size - 1, 0])
    drawn = draw_negatives(Negatives(9, torch.tensor([123]), False), positives, size, 2)
    assert torch.equal(drawn, draw_negatives(Negatives(9, 123), positives, size, 2))
    assert [int(d) for d in drawn[0]] == [literal_draw(123, 0, 0, s, size - 1, size) for s in range(9)]


def test_never_the_positive_and_all_the_others():
    positives = torch.arange(5)
    drawn = draw_negatives(Negatives(200, 1), positives, 5, 5)
    assert not (drawn == positives[:, None]).any()
    counts = torch.stack([torch.bincount(row, minlength=5) for row in drawn])
    assert (counts.sum(1) == 200).all()
    assert int(counts[~torch.eye(5, dtype=torch.bool)].min()) > 20


def test_nothing_to_draw():
    assert (draw_negatives(Negatives(3, 0), torch.tensor([0, 0]), 1, 2) == -1).all()
    assert (draw_negatives(Negatives(3, 0), None, 0, 2) == -1).all()
    assert draw_negatives(Negatives(0, 0), None, 5, 2).shape == (2, 0)


@pytest.mark.skipif(not CPP.available, reason=CPP.reason)
@pytest.mark.parametrize("size", [2, 3, 1000, 50_021])
@pytest.mark.parametrize("indexed", [True, False])
def test_cpp_draws_the_same(size, indexed):
    """With one-hot features the gradient of the pool shows which candidates were drawn, and how often."""
    n, s = 4, 150
    anchors = torch.ones(n, 1, 1)
    pool = torch.zeros(size, 1)
    positives = torch.randint(0, size, (n, 1)) if indexed else torch.zeros(n, 1, 1)
    arguments = (anchors, pool, positives, None, -987654321987654321, s, False, 1.0, None, None)
    _, lse, positive, _, probabilities = torch.ops.cpc_kernels_cpu.sampled_forward(*arguments, True, False)
    for row in range(n):
        grad = torch.zeros(n, 1)
        grad[row] = s * (1 + (positive - lse)[row].exp())  # dloss / dlse = s
        gradient = torch.ops.cpc_kernels_cpu.sampled_backward(
            *arguments, grad, lse, positive, probabilities, False, True, False, False
        )[1]
        drawn = draw_negatives(Negatives(s, -987654321987654321), positives, size, n)[row]
        truth = torch.bincount(drawn, minlength=size).float()
        if indexed:
            truth[positives[row]] -= s
        torch.testing.assert_close(gradient[:, 0], truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "seed"), [(4.0, 0), (None, 0), (4, 3.0), (4, None), (4, "0"), (4, torch.Generator())]
)
def test_what_is_no_integer_is_named(count, seed):
    with pytest.raises(
        TypeError, match=r"Negatives: (count must be an integer|seed must be an integer or a tensor)\. Got"
    ):
        Negatives(count, seed)
    assert Negatives(np.int32(4), np.uint64(2**63 + 5)) == Negatives(4, 2**63 + 5)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"count must be 0 or more. Got -1"):
        Negatives(-1, 0)
    with pytest.raises(ValueError, match=r"fit in 64 bits. Got 18446744073709551616"):
        Negatives(1, 2**64)
    with pytest.raises(ValueError, match=r"one int64 element. Got \(2,\) int64"):
        Negatives(1, torch.zeros(2, dtype=torch.int64))
