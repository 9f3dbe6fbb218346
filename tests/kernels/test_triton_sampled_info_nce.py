"""The sampled Triton kernels against float64, in the interpreter where there is no GPU: every schedule, small shapes.

Inputs sit inside larger NaN-filled buffers, so that a read beyond the end shows; outputs come from poisoned memory (see
conftest), so that an element nobody wrote shows.
"""

import numpy as np
import pytest
import torch
from tolerance import assert_as_good_as_naive, error
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from cpc_kernels import (
    Negatives,
    draw_negatives,
    info_nce,
    reference,
    sampled_info_nce,
    sampled_info_nce_stats,
    sampled_tiles,
    tiles,
    triton_info_nce,
    triton_sampled_info_nce,
)

# the interpreter computes with numpy, which warns where a GPU is silent
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("loss", "lse", "positive", "rank")
SCHEDULES = ("gathered", "steps", "dense")


def surround(tensor):
    """The same values inside a larger buffer of NaN (for integers, a far index): rows are not contiguous either."""
    fill = float("nan") if tensor.is_floating_point() else 2**40
    buffer = torch.full([size + 16 for size in tensor.shape], fill, dtype=tensor.dtype, device=tensor.device)
    inner = buffer[tuple(slice(8, 8 + size) for size in tensor.shape)]
    inner.copy_(tensor)
    return inner


def problem(n=3, steps=2, d=17, m=19, s=6, dtype=torch.float32, vectors=False, drawn=False, per_step=False, ids=False,
            scale=1.0, offset=0.0, seed=0):  # fmt: skip
    """The launchers' arguments: anchors, pool, positives, negatives, seed, count, per_step, scale, ids."""
    draw = torch.Generator().manual_seed(seed)
    q = (torch.randn(n, steps, d, generator=draw) * d**-0.5 + offset / d**0.5).to(dtype)
    z = (torch.randn(m, d, generator=draw) + offset / d**0.5).to(dtype)
    p = torch.randint(0, max(m, 1), (n, steps), generator=draw)
    p[n // 2, 0] = -1
    listed = torch.randint(-1, m, (n, steps, s) if per_step else (n, s), generator=draw)
    if listed.numel() and m:
        listed[-1, ..., 0] = p[-1, 0]  # a copy of the positive, listed
        listed[0, ..., -1] = listed[0, ..., 0]  # a repeat
    if vectors or m == 0:
        p = torch.randn(n, steps, d, generator=draw).to(dtype)
    a = torch.randint(0, 3, (n,), generator=draw) if ids else None
    c = torch.randint(0, 3, (m,), generator=draw) if ids else None
    scale = torch.full((1,), scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    seeded = torch.tensor([0x1234_5678_9ABC_DEF0 + seed]) if drawn else None
    tensors = [q, z, p, None if drawn else listed, seeded, scale, a, c]
    q, z, p, listed, seeded, scale, a, c = [None if t is None else surround(t.to(DEVICE)) for t in tensors]
    return q, z, p, listed, seeded, s, per_step, scale, a, c


def widen(where, dtype):
    return [t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in where]


def plain(q, z, p, listed, seed, count, per_step, scale, a, c):
    """The naive way in one dtype: the rows, O, and dz for given w, through autograd of the spec."""
    drawn = seed is not None
    if drawn:
        listed = draw_negatives(Negatives(count, seed, per_step), p, len(z), *q.shape[:2])
    with torch.enable_grad():
        q, z = q.clone().requires_grad_(), z.clone().requires_grad_()
        options = {"scale": scale, "anchor_ids": a, "pool_ids": c, "exclude_positives": drawn}
        rows, _ = reference.sampled_info_nce_rows(q, z, p, listed, **options)
        live = rows["lse"] != -torch.inf
        (o,) = torch.autograd.grad(rows["lse"].where(live, 0.0).sum(), q, retain_graph=True)
        expectation = o / scale

    def gradient(g):
        return torch.autograd.grad((rows["loss"] * g).sum(), z, retain_graph=True)[0]

    return {name: value.detach() for name, value in rows.items()}, expectation, gradient


def naively(where, truth, truth_o, truth_dz, upstream):
    """Rows, O and dz of naive code in the inputs' compute dtype, each from the worst of four orders of the features.

    On so few numbers one order's error is luck: a sum may come out exact. The worst of several is what the dtype gives.
    """
    q, z, p, *rest = widen(where, upstream.dtype)
    d, draw = q.shape[-1], torch.Generator().manual_seed(1)
    worst = {}
    for order in (torch.arange(d), *(torch.randperm(d, generator=draw) for _ in range(3))):
        order = order.to(DEVICE)
        own = p[..., order] if p.is_floating_point() else p
        rows, o, dz = plain(q[..., order], z[..., order], own, *rest)
        back = order.argsort()
        found = rows | {"expectation": o[..., back], "gradient": dz(upstream)[..., back]}
        for name, value in found.items():
            true = {"expectation": truth_o, "gradient": truth_dz}.get(name)
            wrong = error(value, truth[name] if true is None else true)
            worst[name] = max(worst.get(name, (-1.0, value)), (wrong, value), key=lambda pair: pair[0])
    return {name: value for name, (_, value) in worst.items()}


def possible(schedule, where):
    q = where[0]
    if schedule == "steps" and q.shape[-1] > sampled_tiles.steps_max_d(16 if q.dtype.itemsize == 2 else 32):
        return False
    return schedule != "steps" or (where[3] is None and not where[6]) or (where[3] is not None and where[3].ndim == 2)


def check(where, schedules=SCHEDULES, backwards=(*SCHEDULES, "segments")):
    q = where[0]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    truth, truth_o, truth_dz = plain(*widen(where, torch.float64))
    draw = torch.Generator().manual_seed(7)
    upstream = torch.randn(q.shape[:2], generator=draw).to(DEVICE, compute)  # of either sign, never ones
    truth_dz = truth_dz(upstream.double())
    naive = naively(where, truth, truth_o, truth_dz, upstream)
    for schedule in (s for s in schedules if possible(s, where)):
        out = triton_sampled_info_nce.forward(*where, True, schedule=schedule)
        for name, ours in zip(NAMES[:3], out, strict=False):
            assert ours.dtype == compute
            assert_as_good_as_naive(actual=ours, naive=naive[name], truth=truth[name], name=f"{schedule}: {name}")
        # a rank may differ where two scores are equal to rounding
        assert (out[3] - truth["rank"]).abs().sum() <= (0 if q.dtype == torch.float64 else 1), schedule
        # one rounding of P to the inputs' dtype on the way to the matrix units
        assert_as_good_as_naive(
            actual=out[4], naive=naive["expectation"], truth=truth_o, name=f"{schedule}: expectation", dtype=q.dtype
        )

    w = upstream * -torch.expm1(-truth["loss"]).to(compute) * where[7].to(compute)
    # lse is handed over as one number of the compute dtype, and scale is multiplied in: half an ulp of each, times a
    # score as large as lse, is a relative error of P
    lse = truth["lse"][truth["lse"].isfinite()].abs()
    handed_over = torch.finfo(compute).eps * (float(lse.max()) if lse.numel() else 0.0)
    limit = 2 * (error(naive["gradient"], truth_dz) + torch.finfo(q.dtype).eps / 2 + handed_over)
    if q.dtype == torch.float64:
        limit += 100 * torch.finfo(q.dtype).eps
    for schedule in (s for s in backwards if possible(s, where)):
        dz = triton_sampled_info_nce.backward_pool(w, truth["lse"].to(compute), *where, schedule=schedule)
        assert dz.dtype == compute
        assert dz.shape == truth_dz.shape
        wrong = error(dz, truth_dz)
        assert wrong <= limit, f"{schedule}: pool's gradient errs by {wrong:.3e}, allowed {limit:.3e}"


@pytest.mark.parametrize(
    ("seed", "indexed", "per_step"),
    [(0, True, True), (-1, True, False), (2**62 + 12345, False, True), (-(2**63), False, False)],
)
def test_interpreted_philox_draws_what_the_torch_one_draws(seed, indexed, per_step):
    where = list(problem(n=2, m=29, s=11, drawn=True, per_step=per_step, vectors=not indexed))
    where[4] = torch.tensor([seed], device=DEVICE)
    problem_ = triton_sampled_info_nce.Problem(*where, None)
    ours = problem_.resolve(slice(0, 2), counts=False)
    theirs = draw_negatives(Negatives(11, where[4], per_step), where[2], 29, 2, 2)
    assert torch.equal(ours, theirs if per_step else theirs[:, None])
    counts = problem_.resolve(slice(1, 2), counts=True)
    assert torch.equal(counts.long(), torch.nn.functional.one_hot(ours[1:], 29).sum(2))


@pytest.mark.parametrize("drawn", [False, True], ids=["listed", "drawn"])
@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per step"])
@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
def test_forms(drawn, per_step, vectors):
    ids = (drawn + per_step + vectors) % 2 == 0  # every three of the four flags together
    check(problem(drawn=drawn, per_step=per_step, vectors=vectors, ids=ids, scale=-1.5 if ids else 2.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_expectation(schedule):
    where = problem()
    out = triton_sampled_info_nce.forward(*where, True, schedule=schedule)
    bare = triton_sampled_info_nce.forward(*where, False, schedule=schedule)
    assert bare[4].shape == (0,)
    assert all(torch.equal(a, b) for a, b in zip(out[:4], bare[:4], strict=True))


@pytest.mark.parametrize(
    ("dtype", "drawn"), [(torch.float16, False), (torch.bfloat16, True), (torch.float64, False)], ids=str
)
def test_dtypes(dtype, drawn):
    check(problem(dtype=dtype, drawn=drawn, ids=True))


@pytest.mark.parametrize("d", [1, 2, 64, 256, 300])
def test_features(d):
    check(problem(n=2, d=d, drawn=d in (2, 64), scale=3.0))


def test_many_features_in_16_bits():
    check(problem(n=6, steps=2, m=6, s=5, d=300, dtype=torch.float16), ("steps",), ("steps",))


def test_two_thousand_features():
    check(problem(n=6, steps=2, m=6, s=5, d=2048, dtype=torch.float16))


@pytest.mark.parametrize(
    ("n", "steps", "m", "s", "drawn"),
    [
        (1, 1, 1, 1, False),
        (1, 1, 1, 1, True),
        (1, 2, 2, 3, True),
        (1, 18, 9, 6, False),
        (1, 17, 7, 3, True),
        (3, 1, 5, 9, False),
    ],
)
def test_ragged_sizes(n, steps, m, s, drawn):
    check(problem(n=n, steps=steps, m=m, s=s, d=8, drawn=drawn))


@pytest.mark.parametrize(("n", "steps", "m", "s"), [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 5, 0), (2, 2, 0, 0)])
def test_empty(n, steps, m, s):
    where = problem(n=max(n, 1), steps=max(steps, 1), m=m, s=s, d=8)
    q, z, p, listed, *rest = where
    where = q[:n, :steps], z, p[:n, :steps], listed[:n], *rest
    for schedule in (None, *SCHEDULES):
        loss, lse, positive, rank, o = triton_sampled_info_nce.forward(*where, schedule=schedule)
        assert (loss == 0).all()
        assert (lse == -torch.inf).all()
        assert (rank == 0).all()
        assert (o == 0).all()
        assert o.shape == (n, steps, 8)
        assert positive.isfinite().all()
    dz = triton_sampled_info_nce.backward_pool(torch.zeros_like(loss), lse, *where)
    assert (dz == 0).all()
    assert dz.shape == (m, 8)


@pytest.mark.parametrize("scale", [0.0, 0.01, 100.0, -100.0])
def test_scales(scale):
    where = problem(scale=scale)
    if scale == 0.0:
        listed = (where[3] >= 0).sum(1, keepdim=True).expand(-1, 2)
        expected = torch.log1p(listed.float()).where(where[2] >= 0, 0.0)
        for schedule in SCHEDULES:
            loss, _, _, rank, _ = triton_sampled_info_nce.forward(*where, schedule=schedule)
            torch.testing.assert_close(loss, expected)
            assert not rank.any()
    else:
        check(where)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(sign):
    where = list(problem(offset=100.0))  # scores of about 1e4
    where[0] = where[0] * sign
    check(where)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_infinite_and_nan_scores(schedule):
    where = problem(n=3, steps=2, d=4, m=9, s=6)
    q, z, p = where[:3]
    z[4] = float("nan")
    z[5] = 0.0
    q[:] = 1.0
    z[6] = -torch.inf
    where[3][:] = torch.tensor([[0, 1, 2, 3, 5, 7], [0, 1, 4, 3, 5, 7], [6, 6, 6, 6, -1, -1]])
    p[:] = torch.tensor([[8, 8], [8, -1], [8, 3]])
    loss, lse, *_ = triton_sampled_info_nce.forward(*where, False, schedule=schedule)
    assert loss[0].isfinite().all()
    assert loss[1].isnan().tolist() == [True, False]
    assert (loss[2] == 0).all()
    assert (lse[2] == -torch.inf).all()


@pytest.mark.parametrize("drawn", [False, True], ids=["listed", "drawn"])
def test_any_strides(drawn):
    q, z, p, listed, *rest = problem(n=3, steps=2, d=12, drawn=drawn)
    strange = (
        q.transpose(0, 2).contiguous().transpose(0, 2),
        z.repeat_interleave(3, 1)[:, ::3],
        p.T.contiguous().T,
        None if listed is None else listed.repeat_interleave(2, 1)[:, ::2],
    )
    check([*strange, *rest])
    for a, b in zip(strange, (q, z, p, listed), strict=True):
        assert a is None or (torch.equal(a, b) and not a.is_contiguous())


@pytest.mark.skipif(DEVICE != "cpu", reason="the pages in between cost nothing on a CPU only")
@pytest.mark.parametrize("schedule", ["gathered", "steps"])
def test_steps_beyond_two_to_the_31st_element(schedule):
    """Steps 2^30 elements apart: the third lies where 32 bits no longer reach. What is between is never touched."""
    q, z, _, *rest = problem(n=2, steps=3, d=16, dtype=torch.float16, per_step=False)
    v = torch.randn(2, 3, 16, dtype=torch.float16)

    def far_apart(rows):
        there = torch.from_numpy(np.empty(2 * 2**30 + 64, np.float16)).as_strided(rows.shape, (16, 2**30, 1))
        return there.copy_(rows)

    near, far = (
        triton_sampled_info_nce.forward(*where, z, own, *rest, schedule=schedule)
        for where, own in (((q,), v), ((far_apart(q),), far_apart(v)))
    )
    for ours, theirs in zip(far, near, strict=True):
        assert torch.equal(ours, theirs)
    weights = torch.ones(2, 3)
    near, far = (
        triton_sampled_info_nce.backward_pool(weights, near[1], where, z, v, *rest, schedule=schedule)
        for where in (q, far_apart(q))
    )
    torch.testing.assert_close(far, near)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
def test_equal_scores_give_the_log_of_the_count(schedule, vectors):
    where = list(problem(vectors=vectors))
    where[0], where[1] = where[0].mul(4).round(), where[1].mul(4).round()  # whole numbers: no order breaks the tie
    where[1][:] = where[1][0].clone()
    if vectors:
        where[2] = where[1][0].expand(3, 2, -1)
    loss, _, _, rank, _ = triton_sampled_info_nce.forward(*where, schedule=schedule)
    count = 1 + (where[3] >= 0).sum(1, keepdim=True).expand(-1, 2)
    expected = count.float().log()
    torch.testing.assert_close(loss, expected if vectors else expected.where(where[2] >= 0, 0.0), rtol=1e-5, atol=1e-5)
    assert (rank == 0).all()  # a tie does not beat the positive


def test_deterministic_schedules_are_equal_to_the_bit():
    where = problem(n=5, steps=4, m=9, s=8, ids=True)
    out = triton_sampled_info_nce.forward(*where)
    for schedule in ("segments", "dense"):
        one, two = (triton_sampled_info_nce.backward_pool(out[0], out[1], *where, schedule=schedule) for _ in range(2))
        assert torch.equal(one, two)


def test_ignored_rows_may_hold_anything():
    for schedule in SCHEDULES:
        where = problem()
        where[0][1, 0] = float("nan")  # its positive is -1
        loss, _, _, _, o = triton_sampled_info_nce.forward(*where, schedule=schedule)
        assert loss.isfinite().all()
        assert o.isfinite().all()


def test_indices_past_the_pool_are_not_followed():
    """On a GPU nobody looks at them first. A negative is skipped; a positive makes its own loss NaN."""
    for schedule, backward in (("gathered", "gathered"), ("steps", "steps"), ("dense", "segments")):
        q, z, p, listed, *rest = problem()
        weights = torch.ones_like(p, dtype=torch.float32)
        found = []
        for index in (-1, 2**40):
            listed[1, 2] = index
            where = q, z, p, listed, *rest
            out = triton_sampled_info_nce.forward(*where, schedule=schedule)
            found.append([*out, triton_sampled_info_nce.backward_pool(weights, out[1], *where, schedule=backward)])
        for skipped, far in zip(*found, strict=True):
            torch.testing.assert_close(far, skipped, rtol=0, atol=0)
        for past in (len(z), 2**40):
            p[0, 1] = past
            loss = triton_sampled_info_nce.forward(q, z, p, listed, *rest, schedule=schedule)[0]
            assert loss[0, 1].isnan()
            assert loss[1:].isfinite().all()
            triton_sampled_info_nce.backward_pool(weights, out[1], q, z, p, listed, *rest, schedule=backward)


def test_listed_copies_tie():
    for schedule in SCHEDULES:
        where = list(problem(n=2, steps=4, d=33, m=5, s=3))
        where[2] = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]], device=DEVICE)
        where[3] = torch.tensor([[0, 1, 2], [4, 4, 4]], device=DEVICE)
        out = triton_sampled_info_nce.forward(*where, schedule=schedule)
        truth = plain(*widen(where, torch.float64))[0]
        assert torch.equal(out[3], truth["rank"])


def test_all_negatives_listed_is_dense():
    q, z = torch.randn(3, 1, 16, device=DEVICE), torch.randn(7, 16, device=DEVICE)
    p = torch.arange(3, device=DEVICE)
    others = torch.tensor([[j for j in range(7) if j != i] for i in range(3)], device=DEVICE)
    dense = info_nce(q[:, 0], z, p, reduction="none", impl="triton")
    scale = torch.ones(1, device=DEVICE)
    for schedule in SCHEDULES:
        loss, *_ = triton_sampled_info_nce.forward(q, z, p[:, None], others, None, 0, False, scale, schedule=schedule)
        torch.testing.assert_close(loss[:, 0], dense, rtol=1e-5, atol=1e-6)


def test_small_losses_stay_accurate():
    for schedule in SCHEDULES:
        for margin in (5.0, 30.0):
            where = list(problem(n=2, steps=2, d=32, m=12, s=4))
            where[2] = torch.tensor([[0, 1], [2, 3]], device=DEVICE)
            where[3] = torch.tensor([[4, 5, 6, 7], [8, 9, 10, 11]], device=DEVICE)
            z = where[1]
            for n in range(2):
                for k in range(2):
                    z[2 * n + k] = where[0][n, k] * (margin / where[0][n, k].square().sum())
            loss, lse, _, _, o = triton_sampled_info_nce.forward(*where, schedule=schedule)
            rows, expectation, gradient = plain(*widen(where, torch.float64))
            torch.testing.assert_close(loss.double(), rows["loss"], rtol=3e-5, atol=0)
            torch.testing.assert_close(o.double(), expectation, rtol=1e-4, atol=1e-5)
            true = gradient(torch.ones_like(rows["loss"]))
            assert 0 < float(true.abs().max()) < (1e-10 if margin == 30.0 else 1)
            dz = triton_sampled_info_nce.backward_pool(-torch.expm1(-loss), lse, *where, schedule=schedule)
            assert error(dz, true) < 1e-4


def test_size_chooses_the_schedule():
    def chosen(**sizes):
        return triton_sampled_info_nce.Problem(*problem(**sizes), None).schedule(None)

    assert chosen(steps=3, m=8, s=4) == "dense"
    assert chosen(n=1, steps=3, m=100, s=4) == "gathered"  # float32, whose products are slow
    assert chosen(n=1, steps=3, m=100, s=4, dtype=torch.bfloat16) == "dense"
    assert chosen(steps=3, m=2000, s=2) == "gathered"
    assert chosen(steps=4, m=2000, s=2) == "steps"
    assert chosen(steps=4, m=2000, s=2, per_step=True) == "gathered"
    assert chosen(n=1, steps=4, m=2000, s=2, d=65) == "gathered"
    assert chosen(n=1, steps=4, m=2000, s=2, d=65, dtype=torch.float16) == "steps"
    assert chosen(n=1, steps=4, m=2000, s=2, d=600, dtype=torch.float16) == "gathered"
    with pytest.raises(ValueError, match="share"):
        triton_sampled_info_nce.forward(*problem(per_step=True), schedule="steps")
    with pytest.raises(ValueError, match=r'up to 64 features of torch.float32 in registers. Got 65; "gathered" takes'):
        triton_sampled_info_nce.forward(*problem(d=65), schedule="steps")


def test_chunks_of_the_dense_schedule(monkeypatch):
    monkeypatch.setattr(tiles, "CHUNK_ELEMENTS", 80)  # two anchors at a time
    check(problem(drawn=True), ("dense",), ("dense",))
    check(problem(per_step=True, vectors=True), ("dense",), ("dense",))


# --- as a torch op ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=SCHEDULES)
def schedule(request, monkeypatch):
    """Makes the sizes choose this schedule."""
    if request.param != "dense":
        monkeypatch.setattr(sampled_tiles, "DENSE", 0)
        monkeypatch.setattr(sampled_tiles, "DENSE_FP32", 0)
    monkeypatch.setattr(sampled_tiles, "STEPS", 1 if request.param == "steps" else 1000)
    return request.param


@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
def test_gradcheck(schedule, vectors):
    q, z, p, listed, *_ = problem(d=3, m=5, s=3, dtype=torch.float64, vectors=vectors)
    inputs = [q.clone().requires_grad_(), z.clone().requires_grad_(), torch.tensor(0.7, requires_grad=True).double()]
    if vectors:
        inputs.append(p.clone().requires_grad_())

    def losses(q, z, scale, p=p):
        return sampled_info_nce(q, z, p, listed, scale=scale, impl="triton", reduction="none")

    assert torch.autograd.gradcheck(losses, inputs, nondet_tol=1e-12, fast_mode=True)  # random directions


def test_autocast_rounds_no_score_of_a_positive(schedule):
    """An inner product of torch's in the dense schedule is an op that autocast lowers."""
    q, z, v, listed, *_ = problem(vectors=True)
    plain = sampled_info_nce_stats(q, z, v, listed, scale=100.0, impl="triton")
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cpu" else torch.bfloat16):
        again = sampled_info_nce_stats(*(t.double() for t in (q, z, v)), listed, scale=100.0, impl="triton")
        rounded = sampled_info_nce_stats(q, z, v, listed, scale=100.0, impl="triton")
    torch.testing.assert_close(again.positive.float(), plain.positive)
    if DEVICE == "cpu":  # which computes float16 in float32
        assert torch.equal(rounded.positive, plain.positive)


@pytest.mark.parametrize("drawn", [False, True], ids=["listed", "drawn"])
def test_all_implementations_agree(schedule, drawn):
    q, z, p, listed, seed, count, *_, a, c = problem(ids=True, drawn=drawn, scale=1.3)
    negatives = Negatives(count, seed) if drawn else listed
    draw = torch.Generator().manual_seed(3)
    upstream = torch.randn(p.shape, generator=draw).to(DEVICE)
    results = {}
    for impl in ("reference", "gather", "triton"):
        inputs = [t.clone().requires_grad_() for t in (q, z, torch.tensor(1.3, device=DEVICE))]
        loss = sampled_info_nce(*inputs[:2], p, negatives, scale=inputs[2], anchor_ids=a, pool_ids=c, impl=impl,
                                reduction="none")  # fmt: skip
        results[impl] = (loss.detach(), *torch.autograd.grad((loss * upstream).sum(), inputs))
        stats = sampled_info_nce_stats(q, z, p, negatives, scale=1.3, anchor_ids=a, pool_ids=c, impl=impl)
        results[impl] += (*stats,)
    for impl in ("gather", "triton"):
        for ours, theirs in zip(results[impl], results["reference"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("learns", ["anchors", "pool", "scale", "vectors"])
def test_only_one_input_learns(learns):
    q, z, p, listed, *_ = problem(vectors=learns == "vectors")
    results = []
    for impl in ("reference", "triton"):
        inputs = {
            "anchors": q.clone(),
            "pool": z.clone(),
            "scale": torch.tensor(1.3, device=DEVICE),
            "vectors": p.clone(),
        }
        inputs[learns].requires_grad_()
        loss = sampled_info_nce(inputs["anchors"], inputs["pool"], inputs["vectors"], listed, scale=inputs["scale"],
                                impl=impl)  # fmt: skip
        results.append(torch.autograd.grad(loss, inputs[learns])[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the CPU wait for the device, or a shape depend on data: neither can be in a CUDA graph."""

    REFUSED = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0].rstrip("_")
        assert name not in self.REFUSED, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), NoWaiting():
        torch.ones(1).item()
    for options in ({}, {"drawn": True}, {"per_step": True, "vectors": True, "dtype": torch.float16}):
        where = problem(ids=True, **options)
        for schedule in (s for s in SCHEDULES if possible(s, where)):
            with NoWaiting():
                out = triton_sampled_info_nce.forward(*where, schedule=schedule)
                triton_sampled_info_nce.backward_pool(out[0], out[1], *where, schedule=schedule)
        with NoWaiting():
            triton_sampled_info_nce.backward_pool(out[0], out[1], *where, schedule="segments")
    for d, dtype in ((17, torch.float16), (70, torch.float32), (600, torch.float16)):
        q, z, p, *_ = problem(n=5, steps=1, d=d, dtype=dtype)
        rows = q[:, 0], z, p[:, 0], torch.ones(1, device=DEVICE)
        with NoWaiting():
            for splits in (1, 2):
                out = triton_info_nce.forward(*rows, splits=splits)
                triton_info_nce.backward_candidates(out[0], out[1], *rows, splits=splits)


def test_deterministic_mode_sorts(monkeypatch):
    monkeypatch.setattr(sampled_tiles, "DENSE", 0)
    monkeypatch.setattr(sampled_tiles, "DENSE_FP32", 0)
    ran = []
    real = triton_sampled_info_nce.Launch.__call__
    monkeypatch.setattr(
        triton_sampled_info_nce.Launch, "__call__",
        lambda self, stage, kernel, *a, **k: (ran.append(kernel), real(self, stage, kernel, *a, **k))[1],
    )  # fmt: skip
    where = problem(drawn=True)
    torch.use_deterministic_algorithms(True)
    try:
        out = triton_sampled_info_nce.forward(*where)
        grads = [triton_sampled_info_nce.backward_pool(out[0], out[1], *where) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert triton_sampled_info_nce.segments_kernel in ran
    assert triton_sampled_info_nce.gathered_backward_kernel not in ran
    assert torch.equal(*grads)


def test_opcheck(unpoisoned):
    q, z, p, listed, *_ = problem(n=2, steps=2, d=4, m=6, s=3)
    from cpc_kernels.sampled_info_nce import sampled_op

    q, z = q.clone().requires_grad_(), z.clone().requires_grad_()
    scale = torch.ones(1, device=DEVICE, requires_grad=True)
    arguments = (q, z, p, scale, listed, None, 0, False, None, None, "triton", True, False)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(sampled_op, arguments, test_utils=tests)


def test_named_ranges_reach_the_profiler():
    where = problem(n=1, steps=1, d=4, m=5, s=2)
    with torch.profiler.profile() as profile:
        triton_sampled_info_nce.forward(*where)
    assert any(event.key.startswith("cpc_kernels/sampled_info_nce/") for event in profile.key_averages())


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_every_entry_is_named_once(arch):
    names = [entry.name for entry in triton_sampled_info_nce.aot_entries(arch)]
    assert len(names) == len(set(names)) > 20
