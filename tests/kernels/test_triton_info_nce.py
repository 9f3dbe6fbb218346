"""The dense Triton kernels against float64, in the interpreter where there is no GPU: every branch, small shapes.

Inputs sit inside larger NaN-filled buffers, so that a read beyond the end shows; outputs come from poisoned memory (see
conftest), so that an element nobody wrote shows.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from guards import Guarded
from tolerance import assert_as_good_as_naive, error

pytest.importorskip("triton")
from cpc_kernels import (
    Negatives,
    bilinear_info_nce,
    info_nce,
    info_nce_stats,
    launching,
    reference,
    tiles,
    triton_info_nce,
)
from cpc_kernels.arguments import own_vectors
from cpc_kernels.bilinear_info_nce import bilinear_info_nce_stats, fused_op
from cpc_kernels.info_nce import info_nce_op, info_nce_sum

# the interpreter computes with numpy, which warns where a GPU is silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("loss", "lse", "positive", "rank")
EPS = torch.finfo(torch.float32).eps


def surround(tensor):
    """The same values inside a larger buffer of NaN (a far value for integers): rows are not contiguous either."""
    if tensor.ndim == 1:
        fill = float("nan") if tensor.is_floating_point() else 2**40  # as an index, far away
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
    p = torch.randint(-1, m, (n,), generator=draw) if m and not vectors else torch.randn(n, d, generator=draw).to(dtype)
    a = c = None
    if ids:
        a, c = torch.randint(0, 4, (n,), generator=draw), torch.randint(0, 4, (m,), generator=draw)
        a[: n // 8] = 9  # no candidate shares it
        c[: m // 2] = 5
    s = torch.full((1,), scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return [None if t is None else surround(t.to(DEVICE)) for t in (q, k, p, s, a, c)]


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


def judge(actual, naive, truth, name, floor=0.0, dtype=None):
    """`assert_as_good_as_naive`, but naive code that errs by less than `floor` (absolute) counts as lucky."""
    finite = truth[truth.isfinite()].abs()
    if finite.numel() and error(naive, truth) * float(finite.max()) < floor and actual.dtype != torch.float64:
        assert (actual - truth)[truth.isfinite()].abs().max() <= 2 * (floor + float(finite.max()) * EPS / 2), name
    else:
        assert_as_good_as_naive(actual=actual, naive=naive, truth=truth, name=name, dtype=dtype)


def check(inputs, splits=None):
    q, k, p, s, _, _ = inputs
    truth, truth_o, truth_dk = plain(*widen(*inputs))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    naive, naive_o, naive_dk = plain(*widen(*inputs, dtype=compute))
    # a product of D features errs by a rounding of the sum of their magnitudes, whatever cancels
    rows = p if p.is_floating_point() else torch.cat([k, k.new_zeros(1, k.shape[1])])[p]
    magnitude = (q.double() * rows.double()).abs().sum(1)[slice(None) if p.is_floating_point() else p >= 0]
    floor = torch.finfo(compute).eps / 2 * float(magnitude.max() * s.abs()) if magnitude.numel() else 0.0
    out = triton_info_nce.forward(*inputs, True, splits=splits)
    for name, ours in zip(NAMES[:3], out, strict=False):
        assert ours.dtype == compute
        judge(ours, naive[name], truth[name], name, floor)
    assert out[3].dtype == torch.int64
    # a rank may differ where two scores are equal to rounding
    assert (out[3] - truth["rank"]).abs().sum() <= (0 if q.dtype == torch.float64 else 1)
    # one rounding of P to the inputs' dtype on the way to the matrix units
    judge(out[4], naive_o, truth_o, "expectation", dtype=q.dtype)
    assert out[4].isfinite().all()
    scores_only = triton_info_nce.forward(*inputs, False, need_rank=False, splits=splits)
    assert scores_only[3].shape == scores_only[4].shape == (0,)
    for name, ours in zip(NAMES[:3], scores_only, strict=False):
        judge(ours, naive[name], truth[name], f"{name}, scores only", floor)

    draw = torch.Generator().manual_seed(7)
    upstream = torch.randn(len(q), generator=draw).to(DEVICE, compute)  # of either sign, never ones
    w = upstream * -torch.expm1(-truth["loss"].to(compute)) * s.to(compute)
    dk = triton_info_nce.backward_candidates(w, out[1], *inputs, splits=splits)
    assert dk.dtype == q.dtype
    # lse is handed over as one number of the compute dtype: half an ulp of it is a relative error of P. The scores that
    # P is made of err as much, in naive code too, which has been lucky where its error is smaller.
    lse = truth["lse"][truth["lse"].isfinite()].abs()
    handed_over = torch.finfo(compute).eps * (float(lse.max()) if lse.numel() else 0.0)
    ours, theirs = error(dk, truth_dk(w.double())), error(naive_dk(w).to(q.dtype), truth_dk(w.double()))
    limit = 2 * (theirs + torch.finfo(q.dtype).eps / 2 + handed_over)
    assert ours <= limit, f"candidates' gradient: relative error {ours:.3e}, naive {theirs:.3e}, allowed {limit:.3e}"
    return out, dk


@pytest.mark.parametrize(
    ("dtype", "ids", "vectors"),
    [
        (torch.float32, False, False),
        (torch.float32, True, True),
        (torch.float16, True, False),
        (torch.float16, False, True),
        (torch.bfloat16, False, False),
        (torch.bfloat16, True, True),
        (torch.float64, True, False),
    ],
    ids=str,
)
def test_dtypes_and_positives(dtype, ids, vectors):
    check(problem(dtype=dtype, ids=ids, vectors=vectors))


@pytest.mark.parametrize(
    ("d", "dtype", "splits"),
    [
        (1, torch.float32, 1),
        (2, torch.float32, 3),
        (64, torch.float32, 3),
        (65, torch.float32, 3),  # chunks, as float32 goes from here on
        (256, torch.float16, 1),
        (300, torch.float16, 3),
        (600, torch.float16, 1),  # chunks, as 16 bits go from 512 on
        (70, torch.float64, 1),
    ],
    ids=str,
)
def test_features(d, dtype, splits):
    check(problem(d=d, dtype=dtype, n=34, m=36, ids=d % 2 == 0, scale=3.0), splits=splits)


def test_two_thousand_features():
    check(problem(d=2048, n=3, m=9, vectors=True, ids=True, dtype=torch.float16))


def test_a_write_beyond_the_end_is_noticed():
    guarded = Guarded()
    for place, found in ((0, False), (4, False), (5, True)):
        guarded.between(torch.ones(5)).as_strided((6,), (1,))[place] = 1.0
        if found:
            with pytest.raises(AssertionError, match=r"outside an array of 5 torch.float32"):
                guarded.check()
        else:
            guarded.check()


@pytest.mark.parametrize(
    ("n", "m", "splits", "vectors"),
    [
        (1, 1, None, False),
        (1, 40, 4, False),
        (40, 1, 4, True),
        (32, 16, None, True),
        (33, 17, 4, False),
        (5, 50, 2, True),
    ],
)
def test_ragged_sizes(n, m, splits, vectors):
    check(problem(n=n, m=m, d=32, vectors=vectors), splits=splits)


@pytest.mark.parametrize("d", [8, 70])
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


@pytest.mark.parametrize(
    ("scale", "d", "splits"),
    [
        (0.01, 9, 1),
        (100.0, 9, 3),
        (-1.0, 9, 1),
        (-30.0, 9, 3),
        (0.0, 9, 1),
        (0.0, 9, 3),
        (100.0, 70, 1),
        (-30.0, 70, 1),
        (0.0, 70, 1),
    ],
)
def test_scales(scale, d, splits):
    check(problem(n=20, m=34, d=d, scale=scale, ids=splits == 1), splits=splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides(dtype):
    q, k, p, s, _, _ = problem(d=24, dtype=dtype)
    rows = q.contiguous(), k.contiguous()
    expected, expected_dk = check([*rows, p, s, None, None])
    strange = rows[0].t().contiguous().t(), rows[1].repeat_interleave(2, 1)[:, ::2]
    actual, actual_dk = check([*strange, p, s, None, None])
    for ours, theirs in zip((*actual, actual_dk), (*expected, expected_dk), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_float32_adds_the_positives_features_as_the_negatives(arch):
    """In steps of one size: three tf32 products are added at the end of each, and ties must stay ties."""
    for d in (1, 33, 64, 65, 256, 2048):
        negatives = tiles.tile("streamed" if d > tiles.one_pass_max_d(32) else "scores", d, 32, arch, "tf32x3")
        assert tiles.tile("positive", d, 32, arch, "tf32x3").features == (negatives.features or 64)


@pytest.mark.parametrize("d", [17, 640])
def test_a_positive_past_the_candidates_is_nan(d):
    """On a GPU nobody looks at it first."""
    q, k, p, *rest = problem(d=d)
    for past in (len(k), 2**40):
        p[3] = past
        loss = triton_info_nce.forward(q, k, p, *rest)[0]
        assert loss[3].isnan()
        assert loss[:3].isfinite().all()
        assert torch.equal(own_vectors(p, k, past=True)[3], k[-1])  # what its gradient reads


@pytest.mark.parametrize("side", [0, 1])
def test_one_row_of_a_wider_buffer(side):
    """Its stride is of no account to torch, but to a descriptor."""
    sides = [torch.randn(8, 33, dtype=torch.float16, device=DEVICE)[:, :32] for _ in range(2)]
    sides[side] = sides[side][:1]
    positives = torch.zeros(len(sides[0]), dtype=torch.int64, device=DEVICE)
    ours, theirs = (info_nce(*sides, positives, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(DEVICE != "cpu", reason="the pages in between cost nothing on a CPU only")
@pytest.mark.parametrize("ids", [False, True], ids=["descriptors", "pointers"])
def test_rows_beyond_two_to_the_31st_element(ids):
    """Rows 2^30 elements apart: the third lies where 32 bits no longer reach. What is between is never touched."""

    def far_apart(rows):
        n, d = rows.shape
        there = torch.from_numpy(np.empty((n - 1) * 2**30 + d, np.float16)).as_strided((n, d), (2**30, 1))
        return there.copy_(rows)

    q, k, p, s, *some = problem(n=3, m=4, d=64, dtype=torch.float16, ids=ids)
    expected, expected_dk = check([q, k, p, s, *some])
    actual, actual_dk = check([far_apart(q), far_apart(k), p, s, *some])
    for ours, theirs in zip((*actual, actual_dk), (*expected, expected_dk), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("d", [16, 17], ids=["as they lie", "copied"])
@pytest.mark.parametrize("ids", [False, True], ids=["descriptors", "pointers"])
def test_what_ignored_rows_hold_reaches_nobody(d, ids):
    q, k, p, s, *some = problem(d=d, ids=ids)
    q = q.contiguous()
    q[p < 0] = float("nan")
    _, dk = check([q, k, p, s, *some])
    assert dk.isfinite().all()


def test_rows_are_copied_only_where_tiles_cannot_read_them():
    launch = launching.Launch("info_nce", torch.zeros(1))
    x = torch.randn(5, 64, device=DEVICE)
    for tensor, features, descriptors, width, copied in (
        (x, 64, True, 64, False),
        (x, 64, False, 64, False),
        (x[::2, :32], 32, False, 32, False),
        (x[:, :48], 64, True, 48, False),
        (x[:, :48], 64, False, 64, True),  # narrower than the tile
        (x[:, 1:33], 32, True, 32, True),  # 4 bytes off
        (x[:, ::2], 32, True, 32, True),
        (x.t()[:, :3], 16, False, 16, True),
        (x[:1].expand(5, 64), 64, True, 64, True),
        (torch.randn(80, device=DEVICE).unfold(0, 64, 4), 64, True, 64, True),
    ):
        rows, d = launch.rows(tensor, features, descriptors), tensor.shape[1]
        assert rows.shape == (len(tensor), width)
        assert torch.equal(rows[:, :d], tensor)
        assert not rows[:, d:].any()
        assert (rows.data_ptr() != tensor.data_ptr()) == copied, (tensor.shape, descriptors)


@pytest.mark.parametrize("d", [9, 70])
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
    q, k, p, s, _, _ = problem(d=16, n=10, m=40)
    q[:, 0], k[:, 0] = 100.0, 100.0
    inputs = [q, k, p, s, None, None]
    truth, *_ = plain(*widen(*inputs))
    naive, *_ = plain(*inputs)
    for splits in (1, 3):
        loss = triton_info_nce.forward(*inputs, splits=splits)[0]
        assert_as_good_as_naive(actual=loss, naive=naive["loss"], truth=truth["loss"], name="loss at 1e4")


@pytest.mark.parametrize(("d", "splits"), [(17, 1), (17, 3), (70, 1)])
def test_equal_scores_give_the_log_of_the_count(d, splits):
    q, k, p, s, _, _ = problem(d=d)
    q, k = q.mul(4).round(), k.mul(4).round()  # whole numbers: no order of summation can break the tie
    k[:] = k[0].clone()
    p.clamp_(min=0)
    loss, _, _, rank, _ = triton_info_nce.forward(q, k, p, s, splits=splits)
    torch.testing.assert_close(loss, torch.full_like(loss, len(k)).log(), rtol=1e-5, atol=1e-5)
    assert (rank == 0).all()  # a tie does not beat the positive


@pytest.mark.parametrize(("d", "splits"), [(4, 1), (4, 3), (70, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_reach_the_loss(value, d, splits):
    q, k, p, s, _, _ = problem(d=d, n=7, m=24)
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
    w = torch.linspace(-1, 1, 40, device=DEVICE)
    runs = []
    for _ in range(2):
        out = triton_info_nce.forward(*inputs, splits=3)
        runs.append([*out, triton_info_nce.backward_candidates(w, out[1], *inputs, splits=3)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_small_losses_stay_accurate():
    """With a loss near 1e-10, what is computed from 1 - p is noise; this is not."""
    q, k, p, _, _, _ = problem(n=32, m=64, d=64, dtype=torch.bfloat16)
    p = torch.arange(32, device=DEVICE)
    k[:32] = q * 8
    s = torch.full((1,), 5.0, device=DEVICE)
    inputs = [q, k, p, s, None, None]
    truth, truth_o, truth_dk = plain(*widen(*inputs))
    assert 1e-20 < truth["loss"].median() < 1e-8
    loss, lse, _, _, o = triton_info_nce.forward(*inputs)
    torch.testing.assert_close(loss.double(), truth["loss"], rtol=2e-4, atol=0)
    w = -torch.expm1(-loss) * s
    dk = triton_info_nce.backward_candidates(w, lse, *inputs)
    relative = (dk.double() - truth_dk((-torch.expm1(-truth["loss"])) * 5.0)).norm() / truth_dk(w.double()).norm()
    assert relative < 8e-3
    assert (o - truth_o).norm() / truth_o.norm() < 8e-3


@pytest.mark.parametrize(("d", "splits"), [(17, 1), (17, 3), (600, 1)])
def test_gradients_of_blocks_are_added_before_they_are_rounded(d, splits):
    """What a ring adds up: the candidates' gradient of two blocks of 16-bit anchors, in float32."""
    q, k, p, s, _, _ = problem(n=40, m=12, d=d, dtype=torch.float16)
    w, lse = torch.linspace(-1, 1, 40, device=DEVICE), triton_info_nce.forward(q, k, p, s)[1]

    def gradient(part, **options):
        where = w[part], lse[part], q[part], k, p[part], s
        return triton_info_nce.backward_candidates(*where, splits=splits, **options)

    blocks = [gradient(part, out_dtype=torch.float32) for part in (slice(0, 25), slice(25, 40))]
    assert {each.dtype for each in blocks} == {torch.float32}
    assert torch.equal(blocks[0].half(), gradient(slice(0, 25)))
    together = gradient(slice(0, 40), out_dtype=torch.float32)
    torch.testing.assert_close(sum(blocks), together, rtol=1e-5, atol=1e-5 if d == 17 else 1e-3)  # P is 16 bits
    assert gradient(slice(0, 0), out_dtype=torch.float32).dtype == torch.float32


def test_unknown_precision_is_named():
    with pytest.raises(ValueError, match=r'input_precision must be .* Got "?\'fast'):
        triton_info_nce.forward(*problem(), input_precision="fast")


# Through the public op ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 tiles are for the interpreter")
@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
def test_gradcheck(vectors):
    q, k, p, s, a, c = problem(n=3, m=4, d=2, dtype=torch.float64, vectors=vectors, ids=True)
    q, k, s = (t.clone().requires_grad_() for t in (q, k, s))
    p = p.clone().requires_grad_() if vectors else p

    def op(q, k, s, *p_vectors):
        positives = p_vectors[0] if vectors else p
        ids = {"anchor_ids": a, "candidate_ids": c}
        return info_nce(q, k, positives, scale=s, reduction="none", impl="triton", **ids)

    assert torch.autograd.gradcheck(op, (q, k, s, *([p] if vectors else [])))


def test_opcheck(unpoisoned):
    q, k, p, _, a, c = problem(n=3, m=4, d=3, ids=True)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    scale = torch.ones(1, device=DEVICE, requires_grad=True)
    torch.library.opcheck(info_nce_op, (q, k, p, scale, a, c, "triton", True, False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("ids", [False, True])
def test_the_gradient_of_a_sum_is_made_in_forward(dtype, vectors, ids, monkeypatch):
    """Where P lies in memory, which saves a product."""
    monkeypatch.setattr(tiles, "CHUNK_ELEMENTS", 16 * 45)  # three chunks of rows
    d = 520 if dtype == torch.bfloat16 else 67
    q, k, p, s, a, c = problem(d=d, dtype=dtype, vectors=vectors, ids=ids, scale=3.0)
    if not vectors:
        q[p < 0] = torch.nan  # reaches nobody
    found = {}
    for impl in ("triton", "naive", "truth"):
        cast = torch.float64 if impl == "truth" else dtype
        leaves = [t.detach().to(cast, copy=True).requires_grad_() for t in (q, k, *([p] if vectors else []))]
        leaves.append(s.detach().clone().to(torch.float64 if impl == "truth" else s.dtype).requires_grad_())
        how = {"scale": leaves[-1], "anchor_ids": a, "candidate_ids": c}
        own = leaves[2] if vectors else p
        loss = info_nce(*leaves[:2], own, impl="triton" if impl == "triton" else "reference", **how)
        with monkeypatch.context() as patch:
            patch.setattr(triton_info_nce, "backward_candidates", None)  # is not asked
            found[impl] = (loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 3)))
    for name, *results in zip(("loss", "dq", "dk", "dv or dscale", "dscale"), *found.values(), strict=False):
        actual, naive, truth = results
        assert_as_good_as_naive(actual=actual, naive=naive, truth=truth, name=name, dtype=dtype)


def test_opcheck_of_the_sum(unpoisoned):
    q, k, p, _, a, c = problem(n=3, m=4, d=68, ids=True)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    scale = torch.ones(1, device=DEVICE, requires_grad=True)
    torch.library.opcheck(info_nce_sum, (q, k, p, scale, a, c, "triton", True))


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


@pytest.mark.parametrize("side", ["contexts", "candidates"])
@pytest.mark.parametrize("negatives", [None, "listed", "drawn"])
@pytest.mark.parametrize("listed", [False, True], ids=["everything", "listed rows"])
def test_bilinear_over_the_kernels(listed, negatives, side):
    g = torch.Generator().manual_seed(4)
    shapes = (5, 3), (2, 4, 3), (7, 4)
    inputs = [torch.randn(shape, generator=g).double().to(DEVICE) for shape in shapes]
    rows = (8,) if listed else (5, 2)
    positives = torch.randint(-1, 7, rows, generator=g).to(DEVICE)
    upstream = torch.randn(rows, generator=g).double().to(DEVICE)
    others = torch.randint(-1, 7, (rows[0], 3), generator=g).to(DEVICE)
    others = {None: None, "listed": others, "drawn": Negatives(3, 5)}[negatives]
    options = {"sources": torch.tensor([0, 1, 2, 4, 0, 1, 3, 4], device=DEVICE), "counts": [4, 4]} if listed else {}
    found = []
    for impl in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in inputs]
        where = *leaves, positives, others
        loss = bilinear_info_nce(*where, scale=1.3, reduction="none", impl=impl, side=side, **options)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves, upstream)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# The table -----------------------------------------------------------------------------------------------------------


def test_splits_fill_the_device_and_no_more():
    assert tiles.splits(1000, 100, 132) == 1  # full anyway
    assert tiles.splits(87, 1, 132) == 1  # nothing to cut
    assert tiles.splits(1, 10_000, 132) > 64  # a bank with few queries
    count = tiles.splits(16, 128, 132)
    assert 4 <= count <= 8
    assert tiles.splits(0, 0, 132) == 1


def test_chunks_begin_where_slices_are_aligned_alike():
    for rows, columns in ((45360, 3969), (100_000, 12_543), (5, 7), (1, 1 << 30), (64, 1 << 25), (9, 0)):
        size = tiles.chunk(rows, columns)
        assert 1 <= size <= rows
        assert size == rows or size % 16 == 0 or 16 * columns > tiles.CHUNK_ELEMENTS
        assert size == 1 or size * columns <= tiles.CHUNK_ELEMENTS


def test_every_op_has_a_tile_everywhere():
    for arch in (*tiles.ARCHITECTURES, "interpreter"):
        for op in (
            "positive",
            "forward",
            "scores",
            "streamed",
            "backward",
            "combine",
            "exponentials",
            "coefficients",
            "projected",
        ):
            for d in (1, 64, 65, 512, 2048):
                for width, precision in ((16, "ieee"), (32, "tf32"), (32, "tf32x3"), (32, "ieee")):
                    for variant in ("", "+ids"):
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


@pytest.mark.skipif(DEVICE == "cuda", reason="nothing is interpreted here")
def test_an_old_interpreter_beside_a_new_numpy_says_so(monkeypatch):
    launching._arch.cache_clear()
    monkeypatch.setattr(launching.triton, "__version__", "3.6.0")
    monkeypatch.setattr(launching.metadata, "version", lambda _: "2.4.6")
    with pytest.raises(RuntimeError, match=r"Triton 3\.6\.0 and NumPy 2\.4\.6; pip install 'numpy<2\.4'"):
        launching.Launch("info_nce", torch.ones(2, 2))


@pytest.mark.slow
def test_every_kernel_compiles_for_sizes_of_one():
    """On a GPU an integer argument of 1 is a constant to the compiler, which has fewer methods than a tensor."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", Path(__file__).parent / "sizes_of_one.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+ kernels\n", done.stdout), done.stdout


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.7), (torch.float16, -0.3), (torch.float32, 0.0)])
def test_predictions_made_inside_the_kernel(dtype, scale, ids):
    """Ragged in every size, several tiles of rows, columns and features of a context."""
    g = torch.Generator().manual_seed(0)
    n, steps, c, d, m = 37, 2, 21, 19, 35
    contexts, weights, candidates = (
        torch.randn(shape, generator=g).mul(s).to(dtype)
        for shape, s in (((n, c), 1), ((steps, d, c), c**-0.5), ((m, d), 1))
    )
    positives = torch.randint(-1, m, (n, steps), generator=g)
    tags = {"anchor_ids": torch.arange(n) % 5, "candidate_ids": torch.arange(m) % 5} if ids else {}
    where = contexts, weights, candidates, positives
    ours = bilinear_info_nce_stats(*where, scale=scale, impl="fused", **tags)
    naive = bilinear_info_nce_stats(*where, scale=scale, impl="reference", side="contexts", **tags)
    exact = [t.double() if t.is_floating_point() else t for t in where]
    truth = bilinear_info_nce_stats(*exact, scale=scale, impl="reference", side="contexts", **tags)
    for name in ("loss", "lse", "positive"):
        a, b, e = (getattr(each, name) for each in (ours, naive, truth))
        assert torch.equal(a.isinf(), e.isinf())
        a, b, e = (t.where(t.isfinite(), 0.0) for t in (a, b, e))
        assert_as_good_as_naive(actual=a, naive=b, truth=e, name=name, dtype=dtype)
    assert float((ours.rank == truth.rank).double().mean()) > (0.99 if dtype == torch.float32 else 0.9)
    mean = bilinear_info_nce(*where, scale=scale, impl="fused", **tags)
    torch.testing.assert_close(mean, ours.loss.sum() / (positives >= 0).sum())


def test_predictions_inside_the_kernel_from_maps_that_lie_apart():
    """Every second half of wider rows, which tiles read as they lie where they are aligned."""
    g = torch.Generator().manual_seed(1)
    wide = torch.randn(3, 16, 64, generator=g)
    contexts, candidates = torch.randn(9, 64, generator=g)[:, 32:], torch.randn(20, 16, generator=g)
    where = contexts, wide[..., 32:], candidates, torch.randint(-1, 20, (9, 3), generator=g)
    ours, truth = (bilinear_info_nce_stats(*where, impl=impl) for impl in ("fused", "reference"))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_predictions_inside_the_kernel_read_no_positive_past_the_candidates():
    where = torch.randn(9, 8), torch.randn(2, 16, 8), torch.randn(20, 16), torch.zeros(2, 9, dtype=torch.int64)
    where[-1][1, 4] = 20
    loss, *_ = triton_info_nce.forward_projected(*where, torch.ones(1))
    assert loss.isnan().nonzero().tolist() == [[1, 4]]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (0, 3), (3, 0)])
def test_predictions_inside_the_kernel_of_one_and_of_none(n, m):
    where = torch.ones(n, 4), torch.ones(2, 3, 4), torch.ones(m, 3), torch.full((n, 2), min(m, 1) - 1)
    ours, truth = (bilinear_info_nce_stats(*where, impl=impl) for impl in ("fused", "reference"))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck_of_predictions_inside_the_kernel(unpoisoned):
    where = torch.randn(3, 4), torch.randn(2, 3, 4), torch.randn(5, 3), torch.tensor([[0, 1, 4], [2, -1, 3]])
    torch.library.opcheck(fused_op, (*where, torch.ones(1), None, None))


def test_what_predictions_inside_the_kernel_cannot_do():
    def fused(d=3, dtype=torch.float32, **options):
        where = torch.ones(4, 5, dtype=dtype), torch.ones(2, d, 5, dtype=dtype), torch.ones(6, d, dtype=dtype)
        positives = options.pop("positives", torch.zeros(4, 2, dtype=torch.int64))
        return bilinear_info_nce(*where, positives, impl="fused", **options)

    for options, message in (
        ({"scale": torch.ones((), requires_grad=True)}, 'makes no gradients.*impl="auto" would run'),
        ({"d": 65}, r"holds up to 64 features D of torch.float32, not 65; impl=\"auto\" would run"),
        ({"d": 129, "dtype": torch.float16}, "holds up to 128 features"),
        ({"positives": torch.ones(4, 2, 3)}, "takes every context with every step, all candidates and indices"),
        ({"side": "candidates"}, "takes every context"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fused(**options)
