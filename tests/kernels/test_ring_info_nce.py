"""Losses and gradients across 2 and 4 gloo processes against one process's, by the measured-tolerance rule."""

import sys

import pytest
import torch
from tolerance import assert_as_good_as_naive

from cpc_kernels import (
    Negatives,
    bilinear_info_nce,
    bilinear_info_nce_across_ranks,
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


def uneven(rank=0, world=1):
    """Two ranks' float64 anchors, candidates, positives, and what scores them; or one process's, all of them."""
    anchors, candidates, positives, _ = problem(3, 5, 7, dtype=torch.float64)
    if world == 1:
        return leaf(anchors), leaf(candidates), positives
    of = [leaf(piece(t, counts, rank)) for t, counts in ((anchors, (3, 2)), (candidates, (4, 3)))]
    return *of, piece(positives, (3, 2), rank)


WAYS = {
    "ring": lambda *given, **more: info_nce_across_ranks(*given, exchange="ring", **more),
    "gathered": lambda *given, **more: info_nce_across_ranks(*given, exchange="gathered", **more),
    "auto": info_nce_across_ranks,
    "sampled": lambda *given, **more: sampled_info_nce_across_ranks(*given, Negatives(3, 0), **more),
}
ALONE = {
    name: info_nce if name != "sampled" else lambda *given, **more: sampled_info_nce(*given, Negatives(3, 0), **more)
    for name in WAYS
}


def said(act):
    try:
        act()
    except (RuntimeError, ValueError, TypeError) as error:
        return str(error)
    return "nothing"


def one_learns(rank, world):
    """The first rank's candidates learn, the other's do not: (gradients), and whether those got any."""
    found = []
    for way in WAYS.values():
        anchors, candidates, positives = uneven(rank, world)
        candidates.requires_grad_(rank == 0)
        way(anchors, candidates, positives).backward()
        found.append((anchors.grad, candidates.grad))
    return found


def penalised(way, given, **more):
    """Gradients of a penalty on the gradients of the anchors and the candidates."""
    anchors, candidates, positives = given
    first = torch.autograd.grad(way(anchors, candidates, positives, **more), (anchors, candidates), create_graph=True)
    sum(each.square().sum() for each in first).backward()
    return [anchors.grad, candidates.grad]


def second_derivatives(rank, world):
    refused = said(lambda: penalised(WAYS["ring"], uneven(rank, world)))
    return refused, penalised(WAYS["gathered"], uneven(rank, world), impl="reference", reduction="sum")


def what_differs(rank, world):
    """What is said where the ranks do not give the same, or one of them nothing that learns."""
    anchors, candidates, positives = uneven(rank, world)
    fixed, ids = candidates.detach(), {"anchor_ids": torch.arange(3 - rank), "pool_ids": torch.arange(4 - rank)}
    wide = candidates if rank == 0 else torch.ones(3, 9, dtype=torch.float64)
    draw = Negatives(2, 0)
    own = positives.clamp(0, 2) + 4 * rank
    messages = [
        said(lambda: info_nce_across_ranks(anchors.detach().requires_grad_(rank == 0), fixed, positives)),
        said(lambda: info_nce_across_ranks(anchors, fixed, positives, exchange=("ring", "gathered")[rank])),
        said(lambda: info_nce_across_ranks(anchors, fixed, positives, reduction=("mean", "none")[rank])),
        said(lambda: sampled_info_nce_across_ranks(anchors, fixed, positives, draw, **(ids if rank else {}))),
        said(lambda: sampled_info_nce_across_ranks(wide[:2], wide, positives[:2], draw)),
        said(lambda: sampled_info_nce_across_ranks(anchors.to(wide.dtype if rank else torch.float32),
                                                   fixed.to(wide.dtype if rank else torch.float32), positives, draw)),
    ]  # fmt: skip
    alone = [leaf(t).requires_grad_(rank == 0) for t in (anchors.detach(), fixed)]
    for way in ({"exchange": "local"}, {"exchange": "ring"}):
        learning = alone[1] if way["exchange"] == "local" else alone[1].detach()
        loss = info_nce_across_ranks(alone[0], learning, own, reduction="none", **way)
        assert loss.requires_grad == (rank == 0)
        if rank == 0:  # the others wait for nothing
            loss.sum().backward()
    return messages


def forward_mode(rank, world):
    anchors, candidates, positives = uneven(rank, world)
    weights, rest = torch.eye(7, dtype=torch.float64)[None], {"sources": torch.arange(3), "counts": [3]}
    doors = [
        *WAYS.values(),
        lambda q, k, p, **o: bilinear_info_nce_across_ranks(q[:3], weights, k, p[:3], **rest, **o),
    ]
    messages = []
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(candidates.detach(), torch.ones_like(candidates))
        if world > 1:
            anchors, positives = (torch.cat([t, t])[:3] for t in (anchors.detach(), positives))
        for door in doors:
            messages += [said(lambda: door(anchors, dual, positives, impl=impl)) for impl in ("auto", "reference")]  # noqa: B023
    return messages


def outside(rank, world):
    first = torch.distributed.new_group([0])
    anchors, candidates, positives = uneven(0, 2)
    return said(lambda: info_nce_across_ranks(anchors, candidates, positives.clamp(max=3), group=first))


def rows_of_a_rank(rank, world):
    anchors, candidates, _ = uneven(rank, world)
    numbers, positives = torch.arange(3 - rank, dtype=torch.int32) + 100, torch.arange(3 - rank)
    local = sampled_info_nce_across_ranks(
        anchors, candidates, positives + 4 * rank, Negatives(2, 0), rows=numbers, exchange="local", reduction="none"
    )
    drawn = draw_negatives(Negatives(2, 0), positives, len(candidates), numbers.long())
    return torch.equal(local, sampled_info_nce(anchors, candidates, positives, drawn, reduction="none"))


def corners(rank, world):
    return {act.__name__: act(rank, world) for act in CORNERS}


CORNERS = one_learns, second_derivatives, what_differs, forward_mode, outside, rows_of_a_rank


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, as it loads forward mode
def test_corners(tmp_path):
    found = processes.run(2, corners, tmp_path)
    tight = {"rtol": 1e-10, "atol": 1e-13}

    for at, name in enumerate(WAYS):
        anchors, candidates, positives = uneven()
        ALONE[name](anchors, candidates, positives).backward()
        (dq0, dk0), (dq1, dk1) = (each["one_learns"][at] for each in found)
        torch.testing.assert_close(torch.cat([dq0, dq1]) / 2, anchors.grad, **tight)
        torch.testing.assert_close(dk0 / 2, candidates.grad[:4], **tight)
        assert dk1 is None

    assert all("second derivatives are not implemented" in each["second_derivatives"][0] for each in found)
    ours = [torch.cat(each) for each in zip(*(each["second_derivatives"][1] for each in found), strict=True)]
    truth = penalised(info_nce, uneven(), impl="reference", reduction="sum")
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine / 4, theirs, **tight)  # first derivatives are twice one process's

    assert found[0]["what_differs"] == found[1]["what_differs"]
    for message, expected in zip(
        found[0]["what_differs"],
        [
            "every rank takes part in backward, but on rank 1 nothing requires a gradient.",
            "all ranks must have the same exchange. Got ['ring', 'gathered'], in rank order.",
            "all ranks must have the same reduction. Got ['mean', 'none'], in rank order.",
            "all ranks must have the same ids (1) or none (0). Got [0, 1], in rank order.",
            "all ranks must have the same features. Got [7, 9], in rank order.",
            "all ranks must have the same dtypes. Got ['float32', 'float64'], in rank order.",
        ],
        strict=True,
    ):
        assert expected in message

    for each in found:
        assert len(each["forward_mode"]) == 10
        assert all("do not pass from rank to rank" in message for message in each["forward_mode"])
    assert "process 1 is not in the group that was given" in found[1]["outside"]
    assert found[0]["outside"] == "nothing"
    assert all(each["rows_of_a_rank"] for each in found)


def test_the_reference_is_as_written_under_autocast():
    contexts, weights, candidates = torch.randn(40, 32), torch.randn(2, 24, 32) / 5, torch.randn(50, 24)
    where = {"sources": torch.arange(40).repeat(2), "counts": [40, 40], "impl": "reference", "scale": 5.0}
    given = contexts, weights, candidates, torch.randint(0, 50, (80,))
    with torch.autocast("cpu", torch.float16):  # which rounds inputs, and nothing in between
        alone = bilinear_info_nce(*given, side="contexts", **where)
        torch.testing.assert_close(bilinear_info_nce_across_ranks(*given, **where), alone, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_one_process_keeps_forward_mode_and_rows():
    messages = forward_mode(0, 1)
    assert all("use backward()" in message for message in messages[::2])
    assert set(messages[1::2]) == {
        'info_nce_across_ranks: impl="reference" has no ring; exchange="gathered" has it.',
        "nothing",
    }
    anchors, candidates, positives = uneven()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(candidates.detach(), torch.ones_like(candidates))
        losses = [way(anchors.detach(), dual, positives, impl="reference") for way in (info_nce, info_nce_across_ranks)]
        tangents = [torch.autograd.forward_ad.unpack_dual(loss).tangent for loss in losses]
    torch.testing.assert_close(*tangents)
    numbers, draw = torch.tensor([3, 1, 4, 0, 9]), Negatives(3, 0)
    named = sampled_info_nce_across_ranks(anchors, candidates, positives, draw, rows=numbers, reduction="none")
    drawn = draw_negatives(draw, positives, len(candidates), numbers)
    assert torch.equal(named, sampled_info_nce(anchors, candidates, positives, drawn, reduction="none"))
    counted = sampled_info_nce_across_ranks(anchors, candidates, positives, draw, rows=torch.arange(5))
    torch.testing.assert_close(counted, sampled_info_nce(anchors, candidates, positives, draw))
    with pytest.raises(ValueError, match=r"rows number the draws .* that are listed have none"):
        sampled_info_nce_across_ranks(anchors, candidates, positives, drawn, rows=numbers)
    with pytest.raises(ValueError, match=r"rows number the draws .* without them there are none"):
        bilinear_info_nce_across_ranks(
            anchors,
            torch.eye(anchors.shape[1]).to(anchors)[None],
            candidates,
            positives,
            sources=torch.arange(5),
            counts=[5],
            rows=numbers,
        )
