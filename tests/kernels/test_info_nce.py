"""info_nce against the spec in float64, by the measured-tolerance rule, on inputs that are not tame."""

import os
import sys

import numpy as np
import pytest
import torch
from tolerance import assert_as_good_as_naive, error

from cpc_kernels import (
    Negatives,
    bilinear_info_nce,
    capabilities,
    chunked_info_nce,
    info_nce,
    info_nce_stats,
    reference,
    sampled_info_nce,
    sampled_info_nce_stats,
)
from cpc_kernels import info_nce as door
from cpc_kernels.capabilities import FAST_BF16, find_triton

ops = sys.modules["cpc_kernels.info_nce"]  # the function of that name hides it
needs_cpp = pytest.mark.skipif(not chunked_info_nce.DENSE, reason="the C++ library is not built")


@pytest.fixture(autouse=True, params=["torch", pytest.param("C++", marks=needs_cpp)])
def engine(request, monkeypatch):
    """What computes a chunk on the CPU."""
    monkeypatch.setattr(chunked_info_nce, "DENSE", request.param == "C++")


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks in small problems, the last one ragged."""
    monkeypatch.setattr(chunked_info_nce, "CHUNK_ROWS", (4, 4))


def make(n=11, m=9, d=6, *, dtype=torch.float32, vectors=False, ids=False, spread=1.0, offset=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    anchors = (torch.randn(n, d, generator=g) * spread).to(dtype)
    candidates = (torch.randn(m, d, generator=g) * spread + offset).to(dtype)
    if vectors:
        positives = (torch.randn(n, d, generator=g) * spread + offset).to(dtype)
    else:
        positives = torch.randint(-1, m, (n,), generator=g) if m else torch.full((n,), -1)
    tags = {}
    if ids:
        tags = {"anchor_ids": torch.arange(n) % 4, "candidate_ids": torch.arange(m) % 4}
    return anchors, candidates, positives, tags


def several(*args, **options):
    """Eight problems, judged together: the naive error of one small problem is a matter of luck."""
    return [make(*args, seed=seed, **options) for seed in range(8)]


def run(function, anchors, candidates, positives, scale, dtype, upstream, **options):
    """Loss and gradients of anchors, candidates, scale, and positives if vectors."""
    leaves = [t.to(dtype).detach().clone().requires_grad_() for t in (anchors, candidates)]
    factor = torch.tensor(float(scale), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves.append(factor.requires_grad_())
    own = positives
    if positives.is_floating_point():
        own = positives.to(dtype).detach().clone().requires_grad_()
        leaves.append(own)
    loss = function(leaves[0], leaves[1], own, scale=leaves[2], **options)
    if loss.ndim:
        loss.backward(upstream.to(loss.dtype))
    else:
        loss.backward(torch.tensor(0.37, dtype=loss.dtype))
    return [loss.detach()] + [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def judge(problems, scale=0.7, reduction="none", dtype=torch.float32, impl="chunked"):
    def results(function, dtype, **options):
        each = []
        for anchors, candidates, positives, tags in problems:
            upstream = torch.linspace(0.5, 2, len(anchors), dtype=torch.float64)
            arguments = anchors, candidates, positives, scale, dtype, upstream
            each.append(run(function, *arguments, reduction=reduction, **options, **tags))
        return [torch.stack(r) for r in zip(*each, strict=True)]

    ours = results(info_nce, dtype, impl=impl)
    naive, truth = results(reference.info_nce, dtype), results(reference.info_nce, torch.float64)
    for name, a, b, c in zip(("loss", "dq", "dk", "dscale", "dv"), ours, naive, truth, strict=False):
        assert a.dtype == b.dtype
        assert_as_good_as_naive(actual=a, naive=b, truth=c, name=name, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_against_the_spec(dtype, vectors, ids, reduction, small_chunks):
    judge(several(dtype=dtype, vectors=vectors, ids=ids), reduction=reduction, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(40, 130, 17), (67, 129, 300), (300, 50, 64), (23, 200, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_every_instruction_set(dtype, shape, reduction, engine, level, monkeypatch):
    monkeypatch.setattr(chunked_info_nce, "CHUNK_ROWS", (96, 96))
    judge(several(*shape, ids=True, dtype=dtype), reduction=reduction, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_sums_of_sums_at_every_instruction_set(dtype, vectors, reduction, engine, level):
    """One chunk of more anchors than dk, and more candidates than O, adds at once."""
    judge(several(300, 520, 33, vectors=vectors, ids=True, dtype=dtype), reduction=reduction, dtype=dtype)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("scale", [0.7, -0.7, 30.0])
@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_scores_that_grow_from_block_to_block(scale, reduction, engine, level):
    """What was summed with a smaller maximum is put right later: in the loss, in O and in dk; and in the ranks."""
    problems = several(70, 900, 33, ids=True, dtype=torch.bfloat16)
    for _, candidates, _, _ in problems:
        candidates *= torch.linspace(0.1, 3, len(candidates))[:, None].bfloat16()
    judge(problems, scale=scale, reduction=reduction, dtype=torch.bfloat16)
    for anchors, candidates, positives, tags in problems:
        stats = info_nce_stats(anchors, candidates, positives, scale=scale, **tags)
        truth = info_nce_stats(anchors.double(), candidates.double(), positives, scale=scale, **tags)
        torch.testing.assert_close(stats.lse.double(), truth.lse, rtol=1e-5, atol=1e-5)
        assert (stats.rank - truth.rank).abs().max() <= 1


@pytest.mark.parametrize("features", [7, 130, 300])
@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_equal_candidates_tie_at_every_instruction_set(features, engine, level):
    anchors, candidates, _, _ = make(40, 1, features, dtype=torch.bfloat16)
    everywhere = candidates.repeat(600, 1)
    assert not info_nce_stats(anchors, everywhere, torch.arange(40) * 15, scale=0.3).rank.any()


@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_beside_products_that_use_tiles_too(engine):
    """Torch's may leave its own configuration of the tiles, and must find none of ours."""
    problem, a = make(70, 90, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    alone = run(info_nce, *problem[:3], 1.3, torch.bfloat16, None, reduction="mean")
    for _ in range(3):
        assert (a @ a == 64).all()
        again = run(info_nce, *problem[:3], 1.3, torch.bfloat16, None, reduction="mean")
        assert all(torch.equal(x, y) for x, y in zip(alone, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_bf16_stays_bf16_where_the_instruction_set_has_it(dtype, engine, level):
    (q, *_), _ = chunked_info_nce.in_cpp(*make(dtype=dtype)[:3], torch.ones(1), None, None)
    assert q.dtype == (dtype if torch.ops.cpc_kernels_cpu.dense_has_bf16() else torch.float32)


@needs_cpp
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(RuntimeError, match=r"use_instruction_set: must be baseline, avx2, .* Got 'sse9'"):
        torch.ops.cpc_kernels_cpu.use_instruction_set("sse9")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_threads_change_nothing(dtype, engine, level):
    problem, before, results = make(700, 300, 200), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(info_nce, *problem[:3], 1.3, dtype, None, reduction="mean"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("scale", [0.01, 100.0, -3.0, 0.0])
def test_scales(scale, reduction):
    judge(several(40, 30, 17), scale=scale, reduction=reduction)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 5, 2), (5, 1, 3), (0, 4, 3), (4, 0, 3), (0, 0, 2), (67, 129, 300), (3, 2, 2048)]
)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("vectors", [False, True])
def test_shapes(shape, reduction, vectors):
    judge(several(*shape, vectors=vectors), scale=0.3, reduction=reduction)


def test_scores_far_from_zero():
    judge(several(20, 30, 8, spread=0.1, offset=100.0), scale=20.0)  # scores about 1e3..1e4
    judge(several(20, 30, 8, spread=30.0), scale=3.0, reduction="mean")


def test_infinite_and_nan_scores():
    anchors, candidates, positives, _ = make()
    anchors = anchors.abs()
    candidates[3] = -3e38  # every score of it is -inf
    positives[:] = torch.arange(len(anchors)) % 3
    stats = info_nce_stats(anchors, candidates, positives, impl="chunked", scale=5.0)
    truth = info_nce_stats(anchors, candidates, positives, impl="reference", scale=5.0)
    torch.testing.assert_close(stats.loss, truth.loss)
    leaf = anchors.clone().requires_grad_()
    loss = info_nce(leaf, candidates, positives, scale=5.0, reduction="none", impl="chunked")
    loss[0].backward()
    assert leaf.grad[0].isfinite().all()
    candidates[3] = float("nan")
    assert info_nce(anchors, candidates, positives, reduction="none").isnan().all()
    assert info_nce(anchors, candidates, positives).isnan()
    candidates[3], anchors[4] = 0.0, float("nan")
    bad = info_nce(anchors, candidates, positives, reduction="none").isnan()
    assert bad.nonzero().flatten().tolist() == [4]
    positives[4] = -1  # an ignored row may hold anything
    k = candidates.requires_grad_()
    loss = info_nce(anchors, k, positives)
    loss.backward()
    assert loss.isfinite()
    assert k.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("n", [6, 8])
def test_an_excluded_candidate_may_hold_anything(n, ignored, dtype, bad, reduction):
    """Also where the last tile of anchors has rows to spare."""
    anchors, candidates, _, _ = make(n, 9, 5, dtype=dtype)
    candidates[4] = bad
    k, positives = candidates.requires_grad_(), torch.arange(n) % 4
    positives[2] = -1 if ignored else 0
    tags = {"anchor_ids": torch.zeros(n, dtype=torch.long), "candidate_ids": (torch.arange(9) != 4).long()}
    loss = info_nce(anchors, k, positives, reduction=reduction, impl="chunked", **tags)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert k.grad.isfinite().all()


def test_rows_that_do_not_count():
    anchors, candidates, _, _ = make(4, 3)
    q = anchors.requires_grad_()
    positives = torch.tensor([0, -1, 2, 1])
    tags = {"anchor_ids": torch.tensor([7, 7, 1, 2]), "candidate_ids": torch.tensor([7, 7, 7])}
    loss = info_nce(q, candidates, positives, reduction="none", **tags)
    assert loss[:2].tolist() == [0, 0]
    assert (loss[2:] > 0).all()
    mean = info_nce(q, candidates, positives, **tags)
    torch.testing.assert_close(mean, loss.sum() / 3)
    mean.backward()
    assert not q.grad[:2].any()
    stats = info_nce_stats(q, candidates, positives, **tags)
    assert stats.lse[:2].tolist() == [-torch.inf, -torch.inf]
    assert stats.positive[1] == 0
    assert stats.positive[0] != 0
    assert stats.rank[:2].tolist() == [0, 0]
    assert info_nce(anchors, candidates, torch.full((4,), -1)).item() == 0


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_stats(vectors, ids, small_chunks):
    anchors, candidates, positives, tags = make(vectors=vectors, ids=ids)
    stats = info_nce_stats(anchors, candidates, positives, scale=0.7, **tags)
    truth = info_nce_stats(anchors, candidates, positives, scale=0.7, impl="reference", **tags)
    for field in stats._fields:
        torch.testing.assert_close(getattr(stats, field), getattr(truth, field))
    equal = torch.ones(3, 4)
    assert info_nce_stats(equal, torch.ones(5, 4), torch.arange(3)).rank.tolist() == [0, 0, 0]
    assert not info_nce_stats(anchors.requires_grad_(), candidates, positives).loss.requires_grad


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("margin", [2.0, 8.0, 16.0, 30.0])
def test_small_losses_keep_their_gradient(margin, reduction):
    """bf16 inputs, losses down to 1e-13: dq within 2e-3 of float64."""
    g = torch.Generator().manual_seed(1)
    n, d = 64, 128
    candidates = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    anchors = candidates + 0.02 * torch.randn(n, d, generator=g)
    problem = anchors.bfloat16(), candidates.bfloat16(), torch.arange(n)
    upstream = torch.linspace(0.5, 2, n, dtype=torch.float64)
    scale = margin + 5.0
    loss, dq, *_ = run(info_nce, *problem, scale, torch.float32, upstream, reduction=reduction, impl="chunked")
    truth, dq_truth, *_ = run(reference.info_nce, *problem, scale, torch.float64, upstream, reduction=reduction)
    row_error = (dq.double() - dq_truth).norm(dim=1) / dq_truth.norm(dim=1)
    assert float(row_error.max()) <= 2e-3, f"dq errs by {float(row_error.max()):.1e} at loss {float(truth.mean()):.1e}"
    assert error(loss, truth) < 1e-4
    if margin == 30.0:
        assert float(truth.mean()) < 1e-10
    q = problem[0].clone().requires_grad_()  # and with bf16 itself, the gradient is rounded once
    info_nce(q, problem[1], problem[2], scale=scale, reduction="sum").backward()
    exact = run(reference.info_nce, *problem, scale, torch.float64, torch.ones(n), reduction="none")[1]
    assert float(((q.grad.double() - exact).norm(dim=1) / exact.norm(dim=1)).max()) <= 4e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upstream_gradients_are_not_rounded_to_16_bits(dtype):
    """1 / N would turn every gradient by the same factor, and a GradScaler's 65536 would make float16's infinite."""
    q, k = (torch.randn(48, 32, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    for upstream, reduction, scale in ((1.0, "mean", 1.0), (65536.0, "sum", 0.01)):
        found = []
        for cast in (dtype, torch.float64):
            inputs = [t.to(cast, copy=True).requires_grad_() for t in (q, k)]
            (info_nce(*inputs, torch.arange(48), scale=scale, reduction=reduction) * upstream).backward()
            found.append(torch.cat([t.grad.double() for t in inputs]))
        ours, exact = found
        assert abs((ours * exact).sum() / exact.square().sum() - 1) < 4e-4


def test_a_candidate_that_many_rows_share_has_room_in_float16():
    q = torch.nn.functional.normalize(torch.rand(65536, 8) + 0.2, dim=1).half()
    k = torch.nn.functional.normalize(torch.randn(4, 8), dim=1).half().requires_grad_()
    info_nce(q, k, torch.zeros(65536, dtype=torch.long), scale=14.0).backward()  # its sum over the rows passes 65504
    exact = k.detach().double().requires_grad_()
    info_nce(q.double(), exact, torch.zeros(65536, dtype=torch.long), scale=14.0).backward()
    torch.testing.assert_close(k.grad.double(), exact.grad, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_numpys_scalars_are_numbers(kind):
    q, k = torch.randn(6, 8), torch.randn(9, 8)
    for loss, more in ((info_nce, ()), (sampled_info_nce, (Negatives(4, 0),))):
        assert loss(q, k, torch.arange(6), *more, scale=kind(3)) == loss(q, k, torch.arange(6), *more, scale=3.0)


def test_strides_do_not_matter_and_inputs_are_left_alone():
    anchors, candidates, positives, tags = make(12, 10, 8, ids=True)
    truth = info_nce(anchors, candidates, positives, **tags)
    wide = torch.full((12, 16), float("nan"))
    wide[:, ::2] = anchors
    tall = candidates.T.contiguous().T
    before = wide.clone(), tall.clone()
    q, k = wide[:, ::2].requires_grad_(), tall.requires_grad_()
    loss = info_nce(q, k, positives.int(), **tags)
    torch.testing.assert_close(loss, truth)
    for _ in range(2):  # saved tensors survive a backward
        gradients = torch.autograd.grad(loss, (q, k), retain_graph=True)
    again = torch.autograd.grad(loss, (q, k))
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    assert torch.equal(wide[:, ::2], before[0][:, ::2])
    assert wide[:, 1::2].isnan().all()
    assert torch.equal(tall, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_score_of_a_positive_without_candidates_is_not_rounded(dtype):
    """Of large numbers fp16 would make infinity."""
    q, own = (torch.full((3, 16), 120.0, dtype=dtype) for _ in range(2))
    nobody, steps = torch.zeros(0, 16, dtype=dtype), (q[:, None], torch.zeros(0, 16, dtype=dtype), own[:, None])
    expected = torch.full((3,), 16 * 120.0**2)
    for impl in ("chunked", "reference"):
        assert torch.equal(info_nce_stats(q, nobody, own, impl=impl).positive.float(), expected)
    for impl in ("gather", "reference"):
        found = sampled_info_nce_stats(*steps, torch.zeros(3, 0, dtype=torch.long), impl=impl)
        assert torch.equal(found.positive.float()[:, 0], expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("who", ["anchors", "candidates", "scale", "positives"])
def test_only_one_learns(who, reduction):
    anchors, candidates, positives, _ = make(vectors=True)
    leaves = {"anchors": anchors, "candidates": candidates, "positives": positives, "scale": torch.tensor(0.5)}
    truth = {name: leaf.double().requires_grad_(name == who) for name, leaf in leaves.items()}
    leaves[who].requires_grad_()
    info_nce(**leaves, reduction=reduction).sum().backward()
    info_nce(**truth, reduction=reduction, impl="reference").sum().backward()
    torch.testing.assert_close(leaves[who].grad.double(), truth[who].grad, rtol=1e-4, atol=1e-6)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != who)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("vectors", [False, True])
def test_gradcheck(impl, reduction, vectors, small_chunks):
    anchors, candidates, positives, tags = make(6, 5, 3, dtype=torch.float64, vectors=vectors, ids=True)
    leaves = [
        anchors.requires_grad_(),
        candidates.requires_grad_(),
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
    ]
    if vectors:
        leaves.append(positives.requires_grad_())

    def loss(q, k, scale, own=positives):
        return info_nce(q, k, own, scale=scale, reduction=reduction, impl=impl, **tags)

    assert torch.autograd.gradcheck(loss, leaves)


def test_second_derivatives_are_refused():
    anchors, candidates, positives, _ = make()
    q, k = anchors.requires_grad_(), candidates.requires_grad_()
    for reduction in ("none", "mean"):
        loss = info_nce(q, k, positives, reduction=reduction).sum()
        (dq,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match=r'second derivatives are not implemented.*impl="reference" has them'):
            dq.sum().backward()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("vectors", [False, True])
def test_without_its_registration_it_is_the_same_op(vectors, reduction, monkeypatch):
    anchors, candidates, positives, tags = make(vectors=vectors, ids=True)
    leaves = anchors.requires_grad_(), candidates.requires_grad_(), torch.tensor(0.7, requires_grad=True)

    def results():
        loss = info_nce(*leaves[:2], positives, scale=leaves[2], reduction=reduction, **tags)
        single = torch.autograd.grad(-2 * loss.sum(), leaves, retain_graph=True)
        upstream = torch.eye(len(anchors)) if reduction == "none" else torch.tensor([1.0, -2.0])
        batch = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
        if reduction == "mean":
            assert all(torch.equal(many[1], one) for many, one in zip(batch, single, strict=True))
        return loss, *single, *batch

    plain = results()
    assert "Plain" in str(plain[0].grad_fn.next_functions if reduction == "mean" else plain[0].grad_fn)
    monkeypatch.setattr(ops, "plainly_eager", lambda *tensors: False)
    registered = results()
    assert "Plain" not in str(registered[0].grad_fn.next_functions) + str(registered[0].grad_fn)
    assert all(torch.equal(a, b) for a, b in zip(plain, registered, strict=True))


@pytest.mark.parametrize("vectors", [False, True])
def test_opcheck(vectors, unpoisoned):
    anchors, candidates, positives, tags = make(vectors=vectors, ids=True)
    q, k = anchors.requires_grad_(), candidates.requires_grad_()
    scale = torch.tensor([0.5], requires_grad=True)
    ids = tuple(tags.values())
    torch.library.opcheck(ops.info_nce_op, (q, k, positives, scale, *ids, "chunked", True, True))
    torch.library.opcheck(ops.info_nce_op, (q, k, positives, scale, None, None, "chunked", True, False))
    torch.library.opcheck(ops.info_nce_sum, (q, k, positives, scale, *ids, "chunked", True))


def test_gradients_lie_as_their_fakes_say(unpoisoned):
    """However the inputs lie; what is compiled stops at others."""
    *vectors, _ = make(vectors=True)
    given = [t.T.contiguous().T for t in vectors] + [torch.ones(1), None, None, "chunked"]
    loss, lse, _, _, expectation = ops.info_nce_op(*given, True, False)
    grads = ops.info_nce_backward(torch.ones(len(loss)), loss, lse, expectation, *given, True, True, True, True)
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph(unpoisoned):
    anchors, candidates, positives, _ = make(vectors=False)
    q, k = anchors.requires_grad_(), candidates.requires_grad_()

    def loss(q, k, scale):
        return (
            info_nce(q * 2, k, positives, scale=scale) + info_nce(q, k, positives, scale=scale, reduction="none").sum()
        )

    scale = torch.tensor(0.7, requires_grad=True)
    truth = torch.autograd.grad(loss(q, k, scale), (q, k, scale))
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, scale), (q, k, scale))
    torch.testing.assert_close(ours, truth)


def test_autocast():
    """Under autocast the anchors and candidates take one path, in float32 where this CPU is slow at bf16."""
    anchors, candidates, positives, _ = make(20, 30, 16)
    truth = info_nce(anchors, candidates, positives, scale=100.0, impl="reference")
    q = anchors.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = info_nce(q, candidates, positives, scale=100.0)  # a bf16 layer's output against a float32 bank
    assert mixed.dtype == torch.float32
    exact = anchors.bfloat16().double(), candidates.double()
    if FAST_BF16.available:
        exact = anchors.bfloat16().double(), candidates.bfloat16().double()
    torch.testing.assert_close(mixed.double(), reference.info_nce(*exact, positives, scale=100.0), rtol=1e-5, atol=1e-5)
    mixed.backward()
    assert q.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.float16):
        torch.testing.assert_close(info_nce(anchors, candidates, positives, scale=100.0), truth, rtol=1e-5, atol=1e-5)


def test_checkpoint():
    from torch.utils.checkpoint import checkpoint

    anchors, candidates, positives, _ = make()
    q, k = anchors.requires_grad_(), candidates.requires_grad_()
    truth = torch.autograd.grad(info_nce(q, k, positives), (q, k))
    ours = torch.autograd.grad(checkpoint(info_nce, q, k, positives, use_reentrant=False), (q, k))
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


def test_torch_multiplies_bf16_as_float32_and_no_switch_of_the_process_is_touched(monkeypatch):
    """Another thread's products would change with it."""
    monkeypatch.setattr(chunked_info_nce, "in_cpp", lambda *_: None)
    settings = type(torch.backends.mkldnn.matmul)
    monkeypatch.setattr(settings, "__setattr__", lambda *_: pytest.fail("a switch was touched"))
    judge(several(dtype=torch.bfloat16), dtype=torch.bfloat16)


BAD = [
    (
        {"candidates": torch.zeros(48, 64)},
        ValueError,
        r"info_nce: anchors have 128 features, candidates 64; they must match. "
        r"Got anchors \(32, 128\), candidates \(48, 64\).",
    ),
    (
        {"positives": torch.zeros(31, dtype=torch.long)},
        ValueError,
        r"positives given as indices \(N,\) must be \(32,\). Got anchors \(32, 128\), positives \(31,\).",
    ),
    ({"positives": torch.zeros(32, 12)}, ValueError, r"vectors \(N, D\) must be \(32, 128\)"),
    ({"positives": torch.full((32,), 48)}, IndexError, r"must lie between -1 and 47 .* Got values from 48 to 48"),
    (
        {"positives": torch.full((32,), -2)},
        IndexError,
        r"candidates have 48 rows; -1 is ignored\). Got values from -2 to",
    ),
    ({"scale": "x"}, TypeError, r"scale must be a number or a tensor of one element. Got 'x'."),
    ({"scale": None}, TypeError, r"scale must be a number or a tensor of one element. Got None."),
    (
        {"candidates": torch.zeros(48, 128, dtype=torch.float64)},
        TypeError,
        r"anchors torch.float32, candidates torch.float64",
    ),
    ({"anchors": torch.zeros(32, 128, dtype=torch.long)}, TypeError, r"must be floating point. Got torch.int64"),
    ({"scale": torch.ones(2)}, ValueError, r"a number or a tensor of one element. Got shape \(2,\)"),
    (
        {"anchor_ids": torch.zeros(32, dtype=torch.int, device="meta"), "candidate_ids": torch.zeros(48)},
        ValueError,
        r"anchor_ids must be on the anchors' device. Got meta, anchors on cpu",
    ),
    (
        {"anchor_ids": [0] * 32, "candidate_ids": torch.zeros(48)},
        TypeError,
        r"anchor_ids must be a tensor. Got list; write torch.tensor\(anchor_ids\)",
    ),
    ({"anchor_ids": torch.zeros(32, dtype=torch.int)}, ValueError, r"anchor_ids was given without candidate_ids"),
    (
        {"anchor_ids": torch.zeros(3, dtype=torch.int), "candidate_ids": torch.zeros(48)},
        ValueError,
        r"must be \(32,\) integers",
    ),
    ({"reduction": "avg"}, ValueError, r"must be none, sum or mean. Got 'avg'"),
    ({"impl": "cuda"}, ValueError, r"must be one of auto, reference, chunked, triton. Got 'cuda'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_errors_repeat_the_question(change, kind, message):
    arguments = {
        "anchors": torch.zeros(32, 128),
        "candidates": torch.zeros(48, 128),
        "positives": torch.zeros(32, dtype=torch.long),
    }
    with pytest.raises(kind, match=message):
        door(**(arguments | change))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs it")
def test_triton_never_falls_back():
    with pytest.raises(RuntimeError, match=r'needs tensors on a GPU.*Got tensors on cpu; impl="chunked" would run'):
        info_nce(torch.ones(2, 2), torch.ones(2, 2), torch.arange(2), impl="triton")


def test_capabilities_give_reasons(monkeypatch):
    for each in capabilities():
        assert each.reason
        assert each.name == "Triton" or bool(each.cost) != each.available
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for interpreted in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        found = find_triton()
        assert (found.name, found.available) == ("Triton", interpreted == "1")
        assert not found.cost  # without a GPU there is nothing that Triton would gain
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert not find_triton().available
    assert "no GPU kernels" in find_triton().cost


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(bad):
    q, k, p = torch.randn(6, 8), torch.randn(9, 8), torch.arange(6)
    calls = {
        "info_nce": lambda: info_nce(q, k, p, scale=bad),
        "info_nce_stats": lambda: info_nce_stats(q, k, p, scale=bad),
        "sampled_info_nce": lambda: sampled_info_nce(q, k, p, Negatives(3, seed=0), scale=bad),
        "bilinear_info_nce": lambda: bilinear_info_nce(q, torch.eye(8)[None], k, p[:, None], scale=bad),
    }
    for op, call in calls.items():
        with pytest.raises(ValueError, match=f"^{op}: scale must be finite. Got {bad}.$"):
            call()


@pytest.mark.parametrize(
    ("bad", "got"),
    [(1e39, "Got 1e.39"), (10**400, "Got a whole number beyond that"), (torch.tensor(1 + 5j), "Got torch.complex64")],
)
def test_a_scale_that_float32_cannot_hold_is_refused(bad, got):
    q, k, p = torch.randn(6, 8), torch.randn(9, 8), torch.arange(6)
    for call in (
        lambda: info_nce(q, k, p, scale=bad),
        lambda: sampled_info_nce(q, k, p, Negatives(3, seed=0), scale=bad),
    ):
        with pytest.raises(ValueError, match=f"scale must be .*{got}"):
            call()
    assert info_nce(q, k, p, scale=10**20).isfinite()


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_keeps_gradients_that_a_grad_scaler_is_to_lift(reduction, vectors):
    g = torch.Generator().manual_seed(0)
    q, others = (torch.nn.functional.normalize(torch.randn(64, 128, generator=g), dim=1).half() for _ in range(2))

    def gradients(dtype, impl):
        of = [t.to(dtype, copy=True).requires_grad_() for t in ((q, others, q) if vectors else (q, q))]
        loss = info_nce(*of[:2], of[2] if vectors else torch.arange(64), scale=30.0, reduction=reduction, impl=impl)
        return torch.autograd.grad(loss.mean() * 2**20, of)

    for ours, truth in zip(gradients(torch.float16, "auto"), gradients(torch.float64, "reference"), strict=True):
        assert ours.dtype == torch.float16
        assert ours.double().sub(truth).norm() < 0.03 * truth.norm()


def test_a_scale_may_change_under_compile():
    compiled = torch.compile(
        lambda scale: info_nce(q, q, torch.arange(6), scale=scale), fullgraph=True, backend="aot_eager"
    )
    q = torch.randn(6, 8)
    for scale in (1.0, 2.5, 4.0):
        torch.testing.assert_close(compiled(scale), info_nce(q, q, torch.arange(6), scale=scale))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_tensor_of_nan_as_scale_reaches_the_loss(reduction):
    """It is not looked at, as that might wait for a GPU."""
    scale = torch.tensor(float("nan"))
    q, k = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    assert info_nce(q, k, torch.arange(6), scale=scale, reduction=reduction).isnan().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("engine", [pytest.param("C++", marks=needs_cpp)], indirect=True)
def test_rows_without_weight_have_no_gradient_whatever_the_scale(bad, dtype, engine, level):
    """Nor have the rows that fill up the last tile of anchors, whose anchors are not there to be read."""
    q, k = (torch.randn(n, 17, dtype=dtype, requires_grad=True) for n in (3, 1))
    info_nce(q, k, torch.tensor([0, -1, 0]), scale=torch.tensor(bad), reduction="sum", impl="chunked").backward()
    assert not q.grad.any()
    assert not k.grad.any()


def test_what_is_no_tensor_is_named():
    q = torch.randn(4, 8)
    with pytest.raises(
        TypeError, match=r"info_nce: positives must be a torch\.Tensor\. Got list; write torch\.tensor\(pos"
    ):
        info_nce(q, q, [0, 1, 2, 3])
    with pytest.raises(
        TypeError, match=r"info_nce: anchors must be a torch\.Tensor\. Got list; write torch\.stack\(anch"
    ):
        info_nce(list(q), q, torch.arange(4))
    with pytest.raises(
        TypeError, match=r"candidates must be a torch\.Tensor\. Got ndarray; write torch\.tensor\(candidat"
    ):
        info_nce(q, q.numpy(), torch.arange(4))
    with pytest.raises(TypeError, match=r"anchors must be an ordinary, dense tensor\. Got torch\.sparse_coo; write"):
        info_nce(torch.eye(3).to_sparse(), torch.eye(3), torch.arange(3))
    with pytest.raises(TypeError, match=r"candidates must be an ordinary, dense tensor\. Got a nested tensor; pad it"):
        info_nce(torch.eye(3), torch.nested.nested_tensor([torch.ones(2, 3)], layout=torch.jagged), torch.arange(3))
    with pytest.raises(TypeError, match=r"candidates must be a torch\.Tensor\. Got NoneType\.$"):
        info_nce(q, None, torch.arange(4))
    with pytest.raises(
        TypeError, match=r"sampled_info_nce: pool must be a torch\.Tensor\. Got tuple; write torch\.stack"
    ):
        sampled_info_nce(q, tuple(q), torch.arange(4), Negatives(3, seed=0))
    with pytest.raises(TypeError, match=r"tensor of indices or Neg.*Got list; write torch\.tensor\(negatives\)\.$"):
        sampled_info_nce(q, q, torch.arange(4), [[0, 1]] * 4)
    with pytest.raises(ValueError, match="indices must be integers"):
        info_nce(q, q, torch.arange(4.0))
    with pytest.raises(TypeError, match=r"did you mean Negatives\(3, seed=0\)"):
        sampled_info_nce(q, q, torch.arange(4), 3)
