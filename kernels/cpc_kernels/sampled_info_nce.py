"""InfoNCE against listed or drawn negatives, without gathering them.

    s_nkj    = scale <q_nk, z_j>       q: anchors (N, K, D), z: pool (M, D), j in the S negatives of (n, k)
    lse_nk   = log sum_j exp(s_nkj)    P_nkj = exp(s_nkj - lse_nk),   O_nk = sum_j P_nkj z_j
    loss_nk  = softplus(lse_nk - s_nk,p)

    w_nk  = g_nk sigmoid(lse_nk - s_nk,p) scale
    dq_nk = w_nk (O_nk - z_p)
    dz_j  = sum over (n, k, s) with negative j of w_nk P_nks q_nk  -  sum over (n, k) with positive j of w_nk q_nk

A negative listed twice counts twice; an entry -1, an entry with the anchor's id, and a *drawn* entry that equals the
positive are skipped. "cpp" (kernels/csrc) computes the scores in forward and keeps P; backward sums P z into dq and
w P q into dz, so that O is never stored and nothing depends on the number of threads. "gather" is plain torch, one
chunk of rows at a time; it and "triton" keep O and compute the scores again for dz.
Memory beyond inputs and gradients: P, N K S floats (cpp), or O, N K D floats (gather, triton).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import (
    REDUCTIONS,
    InfoNCEStats,
    autocast,
    check_ids,
    check_indices,
    check_types,
    compute_dtype,
    need_finite,
    need_tensors,
    own_vectors,
    plain_number,
    reduce,
    scale_tensor,
    spell,
    spell_other,
)
from .autograd import as_written, learns, once_differentiable, plain_form, plainly_eager, refuse_transforms
from .capabilities import CPP, triton_module
from .chunked_info_nce import sigmoid_weight
from .negatives import Negatives, draw_negatives
from .ranges import stage

GATHER_FLOATS = 4 * 2**20  # 16 MB gathered at a time

# --- the gather -------------------------------------------------------------------------------------------------------


class Gathered:
    """Walks over the anchors and gathers a chunk's negatives."""

    def __init__(self, anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids):
        n, steps, d = anchors.shape
        self.dtype = compute_dtype(anchors.dtype)
        self.anchors, self.pool, self.positives, self.scale = anchors, pool.to(self.dtype), positives, scale
        self.indexed = not positives.is_floating_point()
        self.drawn = seed is not None
        if self.drawn:
            negatives = draw_negatives(Negatives(count, seed, per_step), positives, len(pool), n, steps)
        self.listed = negatives if negatives.ndim == 3 else negatives[:, None]  # (N, K or 1, S)
        self.anchor_ids, self.pool_ids = anchor_ids, pool_ids
        self.rows = max(1, GATHER_FLOATS // max(self.listed.shape[1:].numel() * d, 1))

    def __iter__(self):
        for start in range(0, len(self.anchors), self.rows):
            yield slice(start, min(start + self.rows, len(self.anchors)))

    def active(self, i):  # (R, K)
        return self.positives[i] >= 0 if self.indexed else None

    def q(self, i):  # (R, K, D), zero where ignored
        q = self.anchors[i].to(self.dtype)
        return q.where(self.active(i)[..., None], 0.0) if self.indexed else q

    def own(self, i):  # (R, K, D)
        return own_vectors(self.positives[i], self.pool).to(self.dtype)

    def scores(self, i, q):
        """(R, K, S) scores with -inf where skipped, (R, K) the positive's, (R, K or 1, S, D) the gathered vectors."""
        listed = self.listed[i]
        z = self.pool[listed.clamp(min=0)]
        each = listed.shape[1] == q.shape[1]
        s = (torch.einsum("rkd,rksd->rks", q, z) if each else q @ z[:, 0].mT) * self.scale
        positive = (q * self.own(i)).sum(-1) * self.scale
        skipped = listed < 0
        if self.indexed:
            copies = listed == self.positives[i][..., None]
            if self.drawn:
                skipped = skipped | copies
            else:  # a listed copy of the positive ties with it, whatever the rounding
                s = torch.where(copies, positive[..., None], s)
        if self.anchor_ids is not None:
            skipped = skipped | (self.anchor_ids[i, None, None] == self.pool_ids[listed.clamp(min=0)])
        return s.masked_fill_(skipped, -torch.inf), positive, z


def weighted(p: Tensor, z: Tensor) -> Tensor:
    """sum over s of (R, K, S) and (R, K or 1, S, D) -> (R, K, D)."""
    return p @ z[:, 0] if z.shape[1] == 1 else (p[:, :, None] @ z)[:, :, 0]


def gather_forward(problem: Gathered, need_expectation: bool, need_rank: bool):
    anchors, dtype = problem.anchors, problem.dtype
    shape, device = anchors.shape[:2], anchors.device
    loss, positive = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
    lse = torch.full(shape, -torch.inf, dtype=dtype, device=device)
    rank = torch.zeros(shape if need_rank else (0,), dtype=torch.int64, device=device)
    expectation = torch.zeros(anchors.shape if need_expectation else (0,), dtype=dtype, device=device)
    if len(problem.pool) == 0:
        if not problem.indexed:
            positive.copy_(torch.linalg.vecdot(anchors.to(dtype), problem.positives.to(dtype)) * problem.scale)
        return loss, lse, positive, rank, expectation
    for i in problem:
        with stage("sampled_info_nce", "scores", device):
            q, active = problem.q(i), problem.active(i)
            s, own_score, z = problem.scores(i, q)
        with stage("sampled_info_nce", "loss", device):
            row_lse = s.logsumexp(-1)
            if need_rank:
                rank[i] = (s > own_score[..., None]).sum(-1)
            if active is not None:
                row_lse, own_score = row_lse.where(active, -torch.inf), own_score.where(active, 0.0)
                if need_rank:
                    rank[i] *= active
            lse[i], positive[i] = row_lse, own_score
            loss[i] = (-F.logsigmoid(own_score - row_lse)).where(row_lse != -torch.inf, 0.0)
        if need_expectation:
            with stage("sampled_info_nce", "expectation", device):
                finite = row_lse.where(row_lse != -torch.inf, 0.0)
                expectation[i] = weighted(s.sub_(finite[..., None]).exp_(), z)
    return loss, lse, positive, rank, expectation


def gather_backward_pool(problem: Gathered, weight: Tensor, lse: Tensor) -> Tensor:
    """dz (M, D) from w (N, K)."""
    pool = problem.pool
    dz = pool.new_zeros(pool.shape)
    if pool.numel() == 0:
        return dz
    lse = lse.where(lse != -torch.inf, 0.0)
    for i in problem:
        with stage("sampled_info_nce", "scores", pool.device):
            q = problem.q(i)
            s, _, z = problem.scores(i, q)
        with stage("sampled_info_nce", "gradients", pool.device):
            pull = q * weight[i][..., None]
            if problem.indexed:
                pull = pull.where(problem.active(i)[..., None], 0.0)
            p = s.sub_(lse[i][..., None]).exp_()  # (R, K, S)
            each = p.mT @ pull if z.shape[1] == 1 and p.shape[1] > 1 else p[..., None] * pull[:, :, None]
            dz.index_add_(0, problem.listed[i].clamp(min=0).flatten(), each.reshape(-1, dz.shape[1]))
            if problem.indexed:
                dz.index_add_(0, problem.positives[i].clamp(min=0).flatten(), -pull.flatten(0, 1))
    return dz


# --- the op -----------------------------------------------------------------------------------------------------------


@as_written
def compute_rows(
    anchors: Tensor,
    pool: Tensor,
    positives: Tensor,
    scale: Tensor,
    negatives: Tensor | None,
    seed: Tensor | None,
    count: int,
    per_step: bool,
    anchor_ids: Tensor | None,
    pool_ids: Tensor | None,
    impl: str,
    need_kept: bool,
    need_rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, lse, positive, rank, and what backward reads: P (cpp), or O."""
    anchors, pool, positives, scale = (t.detach() for t in (anchors, pool, positives, scale))
    where = (anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids)
    if impl == "cpp":  # checks the indices as it reads them
        arguments = cpp_arguments(*where)  # first: it says so where there is no library
        return torch.ops.cpc_kernels_cpu.sampled_forward(*arguments, need_kept, need_rank)
    if not positives.is_floating_point():
        check_indices("sampled_info_nce", "positives", positives, len(pool), pool="pool")
    if negatives is not None:
        check_indices("sampled_info_nce", "negatives", negatives, len(pool), pool="pool")
    if impl == "triton":
        launch = triton_module("sampled_info_nce", anchors.device).forward
        loss, lse, positive, rank, expectation = launch(*where, need_kept)
        return loss, lse, positive, rank if need_rank else rank.new_empty(0), expectation
    return gather_forward(Gathered(*where), need_kept, need_rank)


sampled_op = torch.library.custom_op("cpc_kernels::sampled_info_nce", compute_rows, mutates_args=())


def cpp_arguments(anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids):
    """What the C++ takes: contiguous tensors in the compute dtype, the seed and the scale as numbers."""
    if not CPP.available:
        raise RuntimeError(f'sampled_info_nce: impl="cpp" cannot run: {CPP.reason}; impl="gather" would run.')
    if anchors.device.type != "cpu":
        raise RuntimeError(f'sampled_info_nce: impl="cpp" needs tensors on the CPU. Got {anchors.device}.')
    dtype = compute_dtype(anchors.dtype)
    return (
        anchors.to(dtype).contiguous(),
        pool.to(dtype).contiguous(),
        positives.to(dtype).contiguous() if positives.is_floating_point() else positives.contiguous(),
        None if negatives is None else negatives.contiguous(),
        None if seed is None else seed.item(),
        count,
        per_step,
        scale.item(),
        None if anchor_ids is None else anchor_ids.contiguous(),
        None if pool_ids is None else pool_ids.contiguous(),
    )


@sampled_op.register_fake
def _(anchors, pool, positives, scale, negatives, seed, count, *rest):
    *_, impl, need_kept, need_rank = rest
    n, steps, d = anchors.shape
    dtype = compute_dtype(anchors.dtype)
    s = negatives.shape[-1] if negatives is not None else count
    row = anchors.new_empty((n, steps), dtype=dtype)
    return (
        row,
        torch.empty_like(row),
        torch.empty_like(row),
        anchors.new_empty((n, steps) if need_rank else (0,), dtype=torch.int64),
        anchors.new_empty((n, steps, s if impl == "cpp" else d) if need_kept else (0,), dtype=dtype),
    )


@as_written
def rows_gradients(
    grad: Tensor,
    lse: Tensor,
    positive: Tensor,
    kept: Tensor,
    anchors: Tensor,
    pool: Tensor,
    positives: Tensor,
    scale: Tensor,
    negatives: Tensor | None,
    seed: Tensor | None,
    anchor_ids: Tensor | None,
    pool_ids: Tensor | None,
    count: int,
    per_step: bool,
    impl: str,
    need_anchors: bool,
    need_pool: bool,
    need_positives: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dz, dv, dscale; empty where not needed."""
    dtype = compute_dtype(anchors.dtype)
    indexed = not positives.is_floating_point()
    asked = need_anchors or need_scale or (need_pool and impl == "cpp")
    if asked and kept.ndim != 3:
        raise RuntimeError("sampled_info_nce: a gradient is asked for that forward was told not to prepare")
    where = (anchors, pool, positives, negatives, seed, count, per_step, scale, anchor_ids, pool_ids)
    if impl == "cpp":
        needs = need_anchors, need_pool, need_positives, need_scale
        dq, dz, dv, dscale = torch.ops.cpc_kernels_cpu.sampled_backward(
            *cpp_arguments(*where), grad, lse, positive, kept, *needs
        )
        return dq.to(anchors.dtype), dz.to(pool.dtype), dv.to(positives.dtype) if need_positives else dv, dscale
    weight = grad * sigmoid_weight(lse, positive, positives >= 0 if indexed else None)  # (N, K)
    dq, dz, dv, dscale = (grad.new_empty(0) for _ in range(4))
    rows = (weight * scale)[..., None]
    if need_anchors or need_scale:
        difference = kept - own_vectors(positives, pool, past=True).to(dtype)
        if need_scale:
            each = weight * torch.linalg.vecdot(anchors.to(dtype), difference)
            dscale = each.where(weight != 0, 0.0).sum().reshape(1)
        if need_anchors:
            dq = difference.mul_(rows).masked_fill_(rows == 0, 0.0).to(anchors.dtype)
    if need_pool:
        if impl == "triton":
            launch = triton_module("sampled_info_nce", anchors.device).backward_pool
            dz = launch(rows[..., 0], lse, *where)
        else:
            dz = gather_backward_pool(Gathered(*where), rows[..., 0], lse)
        dz = dz.to(pool.dtype)
    if need_positives:
        dv = (anchors.to(dtype) * -rows).to(positives.dtype).contiguous()  # as its fake says
    return dq, dz, dv, dscale


sampled_backward = torch.library.custom_op("cpc_kernels::sampled_info_nce_backward", rows_gradients, mutates_args=())


@sampled_backward.register_fake
def _(grad, lse, positive, kept, anchors, pool, positives, *rest):
    need_anchors, need_pool, need_positives, need_scale = rest[-4:]
    return (
        anchors.new_empty(anchors.shape if need_anchors else (0,)),
        pool.new_empty(pool.shape if need_pool else (0,)),
        positives.new_empty(positives.shape) if need_positives else grad.new_empty(0),
        grad.new_empty(1 if need_scale else 0),
    )


def _save(ctx, inputs, output):
    anchors, pool, positives, scale, negatives, seed, count, per_step, anchor_ids, pool_ids, impl, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or zeros the size of what is kept would be made for it
    _loss, lse, positive, _rank, kept = output
    where = anchors, pool, positives, scale, negatives, seed, anchor_ids, pool_ids
    ctx.save_for_backward(lse, positive, kept, *where)
    ctx.options = count, per_step, impl


def _backward(ctx, grad, *_, gradients=sampled_backward):
    if grad is None:
        return (None,) * 13
    needs = ctx.needs_input_grad[:4]
    grads = gradients(grad, *ctx.saved_tensors, *ctx.options, *needs)
    return (*(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 9)


sampled_op.register_autograd(_backward, setup_context=_save)
once_differentiable(sampled_backward, "sampled_info_nce")
sampled_plainly = plain_form(compute_rows, _save, _backward, rows_gradients, sampled_backward)


# The same op in C++, with its gradients: the registration's Python costs several times a small batch.
EAGER = torch.ops.cpc_kernels_cpu.sampled_loss if CPP.available else None


def takes(scale: float | Tensor, *tensors: Tensor) -> bool:
    """Whether EAGER can have this call."""
    if isinstance(scale, Tensor):
        if scale.numel() != 1 or scale.is_complex():
            return False
        tensors = scale, *tensors
    elif not isinstance(scale, (int, float)):
        return False
    return CPP.available and all(t.is_cpu for t in tensors) and plainly_eager(*tensors)


# --- the door ---------------------------------------------------------------------------------------------------------


def check(op, anchors, pool, positives, negatives, anchor_ids, pool_ids, impl, reduction="none") -> None:
    impls = ("auto", "reference", "cpp", "gather", "triton")
    tensors = {} if isinstance(negatives, Negatives) else {"negatives": negatives}
    check_types(op, anchors, impl, impls, reduction, pool=pool, positives=positives, **tensors)
    if anchors.ndim not in (2, 3) or pool.ndim != 2:
        raise ValueError(
            f"{op}: anchors must be (N, K, D) or (N, D) and the pool (M, D). {spell(anchors=anchors, pool=pool)}"
        )
    leading, d = tuple(anchors.shape[:-1]), anchors.shape[-1]
    if pool.shape[1] != d:
        raise ValueError(
            f"{op}: anchors have {d} features, the pool {pool.shape[1]}; they must match. "
            f"{spell(anchors=anchors, pool=pool)}"
        )
    expected = (*leading, d) if positives.is_floating_point() else leading
    if tuple(positives.shape) != expected:
        what = "vectors" if positives.is_floating_point() else "indices"
        raise ValueError(
            f"{op}: positives given as {what} must be {expected}. {spell(anchors=anchors, positives=positives)}"
        )
    if tensors:
        check_listed(op, negatives, leading, anchors=anchors)
    check_ids(op, "anchor_ids", anchor_ids, leading[0], pool_ids, "pool_ids", anchors.device)
    check_ids(op, "pool_ids", pool_ids, pool.shape[0], anchor_ids, "anchor_ids", anchors.device)


def check_listed(op: str, negatives: Tensor, leading: tuple[int, ...], **beside: Tensor) -> None:
    """Listed negatives of rows `leading`, (N,) or (N, K); an error shows what they stand beside, too."""
    if negatives.is_floating_point() or negatives.dtype == torch.bool:
        raise TypeError(f"{op}: negatives must be integer indices or Negatives(count, seed). Got {negatives.dtype}.")
    if tuple(negatives.shape[:-1]) not in (leading[:1], leading) or negatives.ndim < 2:
        forms = "(N, S)" if len(leading) == 1 else "(N, S), shared by the K steps, or (N, K, S)"
        raise ValueError(f"{op}: negatives must be {forms}. {spell(**beside, negatives=negatives)}")


def choose(impl: str, device: torch.device) -> str:
    if impl != "auto":
        return impl
    if device.type == "cuda":
        return "triton"
    return "cpp" if CPP.available and device.type == "cpu" else "gather"


def need_negatives(op: str, negatives: object) -> None:
    if isinstance(negatives, (Tensor, Negatives)):
        return
    got = spell_other("negatives", negatives)
    if isinstance(negatives, int):
        got = f"Got int; did you mean Negatives({negatives}, seed=0)?"
    raise TypeError(f"{op}: negatives must be a tensor of indices or Negatives(count, seed). {got}")


def _run(op, anchors, pool, positives, negatives, scale, anchor_ids, pool_ids, impl, reduction, stats):
    """Validate, bring to (N, K, ...), dispatch: the per-row result, reduced, or the stats."""
    need_tensors(op, anchors=anchors, pool=pool, positives=positives)
    need_negatives(op, negatives)
    anchors, pool, positives = autocast(anchors.device, anchors, pool, positives)
    check(op, anchors, pool, positives, negatives, anchor_ids, pool_ids, impl, reduction)
    scale = plain_number(scale)
    need_finite(op, scale, compute_dtype(anchors.dtype))
    impl = choose(impl, anchors.device)
    if not stats:
        refuse_transforms(op, impl, anchors, pool, positives, scale)
    drawn = isinstance(negatives, Negatives)
    count, per_step = (negatives.count, negatives.per_step) if drawn else (0, False)
    if impl == "cpp" and not stats and takes(scale, anchors, pool, positives):
        factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
        which = (None, negatives.seed_number()) if drawn else (negatives, None)
        where = *which, count, per_step, anchor_ids, pool_ids
        return EAGER.default(anchors, pool, positives, *factor, *where, REDUCTIONS.index(reduction))
    seed = negatives.seed_tensor(anchors.device) if drawn else None
    negatives = None if drawn else negatives.long()
    scale = scale_tensor(op, scale, anchors)
    flat = anchors.ndim == 2
    if flat:
        anchors, positives = anchors[:, None], positives[:, None]
    if not positives.is_floating_point():
        positives = positives.long()
    if anchor_ids is not None:
        anchor_ids, pool_ids = anchor_ids.long(), pool_ids.long()
    n, steps, _d = anchors.shape
    if impl == "reference":
        from . import reference

        if drawn:
            negatives = draw_negatives(Negatives(count, seed, per_step), positives, pool.shape[0], n, steps)
        options = {"scale": scale, "anchor_ids": anchor_ids, "pool_ids": pool_ids, "exclude_positives": drawn}
        rows = reference.sampled_info_nce_rows(anchors, pool, positives, negatives, **options)[0]
        result = [rows["loss"], rows["lse"], rows["positive"], rows["rank"]]
    else:
        learning = learns(anchors, scale) or (impl == "cpp" and learns(pool))
        plain = not stats and impl != "cpp" and plainly_eager(anchors, pool, positives, scale)
        where = anchors, pool, positives, scale, negatives, seed, count, per_step, anchor_ids, pool_ids
        result = (sampled_plainly if plain else sampled_op)(*where, impl, learning, stats)
    if stats:
        return InfoNCEStats(*(r[:, 0] if flat else r for r in result[:4]))
    loss = result[0][:, 0] if flat else result[0]
    return reduce(loss, positives, reduction)


def sampled_info_nce(
    anchors: Tensor,
    pool: Tensor,
    positives: Tensor,
    negatives: Tensor | Negatives,
    *,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    pool_ids: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """InfoNCE against negatives that are listed, or drawn by seed, without gathering their vectors.

    loss_nk = softplus(log sum_{j in negatives of (n, k)} exp(s_nkj) - s_nk,p),   s_nkj = scale <q_nk, z_j>

    anchors: (N, K, D) floats, K prediction steps, or (N, D) for one step. pool: (M, D), same dtype. positives: (N, K)
    indices into the pool (-1: ignored row) or (N, K, D) vectors; without the K axis for (N, D) anchors. negatives:
    integer indices (N, S), shared by the steps, or (N, K, S) (-1 is skipped; whatever is listed counts, as often as it
    is listed), or Negatives(count, seed, per_step), which never draws the positive. scale: number or one-element tensor
    (it may learn). anchor_ids, pool_ids: (N,), (M,) integers, both or neither: negatives with the anchor's id are
    skipped. reduction: none (N, K) or (N,), sum, or mean over the rows that are not ignored.
    impl: auto, reference, cpp (CPU), gather (torch, anywhere) or triton (GPU).
    Returns float32 (float64 for float64 inputs); gradients reach anchors, pool, vector positives and scale.

    Raises ValueError, TypeError or IndexError for arguments that do not fit, RuntimeError for an impl that cannot run
    and for second derivatives. Source: van den Oord et al. 2018; draws as in Löwe et al. 2019.

    >>> q, z = torch.randn(8, 2, 16), torch.randn(32, 16)
    >>> positives = torch.arange(16).view(8, 2)
    >>> sampled_info_nce(q, z, positives, Negatives(4, seed=0), reduction="none").shape
    torch.Size([8, 2])
    """
    op = "sampled_info_nce"
    return _run(op, anchors, pool, positives, negatives, scale, anchor_ids, pool_ids, impl, reduction, False)


@torch.no_grad()
def sampled_info_nce_stats(
    anchors: Tensor,
    pool: Tensor,
    positives: Tensor,
    negatives: Tensor | Negatives,
    *,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    pool_ids: Tensor | None = None,
    impl: str = "auto",
) -> InfoNCEStats:
    """Loss, log-sum-exp, positive score and rank of every row, without gradients.

    rank_nk = number of negatives of (n, k) with a score above the positive's, repeats counted: 0 where it wins

    Arguments as `sampled_info_nce`. Returns four (N, K) tensors ((N,) for (N, D) anchors), rank int64. An ignored row
    has loss 0, lse -inf, positive 0, rank 0; a row without negatives has lse -inf.

    >>> q, z = torch.randn(8, 16), torch.randn(32, 16)
    >>> sampled_info_nce_stats(q, z, torch.arange(8), Negatives(4, seed=0)).rank.shape
    torch.Size([8])
    """
    op = "sampled_info_nce_stats"
    return _run(op, anchors, pool, positives, negatives, scale, anchor_ids, pool_ids, impl, "none", True)
