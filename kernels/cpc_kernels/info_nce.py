"""InfoNCE where every candidate is a negative, without the N x M scores.

    s_ij   = scale <q_i, k_j>          q: anchors (N, D), k: candidates (M, D), p(i): the positive of i
    lse_i  = log sum_{j negative of i} exp(s_ij)          P_ij = exp(s_ij - lse_i), negatives only
    loss_i = softplus(lse_i - s_i,p(i))                   O_i  = sum_j P_ij k_j

    w_i    = g_i sigmoid(lse_i - s_i,p(i)) scale          g: the gradient of each row's loss
    dq_i   = w_i (O_i - k_p(i))
    dk_j   = sum_i w_i P_ij q_i - sum_{i: p(i) = j} w_i q_i          with vectors as positives: dv_i = -w_i q_i
    dscale = sum_i (w_i / scale) <q_i, O_i - k_p(i)>

The positive never enters lse, so nothing cancels when the loss is tiny. "chunked" holds one chunk of rows of scores at
a time, on a CPU in C++ (kernels/csrc/info_nce.cpp) where it is built. Products: 2 NMD flops for the loss, 2 more for O
(when q or scale learn), 2 more for dk when the losses are summed or averaged (one upstream gradient for all rows: dk is
folded into forward), 4 more when they are not (the scores are computed again in backward). Memory beyond inputs and
gradients: the chunk, (N + M) D floats.

This file argues for its length: two schedules of one op, each with its registration, behind one door.
"""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .capabilities import CPP, FAST_BF16, triton_module
from .ranges import stage

CHUNK_SCORES = 3 * 2**20  # 12 MB of float32: fits beside its operands in an L3 cache; set by measurement
CHUNK_ROWS = (256, 1024)  # below, products are thin and dk is read and written too often; above, nothing is gained
# The chunk in C++ (kernels/csrc/info_nce.cpp); a library built before it existed goes without.
DENSE = CPP.available and hasattr(torch.ops.cpc_kernels_cpu, "dense_forward")
# Tiles multiply bf16 many times faster than the C++, which knows AVX-512's pairs only: torch's products use them.
AMX = torch.cpu._is_amx_tile_supported()


class InfoNCEStats(NamedTuple):
    """Per row: loss, log-sum-exp of the negatives' scores, positive's score, and how many negatives beat it."""

    loss: Tensor
    lse: Tensor
    positive: Tensor
    rank: Tensor


# --- the chunked schedule ---------------------------------------------------------------------------------------------


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_cpp(anchors, candidates, positives, scale, anchor_ids, candidate_ids):
    """What the C++ takes, or None where torch runs: contiguous tensors of one type, bf16 where this CPU multiplies
    it, and the rows of a chunk."""
    if not DENSE or anchors.device.type != "cpu" or len(candidates) == 0:
        return None
    dtype = compute_dtype(anchors.dtype)
    if anchors.dtype == torch.bfloat16 and FAST_BF16.available:
        if AMX or not torch.ops.cpc_kernels_cpu.dense_has_bf16():
            return None
        dtype = torch.bfloat16
    q, k, p = (t.to(dtype) if t.is_floating_point() else t for t in (anchors, candidates, positives))
    ids = (None if t is None else t.long().contiguous() for t in (anchor_ids, candidate_ids))
    return (q.contiguous(), k.contiguous(), p.contiguous(), scale.item(), *ids), chunk_rows(len(candidates))


def chunk_rows(m: int) -> int:
    low, high = CHUNK_ROWS
    return min(max(CHUNK_SCORES // max(m, 1) // 64 * 64, low), high)


@contextlib.contextmanager
def precision(dtype: torch.dtype, device: torch.device):
    """Products as this schedule means them: no autocast; bf16 operands on a CPU that multiplies them fast go to it as
    float32 with internal bf16, which is exact for them and keeps float32 scores."""
    with torch.autocast(device.type, enabled=False):
        if not (dtype == torch.bfloat16 and device.type == "cpu" and FAST_BF16.available):
            yield
            return
        settings = torch.backends.mkldnn.matmul
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before


class Chunks:
    """Walks over the rows; holds the one buffer of scores, which every method edits in place.

    elsewhere: an index of M stands for a positive that is not among these candidates; its score reads 0.
    """

    def __init__(self, anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere=False):
        self.dtype = compute_dtype(anchors.dtype)
        self.anchors, self.candidates = anchors, candidates.to(self.dtype)
        self.indexed = not positives.is_floating_point()
        self.positives, self.scale = positives, scale
        self.anchor_ids, self.candidate_ids = anchor_ids, candidate_ids
        self.here = positives < len(candidates) if elsewhere and self.indexed else None
        # no row is masked where none is ignored; on a GPU, asking would wait
        self.ignoring = self.indexed and (positives.device.type != "cpu" or bool((positives < 0).any()))
        self.rows = chunk_rows(len(candidates))
        self.buffer = torch.empty(
            min(self.rows, len(anchors)), len(candidates), dtype=self.dtype, device=anchors.device
        )
        # Folded into the product on a CPU; on a GPU, reading it would wait. A NaN must not be: BLAS may take it for 1.
        self.alpha = None
        if scale.device.type == "cpu" and math.isfinite(number := scale.item()):
            self.alpha = number

    def __iter__(self):
        for start in range(0, len(self.anchors), self.rows):
            yield slice(start, min(start + self.rows, len(self.anchors)))

    def active(self, i):  # (R,)
        return self.positives[i] >= 0 if self.ignoring else None

    def place(self, i):  # (R,) among these candidates; anything where ignored or elsewhere
        if self.here is None and not self.ignoring:
            return self.positives[i]
        return self.positives[i].clamp(min=0, max=None if self.here is None else len(self.candidates) - 1)

    def q(self, i):  # (R, D), zero where ignored
        q = self.anchors[i].to(self.dtype)
        return q.where(self.active(i)[:, None], 0.0) if self.ignoring else q

    def own(self, i):  # (R, D) the positives' vectors
        return own_vectors(self.positives[i], self.candidates).to(self.dtype)

    def scores(self, i, q):
        """(R, M) scores with -inf where j is no negative of i, and (R,) the positive's score."""
        s = self.buffer[: len(q)]
        if self.alpha is None:
            torch.mm(q, self.candidates.T, out=s).mul_(self.scale)
        else:
            torch.addmm(s, q, self.candidates.T, beta=0, alpha=self.alpha, out=s)
        if self.indexed:
            index = self.place(i).long()[:, None]
            positive = s.gather(1, index)
            if self.here is None:
                s.scatter_(1, index, -torch.inf)
            else:
                s.scatter_(1, index, positive.masked_fill(self.here[i, None], -torch.inf))
                positive = positive.where(self.here[i, None], 0.0)
            positive = positive[:, 0].where(self.active(i), 0.0) if self.ignoring else positive[:, 0]
        else:
            positive = (q * self.own(i)).sum(1).mul_(self.scale)
        if self.anchor_ids is not None:
            s.masked_fill_(self.anchor_ids[i, None] == self.candidate_ids, -torch.inf)
        return s, positive


def sigmoid_weight(lse: Tensor, positive: Tensor, active: Tensor | None) -> Tensor:
    """d loss / d lse (R,): zero for a row that is ignored or has no negatives (lse = -inf)."""
    weight = torch.sigmoid(lse - positive).where(lse != -torch.inf, 0.0)
    return weight if active is None else weight.where(active, 0.0)


def chunked_forward(
    anchors, candidates, positives, scale, anchor_ids, candidate_ids, need_expectation, need_rank, fold=None,
    elsewhere=False,
):  # fmt: skip
    """loss, lse, positive, rank (N,) and O (N, D); with `fold` = (dq, dk, dv, dscale; empty where not needed), the
    gradients of the sum of losses go there, those of dk and dscale onto what there is, and O is not kept."""
    n, m, device = len(anchors), len(candidates), anchors.device
    dtype = compute_dtype(anchors.dtype)
    if n and (cpp := in_cpp(anchors, candidates, positives, scale, anchor_ids, candidate_ids)):
        given, rows = cpp
        same = fold is None or fold[0].dtype == given[0].dtype  # half precision is computed in another type
        into = fold if same else [t.to(given[0].dtype) for t in fold[:3]] + [fold[3]]
        result = torch.ops.cpc_kernels_cpu.dense_forward(*given, need_expectation, need_rank, into, rows)
        if not same:
            for t, made in zip(fold, into, strict=True):
                t.copy_(made)
        return result
    loss, positive = (torch.zeros(n, dtype=dtype, device=device) for _ in range(2))
    lse = torch.full((n,), -torch.inf, dtype=dtype, device=device)
    rank = torch.zeros(n if need_rank else 0, dtype=torch.int64, device=device)
    keep = need_expectation and fold is None
    expectation = torch.zeros(anchors.shape if keep else (0,), dtype=dtype, device=device)
    if n == 0 or m == 0:
        if m == 0 and positives.is_floating_point():
            positive.copy_((anchors * positives).sum(1) * scale)
        for gradient in fold or ():
            gradient.zero_()
        return loss, lse, positive, rank, expectation
    with precision(anchors.dtype, device):
        chunks = Chunks(anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere)
        for i in chunks:
            with stage("info_nce", "scores", device):
                q, active = chunks.q(i), chunks.active(i)
                s, own_score = chunks.scores(i, q)
            with stage("info_nce", "loss", device):
                if need_rank:
                    rank[i] = (s > own_score[:, None]).sum(1)
                top = s.amax(1).nan_to_num_(torch.nan, 0.0, 0.0)  # infinity is no reference
                total = s.sub_(top[:, None]).exp_().sum(1)  # s is now P times total
                row_lse = top + total.log()
                total = total.where(total > 0, 1.0)
                if active is not None:
                    row_lse = row_lse.where(active, -torch.inf)
                    if need_rank:
                        rank[i] *= active
                positive[i], lse[i] = own_score, row_lse
                loss[i] = (-F.logsigmoid(own_score - row_lse)).where(row_lse != -torch.inf, 0.0)
            if not need_expectation:
                continue
            with stage("info_nce", "expectation", device):
                o = torch.mm(s, chunks.candidates).div_(total[:, None])
            if keep:
                expectation[i] = o
                continue
            with stage("info_nce", "gradients", device):
                dq, dk, dv, dscale = fold  # pyright: ignore[reportGeneralTypeIssues]
                weight = sigmoid_weight(row_lse, own_score, active)
                difference = o.sub_(chunks.own(i))
                if dscale.numel():
                    dscale += (weight * torch.linalg.vecdot(q, difference)).sum()
                weight = weight * scale
                torch.mul(difference, weight[:, None], out=o)
                dq[i] = o if active is None else o.where(active[:, None], 0.0)
                if dk.numel():
                    dk.addmm_(s.T, q * (weight / total)[:, None])
                copied = chunks.ignoring or anchors.dtype != dtype
                pull = q.mul_(-weight[:, None]) if copied else q * -weight[:, None]
                if dk.numel() and chunks.indexed:
                    dk.index_add_(0, chunks.place(i), pull)
                elif dv.numel():
                    dv[i] = pull
    return loss, lse, positive, rank, expectation


def chunked_backward_candidates(
    weight, lse, anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere=False
):
    """dk (M, D) from w (N,): the scores of each chunk computed again."""
    if len(anchors) and (cpp := in_cpp(anchors, candidates, positives, scale, anchor_ids, candidate_ids)):
        given, rows = cpp
        return torch.ops.cpc_kernels_cpu.dense_backward(weight.contiguous(), lse.contiguous(), *given, rows)
    dk = torch.zeros(candidates.shape, dtype=compute_dtype(anchors.dtype), device=anchors.device)
    if dk.numel() == 0 or len(anchors) == 0:
        return dk
    lse = lse.where(lse != -torch.inf, 0.0)
    with precision(anchors.dtype, anchors.device):
        chunks = Chunks(anchors, candidates, positives, scale, anchor_ids, candidate_ids, elsewhere)
        for i in chunks:
            with stage("info_nce", "scores", anchors.device):
                q = chunks.q(i)
                s, _ = chunks.scores(i, q)
            with stage("info_nce", "gradients", anchors.device):
                pull = q * weight[i, None]
                if chunks.ignoring:
                    pull = pull.where(chunks.active(i)[:, None], 0.0)
                dk.addmm_(s.sub_(lse[i, None]).exp_().T, pull)
                if chunks.indexed:
                    pull = pull.neg_() if chunks.here is None else pull.neg_().where(chunks.here[i, None], 0.0)
                    dk.index_add_(0, chunks.place(i), pull)
    return dk


def own_vectors(positives: Tensor, candidates: Tensor) -> Tensor:
    """The positives as vectors (..., D), whichever way they were given."""
    if positives.is_floating_point():
        return positives
    if len(candidates) == 0:
        return candidates.new_zeros(*positives.shape, candidates.shape[1])
    return candidates[positives.clamp(min=0)]


def check_indices(op: str, what: str, indices: Tensor, size: int, lowest: int = -1, pool: str = "candidates") -> None:
    """On the CPU, where looking is free."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < lowest or high >= size:
        where = "candidates have" if pool == "candidates" else "the pool has"
        ignored = "; -1 is ignored" if lowest < 0 else ""
        raise IndexError(
            f"{op}: {what} must lie between {lowest} and {size - 1} ({where} {size} rows{ignored}). "
            f"Got values from {low} to {high}."
        )


# --- the op without its registration, whose Python costs several times a small batch ----------------------------------


def undisturbed() -> bool:
    """Nobody compiles, traces, transforms or intercepts."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def plainly_eager(*tensors: Tensor) -> bool:
    """Plain tensors on the CPU, undisturbed."""
    return undisturbed() and all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu for t in tensors)


def plain_form(compute, save, backward, gradients, registered):
    """The autograd node made of an op's parts; `registered` gives the gradients to whom someone listens, or
    differentiates once more."""

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = compute(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            batched = any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads)
            plain = undisturbed() and not batched and not torch.is_grad_enabled()
            return backward(ctx, *grads, gradients=gradients if plain else registered)

    return Plain.apply


# --- the row op: one loss per row, any upstream gradient --------------------------------------------------------------


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
        difference = expectation - own_vectors(positives, candidates).to(dtype)
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
        dv = (anchors.to(dtype) * (weight * -scale)[:, None]).to(positives.dtype)
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


def once_differentiable(op, name: str) -> None:
    """A second derivative is an error, not a wrong number."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f'{name}: second derivatives are not implemented by this implementation; impl="reference" has them.'
        )

    op.register_autograd(refuse, setup_context=lambda ctx, inputs, output: None)


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


def compute_sum(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    scale: Tensor,
    anchor_ids: Tensor | None,
    candidate_ids: Tensor | None,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, device = compute_dtype(anchors.dtype), anchors.device
    indexed = not positives.is_floating_point()
    if indexed:
        check_indices("info_nce", "positives", positives, len(candidates))
    dq = torch.empty(anchors.shape, dtype=anchors.dtype, device=device)
    dk = torch.zeros(candidates.shape, dtype=dtype, device=device)
    dv = torch.empty((0,) if indexed else positives.shape, dtype=anchors.dtype, device=device)
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
    return loss.sum(), dq, dk.to(candidates.dtype), dv, dscale


info_nce_sum = torch.library.custom_op("cpc_kernels::info_nce_sum", compute_sum, mutates_args=())


@info_nce_sum.register_fake
def _(anchors, candidates, positives, scale, anchor_ids, candidate_ids, need_scale):
    dtype = compute_dtype(anchors.dtype)
    return (
        anchors.new_empty((), dtype=dtype),
        anchors.new_empty(anchors.shape),
        candidates.new_empty(candidates.shape),
        positives.new_empty(positives.shape) if positives.is_floating_point() else anchors.new_empty(0),
        anchors.new_empty(1 if need_scale else 0, dtype=dtype),
    )


def sum_gradients(
    grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dscale: Tensor, of: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`of`: what they are gradients of. Nothing is computed from it; through it a second derivative meets a refusal."""
    return tuple(each * grad.to(each.dtype) for each in (dq, dk, dv, dscale))


def take_gradients(grad: Tensor, *saved) -> tuple[Tensor, ...]:
    """The same in the memory of what was saved, where the graph goes with this backward: nobody reads that again."""
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return sum_gradients(grad, *saved)
    return tuple(each.mul_(grad.to(each.dtype)) for each in saved[:4])


info_nce_sum_backward = torch.library.custom_op("cpc_kernels::info_nce_sum_backward", sum_gradients, mutates_args=())


@info_nce_sum_backward.register_fake
def _(grad, dq, dk, dv, dscale, of):
    return tuple(torch.empty_like(each) for each in (dq, dk, dv, dscale))


def _save_sum(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:4])


def _backward_sum(ctx, grad, *_, gradients=info_nce_sum_backward):
    if grad is None:
        return (None,) * 7
    saved = ctx.saved_tensors  # read once: checkpointing allows no more
    units, of = saved[:4], saved[4:]
    needs = ctx.needs_input_grad[:4]
    # what nobody asked for is not multiplied
    units = [unit if need else unit.new_empty(0) for unit, need in zip(units, needs, strict=True)]
    grads = gradients(grad, *units, list(of))
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None)


info_nce_sum.register_autograd(_backward_sum, setup_context=_save_sum)
once_differentiable(info_nce_sum_backward, "info_nce")
info_nce_sum_plainly = plain_form(compute_sum, _save_sum, _backward_sum, take_gradients, info_nce_sum_backward)


# --- the door ---------------------------------------------------------------------------------------------------------


def spell(**tensors: Tensor) -> str:
    return "Got " + ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items()) + "."


def need_tensors(op: str, **given: object) -> None:
    """Before anything is asked of them."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor. Got {type(value).__name__}.")


def check_types(op: str, anchors: Tensor, impl: str, impls: tuple[str, ...], reduction: str, **others: Tensor) -> None:
    """What both ops ask of their arguments."""
    if impl not in impls:
        raise ValueError(f"{op}: impl must be one of {', '.join(impls)}. Got {impl!r}.")
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"{op}: reduction must be none, sum or mean. Got {reduction!r}.")
    if not anchors.is_floating_point():
        raise TypeError(f"{op}: anchors must be floating point. Got {anchors.dtype}.")
    for name, tensor in others.items():
        if tensor.is_floating_point() and tensor.dtype != anchors.dtype:
            raise TypeError(
                f"{op}: {name} must have the anchors' dtype (or run under autocast). "
                f"Got anchors {anchors.dtype}, {name} {tensor.dtype}."
            )
        if tensor.dtype.is_complex or tensor.dtype == torch.bool:
            raise TypeError(f"{op}: {name} cannot be {tensor.dtype}.")
        if tensor.device != anchors.device:
            raise ValueError(
                f"{op}: {name} must be on the anchors' device. "
                f"Got anchors on {anchors.device}, {name} on {tensor.device}."
            )


def check_ids(
    op: str, name: str, ids: Tensor | None, size: int, other: Tensor | None, other_name: str, device: torch.device
) -> None:
    if ids is None:
        if other is not None:
            raise ValueError(f"{op}: {other_name} was given without {name}; ids are given for both or for neither.")
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor. Got {type(ids).__name__}.")
    if ids.device != device:
        raise ValueError(f"{op}: {name} must be on the anchors' device. Got {ids.device}, anchors on {device}.")
    if ids.is_floating_point() or ids.ndim != 1 or ids.shape[0] != size:
        raise ValueError(f"{op}: {name} must be ({size},) integers. Got {tuple(ids.shape)} {ids.dtype}.")


def need_finite(op: str, scale: float | Tensor) -> None:
    """Not of a tensor, as looking may wait for a GPU, nor under compile, where it may be any number."""
    if isinstance(scale, float) and not torch.compiler.is_compiling() and not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite. Got {scale}.")


def scale_tensor(op: str, scale: float | Tensor, anchors: Tensor) -> Tensor:
    """(1,) in the compute dtype, differentiable when scale is a tensor."""
    dtype = compute_dtype(anchors.dtype)
    if not isinstance(scale, Tensor):
        if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
            raise TypeError(f"{op}: scale must be a number or a tensor of one element. Got {scale!r}.")
        need_finite(op, scale)
        return torch.full((1,), scale, dtype=dtype, device=anchors.device)
    if scale.numel() != 1:
        raise ValueError(f"{op}: scale must be a number or a tensor of one element. Got shape {tuple(scale.shape)}.")
    return scale.reshape(1).to(device=anchors.device, dtype=dtype)


def autocast(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    """Under autocast, floats take its dtype; on a CPU that is slow at it, float32, which is exact for both."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device.type)
    if device.type == "cpu" and not (dtype == torch.bfloat16 and FAST_BF16.available):
        dtype = torch.float32
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


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
    return "triton" if device.type in ("cuda", "xpu") else "chunked"


def accept(op, anchors, candidates, positives, anchor_ids, candidate_ids, impl, reduction="none"):
    """Anchors, candidates and positives checked, of autocast's dtype, indices int64; and the impl that runs."""
    need_tensors(op, anchors=anchors, candidates=candidates, positives=positives)
    anchors, candidates, positives = autocast(anchors.device, anchors, candidates, positives)
    check(op, anchors, candidates, positives, anchor_ids, candidate_ids, impl, reduction)
    if not positives.is_floating_point():
        positives = positives.long()
    return anchors, candidates, positives, choose(impl, anchors.device)


def transformed() -> bool:
    """Inside torch.func's vmap, grad and the like; a compiler that is looking has a world of its own."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def refuse_transforms(op: str, impl: str, *given: float | Tensor) -> None:
    """torch.func's derivatives end in an error that names nothing, and those of forward mode in silent zeros."""
    if impl == "reference" or torch.compiler.is_compiling():
        return
    functional, forward = torch._C._are_functorch_transforms_active(), forward_ad._current_level >= 0
    for tensor in [t for t in given if isinstance(t, Tensor)] if functional or forward else ():
        derived = forward and forward_ad.unpack_dual(tensor).tangent is not None
        while functional and not derived and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            derived = torch._C._functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad
            tensor = torch._C._functorch.get_unwrapped(tensor)
        if derived:
            raise RuntimeError(
                f"{op}: torch.func's derivatives and forward mode do not go through this op; use backward() or "
                'torch.autograd.grad, or impl="reference", which takes every transform.'
            )


def learns(*tensors: Tensor) -> bool:
    """Someone will ask for gradients; under vmap, whose tensors do not tell, if gradients are on at all."""
    return torch.is_grad_enabled() and (transformed() or any(t.requires_grad for t in tensors))


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
    plain = impl == "chunked" and plainly_eager(*where[:4])
    if impl == "chunked" and reduction != "none" and learns(candidates):
        total, *_ = (info_nce_sum_plainly if plain else info_nce_sum)(*where, learns(scale))
        return total if reduction == "sum" else total / count_active(positives)
    loss, *_ = (info_nce_plainly if plain else info_nce_op)(*where, impl, learns(anchors, scale), False)
    return reduce(loss, positives, reduction)


def count_active(positives: Tensor) -> Tensor | int:
    """How many rows the mean is over, at least 1."""
    if positives.is_floating_point():
        return max(positives.shape[:-1].numel(), 1)
    return (positives >= 0).sum().clamp(min=1)


def reduce(loss: Tensor, positives: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / count_active(positives)


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
    rank 0; a row without negatives has lse -inf.

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
