"""InfoNCE where every candidate is a negative, without the N x M scores.

    s_ij   = scale <q_i, k_j>          q: anchors (N, D), k: candidates (M, D), p(i): the positive of i
    lse_i  = log sum_{j negative of i} exp(s_ij)          P_ij = exp(s_ij - lse_i), negatives only
    loss_i = softplus(lse_i - s_i,p(i))                   O_i  = sum_j P_ij k_j

    w_i    = g_i sigmoid(lse_i - s_i,p(i)) scale          g: the gradient of each row's loss
    dq_i   = w_i (O_i - k_p(i))
    dk_j   = sum_i w_i P_ij q_i - sum_{i: p(i) = j} w_i q_i          with vectors as positives: dv_i = -w_i q_i
    dscale = sum_i (w_i / scale) <q_i, O_i - k_p(i)>

The positive never enters lse, so nothing cancels when the loss is tiny. "chunked" holds one chunk of rows of scores at
a time (chunked_info_nce.py), on a CPU in C++ where it is built. Products: 2 NMD flops for the loss, 2 more for O
(when q or scale learn), 2 more for dk when the losses are summed or averaged (one upstream gradient for all rows: dk is
folded into forward), 4 more when they are not (the scores are computed again in backward). Memory beyond inputs and
gradients: the chunk, (N + M) D floats.

This file argues for its length: two registered forms of one op, by rows and by their sum, behind one door.
"""

import torch
from torch import Tensor

from . import tiles
from .arguments import (
    InfoNCEStats,
    autocast,
    check_ids,
    check_indices,
    check_types,
    compute_dtype,
    count_active,
    need_tensors,
    own_vectors,
    reduce,
    scale_tensor,
    spell,
)
from .autograd import as_written, learns, once_differentiable, plain_form, plainly_eager, refuse_transforms
from .capabilities import triton_module
from .chunked_info_nce import chunked_backward_candidates, chunked_forward

# --- the row op: one loss per row, any upstream gradient --------------------------------------------------------------


@as_written
def compute_rows(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
    impl: str,
    need_expectation: bool,
    need_rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    anchors, candidates, scale = anchors.detach(), candidates.detach(), scale.detach()
    positives = positives.detach()
    if not positives.is_floating_point():
        check_indices("info_nce", "positives", positives, len(candidates))
    if impl == "triton":
        launch = triton_module("info_nce", anchors.device).forward
        return launch(
            anchors, candidates, positives, scale, anchor_ids, candidate_ids, need_expectation, need_rank=need_rank
        )
    return chunked_forward(
        anchors, candidates, positives, scale, anchor_ids, candidate_ids, need_expectation, need_rank
    )


info_nce_op = torch.library.custom_op("cpc_kernels::info_nce", compute_rows, mutates_args=())


@info_nce_op.register_fake
def _(anchors, candidates, positives, scale, anchor_ids, candidate_ids, impl, need_expectation, need_rank):
    n, dtype = anchors.shape[0], compute_dtype(anchors.dtype)
    row = anchors.new_empty(n, dtype=dtype)
    rank = anchors.new_empty(n if need_rank else 0, dtype=torch.int64)
    expectation = anchors.new_empty(anchors.shape if need_expectation else (0,), dtype=dtype)
    return row, torch.empty_like(row), torch.empty_like(row), rank, expectation


@as_written
def rows_gradients(
    grad: Tensor,
    loss: Tensor,
    lse: Tensor,
    expectation: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
    impl: str,
    need_anchors: bool,
    need_candidates: bool,
    need_positives: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(anchors.dtype)
    # sigmoid(lse - s_p), from the loss: of large scores, lse - s_p has lost the digits that the loss still has
    weight = -grad * torch.expm1(-loss)
    none = [grad.new_empty(0) for _ in range(4)]
    dq, dk, dv, dscale = none
    if need_anchors or need_scale:
        if expectation.numel() != anchors.numel():
            raise RuntimeError(
                "info_nce: the anchors or the scale need a gradient that forward was told not to prepare"
            )
        difference = expectation - own_vectors(positives, candidates, past=True).to(dtype)
        if need_scale:
            each = weight * torch.linalg.vecdot(anchors.to(dtype), difference)
            dscale = each.where(weight != 0, 0.0).sum().reshape(1)
        if need_anchors:
            rows = (weight * scale)[:, None]
            dq = difference.mul_(rows).masked_fill_(rows == 0, 0.0).to(anchors.dtype)
    if need_candidates:
        if impl == "triton":
            launch = triton_module("info_nce", anchors.device).backward_candidates
        else:
            launch = chunked_backward_candidates
        dk = launch(weight * scale, lse, anchors, candidates, positives, scale, anchor_ids, candidate_ids)
        dk = dk.to(candidates.dtype)
    if need_positives:
        dv = (anchors.to(dtype) * (weight * -scale)[:, None]).to(positives.dtype).contiguous()  # as its fake says
    return dq, dk, dv, dscale


info_nce_backward = torch.library.custom_op("cpc_kernels::info_nce_backward", rows_gradients, mutates_args=())


@info_nce_backward.register_fake
def _(grad, loss, lse, expectation, anchors, candidates, positives, *rest):
    need_anchors, need_candidates, need_positives, need_scale = rest[-4:]
    return (
        anchors.new_empty(anchors.shape) if need_anchors else grad.new_empty(0),
        candidates.new_empty(candidates.shape) if need_candidates else grad.new_empty(0),
        positives.new_empty(positives.shape) if need_positives else grad.new_empty(0),
        grad.new_empty(1 if need_scale else 0),
    )


def _save(ctx, inputs, output):
    anchors, candidates, positives, scale, anchor_ids, candidate_ids, impl, _expectation, _rank = inputs
    loss, lse, positive, rank, expectation = output
    ctx.mark_non_differentiable(lse, positive, rank, expectation)
    ctx.set_materialize_grads(False)  # or zeros the size of O would be made for it
    loss = loss.clone()  # whoever asked may weigh its rows in place
    ctx.save_for_backward(loss, lse, expectation, anchors, candidates, positives, scale, anchor_ids, candidate_ids)
    ctx.impl = impl


def _backward(ctx, grad, *_, gradients=info_nce_backward):
    if grad is None:
        return (None,) * 9
    needs = ctx.needs_input_grad[:4]
    grads = gradients(grad, *ctx.saved_tensors, ctx.impl, *needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 5)


info_nce_op.register_autograd(_backward, setup_context=_save)
once_differentiable(info_nce_backward, "info_nce")
info_nce_plainly = plain_form(compute_rows, _save, _backward, rows_gradients, info_nce_backward)


# --- the sum op: one upstream gradient, so every gradient is ready when forward ends ----------------------------------


@as_written
def compute_sum(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
    impl: str,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, device = compute_dtype(anchors.dtype), anchors.device
    indexed = not positives.is_floating_point()
    if indexed:
        check_indices("info_nce", "positives", positives, len(candidates))
    unit = _unit_dtype(anchors)
    if impl == "triton":
        where = tuple(t.detach() for t in (anchors, candidates, positives, scale))
        ids = anchor_ids, candidate_ids
        dk = torch.zeros(candidates.shape, dtype=dtype, device=device)
        launch = triton_module("info_nce", device).forward
        loss, lse, _, _, expectation = launch(*where, *ids, need_rank=False, pulls=dk)
        needs = True, False, not indexed, need_scale
        dq, _, dv, dscale = rows_gradients(torch.ones_like(loss), loss, lse, expectation, *where, *ids, impl, *needs)
        return loss.sum(), dq, dk.to(unit), dv, dscale
    dq = torch.empty(anchors.shape, dtype=unit, device=device)
    dk = torch.zeros(candidates.shape, dtype=dtype, device=device)
    dv = torch.empty((0,) if indexed else positives.shape, dtype=unit, device=device)
    dscale = torch.zeros(1 if need_scale else 0, dtype=dtype, device=device)
    loss, *_ = chunked_forward(
        anchors.detach(),
        candidates.detach(),
        positives.detach(),
        scale.detach(),
        anchor_ids,
        candidate_ids,
        True,
        False,
        (dq, dk, dv, dscale),
    )
    return loss.sum(), dq, dk.to(unit), dv, dscale


def _unit_dtype(like: Tensor) -> torch.dtype:
    """Of gradients before the upstream one multiplies them: in float16 there is no room for the sum of many rows, nor
    for what a small loss leaves, which a GradScaler is to lift."""
    return torch.float32 if like.dtype == torch.float16 else like.dtype


info_nce_sum = torch.library.custom_op("cpc_kernels::info_nce_sum", compute_sum, mutates_args=())


@info_nce_sum.register_fake
def _(anchors, candidates, positives, scale, anchor_ids, candidate_ids, impl, need_scale):
    dtype = compute_dtype(anchors.dtype)
    unit = _unit_dtype(anchors)
    return (
        anchors.new_empty((), dtype=dtype),
        anchors.new_empty(anchors.shape, dtype=unit),
        candidates.new_empty(candidates.shape, dtype=unit),
        anchors.new_empty(positives.shape if positives.is_floating_point() else (0,), dtype=unit),
        anchors.new_empty(1 if need_scale else 0, dtype=dtype),
    )


def sum_gradients(
    grad: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dscale: Tensor,
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the last four, whose gradients these are, nothing is computed: through them a second derivative is refused.
    (Four, not a list: where an op takes a list, torch refuses is_grads_batched.)"""
    dtype = anchors.dtype
    return *(_times(unit, grad).to(dtype) for unit in (dq, dk, dv)), _times(dscale, grad)  # pyright: ignore[reportReturnType]


def _times(unit: Tensor, grad: Tensor) -> Tensor:
    """Not in 16 bits: 1 / N has no room there, nor has what a GradScaler multiplies by. On the CPU torch sees to it."""
    if unit.device.type == "cpu" or unit.dtype == grad.dtype:
        return unit * grad
    return (unit.to(grad.dtype) * grad).to(unit.dtype)


info_nce_sum_backward = torch.library.custom_op("cpc_kernels::info_nce_sum_backward", sum_gradients, mutates_args=())


@info_nce_sum_backward.register_fake
def _(grad, dq, dk, dv, dscale, anchors, *_):
    return *(torch.empty_like(unit, dtype=anchors.dtype) for unit in (dq, dk, dv)), torch.empty_like(dscale)


def _save_sum(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:4])


def _backward_sum(ctx, grad, *_, gradients=info_nce_sum_backward):
    if grad is None:
        return (None,) * 8
    saved = ctx.saved_tensors  # read once: checkpointing allows no more
    units, of = saved[:4], saved[4:]
    needs = ctx.needs_input_grad[:4]
    # what nobody asked for is not multiplied
    units = [unit if need else unit.new_empty(0) for unit, need in zip(units, needs, strict=True)]
    grads = gradients(grad, *units, *of)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 4)


info_nce_sum.register_autograd(_backward_sum, setup_context=_save_sum)
once_differentiable(info_nce_sum_backward, "info_nce")
info_nce_sum_plainly = plain_form(compute_sum, _save_sum, _backward_sum, sum_gradients, info_nce_sum_backward)


def folds(impl: str, anchors: Tensor) -> bool:
    """Whether P is at hand in forward, so that the candidates' gradient costs one product there, not two in backward.
    (Triton's fp16 would lose the weights of small losses times features.)"""
    if impl == "triton":
        wide = anchors.shape[1] > tiles.one_pass_max_d(8 * anchors.dtype.itemsize)
        return wide and anchors.dtype != torch.float16
    return impl == "chunked"


# --- the door ---------------------------------------------------------------------------------------------------------


def check(op, anchors, candidates, positives, anchor_ids, candidate_ids, impl, reduction="none") -> None:
    impls = ("auto", "reference", "chunked", "triton")
    check_types(op, anchors, impl, impls, reduction, candidates=candidates, positives=positives)
    if anchors.ndim != 2 or candidates.ndim != 2:
        raise ValueError(
            f"{op}: anchors must be (N, D) and candidates (M, D). {spell(anchors=anchors, candidates=candidates)}"
        )
    n, d = anchors.shape
    if candidates.shape[1] != d:
        raise ValueError(
            f"{op}: anchors have {d} features, candidates {candidates.shape[1]}; they must match. "
            f"{spell(anchors=anchors, candidates=candidates)}"
        )
    expected = (n, d) if positives.is_floating_point() else (n,)
    if tuple(positives.shape) != expected:
        what = "vectors (N, D)" if positives.is_floating_point() else "indices (N,)"
        if positives.is_floating_point() and positives.ndim == 1:
            what = "vectors (indices must be integers)"
        raise ValueError(
            f"{op}: positives given as {what} must be {expected}. {spell(anchors=anchors, positives=positives)}"
        )
    check_ids(op, "anchor_ids", anchor_ids, n, candidate_ids, "candidate_ids", anchors.device)
    check_ids(op, "candidate_ids", candidate_ids, candidates.shape[0], anchor_ids, "anchor_ids", anchors.device)


def choose(impl: str, device: torch.device) -> str:
    if impl != "auto":
        return impl
    return "triton" if device.type == "cuda" else "chunked"


def accept(op, anchors, candidates, positives, anchor_ids, candidate_ids, impl, reduction="none"):
    """Anchors, candidates and positives checked, of autocast's dtype, indices int64; and the impl that runs."""
    need_tensors(op, anchors=anchors, candidates=candidates, positives=positives)
    anchors, candidates, positives = autocast(anchors.device, anchors, candidates, positives)
    check(op, anchors, candidates, positives, anchor_ids, candidate_ids, impl, reduction)
    if not positives.is_floating_point():
        positives = positives.long()
    return anchors, candidates, positives, choose(impl, anchors.device)


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    *,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """InfoNCE with every candidate as a negative, in O(N + M) memory.

    loss_i = softplus(log sum_{j negative of i} exp(s_ij) - s_i,p(i)),   s_ij = scale <q_i, k_j>

    Candidate j is a negative of anchor i iff j is not its positive and their ids, if given, differ. A row with positive
    -1 is ignored (loss 0, no gradient, not in the mean); a row without negatives has loss 0.

    anchors: (N, D) floats, any strides. candidates: (M, D), same dtype. positives: (N,) integer indices into the
    candidates, or (N, D) vectors of their own. scale: number or one-element tensor (it may learn); 1 / temperature.
    anchor_ids, candidate_ids: (N,), (M,) integers, both or neither. reduction: none (N,), sum, or mean over the rows
    that are not ignored (0 if there are none). impl: auto, reference, chunked (on a CPU in C++ where it is built, else
    torch) or triton (GPU).
    Returns float32 (float64 for float64 inputs); gradients reach anchors, candidates, vector positives and scale.

    Raises ValueError, TypeError or IndexError for arguments that do not fit, RuntimeError for an impl that cannot run
    and for second derivatives. Source: van den Oord et al. 2018, in the form of kernels/README.md.

    >>> q, k = torch.randn(8, 16), torch.randn(32, 16)
    >>> info_nce(q, k, torch.arange(8), scale=10.0, reduction="none").shape
    torch.Size([8])
    """
    anchors, candidates, positives, impl = accept(
        "info_nce", anchors, candidates, positives, anchor_ids, candidate_ids, impl, reduction
    )
    refuse_transforms("info_nce", impl, anchors, candidates, positives, scale)
    scale = scale_tensor("info_nce", scale, anchors)
    if impl == "reference":
        from . import reference

        ids = {"anchor_ids": anchor_ids, "candidate_ids": candidate_ids}
        return reference.info_nce(anchors, candidates, positives, scale=scale, reduction=reduction, **ids)
    where = anchors, candidates, positives, scale, anchor_ids, candidate_ids
    plain = plainly_eager(*where[:4])
    if folds(impl, anchors) and reduction != "none" and learns(candidates):
        total, *_ = (info_nce_sum_plainly if plain else info_nce_sum)(*where, impl, learns(scale))
        return total if reduction == "sum" else total / count_active(positives)
    loss, *_ = (info_nce_plainly if plain else info_nce_op)(*where, impl, learns(anchors, scale), False)
    return reduce(loss, positives, reduction)


@torch.no_grad()
def info_nce_stats(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    *,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    impl: str = "auto",
) -> InfoNCEStats:
    """Loss, log-sum-exp, positive score and rank of every row, without gradients.

    rank_i = number of negatives j with s_ij > s_i,p(i): 0 where the positive wins

    Arguments as `info_nce`. Returns four (N,) tensors, rank int64. An ignored row has loss 0, lse -inf, positive 0,
    rank 0; a row without negatives has lse -inf. Nothing beats a positive that scores NaN (rank 0), and a negative that
    does beats nothing; either makes the loss NaN.

    >>> q, k = torch.randn(8, 16), torch.randn(32, 16)
    >>> info_nce_stats(q, k, torch.arange(8)).rank.shape
    torch.Size([8])
    """
    anchors, candidates, positives, impl = accept(
        "info_nce_stats", anchors, candidates, positives, anchor_ids, candidate_ids, impl
    )
    scale = scale_tensor("info_nce_stats", scale, anchors)
    if impl == "reference":
        from . import reference

        ids = {"anchor_ids": anchor_ids, "candidate_ids": candidate_ids}
        return InfoNCEStats(**reference.info_nce_rows(anchors, candidates, positives, scale=scale, **ids)[0])
    return InfoNCEStats(
        *info_nce_op(anchors, candidates, positives, scale, anchor_ids, candidate_ids, impl, False, True)[:4]
    )
