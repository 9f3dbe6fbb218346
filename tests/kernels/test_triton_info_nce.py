"""The dense Triton kernels against float64, in the interpreter where there is no GPU: every branch, small shapes.

Inputs sit inside larger NaN-filled buffers, so that a read beyond the end shows; outputs come from poisoned memory (see
conftest), so that an element nobody wrote shows.
"""

import pytest
import torch
from tolerance import assert_as_good_as_naive, error

pytest.importorskip("triton")
from cpc_kernels import info_nce, info_nce_stats, launching, reference, tiles, triton_info_nce

# the interpreter computes with numpy, which warns where a GPU is silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("loss", "lse", "positive", "rank")


def surround(tensor):
    """The same values inside a larger buffer of NaN (a far value for integers): rows are not contiguous either."""
    if tensor.ndim == 1:
        fill = float("nan") if tensor.is_floating_point() else -(2**30)
        buffer = torch.full((len(tensor) + 64,), fill, dtype=tensor.dtype, device=tensor.device)
        buffer[32:-32] = tensor
        return buffer[32:-32]
    n, d = tensor.shape
    buffer = torch.full((n + 64, d + 16), float("nan"), dtype=tensor.dtype, device=tensor.device)
    buffer[32 : 32 + n, 8 : 8 + d] = tensor
    return buffer[32 : 32 + n, 8 : 8 + d]


def problem(n=37, m=45, d=17, dtype=torch.float32, vectors=False, ids=False, scale=1.0, seed=0):
    draw = torch.Generator().manual_seed(seed)
    size = d**-0.5
    q = (torch.randn(n, d, generator=draw) * size).to(dtype)
    k = torch.randn(m, d, generator=draw).to(dtype)
    if vectors or m == 0:
        p = torch.randn(n, d, generator=draw).to(dtype)
    else:
        p = torch.randint(-1, m, (n,), generator=draw)
    a = c = None
    if ids:
        a, c = torch.randint(0, 4, (n,), generator=draw), torch.randint(0, 4, (m,), generator=draw)
        a[: n // 8] = 9  # no candidate shares it
        c[: m // 2] = 5
    s = torch.full((1,), scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [None if t is None else surround(t).to(DEVICE) if t.ndim == 2 else t.to(DEVICE) for t in (q, k, p, s, a, c)]


def widen(q, k, p, s, a, c, dtype=torch.float64):
    return q.to(dtype), k.to(dtype), p.to(dtype) if p.is_floating_point() else p, s.to(dtype), a, c


def plain(q, k, p, s, a, c):
    """The naive way in one dtype: loss, lse, positive, rank, O, and dk for given w, from the full score matrix."""
    result, active = reference.info_nce_rows(q, k, p, scale=s, anchor_ids=a, candidate_ids=c)
    q = q.where(active[:, None], 0.0)
    scores = s * (q @ k.T)
    negative = torch.ones_like(scores, dtype=torch.bool)
    if not p.is_floating_point():
        negative &= torch.arange(len(k), device=k.device) != p[:, None]
    if a is not None:
        negative &= a[:, None] != c
    live = negative & (result["lse"] != -torch.inf)[:, None]
    probabilities = torch.exp(scores - result["lse"][:, None]).where(live, 0.0)

    def gradient(w):
        grad = (probabilities * w[:, None]).T @ q
        if not p.is_floating_point():
            grad.index_add_(0, p.clamp(min=0), -(w * active)[:, None] * q)
        return grad

    return result, probabilities @ k, gradient


def check(inputs, splits=None):
    q, _, p, _, _, _ = inputs
    truth, truth_o, truth_dk = plain(*widen(*inputs))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    naive, naive_o, naive_dk = plain(*widen(*inputs, dtype=compute))
    out = triton_info_nce.forward(*inputs, True, splits=splits)
    for name, ours in zip(NAMES[:3], out, strict=False):
        assert ours.dtype == compute
        assert_as_good_as_naive(actual=ours, naive=naive[name], truth=truth[name], name=name)
    assert out[3].dtype == torch.int64
    # a rank may differ where two scores are equal to rounding
    assert (out[3] - truth["rank"]).abs().sum() <= (0 if q.dtype == torch.float64 else 1)
    # one rounding of P to the inputs' dtype on the way to the matrix units
    assert_as_good_as_naive(actual=out[4], naive=naive_o, truth=truth_o, name="expectation", dtype=q.dtype)
    scores_only = triton_info_nce.forward(*inputs, False, splits=splits)
    assert scores_only[4].shape == (0,)
    for name, ours in zip(NAMES[:3], scores_only, strict=False):
        assert_as_good_as_naive(actual=ours, naive=naive[name], truth=truth[name], name=f"{name}, scores only")

    draw = torch.Generator().manual_seed(7)
    upstream = torch.randn(len(q), generator=draw).to(DEVICE, compute)  # of either sign, never ones
    w = upstream * -torch.expm1(-truth["loss"].to(compute)) * inputs[3].to(compute)
    dk = triton_info_nce.backward_candidates(w, out[1], *inputs, splits=splits)
    assert dk.dtype == q.dtype
    # lse and scale * log2(e) are each one number of the compute dtype: half an ulp of them, times a score as large as
    # lse, is a relative error of P
    lse = truth["lse"][truth["lse"].isfinite()].abs()
    handed_over = torch.finfo(compute).eps * (float(lse.max()) if lse.numel() else 0.0)
    ours, theirs = error(dk, truth_dk(w.double())), error(naive_dk(w).to(q.dtype), truth_dk(w.double()))
    limit = 2 * (theirs + torch.finfo(q.dtype).eps / 2 + handed_over)
    assert ours <= limit, f"candidates' gradient: relative error {ours:.3e}, naive {theirs:.3e}, allowed {limit:.3e}"
    assert out[4].isfinite().all()
    return out, dk


@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
@pytest.mark.parametrize("ids", [False, True], ids=["plain", "ids"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_positives(dtype, ids, vectors):
    check(problem(dtype=dtype, ids=ids, vectors=vectors))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("d", [1, 2, 17, 64, 256, 300, 600])
def test_features(d, splits):
    check(problem(d=d, ids=d % 2 == 0, scale=3.0), splits=splits)


@pytest.mark.slow
def test_two_thousand_features():
    check(problem(d=2048, n=9, m=20))
    check(problem(d=2048, n=9, m=20, vectors=True, ids=True, dtype=torch.float16))


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 40), (40, 1), (32, 16), (33, 17), (5, 100)])
@pytest.mark.parametrize("splits", [None, 4])
def test_ragged_sizes(n, m, splits):
    check(problem(n=n, m=m, d=32), splits=splits)
    check(problem(n=n, m=m, d=32, vectors=True), splits=splits)


@pytest.mark.parametrize("d", [8, 600])
@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_empty(n, m, d):
    q, k, p, s, _, _ = problem(n=n, m=m, d=d)
    for positives in (p, torch.full((n,), -1, device=DEVICE)):
        loss, lse, positive, rank, o = triton_info_nce.forward(q, k, positives, s)
        assert (loss == 0).all()
        assert (lse == -torch.inf).all()
        assert (rank == 0).all()
        assert (o == 0).all()
        assert o.shape == (n, d)
        assert positive.isfinite().all()
        dk = triton_info_nce.backward_candidates(torch.ones(n, device=DEVICE), lse, q, k, positives, s)
        assert dk.shape == (m, d)
        assert (dk == 0).all()


@pytest.mark.parametrize("scale", [0.01, 100.0, -1.0, -30.0, 0.0])
@pytest.mark.parametrize("d", [17, 600])
def test_scales(scale, d):
    check(problem(d=d, scale=scale, ids=True))
    check(problem(d=d, scale=scale), splits=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides(dtype):
    q, k, p, s, _, _ = problem(d=24, dtype=dtype)
    rows = q.contiguous(), k.contiguous()
    expected, expected_dk = check([*rows, p, s, None, None])
    strange = rows[0].t().contiguous().t(), rows[1].repeat_interleave(2, 1)[:, ::2]
    actual, actual_dk = check([*strange, p, s, None, None])
    for ours, theirs in zip((*actual, actual_dk), (*expected, expected_dk), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("d", [16, 17], ids=["descriptors", "pointers"])
def test_descriptors_where_the_strides_allow(d):
    q, k, p, s, _, _ = problem(d=d)
    q, k = q.contiguous(), k.contiguous()
    assert launching.Launch("info_nce", q).describable(q, k) == (d == 16)
    q[p < 0] = float("nan")  # an ignored row may hold anything
    _, dk = check([q, k, p, s, None, None])
    assert dk.isfinite().all()


@pytest.mark.parametrize("d", [17, 600])
def test_ignored_rows_and_rows_without_negatives(d):
    q, k, p, s, _, _ = problem(d=d)
    p[3:30] = -1
    check([q, k, p, s, None, None])
    same = torch.zeros(len(q), dtype=torch.int32, device=DEVICE), torch.zeros(len(k), dtype=torch.int32, device=DEVICE)
    (loss, lse, positive, rank, o), dk = check([q, k, p, s, *same])
    assert (loss == 0).all()
    assert (lse == -torch.inf).all()
    assert (rank == 0).all()
    assert (o == 0).all()
    assert (dk == 0).all()
    assert ((positive == 0) == (p < 0)).all()


def test_large_offset_keeps_the_loss():
    """Scores near 1e4: the gap is formed from raw scores, and does not lose the digits that lse loses."""
    q, k, p, s, _, _ = problem(d=16, vectors=False)
    q[:, 0], k[:, 0] = 100.0, 100.0
    inputs = [q, k, p, s, None, None]
    truth, *_ = plain(*widen(*inputs))
    naive, *_ = plain(*inputs)
    for splits in (1, 3):
        loss = triton_info_nce.forward(*inputs, splits=splits)[0]
        assert_as_good_as_naive(actual=loss, naive=naive["loss"], truth=truth["loss"], name="loss at 1e4")


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("d", [17, 600])
def test_equal_scores_give_the_log_of_the_count(d, splits):
    q, k, p, s, _, _ = problem(d=d)
    k[:] = k[0].clone()
    p.clamp_(min=0)
    loss, _, _, rank, _ = triton_info_nce.forward(q, k, p, s, splits=splits)
    torch.testing.assert_close(loss, torch.full_like(loss, len(k)).log(), rtol=1e-5, atol=1e-5)
    assert (rank == 0).all()  # a tie does not beat the positive


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("d", [4, 600])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_reach_the_loss(value, d, splits):
    q, k, p, s, _, _ = problem(d=d)
    q[:, 0], p[:] = q[:, 0].abs() + 0.1, torch.arange(len(q), device=DEVICE) % 7
    k[20, 0] = value
    loss, lse, *_ = triton_info_nce.forward(q, k, p, s, splits=splits)
    truth, *_ = plain(*widen(q, k, p, s, None, None))
    torch.testing.assert_close(loss.double(), truth["loss"], rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(lse.double(), truth["lse"], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert loss.isnan().all() == (value != value)


def test_rows_whose_scores_are_all_minus_infinity():
    q, k, p, s, _, _ = problem(d=4, vectors=True)
    q, k = q.abs() + 0.1, k.clone()
    k[:, 0] = -torch.inf
    loss, lse, _, rank, _ = triton_info_nce.forward(q, k, p, s, None, None, False)
    assert (loss == 0).all()
    assert (lse == -torch.inf).all()
    assert (rank == 0).all()


def test_split_and_unsplit_agree():
    inputs = problem(n=40, m=100, d=32, ids=True)
    one = triton_info_nce.forward(*inputs, splits=1)
    for splits in (2, 5, 100):
        for ours, theirs in zip(triton_info_nce.forward(*inputs, splits=splits), one, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_two_runs_are_equal_to_the_bit():
    inputs = problem(n=40, m=100, d=32, dtype=torch.float16)
    runs = [triton_info_nce.forward(*inputs, splits=3) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_small_losses_stay_accurate():
    """The table of the design: with a loss near 1e-13, what is computed from 1 - p is noise; this is not."""
    q, k, p, _, _, _ = problem(n=32, m=64, d=64, dtype=torch.bfloat16)
    p = torch.arange(32, device=DEVICE)
    k[:32] = q * 8
    s = torch.full((1,), 30.0, device=DEVICE)
    inputs = [q, k, p, s, None, None]
    truth, truth_o, truth_dk = plain(*widen(*inputs))
    assert truth["loss"].median() < 1e-4
    loss, lse, _, _, o = triton_info_nce.forward(*inputs)
    torch.testing.assert_close(loss.double(), truth["loss"], rtol=2e-4, atol=0)
    w = -torch.expm1(-loss) * s
    dk = triton_info_nce.backward_candidates(w, lse, *inputs)
    relative = (dk.double() - truth_dk((-torch.expm1(-truth["loss"])) * 30.0)).norm() / truth_dk(w.double()).norm()
    assert relative < 8e-3
    assert (o - truth_o).norm() / truth_o.norm() < 8e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_left_out_when_not_asked(dtype):
    inputs = problem(dtype=dtype)
    assert triton_info_nce.forward(*inputs, need_rank=False)[3].shape == (0,)
    assert triton_info_nce.forward(*inputs, need_rank=False, splits=3)[3].shape == (0,)


def test_unknown_precision_is_named():
    with pytest.raises(ValueError, match=r'input_precision must be .* Got "?\'fast'):
        triton_info_nce.forward(*problem(), input_precision="fast")


# Through the public op ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 tiles are for the interpreter")
@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
def test_gradcheck(vectors):
    q, k, p, s, a, c = problem(n=5, m=6, d=3, dtype=torch.float64, vectors=vectors, ids=True)
    q, k, s = (t.clone().requires_grad_() for t in (q, k, s))
    p = p.clone().requires_grad_() if vectors else p

    def op(q, k, s, *p_vectors):
        positives = p_vectors[0] if vectors else p
        ids = {"anchor_ids": a, "candidate_ids": c}
        return info_nce(q, k, positives, scale=s, reduction="none", impl="triton", **ids)

    assert torch.autograd.gradcheck(op, (q, k, s, *([p] if vectors else [])))


@pytest.mark.parametrize("who", ["anchors", "candidates", "scale"])
def test_only_one_input_learns(who):
    q, k, p, s, _, _ = problem(dtype=torch.float64)
    inputs = {"anchors": q.clone(), "candidates": k.clone(), "scale": s.clone()}
    inputs[who].requires_grad_()
    grads = []
    for impl in ("triton", "reference"):
        loss = info_nce(inputs["anchors"], inputs["candidates"], p, scale=inputs["scale"], impl=impl)
        grads += torch.autograd.grad(loss, inputs[who])
    torch.testing.assert_close(*grads)


def test_stats_match_the_reference():
    q, k, p, s, a, c = problem(ids=True)
    ours, theirs = (
        info_nce_stats(q, k, p, scale=s, anchor_ids=a, candidate_ids=c, impl=impl) for impl in ("triton", "reference")
    )
    for name in NAMES:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5, msg=name)


# The table -----------------------------------------------------------------------------------------------------------


def test_splits_fill_the_device_and_no_more():
    assert tiles.splits(1000, 100, 132) == 1  # full anyway
    assert tiles.splits(87, 1, 132) == 1  # nothing to cut
    assert tiles.splits(1, 10_000, 132) > 64  # a bank with few queries
    count = tiles.splits(16, 128, 132)
    assert 4 <= count <= 8
    assert tiles.splits(0, 0, 132) == 1


def test_every_op_has_a_tile_everywhere():
    for arch in (*tiles.ARCHITECTURES, "interpreter"):
        for op in ("positive", "forward", "scores", "streamed", "backward", "combine", "exponentials", "coefficients"):
            for d in (1, 64, 65, 512, 2048):
                for width, precision in ((16, "ieee"), (32, "tf32"), (32, "tf32x3"), (32, "ieee")):
                    for variant in tiles.VARIANTS:
                        assert tiles.tile(op + variant, d, width, arch, precision).warps in (4, 8)


def test_architectures():
    expected = {(8, 0): "sm_80", (8, 9): "sm_86", (9, 0): "sm_90", (10, 0): "sm_100", (12, 0): "sm_86"}
    assert {c: tiles.architecture(c) for c in expected} == expected
    assert tiles.architecture("gfx942:sramecc+:xnack-") == "gfx942"
    with pytest.raises(RuntimeError, match=r"8\.0 or newer. Got \(7, 5\)"):
        tiles.architecture((7, 5))


def test_profiler_sees_each_stage():
    inputs = problem()
    with torch.profiler.profile() as profile:
        triton_info_nce.forward(*inputs, splits=2)
    names = {event.key for event in profile.key_averages()}
    assert {f"cpc_kernels/info_nce/{stage}" for stage in ("positive", "forward", "combine")} <= names
