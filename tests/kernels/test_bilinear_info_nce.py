"""CPC in one call against its spec: both sides, everything or listed rows, dense or sampled."""

import pytest
import torch

from cpc_kernels import Negatives, bilinear_info_nce_across_ranks, info_nce, reference, sampled_info_nce
from cpc_kernels.bilinear_info_nce import bilinear_info_nce, bilinear_info_nce_stats, cheaper_side, project

N, K, D, C, M = 6, 3, 5, 4, 9
SIDES = ("contexts", "candidates")


def problem(dtype=torch.float64, vectors=False, ids=False, learns=True):
    draw = torch.Generator().manual_seed(0)
    shapes = (N, C), (K, D, C), (M, D)
    contexts, weights, candidates = (torch.randn(*shape, generator=draw).to(dtype) for shape in shapes)
    if vectors:
        positives = torch.randn(N, K, D, generator=draw).to(dtype)
    else:
        positives = torch.randint(0, M, (N, K), generator=draw)
        positives[1, 2] = -1
    scale = torch.tensor(0.6, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    options = {"scale": scale}
    if ids:
        options["anchor_ids"] = torch.randint(0, 3, (N,), generator=draw)
        options["candidate_ids"] = torch.randint(0, 3, (M,), generator=draw)
    if learns:
        for tensor in (contexts, weights, candidates, scale):
            tensor.requires_grad_()
    return contexts, weights, candidates, positives, options


def listed_rows(positives):
    """The rows that are not ignored, sorted by step: sources, counts, their positives, and where they are in (N, K)."""
    asked = torch.ones(N, K, dtype=torch.bool) if positives.is_floating_point() else positives >= 0
    asked[0, 1] = asked[3, 0] = False
    step, sources = asked.T.nonzero(as_tuple=True)
    return sources, asked.sum(0).tolist(), positives[sources, step], (sources, step)


def gradients(loss, *tensors):
    draw = torch.Generator().manual_seed(5)
    return torch.autograd.grad((loss * torch.randn(loss.shape, generator=draw).to(loss)).sum(), tensors)


def agree(ours, theirs, inputs):
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
@pytest.mark.parametrize("ids", [False, True], ids=["plain", "ids"])
@pytest.mark.parametrize("negatives", [None, "shared", "per step"])
def test_everything_is_the_spec(negatives, ids, vectors, side, impl):
    contexts, weights, candidates, positives, options = problem(vectors=vectors, ids=ids)
    if negatives is not None:
        negatives = torch.randint(-1, M, (N, 4) if negatives == "shared" else (N, K, 4))
        negatives[0, ..., 0] = 0 if vectors else positives[0, 0]
    other = dict(options)
    if ids and negatives is not None:
        other["pool_ids"] = other.pop("candidate_ids")
    truth = reference.bilinear_info_nce(contexts, weights, candidates, positives, negatives, reduction="none", **other)
    call = {"side": side, "impl": impl, **options}
    ours = bilinear_info_nce(contexts, weights, candidates, positives, negatives, reduction="none", **call)
    agree(ours, truth, (contexts, weights, candidates, options["scale"]))
    active = torch.ones(N, K) if vectors else positives >= 0
    total = bilinear_info_nce(contexts, weights, candidates, positives, negatives, reduction="sum", **call)
    torch.testing.assert_close(total, truth.sum())
    mean = bilinear_info_nce(contexts.view(2, 3, C), weights, candidates, positives, negatives, **call)
    torch.testing.assert_close(mean, truth.sum() / active.sum())
    stats = bilinear_info_nce_stats(contexts, weights, candidates, positives, negatives, **call)
    torch.testing.assert_close(stats.loss, truth.detach())
    assert stats.rank.shape == (N, K)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("sampled", [False, True], ids=["dense", "sampled"])
def test_listed_rows_are_rows_of_everything(sampled, impl, vectors, side):
    contexts, weights, candidates, positives, options = problem(vectors=vectors, ids=True)
    sources, counts, own, where = listed_rows(positives)
    negatives = torch.randint(-1, M, (N, K, 4)) if sampled else None
    call = {"side": side, "impl": impl, **options}
    everything = bilinear_info_nce(contexts, weights, candidates, positives, negatives, reduction="none", **call)
    call |= {"sources": sources, "counts": counts, "anchor_ids": options["anchor_ids"][sources]}
    listed = None if negatives is None else negatives[where]
    rows = bilinear_info_nce(contexts, weights, candidates, own, listed, reduction="none", **call)
    agree(rows, everything[where], (contexts, weights, candidates, options["scale"]))
    mean = bilinear_info_nce(contexts, weights, candidates, own, listed, **call)
    torch.testing.assert_close(mean, rows.mean())
    stats = bilinear_info_nce_stats(contexts, weights, candidates, own, listed, **call)
    torch.testing.assert_close(stats.loss, rows.detach())


@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per step"])
@pytest.mark.parametrize("vectors", [False, True], ids=["index", "vectors"])
def test_both_sides_draw_the_same(vectors, per_step):
    contexts, weights, candidates, positives, options = problem(vectors=vectors, ids=True)
    drawn = Negatives(5, seed=11, per_step=per_step)
    inputs = contexts, weights, candidates, options["scale"]
    a, b = (bilinear_info_nce(*inputs[:3], positives, drawn, side=side, reduction="none", **options) for side in SIDES)
    agree(a, b, inputs)
    sources, counts, own, _ = listed_rows(positives)
    call = options | {"sources": sources, "counts": counts, "anchor_ids": options["anchor_ids"][sources]}
    a, b = (bilinear_info_nce(*inputs[:3], own, drawn, side=side, reduction="none", **call) for side in SIDES)
    agree(a, b, inputs)


@pytest.mark.parametrize("at_once", [False, True])
def test_projection_of_listed_rows(at_once):
    contexts, weights, _, positives, _ = problem()
    sources, counts, _, where = listed_rows(positives)
    counts = [*counts, 0]  # a step that nobody is asked about
    weights = torch.cat([weights.detach(), torch.zeros(1, D, C, dtype=torch.float64)]).requires_grad_()
    truth = torch.einsum("kdc,nc->nkd", weights, contexts)[where]
    agree(project(contexts, weights, sources, counts, at_once), truth, (contexts, weights))
    assert torch.autograd.gradcheck(lambda c, w: project(c, w, sources, counts, at_once), (contexts, weights))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(project, (contexts, weights, sources, counts, at_once), test_utils=tests)


def test_gradcheck():
    contexts, weights, candidates, positives, options = problem()
    sources, counts, own, _ = listed_rows(positives)

    def loss(contexts, weights, candidates, scale):
        return bilinear_info_nce(contexts, weights, candidates, own, sources=sources, counts=counts, scale=scale)

    assert torch.autograd.gradcheck(loss, (contexts, weights, candidates, options["scale"]))


def test_no_rows():
    contexts, weights, candidates, _, _ = problem()
    none = torch.zeros(0, dtype=torch.int64)
    for side in SIDES:
        for negatives in (None, Negatives(3, 0)):
            loss = bilinear_info_nce(
                contexts, weights, candidates, none, negatives, sources=none, counts=[0] * K, side=side
            )
            assert loss == 0


def test_one_step_is_info_nce():
    contexts, weights, candidates, positives, _ = problem(torch.float32, learns=False)
    ours = bilinear_info_nce(contexts, weights[:1], candidates, positives[:, :1])
    torch.testing.assert_close(ours, info_nce(contexts @ weights[0].T, candidates, positives[:, 0]))


def test_autocast_takes_the_cpus_own_dtype():
    contexts, weights, candidates, positives, _ = problem(torch.float32, learns=False)
    plain = bilinear_info_nce(contexts, weights, candidates, positives)
    with torch.autocast("cpu", torch.bfloat16):
        cast = bilinear_info_nce(contexts, weights, candidates, positives)
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast, plain, rtol=0.1, atol=0.05)


def test_the_cheaper_side():
    assert cheaper_side(rows=1000, steps=4, m=500, scored=500, d=64, c=64) == "contexts"
    assert cheaper_side(rows=4000, steps=4, m=500, scored=500, d=64, c=64) == "candidates"
    assert cheaper_side(rows=1000, steps=4, m=500, scored=16, d=256, c=32) == "contexts"


def test_errors_say_what_to_do():
    contexts, weights, candidates, positives, _ = problem(torch.float32, learns=False)
    rows = torch.zeros(4, dtype=torch.int64)
    cases = [
        ((contexts, weights[0], candidates, positives), {}, ValueError, "weights \\(K, D, C\\)"),
        ((contexts[:, 1:], weights, candidates, positives), {}, ValueError, "must map the contexts' features"),
        ((contexts, weights, candidates.double(), positives), {}, TypeError, "the contexts' dtype"),
        ((contexts, weights, candidates, positives.T), {}, ValueError, "one per context and step"),
        ((contexts, weights, candidates, positives), {"side": "left"}, ValueError, "side must be"),
        ((contexts, weights, candidates, rows), {"sources": rows}, ValueError, "without counts"),
        ((contexts, weights, candidates, rows), {"sources": rows, "counts": [1, 1, 1]}, ValueError, "add up to P"),
        ((contexts, weights, candidates, rows[:3]), {"sources": rows, "counts": [4, 0, 0]}, ValueError, "one for each"),
        ((contexts.tolist(), weights, candidates, positives), {}, TypeError, "list; write torch.tensor\\(contexts\\)"),
        ((contexts, list(weights), candidates, positives), {}, TypeError, "list; write torch.stack\\(weights\\)"),
        ((contexts, weights, candidates, positives, 3), {}, TypeError, "did you mean Negatives\\(3, seed=0\\)"),
        (
            (contexts, weights, candidates, rows),
            {"sources": [0] * 4, "counts": [4]},
            TypeError,
            "torch.tensor\\(sources",
        ),
    ]
    for arguments, options, kind, text in cases:
        with pytest.raises(kind, match=text):
            bilinear_info_nce(*arguments, **options)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("run", [bilinear_info_nce, bilinear_info_nce_stats])
def test_an_index_of_another_steps_candidate_is_refused(run, side):
    """On the side of the candidates, M + j of a step is j of the next."""
    contexts, weights, candidates, positives, _ = problem(learns=False)
    negatives = torch.randint(0, M, (N, 4))
    for what, where in (
        ("positives", (positives.clamp(min=0) + M, negatives)),
        ("positives", (positives * 0 - 5, Negatives(3, 0))),
        ("positives", (positives * 0 + M, None)),
        ("negatives", (positives, negatives + M)),
        ("negatives", (positives, negatives * 0 - 5)),
    ):
        with pytest.raises(IndexError, match=rf"nce.*: {what} must lie between -1 and 8 \(candidates have 9 rows"):
            run(contexts, weights, candidates, *where, side=side)
    for kind, wrong in (
        (TypeError, negatives.bool()),
        (TypeError, negatives.float()),
        (ValueError, negatives[:, None]),
    ):
        with pytest.raises(kind, match="negatives must be"):
            run(contexts, weights, candidates, positives, wrong, side=side)


@pytest.mark.parametrize("run", [bilinear_info_nce, bilinear_info_nce_across_ranks])
def test_listed_rows_that_are_none_are_refused(run):
    contexts, weights, candidates, positives, _ = problem(learns=False)
    sources, counts, own, _ = listed_rows(positives)
    for wrong in (counts[:-1], [*counts[:-1], counts[-1] + 1], [len(sources) + 1, 0, -1]):
        with pytest.raises(ValueError, match=r"counts 3 numbers \(one per step\) that add up to P"):
            run(contexts, weights, candidates, own, sources=sources, counts=wrong)
    for wrong in (sources - 1, sources + 1):
        with pytest.raises(IndexError, match=r"sources must lie between 0 and 5 \(contexts have 6 rows\)"):
            run(contexts, weights, candidates, own, sources=wrong, counts=counts)
    with pytest.raises(ValueError, match=r"sources must be .* Got sources .* torch\.bool"):
        run(contexts, weights, candidates, own, sources=sources > 0, counts=counts)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("negatives", [None, Negatives(3, 0)])
def test_a_context_that_never_speaks_may_hold_anything(negatives, side):
    contexts, weights, candidates, positives, options = problem()
    positives[4] = -1
    with torch.no_grad():
        contexts[4] = torch.nan
    bilinear_info_nce(contexts, weights, candidates, positives, negatives, side=side, **options).backward()
    assert weights.grad.isfinite().all()
    assert not contexts.grad[4].any()


def test_second_derivatives_are_refused():
    contexts, weights, candidates, positives, _ = problem()
    sources, counts, own, _ = listed_rows(positives)
    loss = bilinear_info_nce(contexts, weights, candidates, own, sources=sources, counts=counts)
    (first,) = torch.autograd.grad(loss, contexts, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()


def test_a_context_is_gathered_not_kept(unpoisoned):
    """What autograd holds between forward and backward grows with the inputs, not with a copy for each step."""
    contexts, weights, _, positives, _ = problem(torch.float32)
    sources, counts, _, _ = listed_rows(positives)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        project(contexts, weights, sources, counts, False)
    given = {t.data_ptr() for t in (contexts, weights, sources)}
    assert {t.data_ptr() for t in kept} <= given


OPS = {
    "info_nce": lambda q, k, w, i, **o: info_nce(q, k, i, **o),
    "sampled_info_nce": lambda q, k, w, i, **o: sampled_info_nce(q, k, i, torch.tensor([[1, 2]] * N), **o),
    "bilinear_info_nce": lambda q, k, w, i, **o: bilinear_info_nce(q, w, k, i[:, None].expand(N, K), **o),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, as it loads forward mode
@pytest.mark.parametrize("name", OPS)
def test_derivatives_that_would_be_lost_are_refused(name):
    """Forward mode through these ops would be zero without a word, and torch.func's error would name nothing."""
    op, draw = OPS[name], torch.Generator().manual_seed(0)
    q, k, t = torch.randn(3, M, D, generator=draw, dtype=torch.float64)
    q, t, i = q[:N], t[:N], torch.arange(N)
    w = torch.randn(K, D, D, generator=draw, dtype=torch.float64)

    def forward_mode(**options):
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(
                op(torch.autograd.forward_ad.make_dual(q, t), k, w, i, **options)
            ).tangent

    ways = {
        "grad": lambda **o: (torch.func.grad(lambda x: op(x, k, w, i, **o))(q) * t).sum(),
        "scale": lambda **o: torch.func.grad(lambda s: op(q, k, w, i, scale=s, **o))(torch.ones((), dtype=q.dtype)),
        "jvp": lambda **o: torch.func.jvp(lambda x: op(x, k, w, i, **o), (q,), (t,))[1],
        "forward mode": forward_mode,
    }
    for way in ways.values():
        with pytest.raises(RuntimeError, match=rf"{name}: .* use backward\(\) or .* impl=\"reference\""):
            way()
    reference_of = {way: float(ways[way](impl="reference")) for way in ways}
    assert reference_of["grad"] == pytest.approx(reference_of["jvp"])
    assert reference_of["jvp"] == pytest.approx(reference_of["forward mode"])
    assert torch.func.grad(lambda x: op(q, k, w, i) + x.sum())(q).shape == q.shape  # nothing of it is derived


def test_sources_of_any_integers_are_indices():
    """Torch takes bytes for a mask."""
    g = torch.Generator().manual_seed(0)
    contexts, weights, latents = (torch.randn(*shape, generator=g) for shape in ((6, 4), (1, 3, 4), (5, 3)))
    sources, rest = torch.tensor([3, 0, 5, 1, 2, 4]), {"counts": [6], "side": "contexts", "reduction": "none"}
    losses = [
        bilinear_info_nce(contexts, weights, latents, torch.arange(6) % 5, sources=sources.to(dtype), **rest)
        for dtype in (torch.int64, torch.uint8, torch.int16)
    ]
    assert all(torch.equal(losses[0], other) for other in losses[1:])


def test_what_lies_elsewhere_or_is_no_float_is_named():
    contexts, weights, latents = torch.randn(6, 4), torch.randn(2, 3, 4), torch.randn(5, 3)
    positives = torch.zeros(6, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"weights must be on the contexts' device. .* weights on meta"):
        bilinear_info_nce(contexts, weights.to("meta"), latents, positives)
    with pytest.raises(TypeError, match=r"contexts must be floating point. Got torch.int64"):
        bilinear_info_nce(contexts.long(), weights.long(), latents.long(), positives)


def test_listed_rows_compile_for_any_batch():
    """In one graph, whose counts are symbols from the second size on."""
    g = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 4, generator=g)

    def loss(contexts, candidates, positives, sources, counts):
        return bilinear_info_nce(contexts, weights, candidates, positives, sources=sources, counts=counts)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for n in (4, 6, 5, 9):
        contexts, candidates = torch.randn(n, 4, generator=g), torch.randn(n + 3, 3, generator=g)
        rows = torch.arange(2 * n - 1)
        given = contexts, candidates, rows % (n + 3), rows % n, [n, n - 1]
        torch.testing.assert_close(compiled(*given), loss(*given))
