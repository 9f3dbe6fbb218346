"""sampled_info_nce, in C++ and by gathering, against the spec in float64, on inputs that are not tame."""

import os
import sys

import pytest
import torch
from tolerance import assert_as_good_as_naive

from cpc_kernels import Negatives, draw_negatives, info_nce, reference, sampled_info_nce, sampled_info_nce_stats
from cpc_kernels.capabilities import CPP

module = sys.modules["cpc_kernels.sampled_info_nce"]  # the function of that name hides it
needs_cpp = pytest.mark.skipif(not CPP.available, reason=CPP.reason)
both = pytest.mark.parametrize("impl", ["gather", pytest.param("cpp", marks=needs_cpp)])


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "GATHER_FLOATS", 100)


def make(n=9, k=3, m=8, s=5, d=6, *, kind="listed", vectors=False, ids=False, spread=1.0, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    anchors = (torch.randn(n, k, d, generator=g) * spread).to(dtype)
    pool = (torch.randn(m, d, generator=g) * spread).to(dtype)
    if vectors:
        positives = (torch.randn(n, k, d, generator=g) * spread).to(dtype)
    else:
        positives = torch.randint(-1, m, (n, k), generator=g) if m else torch.full((n, k), -1)
    negatives = {
        "listed": lambda: torch.randint(-1, m, (n, s), generator=g),
        "listed per step": lambda: torch.randint(-1, m, (n, k, s), generator=g),
        "drawn": lambda: Negatives(s, 5),
        "drawn per step": lambda: Negatives(s, torch.tensor(-6), per_step=True),
    }[kind]()
    tags = {"anchor_ids": torch.arange(n) % 4, "pool_ids": torch.arange(m).int() % 4} if ids else {}
    return anchors, pool, positives, negatives, tags


def several(*args, **options):
    """Eight problems, judged together: the naive error of one small problem is a matter of luck."""
    return [make(*args, seed=seed, **options) for seed in range(8)]


def run(problem, scale, dtype, reduction, impl):
    """Loss and gradients of anchors, pool, scale, and positives if vectors."""
    anchors, pool, positives, negatives, tags = problem
    leaves = [t.to(dtype).detach().clone().requires_grad_() for t in (anchors, pool)]
    factor = torch.tensor(float(scale), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaves.append(factor.requires_grad_())
    own = positives
    if positives.is_floating_point():
        own = positives.to(dtype).detach().clone().requires_grad_()
        leaves.append(own)
    loss = sampled_info_nce(
        leaves[0], leaves[1], own, negatives, scale=leaves[2], reduction=reduction, impl=impl, **tags
    )
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.ndim else None
    loss.backward(upstream)
    return [loss.detach()] + [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def judge(problems, impl, scale=0.7, reduction="none", dtype=torch.float32):
    def results(dtype, impl):
        return [torch.stack(r) for r in zip(*(run(p, scale, dtype, reduction, impl) for p in problems), strict=True)]

    ours, naive, truth = results(dtype, impl), results(dtype, "reference"), results(torch.float64, "reference")
    for name, a, b, c in zip(("loss", "dq", "dpool", "dscale", "dv"), ours, naive, truth, strict=False):
        assert a.dtype == b.dtype
        assert_as_good_as_naive(actual=a, naive=b, truth=c, name=name, dtype=dtype)


KINDS = ["listed", "listed per step", "drawn", "drawn per step"]


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_against_the_spec(dtype, vectors, ids, kind, impl, small_chunks):
    judge(several(kind=kind, vectors=vectors, ids=ids, dtype=dtype), impl, dtype=dtype)
    judge(several(kind=kind, vectors=vectors, ids=ids, dtype=dtype), impl, dtype=dtype, reduction="mean")


@needs_cpp
@pytest.mark.parametrize(
    "shape",
    [(40, 1, 50, 20, 256), (12, 5, 30, 70, 100), (300, 2, 2000, 17, 72), (9, 4, 900, 33, 515), (4, 2, 900, 5, 70)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(shape, dtype, level):
    judge(several(*shape, spread=0.2, dtype=dtype), "cpp", dtype=dtype)
    judge(several(*shape, spread=0.2, dtype=dtype, kind="drawn per step"), "cpp", dtype=dtype)


@both
@pytest.mark.parametrize(
    "shape", [(1, 1, 3, 2, 1), (0, 2, 3, 4, 5), (3, 2, 0, 4, 5), (3, 2, 4, 0, 5), (4, 1, 3, 9, 2), (12, 3, 9, 4, 2048)]
)
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(shape, kind, vectors, impl):
    if shape[2] == 0 and kind.startswith("listed"):
        kind = "drawn"
    judge(several(*shape, kind=kind, vectors=vectors), impl, scale=0.3)


@both
@pytest.mark.parametrize("scale", [0.01, 100.0, -3.0, 0.0])
def test_scales(scale, impl):
    judge(several(20, 2, 30, 12, 17), impl, scale=scale)
    judge(several(20, 2, 30, 12, 17, spread=10.0), impl, scale=scale, reduction="sum")


@both
def test_one_step_needs_no_axis(impl):
    anchors, pool, positives, negatives, _ = make(k=1)
    flat = sampled_info_nce(anchors[:, 0], pool, positives[:, 0], negatives, reduction="none", impl=impl)
    assert flat.shape == (9,)
    torch.testing.assert_close(flat, sampled_info_nce(anchors, pool, positives, negatives, reduction="none")[:, 0])
    assert sampled_info_nce_stats(anchors[:, 0], pool, positives[:, 0], negatives, impl=impl).rank.shape == (9,)


@both
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vectors", [False, True])
def test_stats(kind, vectors, impl):
    anchors, pool, positives, negatives, tags = make(kind=kind, vectors=vectors, ids=True)
    stats = sampled_info_nce_stats(anchors, pool, positives, negatives, scale=0.7, impl=impl, **tags)
    truth = sampled_info_nce_stats(anchors, pool, positives, negatives, scale=0.7, impl="reference", **tags)
    for field in stats._fields:
        torch.testing.assert_close(getattr(stats, field), getattr(truth, field))


@both
def test_rows_that_do_not_count(impl):
    anchors, pool, _, _, _ = make(3, 2, 4)
    positives = torch.tensor([[0, -1], [2, 1], [3, 3]])
    negatives = torch.tensor([[1, 1, 2], [0, 3, -1], [-1, -1, -1]])
    q = anchors.clone()
    q[0, 1] = float("nan")  # an ignored row may hold anything
    q, z = q.requires_grad_(), pool.requires_grad_()
    loss = sampled_info_nce(q, z, positives, negatives, reduction="none", impl=impl)
    assert loss[0, 1] == 0
    assert loss[2].tolist() == [0, 0]
    mean = sampled_info_nce(q, z, positives, negatives, impl=impl)
    torch.testing.assert_close(mean, loss.sum() / 5)
    mean.backward()
    assert not q.grad[0, 1].any()
    assert not q.grad[2].any()
    assert z.grad.isfinite().all()


@both
def test_nan_and_infinity_reach_the_loss(impl):
    anchors, pool, positives, _, _ = make()
    anchors = anchors.abs()
    positives = positives.clamp(min=0) % 3
    negatives = torch.tensor([[3, 4, 5, 6, 7]]).expand(9, -1)
    pool[5] = -3e38  # a score of -inf
    leaf = anchors.clone().requires_grad_()
    loss = sampled_info_nce(leaf, pool, positives, negatives, scale=5.0, reduction="none", impl=impl)
    without = sampled_info_nce(
        anchors, pool, positives, torch.where(negatives == 5, -1, negatives), scale=5.0, reduction="none"
    )
    torch.testing.assert_close(loss, without)
    loss.sum().backward()
    assert leaf.grad.isfinite().all()
    pool[5] = float("nan")
    assert sampled_info_nce(anchors, pool, positives, negatives, reduction="none", impl=impl).isnan().all()
    listed = torch.where(negatives == 5, -1, negatives)
    assert sampled_info_nce(anchors, pool, positives, listed, reduction="none", impl=impl).isfinite().all()


@both
@pytest.mark.parametrize("scale", [8.0, 20.0, 34.0])
def test_small_losses_keep_their_gradient(scale, impl):
    g = torch.Generator().manual_seed(1)
    n, d = 64, 128
    pool = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1).bfloat16()
    anchors = (pool.float() + 0.02 * torch.randn(n, d, generator=g)).bfloat16()
    problem = anchors[:, None], pool, torch.arange(n)[:, None], Negatives(32, 3), {}
    loss, dq, *_ = run(problem, scale, torch.float32, "none", impl)
    truth, dq_truth, *_ = run(problem, scale, torch.float64, "none", "reference")
    assert float(((loss - truth).abs() / truth).max()) < 2e-5
    error = (dq.double() - dq_truth).flatten(1).norm(dim=1) / dq_truth.flatten(1).norm(dim=1)
    assert float(error.max()) <= 2e-3, f"dq errs by {float(error.max()):.1e} at loss {float(truth.mean()):.1e}"
    assert scale < 34 or float(truth.mean()) < 1e-9


@needs_cpp
@pytest.mark.parametrize("vectors", [False, True])
def test_a_batch_of_upstream_gradients(vectors):
    anchors, pool, positives, negatives, _ = make(n=4, k=1, vectors=vectors)
    leaves = anchors.requires_grad_(), pool.requires_grad_()
    loss = sampled_info_nce(*leaves, positives, negatives, reduction="none", impl="cpp").flatten()
    batch = torch.autograd.grad(loss, leaves, torch.eye(4), retain_graph=True, is_grads_batched=True)
    for i, row in enumerate(torch.eye(4)):
        single = torch.autograd.grad(loss, leaves, row, retain_graph=True)
        assert all(torch.equal(a[i], b) for a, b in zip(batch, single, strict=True))


@needs_cpp
@pytest.mark.parametrize("kind", ["listed", "drawn per step"])
@pytest.mark.parametrize(("m", "d"), [(300, 48), (40_000, 70)])  # the larger pool is copied by few threads only
def test_threads_change_nothing(kind, m, d):
    assert torch.ops.cpc_kernels_cpu.threaded(), "built without OpenMP: every loop runs on one thread"
    problem = make(700, 2, m, 40, d, kind=kind, spread=0.3)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(problem, 1.3, torch.float32, "none", "cpp"))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpp
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_threads_change_no_sum_of_losses(reduction):
    """Of more rows than torch adds on one thread."""
    anchors, pool, positives, negatives, _ = make(40_000, 1, 64, 2, 4)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(sampled_info_nce(anchors, pool, positives, negatives, reduction=reduction, impl="cpp").item())
    torch.set_num_threads(before)
    assert len(set(results)) == 1
    rows = sampled_info_nce(anchors, pool, positives, negatives, reduction="none", impl="cpp").double()
    truth = rows.sum() / (1 if reduction == "sum" else (positives >= 0).sum())
    assert results[0] == truth.float().item()


@both
def test_all_listed_is_dense(impl):
    anchors, pool, positives, _, _ = make(k=1)
    everything = torch.arange(8).expand(9, -1)
    others = torch.where(everything == positives, -1, everything)
    dense = info_nce(anchors[:, 0], pool, positives[:, 0], reduction="none")
    torch.testing.assert_close(
        sampled_info_nce(anchors, pool, positives, others, reduction="none", impl=impl)[:, 0], dense
    )


@both
def test_drawn_is_listed(impl):
    anchors, pool, positives, drawn, _ = make(kind="drawn", m=6)
    listed = draw_negatives(drawn, positives, 6, 9, 3)
    per_step = listed[:, None].expand(-1, 3, -1)
    listed = torch.where(per_step == positives[..., None], -1, per_step)
    ours = sampled_info_nce(anchors, pool, positives, drawn, reduction="none", impl=impl)
    torch.testing.assert_close(ours, sampled_info_nce(anchors, pool, positives, listed, reduction="none", impl=impl))


@pytest.mark.parametrize("impl", ["reference", "gather", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("kind", ["listed", "drawn per step"])
def test_gradcheck(kind, vectors, impl):
    anchors, pool, positives, negatives, tags = make(
        3, 2, 5, 4, 3, kind=kind, vectors=vectors, ids=True, dtype=torch.float64
    )
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    leaves = [anchors.requires_grad_(), pool.requires_grad_(), scale]
    if vectors:
        leaves.append(positives.requires_grad_())

    def loss(q, z, scale, own=positives):
        return sampled_info_nce(q, z, own, negatives, scale=scale, reduction="none", impl=impl, **tags)

    assert torch.autograd.gradcheck(loss, leaves)


@both
@pytest.mark.parametrize("who", ["anchors", "pool", "positives", "scale"])
def test_only_one_learns(who, impl):
    anchors, pool, positives, negatives, _ = make(vectors=True)
    leaves = {"anchors": anchors, "pool": pool, "positives": positives, "scale": torch.tensor(0.5)}
    truth = {name: leaf.double().requires_grad_(name == who) for name, leaf in leaves.items()}
    leaves[who].requires_grad_()
    sampled_info_nce(**leaves, negatives=negatives, impl=impl).backward()
    sampled_info_nce(**truth, negatives=negatives, impl="reference").backward()
    torch.testing.assert_close(leaves[who].grad.double(), truth[who].grad, rtol=1e-4, atol=1e-6)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != who)


@both
def test_second_derivatives_are_refused(impl):
    anchors, pool, positives, negatives, _ = make()
    q, z = anchors.requires_grad_(), pool.requires_grad_()
    loss = sampled_info_nce(q, z, positives, negatives, impl=impl)
    (dq,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match=r'second derivatives are not implemented.*impl="reference" has them'):
        dq.sum().backward()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 3, 7, 15, 17, 19, 31, 33, 45, 300, 513, 600])
def test_equal_rows_tie_whatever_the_number_of_features(d, dtype, level):
    """A positive is scored alone, negatives in eights or for two anchors at a time: all must add in one way."""
    pool = torch.randn(1, d, dtype=dtype).expand(12, d).contiguous()
    for steps in (1, 2, 3):
        anchors = torch.randn(20, 1, d, dtype=dtype).expand(20, steps, d).contiguous()
        listed = torch.randint(0, 12, (20, 9))
        stats = sampled_info_nce_stats(anchors, pool, torch.zeros(20, steps, dtype=torch.long), listed)
        assert stats.rank.sum() == 0
        assert (stats.positive == stats.positive[:, :1]).all()
        assert (stats.lse == stats.lse[:, :1]).all()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_down_to_the_least_normal_number_keep_their_digits(dtype, level):
    """One negative of score x beside a positive of score 0: softplus(x)."""
    scores = torch.cat([torch.linspace(-87, 88, 701), torch.tensor([0.0, -1e-7, 1e-7, 1e30])]).to(dtype)
    pool = torch.tensor([[1.0], [0.0]], dtype=dtype)
    own, other = (torch.full((len(scores), *axis), i) for axis, i in (((), 1), ((1,), 0)))
    loss = sampled_info_nce(scores[:, None], pool, own, other, reduction="none", impl="cpp")
    truth = torch.nn.functional.softplus(scores.double(), threshold=800)
    truth = truth.where(scores > -30, scores.double().exp().log1p())
    assert float(((loss.double() - truth) / truth).abs().max()) < 8 * torch.finfo(dtype).eps


@needs_cpp
@pytest.mark.parametrize("which", ["positives", "negatives"])
def test_indices_changed_behind_autograds_back_are_refused(which):
    """A write through NumPy counts as no change of the tensor."""
    anchors, pool, positives, negatives, _ = make()
    loss = sampled_info_nce(anchors.requires_grad_(), pool.requires_grad_(), positives, negatives, impl="cpp")
    {"positives": positives, "negatives": negatives}[which].numpy()[2] = 8
    with pytest.raises(IndexError, match=f"{which} must lie between -1 and 7"):
        loss.backward()


@both
def test_losses_can_be_changed_in_place(impl):
    anchors, pool = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8)
    losses = sampled_info_nce(anchors, pool, torch.arange(6), Negatives(4, 0), reduction="none", impl=impl)
    losses.mul_(2)
    losses[:2] = 0
    losses.sum().backward()
    assert not anchors.grad[:2].any()


@both
def test_retain_graph_and_strides(impl):
    anchors, pool, positives, negatives, _ = make()
    q, z = anchors.mT.contiguous().mT.requires_grad_(), pool.T.contiguous().T.requires_grad_()
    loss = sampled_info_nce(q, z, positives.int(), negatives.T.contiguous().T.int(), impl=impl)
    torch.testing.assert_close(loss, sampled_info_nce(anchors, pool, positives, negatives, impl="reference"))
    first = torch.autograd.grad(loss, (q, z), retain_graph=True)
    second = torch.autograd.grad(loss, (q, z))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
def test_gradients_lie_as_their_fakes_say(impl, unpoisoned):
    """However the inputs lie; what is compiled stops at others."""
    anchors, pool, positives, negatives, _ = make(vectors=True)
    q, z, v = (t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1])
               for t in (anchors, pool, positives))  # fmt: skip
    given, options = (q, z, v, torch.ones(1)), (0, False, impl)
    _, lse, positive, _, kept = module.sampled_op(*given, negatives, None, 0, False, None, None, impl, True, False)
    ones = torch.ones(lse.shape)
    grads = module.sampled_backward(
        ones, lse, positive, kept, *given, negatives, None, None, None, *options, True, True, True, True
    )
    assert all(grad.is_contiguous() for grad in grads)


@both
def test_opcheck(impl, unpoisoned):
    anchors, pool, positives, negatives, tags = make(ids=True)
    q, z, scale = anchors.requires_grad_(), pool.requires_grad_(), torch.tensor([0.5], requires_grad=True)
    ids = tags["anchor_ids"], tags["pool_ids"].long()
    options = (impl, True, True)
    torch.library.opcheck(module.sampled_op, (q, z, positives, scale, negatives, None, 0, False, *ids, *options))
    seed = torch.tensor([3])
    torch.library.opcheck(module.sampled_op, (q, z, positives, scale, None, seed, 5, True, None, None, *options))


@both
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own
def test_compile_fullgraph(impl, unpoisoned):
    anchors, pool, positives, negatives, _ = make()
    q, z = anchors.requires_grad_(), pool.requires_grad_()

    def loss(q, z, seed):
        listed = sampled_info_nce(q * 2, z, positives, negatives, impl=impl)
        return listed + sampled_info_nce(q, z, positives, Negatives(4, seed), reduction="none", impl=impl).sum()

    seed = torch.tensor([11])
    truth = torch.autograd.grad(loss(q, z, seed), (q, z))
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, z, seed), (q, z))
    torch.testing.assert_close(ours, truth)


@both
def test_autocast_and_checkpoint(impl):
    from torch.utils.checkpoint import checkpoint

    anchors, pool, positives, negatives, _ = make()
    q = anchors.bfloat16().requires_grad_()
    z = pool.requires_grad_()

    def loss(q, z):
        return sampled_info_nce(q, z, positives, negatives, impl=impl)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(q, z)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, loss(q.float(), z), rtol=1e-2, atol=1e-2)
    mixed.backward()
    assert q.grad.dtype == torch.bfloat16
    q = anchors.requires_grad_()
    truth = torch.autograd.grad(loss(q, z), (q, z))
    ours = torch.autograd.grad(checkpoint(loss, q, z, use_reentrant=False), (q, z))
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))


BAD = [
    (
        {"pool": torch.zeros(7, 3)},
        ValueError,
        r"anchors have 4 features, the pool 3; they must match. Got anchors \(5, 2, 4\), pool \(7, 3\).",
    ),
    (
        {"positives": torch.zeros(5, dtype=torch.long)},
        ValueError,
        r"indices must be \(5, 2\). Got .* positives \(5,\).",
    ),
    ({"positives": torch.full((5, 2), 7)}, IndexError, r"positives must lie between -1 and 6 .* from 7 to 7"),
    ({"negatives": torch.full((5, 3), 7)}, IndexError, r"negatives must lie between -1 and 6 .* from 7 to 7"),
    (
        {"negatives": torch.full((5, 3), 7), "impl": "gather"},
        IndexError,
        r"negatives must lie between -1 and 6 \(the pool has 7 rows; -1 is ignored\)",
    ),
    ({"negatives": torch.zeros(5, 3)}, TypeError, r"integer indices or Negatives\(count, seed\). Got torch.float32"),
    ({"negatives": torch.zeros(4, 3, dtype=torch.long)}, ValueError, r"negatives must be \(N, S\), shared .* \(4, 3\)"),
    ({"pool_ids": torch.zeros(7, dtype=torch.long)}, ValueError, r"pool_ids was given without anchor_ids"),
    ({"impl": "chunked"}, ValueError, r"must be one of auto, reference, cpp, gather, triton. Got 'chunked'"),
    ({"reduction": "avg"}, ValueError, r"must be none, sum or mean. Got 'avg'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD)
def test_errors_repeat_the_question(change, kind, message):
    arguments = {
        "anchors": torch.zeros(5, 2, 4),
        "pool": torch.zeros(7, 4),
        "positives": torch.zeros(5, 2, dtype=torch.long),
        "negatives": torch.zeros(5, 3, dtype=torch.long),
    }
    with pytest.raises(kind, match=message):
        sampled_info_nce(**(arguments | change))


def test_without_the_library(monkeypatch):
    missing = type(CPP)("C++ CPU kernels", False, "not built", "slow")
    monkeypatch.setattr(module, "CPP", missing)
    anchors, pool, positives, negatives, _ = make()
    with pytest.raises(RuntimeError, match=r'impl="cpp" cannot run: not built; impl="gather" would run'):
        sampled_info_nce(anchors, pool, positives, negatives, impl="cpp")
    assert module.choose("auto", anchors.device) == "gather"
    torch.testing.assert_close(
        sampled_info_nce(anchors, pool, positives, negatives),
        reference.sampled_info_nce(anchors, pool, positives, negatives),
    )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs it")
def test_triton_never_falls_back():
    anchors, pool, positives, negatives, _ = make()
    with pytest.raises(RuntimeError, match=r"needs tensors on a GPU.*Got tensors on cpu"):
        sampled_info_nce(anchors, pool, positives, negatives, impl="triton")


@needs_cpp
def test_the_pools_gradient_is_written_everywhere():
    """In this mode what C++ has not written is NaN, too: candidates that nobody reads, several blocks and slices."""
    torch.use_deterministic_algorithms(True)
    try:
        for n, m, s, d in ((3, 4000, 2, 70), (700, 300, 200, 5), (5, 7, 3, 260)):
            problem = make(n, 1, m, s, d)
            ours, other = (run(problem, 1.0, torch.float64, "sum", impl) for impl in ("cpp", "gather"))
            torch.testing.assert_close(ours, other)
    finally:
        torch.use_deterministic_algorithms(False)
