"""Who computes it: ours by implementation, plain torch, other people's criteria and packages. One function each.

A provider is built for a case, or says why it cannot be (Unavailable), and is then a function of a Problem that
returns the scalar loss, ready for backward. Criteria of other projects are the same computation in our own words.
`truth` is the float64 reference on the same input; `judge` says how far a provider is from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

import cpc_kernels
from cpc_kernels import reference
from cpc_kernels.capabilities import CPP, FAST_BF16, interpreting

from .cases import Case

TOLERANCE = {
    "float64": 1e-9,
    "float32": 2e-3,
    "float16": 1e-2,
    "bfloat16": 2e-2,
}  # norm of the error over that of truth
SEED = 5


class Unavailable(Exception):
    """Why a provider cannot run here."""


@dataclass
class Problem:
    """One set of inputs: anchors (N, D), or (N, K, D) when K > 1; candidates (M, D); positives (N,) or (N, K)."""

    anchors: Tensor
    candidates: Tensor
    positives: Tensor
    negatives: Tensor | None  # (N, S)
    drawn: cpc_kernels.Negatives | None  # the same negatives, as a seed on the device
    scale: float

    def clear(self) -> None:
        self.anchors.grad = self.candidates.grad = None

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        return {"dq": self.anchors.grad, "dk": self.candidates.grad}


Loss = Callable[[Problem], Tensor]


def make_problem(case: Case, seed: int, device: str | torch.device = "cpu") -> Problem:
    """Random unit vectors, each anchor leaning towards its positive, so that losses are neither flat nor zero."""
    g = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    # drawn on the CPU from a seed, or in place on a GPU where the bank alone has 256 million numbers
    make = torch.Generator(device).manual_seed(seed) if torch.device(device).type == "cuda" else g
    candidates = F.normalize(torch.randn(case.m, case.d, generator=make, device=device), dim=-1)
    shape = (case.n, case.k) if case.k > 1 else (case.n,)
    square = case.n == case.m and case.k == 1
    positives = torch.arange(case.n) if square else torch.randint(case.m, shape, generator=g)
    positives = positives.to(device)
    noise = torch.randn(*shape, case.d, generator=make, device=device)
    anchors = F.normalize(F.normalize(noise, dim=-1) + 0.3 * candidates[positives], dim=-1)
    negatives = drawn = None
    if case.s:
        base = positives if case.k == 1 else positives[:, 0]
        drawn = cpc_kernels.Negatives(case.s, torch.tensor([SEED + seed], device=device))
        negatives = cpc_kernels.draw_negatives(drawn, base, case.m, case.n)
    return Problem(
        anchors.to(dtype).requires_grad_(),
        candidates.to(dtype).requires_grad_(case.learns != "anchors"),
        positives,
        negatives,
        drawn,
        scale=1 / 0.07,
    )


# --- how right ------------------------------------------------------------------------------------------------------


def truth(case: Case, problem: Problem, seeded: bool = False) -> dict[str, Tensor]:
    """The reference in float64, some rows at a time: loss, dq, and dk unless the candidates are a bank."""
    q = problem.anchors.detach().double().requires_grad_()
    k = problem.candidates.detach().double().requires_grad_(problem.candidates.requires_grad)
    width = case.k * case.s * case.d if case.s else case.m
    rows = max(1, (2**24 if q.device.type == "cpu" else 2**25) // width)  # about 2 GB of a GPU
    total = torch.zeros((), dtype=torch.float64, device=q.device)
    for part in torch.arange(case.n, device=q.device).split(rows):
        if case.s:
            anchors, positives = q[part].view(len(part), case.k, -1), problem.positives[part].view(len(part), case.k)
            assert problem.negatives is not None
            loss = reference.sampled_info_nce(
                anchors, k, positives, problem.negatives[part], scale=problem.scale, exclude_positives=seeded,
                reduction="sum",
            )  # fmt: skip
        else:
            loss = reference.info_nce(q[part], k, problem.positives[part], scale=problem.scale, reduction="sum")
            if case.learns == "clip":
                columns = reference.info_nce(k[part], q, part, scale=problem.scale, reduction="sum")
                loss = (loss + columns) / 2
        loss = loss / problem.positives.numel()
        loss.backward()
        total += loss.detach()
    found = {"loss": total, "dq": q.grad, "dk": k.grad}
    return {name: value for name, value in found.items() if value is not None}


def judge(case: Case, problem: Problem, loss: Loss, true: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the loss and each gradient, |out - truth| / |truth|; nan and a missing gradient are inf."""
    problem.clear()
    value = loss(problem)
    value.backward()
    found = {"loss": value.detach(), **problem.gradients}
    errors = {}
    for name, expected in true.items():
        got = found[name]
        wrong = got is None or got.shape != expected.shape or not bool(got.isfinite().all())
        difference = torch.inf if wrong else float(torch.linalg.vector_norm(got.double() - expected))
        errors[name] = difference / max(float(torch.linalg.vector_norm(expected)), 1e-300)
    problem.clear()
    return errors


def right(case: Case, errors: dict[str, float]) -> bool:
    return all(error <= TOLERANCE[case.dtype] for error in errors.values())


# --- dense ----------------------------------------------------------------------------------------------------------


def need(condition: bool, reason: str) -> None:
    if not condition:
        raise Unavailable(reason)


def need_package(name: str):
    """A peer, or why it is not compared."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name)
    except Exception as error:
        raise Unavailable(f"{name} cannot be imported ({type(error).__name__})") from None


def both_ways(case: Case, one_way: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> Loss:
    """Losses of rows; for CLIP the mean of rows and columns."""
    if case.learns != "clip":
        return lambda p: one_way(p.anchors, p.candidates, p.positives, p.scale)
    return lambda p: (
        (
            one_way(p.anchors, p.candidates, p.positives, p.scale)
            + one_way(p.candidates, p.anchors, p.positives, p.scale)
        )
        / 2
    )


def eager_dense(q: Tensor, k: Tensor, positives: Tensor, scale: float) -> Tensor:
    return F.cross_entropy((q @ k.T).float() * scale, positives)


def eager_dense_fp32(q: Tensor, k: Tensor, positives: Tensor, scale: float) -> Tensor:
    return F.cross_entropy(q.float() @ k.float().T * scale, positives)


def compiled(function):
    return torch.compile(function, dynamic=False)


def build_ours(impl: str):
    def build(case: Case, device: torch.device) -> Loss:
        need(impl != "triton" or device.type == "cuda" or interpreting(), "Triton needs a GPU")
        need(impl != "cpp" or (CPP.available and device.type == "cpu"), CPP.reason)
        if not case.s:
            return both_ways(
                case, lambda q, k, positives, scale: cpc_kernels.info_nce(q, k, positives, scale=scale, impl=impl)
            )
        return lambda p: cpc_kernels.sampled_info_nce(
            p.anchors, p.candidates, p.positives, cast(Tensor, p.negatives), scale=p.scale, impl=impl
        )

    return build


def build_seeded(impl: str):
    """The draw inside the op, of what the others were given."""

    def build(case: Case, device: torch.device) -> Loss:
        build_ours(impl)(case, device)
        need(case.k == 1, "with shared steps a draw skips other steps' positives: another loss")
        return lambda p: cpc_kernels.sampled_info_nce(
            p.anchors, p.candidates, p.positives, cast(cpc_kernels.Negatives, p.drawn), scale=p.scale, impl=impl
        )

    return build


def build_eager(case: Case, device: torch.device) -> Loss:
    if case.s:
        return eager_gather
    slow = case.dtype == "bfloat16" and device.type == "cpu" and not FAST_BF16.available
    need(not slow, "bf16 products are not fast on this CPU; see eager in fp32")
    return both_ways(case, eager_dense)


def build_compiled(case: Case, device: torch.device) -> Loss:
    if case.s:
        function = compiled(gather_scores)
        return lambda p: function(p.anchors, p.candidates, p.positives, p.negatives, p.scale)
    slow = case.dtype == "bfloat16" and device.type == "cpu" and not FAST_BF16.available
    return both_ways(case, compiled(eager_dense_fp32 if slow else eager_dense))


def build_eager_fp32(case: Case, device: torch.device) -> Loss:
    need(case.dtype != "float32" and not case.s, "the same as eager")
    return both_ways(case, eager_dense_fp32)


def build_linear_cross_entropy(case: Case, device: torch.device) -> Loss:
    need(hasattr(F, "linear_cross_entropy"), f"torch {torch.__version__} has none; it came with 2.13")
    slow = case.dtype == "bfloat16" and device.type == "cpu" and not FAST_BF16.available
    need(not slow, "bf16 products are not fast on this CPU")
    options = torch.nn.LinearCrossEntropyOptions()
    return both_ways(
        case, lambda q, k, positives, scale: F.linear_cross_entropy(q * scale, k, positives, options=options)
    )


def build_inf_cl(case: Case, device: torch.device) -> Loss:
    need(device.type == "cuda", "needs a GPU")
    peer = need_package("inf_cl")
    head = min(case.d, 256)
    need(case.d % head == 0, "features must be a multiple of 256")
    return both_ways(
        case, lambda q, k, positives, scale: peer.cal_flash_loss(q, k, positives, scale, head_dim=head).mean()
    )


def build_memeff(case: Case, device: torch.device) -> Loss:
    need(device.type == "cuda", "needs a GPU")
    peer = need_package("memeff")
    need(case.n == case.m and case.learns != "both", "only square: rows and columns, or frozen candidates")
    options = {"normalized_inputs": True, "stable": False}
    kind = peer.MemoryEfficientCLIPLoss if case.learns == "clip" else peer.MemoryEfficientLiTLoss
    return lambda p: kind(temperature=1 / p.scale, **options)(p.anchors, p.candidates)


def build_liger(case: Case, device: torch.device) -> Loss:
    need(device.type == "cuda", "needs a GPU")
    need_package("liger_kernel.transformers")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

    criterion = LigerFusedLinearCrossEntropyLoss()
    return both_ways(case, lambda q, k, positives, scale: criterion(k, q * scale, positives))


def build_cce(case: Case, device: torch.device) -> Loss:
    """Exact: by default it skips small probabilities, which is unsafe for contrastive losses."""
    need(device.type == "cuda", "needs a GPU")
    need(case.dtype != "float32", "16-bit inputs only")
    need_package("cut_cross_entropy")
    import inspect

    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    named = "cce_exact" in inspect.getsource(inspect.getmodule(linear_cross_entropy) or linear_cross_entropy)
    exact = {"impl": "cce_exact"} if named else {"impl": "cce", "filter_eps": None}
    return both_ways(case, lambda q, k, positives, scale: linear_cross_entropy(q * scale, k, positives, **exact))


def build_flex(case: Case, device: torch.device) -> Loss:
    """Attention's log-sum-exp is the loss; its values are not wanted, so they are narrow."""
    need(device.type == "cuda", "has no backward on the CPU")
    from torch.nn.attention.flex_attention import flex_attention

    attend = compiled(flex_attention)

    def one_way(q: Tensor, k: Tensor, positives: Tensor, scale: float) -> Tensor:
        values = k.detach()[None, None, :, :16]
        _, lse = attend(q[None, None], k[None, None], values, scale=scale, return_lse=True)
        own = (q.float() * k[positives].float()).sum(-1) * scale
        return (lse[0, 0] - own).mean()

    return both_ways(case, one_way)


# --- sampled --------------------------------------------------------------------------------------------------------


def gather_scores(q: Tensor, z: Tensor, positives: Tensor, negatives: Tensor, scale: float) -> Tensor:
    """What one writes first: gather (N, S, D), score, cross entropy with the positive in front."""
    q, positives = (q, positives) if q.ndim == 3 else (q[:, None], positives[:, None])
    own = (q * z[positives]).sum(-1, keepdim=True)  # (N, K, 1)
    others = torch.einsum("nkd,nsd->nks", q, z[negatives])
    logits = (torch.cat([own, others], -1) * scale).float().flatten(0, 1)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=q.device))


def eager_gather(p: Problem) -> Tensor:
    assert p.negatives is not None
    return gather_scores(p.anchors, p.candidates, p.positives, p.negatives, p.scale)


def greedy_infomax(p: Problem) -> Tensor:
    """Greedy InfoMax (Löwe et al. 2019): an int64 index as large as what it gathers, softmax, log with 1e-11."""
    q, z, negatives = p.anchors, p.candidates, p.negatives
    assert negatives is not None
    (n, s), d = negatives.shape, z.shape[1]
    index = negatives.reshape(-1, 1).repeat(1, d)  # (N S, D)
    others = torch.gather(z, 0, index).view(n, s, d)
    own = (q * z[p.positives]).sum(-1, keepdim=True)
    logits = torch.cat([own, torch.bmm(others, q[..., None])[..., 0]], -1).float() * p.scale
    log_p = (logits.softmax(-1) + 1e-11).log()
    return F.nll_loss(log_p, torch.zeros(n, dtype=torch.int64, device=q.device))


def cpc_audio(p: Problem) -> Tensor:
    """CPC_audio's criterion (Rivière et al. 2020): every step joins its positive to the shared gathered negatives,
    multiplies elementwise and averages over features."""
    q, z, negatives = p.anchors, p.candidates, p.negatives
    assert negatives is not None
    n, steps, d = q.shape
    others = z[negatives.flatten()].view(n, -1, d)
    label = torch.zeros(n, dtype=torch.int64, device=q.device)
    total = q.new_zeros((), dtype=torch.float32)
    for step in range(steps):
        candidates = torch.cat([z[p.positives[:, step]][:, None], others], 1)  # (N, 1 + S, D)
        scores = (q[:, step, None] * candidates).mean(-1)
        total = total + F.cross_entropy(scores.float() * (p.scale * d), label)
    return total / steps


def only(condition: Callable[[Case], bool], function: Loss, reason: str):
    def build(case: Case, device: torch.device) -> Loss:
        need(condition(case), reason)
        return function

    return build


# --- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """A row of the table. memory: bytes it is known to need beyond inputs, to refuse what cannot fit."""

    name: str
    build: Callable[[Case, torch.device], Loss]
    memory: Callable[[Case], int] = lambda case: 0
    ours: bool = False
    seeded: bool = False
    compiles: bool = False


def dense_memory(case: Case) -> int:
    return 3 * case.scores_bytes


def gather_memory(case: Case) -> int:
    return 3 * case.gathered_bytes


PROVIDERS: dict[str, tuple[Provider, ...]] = {
    "dense": (
        Provider("ours: triton", build_ours("triton"), ours=True),
        Provider("ours: chunked", build_ours("chunked"), ours=True),
        Provider("eager", build_eager, dense_memory),
        Provider("eager, fp32", build_eager_fp32, dense_memory),
        Provider("torch.compile", build_compiled, dense_memory, compiles=True),
        Provider("F.linear_cross_entropy", build_linear_cross_entropy),
        Provider("Inf-CL", build_inf_cl),
        Provider("memeff", build_memeff),
        Provider("Liger", build_liger),
        Provider("CCE, exact", build_cce),
        Provider("FlexAttention", build_flex, compiles=True),
    ),
    "sampled": (
        Provider("ours: triton", build_ours("triton"), ours=True),
        Provider("ours: triton, seeded", build_seeded("triton"), ours=True, seeded=True),
        Provider("ours: cpp", build_ours("cpp"), ours=True),
        Provider("ours: cpp, seeded", build_seeded("cpp"), ours=True, seeded=True),
        Provider("ours: gather", build_ours("gather"), ours=True),
        Provider("eager gather", build_eager, gather_memory),
        Provider("torch.compile of it", build_compiled, gather_memory, compiles=True),
        Provider(
            "Greedy InfoMax",
            only(lambda case: case.k == 1, greedy_infomax, "its negatives are drawn per step"),
            lambda case: 3 * case.gathered_bytes + 8 * case.n * case.s * case.d,
        ),
        Provider(
            "CPC_audio",
            only(lambda case: case.k > 1, cpc_audio, "made for several steps"),
            lambda case: (2 * case.k + 2) * case.gathered_bytes,
        ),
    ),
}


def find(op: str, name: str) -> Provider:
    return next(provider for provider in PROVIDERS[op] if provider.name == name)
