"""CPC in one call: step k predicts W_k c, and InfoNCE scores the prediction against the candidates.

    p_nk   = W_k c_n                        c: contexts (N, C), W: weights (K, D, C), z: candidates (M, D)
    s_nkj  = scale z_j^T W_k c_n            the bilinear score: project the contexts (p), or the candidates (z W_k)
    loss   = info_nce, or sampled_info_nce where negatives are given

    dc_n = sum_k W_k^T dp_nk,   dW_k = sum_n dp_nk c_n^T         or, on the other side, of z W_k alike

Which contexts speak about which step is either everything (N x K rows) or listed: `sources` name the context of every
row, sorted by step, `counts` how many rows each step has. Listed rows are projected one product per step; on a GPU,
where at least half of everything is asked for, in one product of which these rows are kept. Nothing but the projection
itself is stored: the contexts that a step reads are gathered again in backward, and added to one gradient. "fused"
stores not even that: its kernel makes a tile of predictions, scores it against all candidates and forgets it. With
gradients they would be wanted again (dW, dz), so it has none.

The cheaper side is projected. Contexts: P C D + P S' D multiply-adds, P the number of rows, S' the candidates that each
is scored against. Candidates: K M C D + P S' C, and P C D where the positives are vectors of their own. (Three times as
many with gradients.) Drawn negatives are the same on both sides.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import tiles
from .arguments import (
    InfoNCEStats,
    autocast,
    check_ids,
    check_indices,
    check_reduction,
    compute_dtype,
    need_tensors,
    reduce,
    scale_tensor,
    spell,
)
from .autograd import as_written, learns, once_differentiable, refuse_transforms, undisturbed
from .capabilities import interpreting, triton_module
from .info_nce import info_nce, info_nce_stats
from .negatives import Negatives, draw_negatives
from .ranges import stage
from .sampled_info_nce import check_listed, need_negatives, sampled_info_nce, sampled_info_nce_stats

# --- the projection of listed rows ------------------------------------------------------------------------------------


def _parts(sources: Tensor, counts: Sequence[int]):
    """(k, rows of the result, the contexts they read)."""
    start = 0
    for k, count in enumerate(counts):
        yield k, slice(start, start + count), sources[start : start + count]
        start += count


def _steps(counts: Sequence[int], device: torch.device) -> Tensor:
    """(P,) the step of each row, without waiting for the device."""
    return torch.cat([torch.full((count,), k, device=device) for k, count in enumerate(counts)])


def _cells(sources: Tensor, counts: Sequence[int]) -> Tensor:
    """(P,) where each row lies in the (N K) rows of the projection of everything."""
    return sources * len(counts) + _steps(counts, sources.device)


@torch.library.custom_op("cpc_kernels::project", mutates_args=())
@as_written
def project(contexts: Tensor, weights: Tensor, sources: Tensor, counts: Sequence[int], at_once: bool) -> Tensor:
    """(N, C), (K, D, C), (P,) -> (P, D)."""
    contexts, weights = contexts.detach(), weights.detach()
    steps, d, c = weights.shape
    with stage("bilinear_info_nce", "predictions", contexts.device):
        if at_once:
            everything = contexts @ weights.reshape(steps * d, c).T  # (N, K D)
            return everything.view(-1, d)[_cells(sources, counts)]
        out = contexts.new_empty(len(sources), d)
        for k, rows, read in _parts(sources, counts):
            torch.mm(contexts[read], weights[k].T, out=out[rows])
        return out


@project.register_fake
def _(contexts, weights, sources, counts, at_once):
    return contexts.new_empty((sources.shape[0], weights.shape[1]))


@torch.library.custom_op("cpc_kernels::project_backward", mutates_args=())
@as_written
def project_backward(
    grad: Tensor,
    contexts: Tensor,
    weights: Tensor,
    sources: Tensor,
    counts: Sequence[int],
    at_once: bool,
    need_contexts: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    steps, d, c = weights.shape
    none = grad.new_empty(0)
    with stage("bilinear_info_nce", "gradients", grad.device):
        if at_once:
            everything = grad.new_zeros(len(contexts) * steps, d)
            everything.index_copy_(0, _cells(sources, counts), grad)  # a context speaks once about a step
            everything = everything.view(-1, steps * d)
            dc = everything @ weights.reshape(steps * d, c) if need_contexts else none
            dw = (everything.T @ contexts).view(steps, d, c) if need_weights else none.clone()
            return dc, dw
        dc = contexts.new_zeros(contexts.shape) if need_contexts else none
        dw = weights.new_zeros(weights.shape) if need_weights else none.clone()
        for k, rows, read in _parts(sources, counts):
            if need_contexts:
                dc.index_add_(0, read, grad[rows] @ weights[k])
            if need_weights:
                torch.mm(grad[rows].T, contexts[read], out=dw[k])
        return dc, dw


@project_backward.register_fake
def _(grad, contexts, weights, sources, counts, at_once, need_contexts, need_weights):
    return (
        contexts.new_empty(contexts.shape if need_contexts else (0,)),
        weights.new_empty(weights.shape if need_weights else (0,)),
    )


def _save(ctx, inputs, output):
    contexts, weights, sources, counts, at_once = inputs
    ctx.save_for_backward(contexts, weights, sources)
    ctx.options = counts, at_once


def _backward(ctx, grad):
    needs = ctx.needs_input_grad[:2]
    grads = project_backward(grad, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


project.register_autograd(_backward, setup_context=_save)
once_differentiable(project_backward, "bilinear_info_nce")


@as_written
def project_rows(contexts, weights, sources, counts, impl):
    """(P, D), by plain torch where second derivatives are wanted."""
    if impl == "reference":
        return torch.cat([contexts[read] @ weights[k].T for k, _, read in _parts(sources, counts)])
    at_once = contexts.device.type != "cpu" and 2 * sources.shape[0] >= contexts.shape[0] * len(counts)
    return project(contexts, weights, sources, list(counts), at_once)


# --- the projection inside the kernel ---------------------------------------------------------------------------------


@torch.library.custom_op("cpc_kernels::bilinear_fused", mutates_args=())
@as_written
def fused_op(
    contexts: Tensor,
    weights: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, positive score and rank (K, N) of positives (K, N)."""
    check_indices("bilinear_info_nce", "positives", positives, len(candidates))
    launch = triton_module("info_nce", contexts.device).forward_projected
    return launch(contexts, weights, candidates, positives, scale, anchor_ids, candidate_ids)


@fused_op.register_fake
def _(contexts, weights, candidates, positives, scale, anchor_ids, candidate_ids):
    row = contexts.new_empty(positives.shape, dtype=compute_dtype(contexts.dtype))
    return row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(positives)


def fused(op, contexts, weights, candidates, positives, scale, anchor_ids, candidate_ids, plain: bool):
    """The stats (N, K) of a problem that fits the kernel; an error that says what does not, and what would run."""
    learning = learns(contexts, weights, candidates, scale)
    limit = tiles.projected_max_d(16 if contexts.dtype.itemsize == 2 else 32)
    for wrong, why in (
        (contexts.device.type == "cpu" and not interpreting(), "runs on a CUDA or ROCm GPU alone"),
        (not plain, "takes every context with every step, all candidates and indices as positives"),
        (learning, "makes no gradients, which would need the predictions stored"),
        (weights.shape[1] > limit, f"holds up to {limit} features D of {contexts.dtype}, not {weights.shape[1]}"),
    ):
        if wrong:
            raise RuntimeError(f'{op}: impl="fused" {why}; impl="auto" would run.')
    ids = [None if each is None else each.long() for each in (anchor_ids, candidate_ids)]
    found = fused_op(contexts, weights, candidates, positives.long().T.contiguous(), scale, *ids)
    return InfoNCEStats(*(each.T for each in found))


# --- the door ---------------------------------------------------------------------------------------------------------


def check(op, contexts, weights, candidates, positives, negatives, sources, counts, side) -> None:
    if weights.ndim != 3 or candidates.ndim != 2 or contexts.ndim < 2:
        raise ValueError(
            f"{op}: contexts must be (..., C), weights (K, D, C) and candidates (M, D). "
            f"{spell(contexts=contexts, weights=weights, candidates=candidates)}"
        )
    k, d, c = weights.shape
    if contexts.shape[-1] != c or candidates.shape[1] != d:
        raise ValueError(
            f"{op}: weights (K, D, C) must map the contexts' features C to the candidates' D. "
            f"{spell(contexts=contexts, weights=weights, candidates=candidates)}"
        )
    if not contexts.is_floating_point():
        raise TypeError(f"{op}: contexts must be floating point. Got {contexts.dtype}.")
    others = {"weights": weights, "candidates": candidates, "positives": positives, "sources": sources}
    for name, tensor in (others | {"negatives": negatives}).items():
        if isinstance(tensor, Tensor) and tensor.device != contexts.device:
            raise ValueError(
                f"{op}: {name} must be on the contexts' device. "
                f"Got contexts on {contexts.device}, {name} on {tensor.device}."
            )
    for name, tensor in (("weights", weights), ("candidates", candidates)):
        if tensor.dtype != contexts.dtype:
            raise TypeError(
                f"{op}: {name} must have the contexts' dtype (or run under autocast). "
                f"Got contexts {contexts.dtype}, {name} {tensor.dtype}."
            )
    if side not in ("auto", "contexts", "candidates"):
        raise ValueError(f"{op}: side must be auto, contexts or candidates. Got {side!r}.")
    if (sources is None) != (counts is None):
        missing, given = ("counts", "sources") if counts is None else ("sources", "counts")
        raise ValueError(f"{op}: {given} were given without {missing}; rows are listed by both, or by neither.")
    vectors = (d,) if positives.is_floating_point() else ()
    if counts is None:
        n = math.prod(contexts.shape[:-1])
        if tuple(positives.shape) not in ((n, k, *vectors), (*contexts.shape[:-1], k, *vectors)):
            raise ValueError(
                f"{op}: positives must be ({n}, {k}) indices or ({n}, {k}, {d}) vectors, one per context and step. "
                f"{spell(contexts=contexts, weights=weights, positives=positives)}"
            )
        return
    check_rows(op, sources, counts, k, math.prod(contexts.shape[:-1]))
    if tuple(positives.shape) != (sources.shape[0], *vectors):
        raise ValueError(
            f"{op}: positives must be ({len(sources)},) indices or ({len(sources)}, {d}) vectors, one for each source. "
            f"{spell(sources=sources, positives=positives)}"
        )


def check_rows(op: str, sources: Tensor, counts: Sequence[int], steps: int, contexts: int) -> None:
    """Listed rows: whether the sources are some of so many contexts, and the counts of so many steps are theirs."""
    numbers = not (sources.is_floating_point() or sources.dtype == torch.bool)
    whole = len(counts) == steps and sum(counts) == sources.shape[0] and all(count >= 0 for count in counts)
    if sources.ndim != 1 or not (numbers and whole):
        raise ValueError(
            f"{op}: sources must be (P,) integers sorted by step, counts {steps} numbers (one per step) that add up to "
            f"P. Got sources {tuple(sources.shape)} {sources.dtype}, counts {list(counts)}."
        )
    if undisturbed():
        check_indices(op, "sources", sources, contexts, 0, "contexts")


def cheaper_side(rows: int, steps: int, m: int, scored: int, d: int, c: int, vectors: bool = False) -> str:
    """Whose projection costs fewer multiply-adds; `scored`: candidates that each row is scored against; `vectors`: the
    positives are, and would be projected with the candidates."""
    if isinstance(rows, torch.SymInt) or isinstance(m, torch.SymInt):  # traced for any size: one way for all
        return "contexts"
    contexts = rows * c * d + rows * scored * d
    projected = steps * m + (rows if vectors else 0)
    candidates = projected * c * d + rows * scored * c
    return "contexts" if contexts <= candidates else "candidates"


def _run(
    op, contexts, weights, candidates, positives, negatives, sources, counts, scale, anchor_ids, candidate_ids,
    reduction, impl, side, stats,
):  # fmt: skip
    need_tensors(op, contexts=contexts, weights=weights, candidates=candidates, positives=positives)
    if sources is not None:
        need_tensors(op, sources=sources)
    if negatives is not None:
        need_negatives(op, negatives)
    contexts, weights, candidates, positives = autocast(contexts.device, contexts, weights, candidates, positives)
    return _scored(
        op, contexts, weights, candidates, positives, negatives, sources, counts, scale, anchor_ids, candidate_ids,
        reduction, impl, side, stats,
    )  # fmt: skip


@as_written
def _scored(
    op, contexts, weights, candidates, positives, negatives, sources, counts, scale, anchor_ids, candidate_ids,
    reduction, impl, side, stats,
):  # fmt: skip
    check(op, contexts, weights, candidates, positives, negatives, sources, counts, side)
    if not stats:
        refuse_transforms(op, impl, contexts, weights, candidates, positives, scale)
    scale = scale_tensor(op, scale, contexts)
    steps, d, c = weights.shape
    contexts = contexts.reshape(-1, c)
    n, m = contexts.shape[0], candidates.shape[0]
    vectors = positives.is_floating_point()
    listed = sources is not None
    if listed:
        sources = sources.long()  # torch takes bytes for a mask
    else:
        positives = positives.reshape(n, steps, *positives.shape[positives.ndim - vectors :])
    rows = sources.shape[0] if listed else n * steps
    check_reduction(op, reduction)
    check_ids(op, "anchor_ids", anchor_ids, rows if listed else n, candidate_ids, "candidate_ids", contexts.device)
    check_ids(op, "candidate_ids", candidate_ids, m, anchor_ids, "anchor_ids", contexts.device)
    if isinstance(negatives, Tensor):
        check_listed(op, negatives, (rows,) if listed else (n, steps), positives=positives)
    for name, given in (("positives", positives), ("negatives", negatives)) if undisturbed() else ():
        if isinstance(given, Tensor) and not given.is_floating_point():  # on one side they would be another step's
            check_indices(op, name, given, m)
    drawn = isinstance(negatives, Negatives)
    scored = m if negatives is None else negatives.count if drawn else negatives.shape[-1]
    if side == "auto" and impl == "fused":
        side = "contexts"
    elif side == "auto":
        side = cheaper_side(rows, steps, m, scored, d, c, vectors)
    options = {"scale": scale, "anchor_ids": anchor_ids, "impl": impl}
    if not stats:
        options["reduction"] = reduction if side == "contexts" else "none"
    dense, sampled = (info_nce_stats, sampled_info_nce_stats) if stats else (info_nce, sampled_info_nce)

    if impl == "fused":
        plain = side == "contexts" and not (listed or vectors or negatives is not None)
        where = contexts, weights, candidates, positives, scale, anchor_ids, candidate_ids
        rows = fused(op, *where, plain)
        return rows if stats else reduce(rows.loss, positives, reduction)

    if side == "contexts":
        if listed:
            anchors = project_rows(contexts, weights, sources, counts, impl)  # (P, D)
        else:
            if not vectors:  # what a context holds that never speaks is in no gradient, NaN neither
                contexts = contexts.masked_fill((positives < 0).all(1, keepdim=True), 0)
            anchors = (contexts @ weights.reshape(steps * d, c).T).view(n, steps, d)
        if negatives is not None:
            return sampled(anchors, candidates, positives, negatives, pool_ids=candidate_ids, **options)
        if listed:
            return dense(anchors, candidates, positives, candidate_ids=candidate_ids, **options)
        flat = positives.reshape(n * steps, *positives.shape[2:])
        if anchor_ids is not None:
            options["anchor_ids"] = anchor_ids.repeat_interleave(steps)
        result = dense(anchors.view(n * steps, d), candidates, flat, candidate_ids=candidate_ids, **options)
        if stats:
            return InfoNCEStats(*(r.view(n, steps) for r in result))
        return result.view(n, steps) if reduction == "none" else result

    if negatives is not None:
        result = _sampled_candidates(
            sampled, contexts, weights, candidates, positives, negatives, sources, counts, candidate_ids, options
        )
        return result if stats else reduce(result, positives, reduction)
    pieces = []
    parts = _parts(sources, counts) if listed else ((k, k, slice(None)) for k in range(steps))
    for k, part, read in parts:
        own = positives[part] if listed else positives[:, k]
        if anchor_ids is not None and listed:
            options["anchor_ids"] = anchor_ids[part]
        own = own @ weights[k] if vectors else own
        pieces.append(dense(contexts[read], candidates @ weights[k], own, candidate_ids=candidate_ids, **options))
    join = torch.cat if listed else lambda each: torch.stack(each, 1)
    if stats:
        return InfoNCEStats(*(join(each) for each in zip(*pieces, strict=True)))
    return reduce(join(pieces), positives, reduction)


def _sampled_candidates(
    sampled, contexts, weights, candidates, positives, negatives, sources, counts, candidate_ids, options
):  # fmt: skip
    """Candidates projected once for each step, (K M, C): row k M + j is z_j as step k sees it."""
    steps, _, c = weights.shape
    m, listed = candidates.shape[0], sources is not None
    vectors = positives.is_floating_point()
    pool = torch.einsum("md,kdc->kmc", candidates, weights).reshape(steps * m, c)
    if listed:
        of_row = _steps(counts, sources.device)  # (P,)
        anchors = contexts[sources]
        row_steps = 1
    else:
        of_row = torch.arange(steps, device=contexts.device)  # (K,)
        anchors = contexts[:, None].expand(-1, steps, -1)
        row_steps = steps
    rows = anchors.shape[0]
    if isinstance(negatives, Negatives):
        drawn = draw_negatives(negatives, positives, m, rows, row_steps)
        if drawn.ndim == 3 and listed:
            drawn = drawn[:, 0]
        if not listed and drawn.ndim == 2:
            drawn = drawn[:, None].expand(-1, steps, -1)
        if not vectors:  # a draw shared by the steps may hit one step's positive
            drawn = drawn.where(drawn != positives[..., None], -1)
        negatives = drawn
    elif not listed and negatives.ndim == 2:
        negatives = negatives[:, None].expand(-1, steps, -1)
    negatives = torch.where(negatives < 0, -1, negatives + of_row[:, None] * m)
    if not vectors:
        positives = torch.where(positives < 0, -1, positives + of_row * m)
    elif listed:
        positives = torch.cat([positives[part] @ weights[k] for k, part, _ in _parts(sources, counts)])
    else:
        positives = torch.einsum("nkd,kdc->nkc", positives, weights)
    if candidate_ids is not None:
        candidate_ids = candidate_ids.repeat(steps)
    return sampled(anchors, pool, positives, negatives, pool_ids=candidate_ids, **options)


def bilinear_info_nce(
    contexts: Tensor,
    weights: Tensor,
    candidates: Tensor,
    positives: Tensor,
    negatives: Tensor | Negatives | None = None,
    *,
    sources: Tensor | None = None,
    counts: Sequence[int] | None = None,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    side: str = "auto",
) -> Tensor:
    """CPC's loss from contexts, weights and latents: step k predicts W_k c and is scored against the candidates.

    loss_nk = softplus(log sum_{j negative} exp(s_nkj) - s_nk,p),   s_nkj = scale z_j^T W_k c_n

    contexts: (N, C), or (B, H, W, C) and the like, flattened to N. weights: (K, D, C), one map for each step (and
    direction). candidates: (M, D). All of one dtype.
    Without `sources` every context speaks about every step: positives are (N, K) candidate indices (-1: no such row)
    or (N, K, D) vectors, and losses (N, K). With sources (P,), the flat context of each row sorted by step, and counts,
    how many rows each of the K steps has, positives are (P,) or (P, D) and losses (P,); a context speaks at most once
    about a step.
    negatives: None (all candidates, as `info_nce`), or as for `sampled_info_nce`: Negatives(count, seed, per_step), or
    indices (N, S) or (N, K, S), (P, S) for listed rows.
    scale: number or one-element tensor (it may learn). anchor_ids: (N,), or (P,) for listed rows; candidate_ids: (M,).
    reduction: none, sum, or mean over the rows that are not ignored. impl: that of `info_nce` or `sampled_info_nce`; or
    fused (Triton; every context and step, all candidates, no gradients, D up to 128, 64 in float32), which makes the
    predictions inside the kernel and stores none. auto does not take it: it was never timed.
    side: what is projected, contexts or candidates; auto takes the cheaper.
    Gradients reach contexts, weights, candidates, vector positives and scale.

    Raises ValueError, TypeError or IndexError for arguments that do not fit, RuntimeError for an impl that cannot run
    and for second derivatives. Source: van den Oord et al. 2018 (arXiv 1807.03748).

    >>> contexts, weights, latents = torch.randn(2, 3, 3, 8), torch.randn(4, 16, 8), torch.randn(18, 16)
    >>> positives = torch.randint(0, 18, (18, 4))
    >>> bilinear_info_nce(contexts, weights, latents, positives, reduction="none").shape
    torch.Size([18, 4])
    """
    return _run(
        "bilinear_info_nce", contexts, weights, candidates, positives, negatives, sources, counts, scale, anchor_ids,
        candidate_ids, reduction, impl, side, False,
    )  # fmt: skip


@torch.no_grad()
def bilinear_info_nce_stats(
    contexts: Tensor,
    weights: Tensor,
    candidates: Tensor,
    positives: Tensor,
    negatives: Tensor | Negatives | None = None,
    *,
    sources: Tensor | None = None,
    counts: Sequence[int] | None = None,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    impl: str = "auto",
    side: str = "auto",
) -> InfoNCEStats:
    """Loss, log-sum-exp, positive score and rank of every row of `bilinear_info_nce`, without gradients.

    rank = number of negatives that score above the positive: 0 where it wins

    Arguments as `bilinear_info_nce`. Returns four (N, K) tensors, (P,) for listed rows; rank int64.

    >>> contexts, weights, latents = torch.randn(6, 8), torch.randn(2, 16, 8), torch.randn(9, 16)
    >>> sources, positives = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 4, 5, 6])
    >>> bilinear_info_nce_stats(contexts, weights, latents, positives, sources=sources, counts=[3, 1]).rank.shape
    torch.Size([4])
    """
    return _run(
        "bilinear_info_nce_stats", contexts, weights, candidates, positives, negatives, sources, counts, scale,
        anchor_ids, candidate_ids, "none", impl, side, True,
    )  # fmt: skip
