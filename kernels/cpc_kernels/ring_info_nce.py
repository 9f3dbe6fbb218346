"""InfoNCE against the candidates of all ranks; no rank holds all of them, nor a score matrix.

Rank r of W holds N_r anchors and M_r candidates. The candidates travel: in step t rank r scores its anchors against
block r - t (mod W) while that block goes on to rank r + 1 and the next one comes in.

    forward, per block b:   lse <- log(e^lse + e^lse_b),   O <- O e^(lse_old - lse) + O_b e^(lse_b - lse)
    loss_i = softplus(lse_i - s_i,p(i)),    dq_i = w_i (O_i - k_p(i)),    w_i = g_i sigmoid(lse_i - s_i,p(i)) scale
    backward: the blocks travel once more; sum_i w_i P_ij q_i (minus w_i q_i where j = p(i)) of each rank is added to a
    gradient that follows its block one step behind and comes home after W steps

The positive never enters lse (see info_nce.py). Products: 8 NMD flops over all ranks, as the one-pass schedule.
Memory of a rank: O and the positives' vectors (N_r, D), two blocks of candidates in forward, and two of candidates with
three of float32 gradients in backward: O((N + M) D / W). Bytes that a rank sends in a step of training: 2 (W - 1)
blocks in the candidates' dtype and W in float32, with ids 8 bytes more for each candidate of the 2 (W - 1).

Where all candidates are few they are gathered instead: one exchange, and the kernels as they are for one process.

Longer than 250 lines because the ring and its alternatives, local and gathered, share one door and its checks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from .arguments import REDUCTIONS, autocast, check_indices, compute_dtype, need_tensors, scale_tensor
from .autograd import as_written, refuse_transforms
from .bilinear_info_nce import check as check_bilinear
from .bilinear_info_nce import project_rows
from .capabilities import triton_module
from .chunked_info_nce import chunked_backward_candidates, chunked_forward, sigmoid_weight
from .exchange import Shares, everyones, gather_rows, gather_rows_with_grad, rank_and_world, total
from .info_nce import accept, info_nce
from .negatives import Negatives, draw_negatives
from .sampled_info_nce import check as check_sampled
from .sampled_info_nce import need_negatives, sampled_info_nce

GATHER_BYTES = 64 * 2**20  # all candidates up to here are gathered; an estimate: no link has been measured
EXCHANGES = ("auto", "local", "gathered", "ring")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# --- the ring ---------------------------------------------------------------------------------------------------------


def post(out: list[Tensor], into: list[Tensor], of: Shares) -> list[dist.Work]:
    """Send to the next rank, receive from the one before; nothing is sent of empty tensors."""
    after, before = (of.rank + 1) % of.world, (of.rank - 1) % of.world
    ops = [dist.P2POp(dist.isend, t, group=of.group, group_peer=after) for t in out if t.numel()]
    ops += [dist.P2POp(dist.irecv, t, group=of.group, group_peer=before) for t in into if t.numel()]
    return dist.batch_isend_irecv(ops) if ops else []


def like(tensors: list[Tensor], rows: int) -> list[Tensor]:
    return [torch.empty((rows, *t.shape[1:]), dtype=t.dtype, device=t.device) for t in tensors]


def arrive(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def blocks(own: list[Tensor], of: Shares):
    """(owner, its tensors) for every rank, this one first; the next block is on its way while one is used."""
    held = [t.contiguous() for t in own]
    for step in range(of.world):
        coming, works = [], []
        if step < of.world - 1:
            coming = like(own, of.counts[(of.rank - step - 1) % of.world])
            works = post(held, coming, of)
        yield (of.rank - step) % of.world, held
        arrive(works)
        held = coming


def returning(own: list[Tensor], of: Shares, gradient):
    """The sum over all ranks of gradient(owner, tensors) for this rank's own tensors (M_r, D).

    What is known of a block's gradient travels one step behind the block, and home in the end.
    """
    known, works = None, []
    for step, (owner, held) in enumerate(blocks(own, of)):
        before = like([known], of.counts[owner]) if known is not None else []
        works = post([known], before, of) if known is not None else []
        new = gradient(owner, held)
        arrive(works)
        known = new.add_(before[0]) if step else new
    if of.world == 1:
        return known
    home = like([known], of.counts[of.rank])
    arrive(post([known], home, of))
    return home[0]


class Ring(torch.autograd.Function):
    """(N_r,) losses of this rank's anchors against everybody's candidates."""

    @staticmethod
    @as_written
    def forward(ctx, anchors, candidates, positives, scale, anchor_ids, candidate_ids, impl, of, learning):
        dtype, indexed = compute_dtype(anchors.dtype), not positives.is_floating_point()
        given = anchors, candidates, positives, scale
        anchors, candidates, positives, scale = (t.detach() for t in given)
        need_o = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]
        n, d = anchors.shape
        lse = torch.full((n,), -torch.inf, dtype=dtype, device=anchors.device)
        positive = torch.zeros_like(lse)
        if not indexed:
            positive = torch.linalg.vecdot(anchors.to(dtype), positives.to(dtype)) * scale
        o = torch.zeros((n, d) if need_o else (0,), dtype=dtype, device=anchors.device)
        own = torch.zeros((n, d) if need_o and indexed else (0,), dtype=anchors.dtype, device=anchors.device)
        tensors = [candidates] if candidate_ids is None else [candidates, candidate_ids]
        for owner, (block, *ids) in blocks(tensors, of):
            if n == 0 or len(block) == 0:
                continue
            place = local_places(positives, owner, of)
            _, lse_b, positive_b, _, o_b = forward_block(
                impl, anchors, block, place, scale, anchor_ids, ids[0] if ids else None, need_o
            )
            merged = torch.logaddexp(lse, lse_b)
            if need_o:
                reference = merged.where(merged != -torch.inf, 0.0)
                o.mul_((lse - reference).exp_()[:, None])
                o.add_(o_b.mul_((lse_b - reference).exp_()[:, None]))
            lse = merged
            if indexed:
                positive += positive_b
                if need_o:
                    here = (place >= 0) & (place < len(block))
                    own = torch.where(here[:, None], block[place.clamp(0, len(block) - 1)], own)
        loss = (-F.logsigmoid(positive - lse)).where(lse != -torch.inf, 0.0)
        if need_o:
            o.sub_(own if indexed else positives)
        ctx.save_for_backward(lse, positive, o, *given, anchor_ids, candidate_ids)
        ctx.options = impl, of, learning
        return loss

    @staticmethod
    def backward(ctx, grad):
        grads = RingGradients.apply(grad, *ctx.saved_tensors, *ctx.options, ctx.needs_input_grad[:4])
        return *grads, None, None, None, None, None


class RingGradients(torch.autograd.Function):
    """Of anchors, candidates, positives and scale, each or None; through them a second derivative is refused."""

    @staticmethod
    @as_written
    def forward(
        ctx, grad, lse, positive, difference, anchors, candidates, positives, scale, anchor_ids, candidate_ids, impl,
        of, learning, needs,
    ):  # fmt: skip
        anchors, candidates, positives, scale = (t.detach() for t in (anchors, candidates, positives, scale))
        dtype, indexed = compute_dtype(anchors.dtype), not positives.is_floating_point()
        weight = grad * sigmoid_weight(lse, positive, positives >= 0 if indexed else None)  # (N,)
        rows = weight * scale
        dq = dk = dv = dscale = None
        if needs[3]:
            each = weight * torch.linalg.vecdot(anchors.to(dtype), difference)
            dscale = each.where(weight != 0, 0.0).sum().reshape(1)
        if needs[0]:
            dq = (difference * rows[:, None]).masked_fill_(rows[:, None] == 0, 0.0).to(anchors.dtype)
        if needs[2]:
            dv = (anchors.to(dtype) * -rows[:, None]).to(positives.dtype)
        if learning:  # some rank's candidates do

            def gradient(owner, tensors):
                block, *ids = tensors
                if len(anchors) == 0 or len(block) == 0:
                    return torch.zeros(block.shape, dtype=dtype, device=block.device)
                place = local_places(positives, owner, of)
                return backward_block(
                    impl, rows, lse, anchors, block, place, scale, anchor_ids, ids[0] if ids else None
                )

            dk = returning([candidates] if candidate_ids is None else [candidates, candidate_ids], of, gradient)
            dk = dk.to(candidates.dtype) if needs[1] else None
        return dq, dk, dv, dscale

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "info_nce_across_ranks: second derivatives are not implemented by the ring; "
            'exchange="gathered" with impl="reference" has them.'
        )


def local_places(positives: Tensor, owner: int, of: Shares) -> Tensor:
    """Where the positives stand in a rank's block: -1 if ignored, the block's size if elsewhere."""
    if positives.is_floating_point():
        return positives
    count, place = of.counts[owner], positives - of.first(owner)
    place = place.where((place >= 0) & (place < count), count)
    return place.where(positives >= 0, -1)


def forward_block(impl, anchors, block, place, scale, anchor_ids, block_ids, need_expectation):
    """loss, lse, positive, rank, O of one block; loss and rank mean nothing where the positive is elsewhere."""
    where = anchors, block, place, scale, anchor_ids, block_ids, need_expectation
    if impl == "triton":
        launch = triton_module("info_nce", anchors.device).forward
        return launch(*where, need_rank=False, elsewhere=True)
    return chunked_forward(*where, False, elsewhere=True)


def backward_block(impl, weight, lse, anchors, block, place, scale, anchor_ids, block_ids):
    """(M_b, D) in the compute dtype."""
    where = weight, lse, anchors, block, place, scale, anchor_ids, block_ids
    if impl == "triton":
        launch = triton_module("info_nce", anchors.device).backward_candidates
        return launch(*where, out_dtype=compute_dtype(anchors.dtype))
    return chunked_backward_candidates(*where, elsewhere=True)


# --- the door ---------------------------------------------------------------------------------------------------------


def refuse(op: str, impl: str, group, *given: float | Tensor) -> None:
    """Derivatives that would be lost; across ranks those of the reference, too."""
    alone = rank_and_world(group)[1] == 1
    try:
        refuse_transforms(op, impl if alone else "auto", *given)
    except RuntimeError:
        if alone:
            raise
        raise RuntimeError(
            f"{op}: torch.func's derivatives and forward mode do not pass from rank to rank; use backward() or "
            "torch.autograd.grad."
        ) from None


def agree(
    op: str, anchors: Tensor, candidates: Tensor, ids: bool, exchange: str, reduction: str, learning: list[bool], group
) -> tuple[Shares, Shares, bool]:
    """Candidates and anchors of each rank, and whether any rank's candidates learn; what it raises, all ranks raise.

    learning: whether this rank's candidates do, and whether anything does.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"{op}: exchange must be one of {', '.join(EXCHANGES)}. Got {exchange!r}.")
    rank = rank_and_world(group)[0]
    dtype = DTYPES.index(anchors.dtype) if anchors.dtype in DTYPES else -1
    alike = [anchors.shape[-1], dtype, ids, EXCHANGES.index(exchange), REDUCTIONS.index(reduction)]
    mine = [len(candidates), len(anchors), *learning, *alike]
    told = everyones([int(number) for number in mine], anchors.device, group)
    dtypes = [str(each).removeprefix("torch.") for each in DTYPES]
    names = ("features", "dtypes", "ids (1) or none (0)", "exchange", "reduction")
    for column, (name, words) in enumerate(
        zip(names, (None, dtypes, None, EXCHANGES, REDUCTIONS), strict=True), start=len(mine) - len(alike)
    ):
        values = [each[column] for each in told]
        if len(set(values)) > 1:
            shown = values if words is None else [words[value] for value in values]
            raise ValueError(f"{op}: all ranks must have the same {name}. Got {shown}, in rank order.")
    candidates_learn = any(each[2] for each in told)
    idle = [i for i, each in enumerate(told) if not each[3]]
    meet = reduction != "none" or (candidates_learn and exchange != "local")  # in backward
    if meet and 0 < len(idle) < len(told):
        raise RuntimeError(
            f"{op}: every rank takes part in backward, but on rank {', '.join(map(str, idle))} nothing requires a "
            "gradient. Let the empty batch come from the model too, or call requires_grad_() on it."
        )
    return (
        Shares([each[0] for each in told], rank, group),
        Shares([each[1] for each in told], rank, group),
        candidates_learn,
    )


def chosen(exchange: str, of: Shares, candidates: Tensor) -> str:
    if exchange == "auto":
        size = of.total * candidates.shape[1] * candidates.element_size()
        return "gathered" if size <= GATHER_BYTES or of.world == 1 else "ring"
    return exchange


def own_places(op: str, what: str, indices: Tensor, of: Shares) -> Tensor:
    """For exchange="local": indices into this rank's rows."""
    own = local_places(indices, of.rank, of)
    if not own.is_floating_point() and bool((own == of.counts[of.rank]).any()):
        raise IndexError(
            f'{op}: with exchange="local" the {what} of rank {of.rank} must lie among its own candidates, '
            f"{of.first()} to {of.first() + of.counts[of.rank] - 1}."
        )
    return own


def reduce(loss: Tensor, counted: Tensor | int, reduction: str, group) -> Tensor:
    """`loss` summed over this rank's rows, or each of them; the same number on every rank, unless none."""
    if reduction == "none":
        return loss
    summed = total(loss.sum(), group)
    if reduction == "sum":
        return summed
    count = torch.as_tensor(counted, dtype=torch.int64, device=loss.device)
    return summed / total(count, group).clamp(min=1)


def info_nce_across_ranks(
    anchors: Tensor,
    candidates: Tensor,
    positives: Tensor,
    *,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    exchange: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`info_nce` of a batch that lies across the ranks of torch.distributed: every rank's candidates are negatives.

    loss_i = softplus(log sum_{j negative of i, on any rank} exp(s_ij) - s_i,p(i)),   s_ij = scale <q_i, k_j>

    anchors (N, D), candidates (M, D): this rank's rows; ranks may hold different numbers, also none. positives: (N,)
    indices, counted through all ranks' candidates in rank order (`exchange.shares(M, device).first()` is this rank's
    first), -1 ignored; or (N, D) vectors. scale, ids: as `info_nce`; ids mean the same on every rank.
    reduction: mean or sum over the rows of all ranks, the same number on each; or none, this rank's (N,).
    exchange: "ring", blocks of candidates pass from rank to rank in O(N + M) memory; "gathered", every rank gets all;
    "local", only this rank's own are negatives (and its positives must be among them); auto chooses by size.
    impl: auto, chunked or triton; reference where there is no ring.

    Gradients are those of the sum of what all ranks differentiate, so with the mean over W ranks each parameter's is W
    times that of one process, which DistributedDataParallel's average over the ranks makes exactly one process's.
    All ranks call this, and backward, in the same order. Second derivatives raise, but for exchange="gathered" with
    impl="reference"; torch.func's derivatives and forward mode raise where there are several ranks.
    What does not fit between ranks (features, dtypes, ids on some, exchange, reduction, nothing that learns on a rank
    which the others meet in backward) raises the same error on all of them; what is wrong with one rank's own input
    raises as `info_nce`, on that rank alone, and the others wait for it until the group's timeout. Source: the merge of
    kernels/README.md.

    >>> q, k = torch.randn(8, 16), torch.randn(32, 16)
    >>> info_nce_across_ranks(q, k, torch.arange(8), scale=10.0).shape    # one process: plain info_nce
    torch.Size([])
    """
    op = "info_nce_across_ranks"
    where = anchors, candidates, positives, anchor_ids, candidate_ids
    anchors, candidates, positives, impl = accept(op, *where, impl, reduction)
    refuse(op, impl, group, anchors, candidates, positives, scale)
    scale = scale_tensor(op, scale, anchors)
    indexed = not positives.is_floating_point()
    learning = torch.is_grad_enabled() and candidates.requires_grad
    any_learning = torch.is_grad_enabled() and any(t.requires_grad for t in (anchors, candidates, positives, scale))
    ids, learning = anchor_ids is not None, [learning, any_learning]
    of, _, learning = agree(op, anchors, candidates, ids, exchange, reduction, learning, group)
    exchange = chosen(exchange, of, candidates)
    if indexed:
        check_indices(op, "positives", positives, of.total)
    counted = (positives >= 0).sum() if indexed else len(positives)
    options = {"scale": scale, "anchor_ids": anchor_ids, "impl": impl}
    one = "none" if reduction == "none" else "sum"
    if exchange == "local":
        positives = own_places(op, "positives", positives, of)
        loss = info_nce(anchors, candidates, positives, candidate_ids=candidate_ids, reduction=one, **options)
    elif exchange == "gathered":
        everybody = gather_rows_with_grad(candidates, of) if learning else gather_rows(candidates, of)
        ids = None if candidate_ids is None else gather_rows(candidate_ids.long(), of)
        loss = info_nce(anchors, everybody, positives, candidate_ids=ids, reduction=one, **options)
    else:
        if impl == "reference":
            raise ValueError(f'{op}: impl="reference" has no ring; exchange="gathered" has it.')
        if anchor_ids is not None:
            anchor_ids, candidate_ids = anchor_ids.long(), candidate_ids.long()
        tensors = anchors, candidates, positives, scale
        if not any_learning:
            tensors = tuple(t.detach() for t in tensors)
        loss = Ring.apply(*tensors, anchor_ids, candidate_ids, impl, of, learning)
    return reduce(loss, counted, reduction, group)


def sampled_info_nce_across_ranks(
    anchors: Tensor,
    pool: Tensor,
    positives: Tensor,
    negatives: Tensor | Negatives,
    *,
    rows: Tensor | None = None,
    scale: float | Tensor = 1.0,
    anchor_ids: Tensor | None = None,
    pool_ids: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
    exchange: str = "auto",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`sampled_info_nce` of a batch that lies across the ranks: negatives come from every rank's pool.

    loss_nk = softplus(log sum_{j in negatives of (n, k)} exp(s_nkj) - s_nk,p),   s_nkj = scale <q_nk, z_j>

    anchors (N, K, D) or (N, D), pool (M, D): this rank's. positives and listed negatives are indices through all ranks'
    pools in rank order. Drawn negatives are those that one process with the whole batch draws: `rows` (N,) is the
    number that each anchor has there; by default the anchors are counted through, rank after rank (with "local", each
    rank's own from 0).
    exchange: "gathered" (also auto): every rank gets the whole pool, since a ring would bring each anchor every block
    for the few rows it wants of it; "local": this rank's pool alone (which positives and listed negatives lie in).
    Everything else, the mean, and what the gradients are: `info_nce_across_ranks` and `sampled_info_nce`.

    >>> q, z = torch.randn(8, 16), torch.randn(32, 16)
    >>> sampled_info_nce_across_ranks(q, z, torch.arange(8), Negatives(4, seed=0), reduction="none").shape
    torch.Size([8])
    """
    op = "sampled_info_nce_across_ranks"
    need_tensors(op, anchors=anchors, pool=pool, positives=positives, **({} if rows is None else {"rows": rows}))
    need_negatives(op, negatives)
    if exchange == "ring":
        raise ValueError(f'{op}: there is no ring for sampled negatives; exchange="gathered" takes them of all ranks.')
    anchors, pool, positives = autocast(anchors.device, anchors, pool, positives)
    check_sampled(op, anchors, pool, positives, negatives, anchor_ids, pool_ids, impl, reduction)
    if rows is not None and not isinstance(negatives, Negatives):
        raise ValueError(f"{op}: rows number the draws of Negatives(count, seed); negatives that are listed have none.")
    if rows is not None and (rows.ndim != 1 or len(rows) != len(anchors) or rows.is_floating_point()):
        raise ValueError(f"{op}: rows must be ({len(anchors)},) integers. Got {tuple(rows.shape)} {rows.dtype}.")
    refuse(op, impl, group, anchors, pool, positives, scale)
    scale = scale_tensor(op, scale, anchors)
    learning = torch.is_grad_enabled() and pool.requires_grad
    any_learning = torch.is_grad_enabled() and any(t.requires_grad for t in (anchors, pool, positives, scale))
    ids, learning = anchor_ids is not None, [learning, any_learning]
    of, of_anchors, learning = agree(op, anchors, pool, ids, exchange, reduction, learning, group)
    if exchange == "local":
        positives = own_places(op, "positives", positives, of)
        if isinstance(negatives, Tensor):
            negatives = own_places(op, "negatives", negatives, of)
    elif of.world > 1:
        pool = gather_rows_with_grad(pool, of) if learning else gather_rows(pool, of)
        pool_ids = None if pool_ids is None else gather_rows(pool_ids.long(), of)
        if rows is None:
            rows = torch.arange(len(anchors), device=anchors.device) + of_anchors.first()
    if isinstance(negatives, Negatives) and rows is not None:
        negatives = listed(negatives, positives, len(pool), rows.to(anchors.device, torch.int64))
    loss = sampled_info_nce(
        anchors, pool, positives, negatives, scale=scale, anchor_ids=anchor_ids, pool_ids=pool_ids, impl=impl,
        reduction="none" if reduction == "none" else "sum",
    )  # fmt: skip
    counted = positives.shape[:-1].numel() if positives.is_floating_point() else (positives >= 0).sum()
    return reduce(loss, counted, reduction, group)


def listed(negatives: Negatives, positives: Tensor, pool_size: int, rows: Tensor) -> Tensor:
    """What is drawn for rows of these numbers, as a list; -1 where a draw hits the positive of its step."""
    vectors = positives.is_floating_point()
    shape = positives.shape[:-1] if vectors else positives.shape
    steps = shape[1] if len(shape) == 2 else 1
    drawn = draw_negatives(negatives, positives, pool_size, rows, steps)
    if vectors or len(shape) == 1:
        return drawn if len(shape) == 2 or drawn.ndim == 2 else drawn[:, 0]
    each = drawn if drawn.ndim == 3 else drawn[:, None].expand(-1, steps, -1)
    return each.where(each != positives[..., None], -1)


def bilinear_info_nce_across_ranks(
    contexts: Tensor,
    weights: Tensor,
    candidates: Tensor,
    positives: Tensor,
    negatives: Tensor | Negatives | None = None,
    *,
    sources: Tensor,
    counts: Sequence[int],
    rows: Tensor | None = None,
    impl: str = "auto",
    **options: Any,
) -> Tensor:
    """`bilinear_info_nce` of listed rows, over a batch that lies across the ranks: the contexts are projected here.

    loss_i = softplus(log sum_{j negative, on any rank} exp(s_ij) - s_i,p),   s_ij = scale z_j^T W_k c_sources[i]

    contexts (N, C), weights (K, D, C), sources (P,), counts: this rank's, as for `bilinear_info_nce`. The rest, options
    too, as `info_nce_across_ranks`, or `sampled_info_nce_across_ranks` where negatives are given.

    >>> contexts, weights, latents = torch.randn(6, 8), torch.randn(2, 16, 8), torch.randn(9, 16)
    >>> sources, positives = torch.tensor([0, 1, 2, 0]), torch.tensor([3, 4, 5, 6])
    >>> bilinear_info_nce_across_ranks(contexts, weights, latents, positives, sources=sources, counts=[3, 1]).shape
    torch.Size([])
    """
    op = "bilinear_info_nce_across_ranks"
    need_tensors(op, contexts=contexts, weights=weights, candidates=candidates, positives=positives, sources=sources)
    contexts, weights, candidates, positives = autocast(contexts.device, contexts, weights, candidates, positives)
    check_bilinear(op, contexts, weights, candidates, positives, negatives, sources, counts, "auto")
    refuse(op, impl, options.get("group"), contexts, weights, candidates, positives, options.get("scale", 1.0))
    contexts = contexts.reshape(-1, contexts.shape[-1])
    anchors = project_rows(contexts, weights, sources.long(), counts, impl)
    if negatives is None:
        if rows is not None:
            raise ValueError(f"{op}: rows number the draws of Negatives(count, seed); without them there are none.")
        return info_nce_across_ranks(anchors, candidates, positives, impl=impl, **options)
    options["pool_ids"] = options.pop("candidate_ids", None)
    return sampled_info_nce_across_ranks(anchors, candidates, positives, negatives, rows=rows, impl=impl, **options)
