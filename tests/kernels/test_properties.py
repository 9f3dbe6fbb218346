"""What holds of the loss whatever the numbers: properties, tried on drawn problems, for every implementation.

float64 throughout, so that what is judged is the algebra. Sizes and a seed are drawn, and values made from the seed:
a problem that fails shrinks to few rows. The interpreter is slow, so Triton gets fewer and smaller problems.
"""

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpc_kernels import Negatives, draw_negatives, info_nce, info_nce_stats, sampled_info_nce
from cpc_kernels.capabilities import CPP, find_triton

dense_module, sampled_module = (sys.modules[f"cpc_kernels.{name}"] for name in ("chunked_info_nce", "sampled_info_nce"))
CPP_HERE = pytest.param("cpp", marks=pytest.mark.skipif(not CPP.available, reason=CPP.reason))
TRITON = find_triton()
TRITON_HERE = pytest.param("triton", marks=pytest.mark.skipif(not TRITON.available, reason=TRITON.reason))
dense = pytest.mark.parametrize("impl", ["reference", "chunked", TRITON_HERE])
sampled = pytest.mark.parametrize("impl", ["reference", "gather", CPP_HERE, TRITON_HERE])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# the interpreter computes with numpy, which warns where a GPU is silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@dataclass(frozen=True)
class Problem:
    anchors: Tensor  # (N, K, D); a dense op sees N K rows
    pool: Tensor  # (M, D)
    positives: Tensor  # (N, K), -1 among them, or (N, K, D)
    negatives: Tensor  # (N, K, S) listed, -1 among them
    upstream: Tensor  # (N, K): positive, negative and zero
    scale: float
    ids: tuple[Tensor, Tensor] | None  # (N,), (M,)

    @property
    def indexed(self) -> bool:
        return not self.positives.is_floating_point()

    @property
    def candidates(self) -> Tensor:  # (N, K, M): which candidates are negatives when all may be
        n, steps = self.anchors.shape[:2]
        all_of_them = torch.arange(len(self.pool), device=DEVICE).expand(n, steps, -1)
        negative = torch.ones_like(all_of_them, dtype=torch.bool)
        if self.indexed:
            negative &= all_of_them != self.positives[..., None]
        if self.ids:
            negative &= (self.ids[0][:, None] != self.ids[1])[:, None]
        return negative


def make(seed, n, steps, m, s, d, scale, vectors, ids) -> Problem:
    g = torch.Generator().manual_seed(seed)
    anchors, pool = torch.randn(n, steps, d, generator=g), torch.randn(m, d, generator=g)
    indices = torch.randint(-1, m, (n, steps), generator=g)
    tensors = [
        anchors, pool, torch.randn(n, steps, d, generator=g) if vectors else indices,
        torch.randint(-1, m, (n, steps, s), generator=g), torch.randn(n, steps, generator=g).round(decimals=0),
    ]  # fmt: skip
    tensors = [(t.double() if t.is_floating_point() else t).to(DEVICE) for t in tensors]
    tags = (torch.randint(0, 3, (size,), generator=g).to(DEVICE) for size in (n, m))
    return Problem(*tensors, scale, tuple(tags) if ids else None)


def problems(impl, **fixed):
    most = 3 if impl == "triton" else 7
    sizes = {name: st.integers(1, most) for name in ("n", "m", "s", "d")} | {"steps": st.integers(1, 3)}
    rest = {
        "seed": st.integers(0, 2**31),
        "scale": st.sampled_from([1.0, 0.01, 30.0, -2.0]),
        "vectors": st.booleans(),
        "ids": st.booleans(),
    }
    return st.builds(make, **(sizes | rest | {name: st.just(value) for name, value in fixed.items()}))


def holds(impl, *strategies):
    """Run the decorated function on drawn problems, the same ones each time."""

    def run(property):
        tries = settings(max_examples=3 if impl == "triton" else 25, deadline=None, derandomize=True, database=None)
        tries(given(*strategies)(property))()

    return run


def ask(op, p: Problem, impl, negatives=None) -> Tensor:
    """Losses (N, K) of either op."""
    ids = {} if p.ids is None else {"anchor_ids": p.ids[0], "pool_ids": p.ids[1]}
    if op is sampled_info_nce:
        negatives = p.negatives if negatives is None else negatives
        return op(p.anchors, p.pool, p.positives, negatives, scale=p.scale, reduction="none", impl=impl, **ids)
    if p.ids is not None:
        ids = {"anchor_ids": p.ids[0].repeat_interleave(p.anchors.shape[1]), "candidate_ids": p.ids[1]}
    rows = op(
        p.anchors.flatten(0, 1), p.pool, p.positives.flatten(0, 1), scale=p.scale, reduction="none", impl=impl, **ids
    )
    return rows.view(p.anchors.shape[:2])


def answer(op, p: Problem, impl, negatives=None) -> list[Tensor]:
    """Losses, and gradients of the anchors, the pool and vectors for positives."""
    anchors, pool = p.anchors.clone().requires_grad_(), p.pool.clone().requires_grad_()
    positives = p.positives if p.indexed else p.positives.clone().requires_grad_()
    p = replace(p, anchors=anchors, pool=pool, positives=positives)
    loss = ask(op, p, impl, negatives)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, [t for t in (anchors, pool, positives) if t.requires_grad], p.upstream),
    ]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def shuffled(p: Problem) -> tuple[Problem, Tensor]:
    """The pool in another order, with the indices that go with it, and the order."""
    order = torch.randperm(len(p.pool), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=DEVICE))

    def moved(indices):
        return torch.where(indices < 0, -1, place[indices.clamp(min=0)])

    ids = p.ids and (p.ids[0], p.ids[1][order])
    positives = moved(p.positives) if p.indexed else p.positives
    return replace(p, pool=p.pool[order], positives=positives, negatives=moved(p.negatives), ids=ids), order


@pytest.mark.parametrize(
    ("op", "impl"),
    [
        (info_nce, "reference"),
        (info_nce, "chunked"),
        pytest.param(info_nce, "triton", marks=TRITON_HERE.marks),
        (sampled_info_nce, "reference"),
        (sampled_info_nce, "gather"),
        pytest.param(sampled_info_nce, "cpp", marks=CPP_HERE.marks),
        pytest.param(sampled_info_nce, "triton", marks=TRITON_HERE.marks),
    ],
)
class TestBoth:
    def test_the_order_of_candidates_does_not_matter(self, op, impl):
        @holds(impl, problems(impl))
        def _(p):
            again, order = shuffled(p)
            loss, dq, dz, *dv = answer(op, p, impl)
            same(answer(op, again, impl), [loss, dq, dz[order], *dv])

    def test_one_more_negative_never_lowers_the_loss(self, op, impl):
        @holds(impl, problems(impl))
        def _(p):
            if op is info_nce:  # the new candidate is nobody's positive
                more = replace(p, pool=torch.cat([p.pool, p.anchors[:1, 0]]))
                if p.ids:
                    more = replace(more, ids=(p.ids[0], torch.cat([p.ids[1], p.ids[1][:1]])))
            else:
                more = replace(p, negatives=torch.cat([p.negatives, p.negatives[..., :1]], -1))
            before, after = ask(op, p, impl), ask(op, more, impl)
            assert (after >= before - 1e-12 * before.abs()).all(), (before, after)

    def test_equal_scores_give_the_log_of_the_count(self, op, impl):
        @holds(impl, problems(impl))
        def _(p):
            p = replace(p, pool=p.pool[:1].expand_as(p.pool))
            if not p.indexed:
                p = replace(p, positives=p.pool[0].expand_as(p.anchors))
            counts = p.candidates.sum(-1)
            if op is sampled_info_nce:
                skipped = p.negatives < 0
                if p.ids:
                    skipped = skipped | (p.ids[0][:, None, None] == p.ids[1][p.negatives.clamp(min=0)])
                counts = (~skipped).sum(-1)
            if p.indexed:
                counts = counts * (p.positives >= 0)
            torch.testing.assert_close(ask(op, p, impl), (1 + counts).double().log(), rtol=1e-9, atol=1e-9)

    def test_gradients_over_the_candidates_add_up(self, op, impl):
        """Each row hands out w q over its negatives, and takes it from its positive: nothing is left over."""

        @holds(impl, problems(impl))
        def _(p):
            _, _, dz, *dv = answer(op, p, impl)
            left = dz.sum(0) if p.indexed else dz.sum(0) + dv[0].sum((0, 1))
            torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-9 * (1 + float(dz.abs().sum())))


@sampled
def test_dense_is_sampled_with_all_listed(impl):
    @holds(impl, problems(impl))
    def _(p):
        everything = torch.arange(len(p.pool), device=DEVICE).expand(*p.anchors.shape[:2], -1)
        listed = everything.where(everything != p.positives[..., None], -1) if p.indexed else everything
        same(answer(sampled_info_nce, p, impl, listed), answer(info_nce, p, "reference"))


@dense
def test_ids_are_a_mask(impl):
    @holds(impl, problems(impl, ids=True))
    def _(p):
        pool, rows = p.pool.clone().requires_grad_(), p.anchors.flatten(0, 1).clone().requires_grad_()
        own = pool[p.positives.flatten(0, 1)] if p.indexed else p.positives.flatten(0, 1)
        masked = (p.scale * rows @ pool.T).masked_fill(~p.candidates.flatten(0, 1), -torch.inf)
        live = (masked != -torch.inf).any(-1)
        if p.indexed:
            live &= p.positives.flatten() >= 0
        lse = masked.where(live[:, None], 0.0).logsumexp(-1)
        gap = (lse - p.scale * (rows * own).sum(-1)).where(live, 0.0)
        loss = -torch.nn.functional.logsigmoid(-gap).where(live, 0.0)
        expected = torch.autograd.grad(loss, (rows, pool), p.upstream.flatten())
        ours = answer(info_nce, p, impl)
        same(ours[:3], [loss.detach().view_as(ours[0]), expected[0].view_as(p.anchors), expected[1]])


@sampled
def test_ids_leave_out_what_is_listed(impl):
    @holds(impl, problems(impl, ids=True))
    def _(p):
        alike = p.ids[0][:, None, None] == p.ids[1][p.negatives.clamp(min=0)]
        shorter = replace(p, ids=None, negatives=p.negatives.masked_fill(alike, -1))
        same(answer(sampled_info_nce, p, impl), answer(sampled_info_nce, shorter, impl))


def test_chunks_and_the_whole_agree(monkeypatch):
    @holds("chunked", problems("chunked"))
    def _(p):
        whole = answer(info_nce, p, "chunked")
        with monkeypatch.context() as patch:
            patch.setattr(dense_module, "CHUNK_ROWS", (1, 2))
            patch.setattr(dense_module, "CHUNK_SCORES", 1)
            same(answer(info_nce, p, "chunked"), whole)


def test_gathered_chunks_and_the_whole_agree(monkeypatch):
    @holds("gather", problems("gather"))
    def _(p):
        whole = answer(sampled_info_nce, p, "gather")
        with monkeypatch.context() as patch:
            patch.setattr(sampled_module, "GATHER_FLOATS", 1)
            same(answer(sampled_info_nce, p, "gather"), whole)


@pytest.mark.skipif(not TRITON.available, reason=TRITON.reason)
def test_split_and_unsplit_agree():
    from cpc_kernels import triton_info_nce

    @holds("triton", problems("triton", m=70, d=4), st.integers(2, 4))
    def _(p, splits):
        scale = torch.full((1,), p.scale, dtype=torch.float64, device=DEVICE)
        ids = (None, None) if p.ids is None else (p.ids[0].repeat_interleave(p.anchors.shape[1]), p.ids[1])
        inputs = p.anchors.flatten(0, 1), p.pool, p.positives.flatten(0, 1), scale, *ids
        one, several = (triton_info_nce.forward(*inputs, splits=s) for s in (1, splits))
        same(several, one)
        weight = p.upstream.flatten()
        backward = (triton_info_nce.backward_candidates(weight, one[1], *inputs, splits=s) for s in (splits, 1))
        same(*([each] for each in backward))


@sampled
def test_every_implementation_draws_the_same(impl):
    seeds, counts = st.integers(-(2**63), 2**64 - 1), st.integers(0, 9)

    @holds(impl, problems(impl), seeds, counts, st.booleans())
    def _(p, seed, count, per_step):
        negatives = Negatives(count, seed, per_step)
        drawn = draw_negatives(negatives, p.positives, len(p.pool), *p.anchors.shape[:2])
        listed = drawn if per_step else drawn[:, None].expand(-1, p.anchors.shape[1], -1)
        if p.indexed:
            listed = listed.where(listed != p.positives[..., None], -1)
        same(answer(sampled_info_nce, p, impl, negatives), answer(sampled_info_nce, p, "reference", listed))


@dense
def test_the_rank_is_the_number_of_better_negatives(impl):
    @holds(impl, problems(impl, ids=False))
    def _(p):
        rows = p.anchors.flatten(0, 1), p.pool, p.positives.flatten(0, 1)
        stats = info_nce_stats(*rows, scale=p.scale, impl=impl)
        better = (p.scale * rows[0] @ p.pool.T > stats.positive[:, None]) & p.candidates.flatten(0, 1)
        if p.indexed:
            better &= rows[2][:, None] >= 0
        assert torch.equal(stats.rank, better.sum(-1))


def test_the_strategies_reach_the_corners():
    """Ignored rows, rows without negatives, zero and negative gradients are among what is drawn."""
    seen = set()

    @holds("chunked", problems("chunked"))
    def _(p):
        seen.update(name for name, there in {
            "ignored": p.indexed and (p.positives < 0).any(), "alone": ~p.candidates.any(-1).all(),
            "zero": (p.upstream == 0).any(), "negative": (p.upstream < 0).any(), "vectors": not p.indexed,
        }.items() if there)  # fmt: skip

    assert seen == {"ignored", "alone", "zero", "negative", "vectors"}
