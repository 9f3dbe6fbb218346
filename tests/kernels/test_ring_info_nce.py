"""Losses and gradients across 2 and 4 gloo processes against one process's, by the measured-tolerance rule."""

import sys

import pytest
import torch
from tolerance import assert_as_good_as_naive

from cpc_kernels import (
    Negatives,
    draw_negatives,
    info_nce,
    info_nce_across_ranks,
    info_nce_stats,
    reference,
    sampled_info_nce,
    sampled_info_nce_across_ranks,
)
from cpc_kernels.exchange import Shares
from tests import processes

module = sys.modules["cpc_kernels.ring_info_nce"]

# rows that each rank holds: uneven, and one rank with nothing at all
COUNTS = {2: [((17, 4), (5, 21)), ((9, 0), (12, 0))], 4: [((9, 0, 12, 4), (10, 0, 3, 17))]}
SEEDS = range(4)
NAMES = "loss", "anchors", "candidates", "positives", "scale"


def problem(seed, n, m, d=7, *, vectors=False, ids=False, dtype=torch.float32, spread=1.0):
    """The whole batch."""
    g = torch.Generator().manual_seed(seed)
    anchors, candidates, own = (torch.randn(rows, d, generator=g) * spread for rows in (n, m, n))
    positives = own if vectors else torch.randint(-1, m, (n,), generator=g)
    tags = {"anchor_ids": torch.arange(n) % 4, "candidate_ids": torch.arange(m) % 4} if ids else {}
    floats = [t.to(dtype) if t.is_floating_point() else t for t in (anchors, candidates, positives)]
    return *floats, tags


def leaf(t, dtype=None):
    t = (t if dtype is None or not t.is_floating_point() else t.to(dtype)).clone()
    return t.requires_grad_() if t.is_floating_point() else t


def grads(loss, leaves, upstream):
    loss.backward(upstream)
    found = [loss.detach()]
    return found + [None if not t.requires_grad else torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]


def single(function, whole, scale, dtype, reduction, upstream):
    anchors, candidates, positives, tags = whole
    leaves = [leaf(t, dtype) for t in (anchors, candidates, positives)]
    factor = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    loss = function(*leaves, scale=factor, reduction=reduction, **tags)
    return grads(loss, [*leaves, factor], upstream.to(loss.dtype) if reduction == "none" else None)


def piece(t, counts, rank):
    first = sum(counts[:rank])
    return t[first : first + counts[rank]]


CASES = [
    {"vectors": vectors, "ids": ids, "reduction": reduction, "exchange": exchange}
    for exchange, vectors, ids, reduction in [
        ("ring", False, False, "none"),
        ("ring", False, True, "mean"),
        ("ring", True, False, "mean"),
        ("gathered", False, True, "none"),
    ]
]


def each_problem(world, cases):
    """Every case, for every number of rows that the ranks hold, for several seeds."""
    for case in cases:
        for of_anchors, of_candidates in COUNTS[world]:
            for seed in SEEDS:
                yield case, of_anchors, of_candidates, seed


def make(case, of_anchors, of_candidates, seed, dtype, spread):
    options = {"vectors": case["vectors"], "ids": case["ids"], "dtype": dtype, "spread": spread}
    return problem(seed, sum(of_anchors), sum(of_candidates), **options)


def ranked(rank, world, dtype, scale, impl="chunked", spread=1.0, cases=CASES):
    """What this rank finds for every problem."""
    answers = []
    for case, of_anchors, of_candidates, seed in each_problem(world, cases):
        anchors, candidates, positives, tags = make(case, of_anchors, of_candidates, seed, dtype, spread)
        leaves = [leaf(piece(anchors, of_anchors, rank)), leaf(piece(candidates, of_candidates, rank))]
        leaves.append(leaf(piece(positives, of_anchors, rank)))
        tags = {name: piece(t, of_anchors if name[0] == "a" else of_candidates, rank) for name, t in tags.items()}
        factor = torch.tensor(scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        loss = info_nce_across_ranks(
            *leaves, scale=factor.requires_grad_(), reduction=case["reduction"], exchange=case["exchange"],
            impl=impl, **tags,
        )  # fmt: skip
        upstream = piece(torch.linspace(0.5, 2, len(anchors)), of_anchors, rank).to(loss.dtype)
        answers.append(grads(loss, [*leaves, factor], upstream if case["reduction"] == "none" else None))
    return answers


def whole_again(answers, world, reduction):
    """One process's loss and gradients from the ranks': rows put together, the scale's summed; a mean's over W."""
    losses, *rest = zip(*answers, strict=True)
    if reduction == "none":
        found = [torch.cat(losses)]
    else:
        assert all(torch.equal(loss, losses[0]) for loss in losses)
        found = [losses[0]]
    share = 1 if reduction == "none" else world
    for parts in rest:
        if parts[0] is None:
            found.append(None)
        else:
            found.append((torch.cat(parts) if parts[0].ndim else torch.stack(parts).sum(0)) / share)
    return found


def compare(answers, world, dtype, scale, spread=1.0, cases=CASES):
    judged = {}
    for at, (case, of_anchors, of_candidates, seed) in enumerate(each_problem(world, cases)):
        whole = make(case, of_anchors, of_candidates, seed, dtype, spread)
        upstream = torch.linspace(0.5, 2, sum(of_anchors))
        naive = single(reference.info_nce, whole, scale, dtype, case["reduction"], upstream)
        truth = single(reference.info_nce, whole, scale, torch.float64, case["reduction"], upstream)
        found = whole_again([each[at] for each in answers], world, case["reduction"])
        for name, *three in zip(NAMES, found, naive, truth, strict=True):
            if three[0] is not None:
                judged.setdefault(f"{name} {case} {of_anchors} {of_candidates}", []).append(three)
    for name, problems in judged.items():  # together: the naive error of one small problem is a matter of luck
        ours, naive, truth = (torch.stack(each) for each in zip(*problems, strict=True))
        assert_as_good_as_naive(actual=ours, naive=naive, truth=truth, name=name, dtype=dtype)


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("impl", "d"), [("chunked", 7), ("triton", 7), ("triton", 600)])
def test_a_positive_elsewhere(impl, d, ids):
    """The seam of the ring: a block without a row's positive excludes nothing and reads its score as 0."""
    if impl == "triton":
        pytest.importorskip("triton")
    anchors, candidates, positives, tags = problem(1, 9, 8, d, ids=ids)
    anchors /= d**0.5
    positives[:3], scale = torch.tensor([2, 8 - 1, -1]), torch.tensor([0.7])
    of = Shares([3, 5], 0)
    found, dk = [], []
    whole = info_nce_stats(anchors, candidates, positives, scale=0.7, impl="reference", **tags)
    for owner in range(2):
        block = piece(candidates, of.counts, owner)
        of_block = piece(tags["candidate_ids"], of.counts, owner) if ids else None
        place = module.local_places(positives, owner, of)
        where = anchors, block, place, scale, tags.get("anchor_ids"), of_block
        found.append(module.forward_block(impl, *where, True))
        weight = torch.linspace(0.5, 2, 9).where(positives >= 0, 0.0)
        dk.append(module.backward_block(impl, weight, whole.lse, *where))
    (_, lse0, positive0, _, o0), (_, lse1, positive1, _, o1) = found
    lse = torch.logaddexp(lse0, lse1)
    torch.testing.assert_close(lse, whole.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(positive0 + positive1, whole.positive, rtol=1e-5, atol=1e-5)
    finite = lse.where(lse.isfinite(), 0.0)
    o = o0 * (lse0 - finite).exp()[:, None] + o1 * (lse1 - finite).exp()[:, None]
    scores = (0.7 * anchors @ candidates.T).masked_fill(torch.arange(8) == positives[:, None], -torch.inf)
    if ids:
        scores = scores.masked_fill(tags["anchor_ids"][:, None] == tags["candidate_ids"], -torch.inf)
    p = (scores - finite[:, None]).exp().where((positives >= 0)[:, None], 0.0)
    torch.testing.assert_close(o, p @ candidates, rtol=1e-4, atol=1e-4)
    expected = (p * weight[:, None]).T @ anchors
    expected.index_add_(0, positives.clamp(min=0), -weight[:, None] * anchors)
    torch.testing.assert_close(torch.cat(dk), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("world", [2, 4])
def test_dense_equals_one_process(world, tmp_path):
    compare(processes.run(world, ranked, tmp_path, torch.float32, 0.7), world, torch.float32, 0.7)


def sampled_problem(steps, seed, of_anchors, of_pool):
    g = torch.Generator().manual_seed(seed)
    n, m = sum(of_anchors), sum(of_pool)
    shape = (n, steps) if steps else (n,)
    anchors = torch.randn(*shape, 7, generator=g)
    return anchors, torch.randn(m, 7, generator=g), torch.randint(-1, m, shape, generator=g)


SAMPLED = [(steps, per_step, listed) for steps in (0, 3) for per_step in (False, True) for listed in (False, True)]
SAMPLED = [each for each in SAMPLED if each != (0, True, True)]


def sampled_ranked(rank, world):
    of_anchors, of_pool = COUNTS[world][0]
    answers = []
    for steps, per_step, listed in SAMPLED:
        for seed in SEEDS:
            whole = sampled_problem(steps, seed, of_anchors, of_pool)
            anchors, pool, _ = whole
            leaves = [leaf(piece(t, of, rank)) for t, of in zip(whole, (of_anchors, of_pool, of_anchors), strict=True)]
            negatives = Negatives(5, seed, per_step)
            if listed:
                negatives = piece(draw_negatives(negatives, None, len(pool), len(anchors), 3), of_anchors, rank)
            factor = torch.tensor(0.7).requires_grad_()
            loss = sampled_info_nce_across_ranks(*leaves, negatives, scale=factor)
            answers.append(grads(loss, [*leaves, factor], None))
    return answers


@pytest.mark.parametrize("world", [2, 4])
def test_sampled_equals_one_process(world, tmp_path):
    """Drawn by a seed, the negatives are those of one process with the whole batch."""
    answers = processes.run(world, sampled_ranked, tmp_path)
    at = 0
    for steps, per_step, listed in SAMPLED:
        judged = {}
        for seed in SEEDS:
            anchors, pool, positives = sampled_problem(steps, seed, *COUNTS[world][0])
            negatives = Negatives(5, seed, per_step)
            if listed:
                negatives = draw_negatives(negatives, None, len(pool), len(anchors), 3)
            three = [whole_again([each[at] for each in answers], world, "mean")]
            for dtype in (torch.float32, torch.float64):
                leaves = [leaf(t, dtype) for t in (anchors, pool, positives)]
                factor = torch.tensor(0.7, dtype=dtype).requires_grad_()
                loss = sampled_info_nce(*leaves, negatives, scale=factor, impl="reference")
                three.append(grads(loss, [*leaves, factor], None))
            for name, *values in zip(NAMES, *three, strict=True):
                if values[0] is not None:
                    judged.setdefault(f"{name} {steps} {per_step} {listed}", []).append(values)
            at += 1
        for name, problems in judged.items():
            ours, naive, truth = (torch.stack(each) for each in zip(*problems, strict=True))
            assert_as_good_as_naive(actual=ours, naive=naive, truth=truth, name=name)


def odd_ones(rank, world):
    """Wider inputs, other kinds of numbers, and what cannot work: (answers, messages)."""
    answers, messages = [], []
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        answers += ranked(rank, world, dtype, 0.7, cases=CASES[1:2])
    answers += ranked(rank, world, torch.float32, -3.0, spread=20.0, cases=CASES[:1])
    q, k = torch.randn(3, 4 + rank), torch.randn(5, 4 + rank)
    for act in (
        lambda: info_nce_across_ranks(q, k, torch.zeros(3, dtype=torch.long)),
        lambda: info_nce_across_ranks(q[:, :4], k[:, :4], torch.full((3,), 10), exchange="ring"),
        lambda: info_nce_across_ranks(q[:, :4], k[:, :4].requires_grad_(rank == 0), torch.zeros(3, dtype=torch.long)),
        lambda: info_nce_across_ranks(q[:, :4], k[:, :4].detach(), torch.full((3,), 5 - 5 * rank), exchange="local"),
        lambda: sampled_info_nce_across_ranks(q, k, q, Negatives(2, 0), exchange="ring"),
        lambda: info_nce_across_ranks(q[:, :4], k[:, :4].detach(), q[:, :4], exchange="star"),
    ):
        try:
            act()
        except (ValueError, RuntimeError, IndexError) as error:
            messages.append(str(error))
    own = torch.arange(3) + 5 * rank
    local = info_nce_across_ranks(q[:, :4], k[:, :4].detach(), own, exchange="local", reduction="none")
    alone = info_nce(q[:, :4], k[:, :4].detach(), own - 5 * rank, reduction="none")
    with torch.no_grad():
        info_nce_across_ranks(q[:, :4], k[:, :4], own, exchange="ring")
    return answers, messages, torch.equal(local, alone)


def test_other_numbers_and_what_cannot_work(tmp_path):
    found = processes.run(2, odd_ones, tmp_path)
    answers, at = [each[0] for each in found], 0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        size = len(list(each_problem(2, CASES[1:2])))
        compare([each[at : at + size] for each in answers], 2, dtype, 0.7, cases=CASES[1:2])
        at += size
    compare([each[at:] for each in answers], 2, torch.float32, -3.0, spread=20.0, cases=CASES[:1])
    assert all(each[2] for each in found)
    first = found[0][1]
    assert first[:3] + first[4:] == found[1][1][:3] + found[1][1][4:]
    assert "the positives of rank 0 must lie among its own candidates, 0 to 4." in first[3]
    for message, expected in zip(
        first,
        [
            "all ranks must have the same features. Got [4, 5], in rank order.",
            "positives must lie between -1 and 9",
            "every rank takes part in backward, but on rank 1 nothing requires a gradient.",
            "",
            'there is no ring for sampled negatives; exchange="gathered" takes them of all ranks.',
            "exchange must be one of auto, local, gathered, ring. Got 'star'.",
        ],
        strict=True,
    ):
        assert expected in message
