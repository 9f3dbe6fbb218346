"""Every op against float64 on a device: dtypes, edge cases, upstream gradients of both signs, twice for the same bits.

A probe passes when each result's error is at most twice that of the reference in the probe's own dtype, plus one
rounding (`tests/kernels/tolerance.py`), plus the rounding in float32 of what the result is summed from: a gradient of
about 0 is not judged against what happens to be left, and lse, kept in float32, errs in proportion to its size. Two
runs with `torch.use_deterministic_algorithms` agree to the last bit. Uninitialised memory is NaN in those two runs:
torch fills it. Probes are in order of importance, and run in several processes, because most of their time is
compilation. Run as a module, it checks a handful of small ones.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cpc_kernels
from cpc_kernels import reference, tiles
from tests.kernels.tolerance import error

DTYPES = ("bfloat16", "float32", "float16", "float64")
NAMES = ("loss", "dq", "dk", "dscale", "dv or dw")


@dataclass(frozen=True)
class Probe:
    """One problem. d is also the contexts' length for bilinear; s 0: all candidates are negatives."""

    op: str  # dense, sampled, bilinear
    n: int
    m: int
    d: int
    k: int = 1
    s: int = 0
    dtype: str = "float32"
    positives: str = "index"  # or vectors
    ids: bool = False
    scale: float = 1.0
    reduction: str = "none"
    strided: bool = False
    seeded: bool = False
    per_step: bool = False

    @property
    def name(self) -> str:
        plain = Probe(self.op, self.n, self.m, self.d)
        extra = [f"{key} {value}" for key, value in asdict(self).items() if value != getattr(plain, key)]
        return f"{self.op} {self.n} x {self.m}, D {self.d}" + "".join(f", {what}" for what in extra)


def probes(small: bool = False) -> Iterator[Probe]:
    """The matrix. small: a handful that the interpreter can do."""
    dense = Probe("dense", 37, 45, 17)
    sampled = Probe("sampled", 37, 45, 17, s=7)  # of a small pool: the dense schedule
    large = replace(sampled, m=2000)  # gathered
    steps = replace(large, k=5, s=9)
    bilinear = Probe("bilinear", 21, 30, 16, k=2)
    if small:
        few = {"n": 9, "m": 20}
        yield replace(dense, **few, dtype="bfloat16", ids=True)
        yield replace(dense, **few, positives="vectors", reduction="mean")
        yield replace(sampled, **few, seeded=True)
        yield replace(steps, n=5, m=250)
        yield replace(bilinear, **few)
        return
    # what training uses, at sizes of several tiles with ragged ends
    for dtype in ("bfloat16", "float32"):
        for d in (128, 256, 512, 64):
            yield replace(dense, n=300, m=700, d=d, dtype=dtype)
        for shape in ({"n": 200, "m": 300, "d": 256, "k": 5, "s": 33}, {"n": 64, "m": 20000, "d": 128, "s": 16}):
            yield replace(sampled, **shape, dtype=dtype)
            yield replace(sampled, **shape, dtype=dtype, seeded=True)
        yield replace(sampled, n=50, m=9000, d=128, k=12, s=32, dtype=dtype)
        yield replace(bilinear, n=200, m=300, d=128, k=3, dtype=dtype)
        yield replace(bilinear, n=200, m=300, d=128, k=3, s=16, dtype=dtype)
    for dtype in DTYPES:
        yield replace(dense, dtype=dtype)
        yield replace(dense, dtype=dtype, ids=True, positives="vectors")
        yield replace(sampled, dtype=dtype, ids=True)
        yield replace(large, dtype=dtype, ids=True)
        yield replace(large, dtype=dtype, positives="vectors")
        yield replace(steps, dtype=dtype, ids=True)
        yield replace(steps, dtype=dtype, positives="vectors", seeded=True)
        yield replace(steps, dtype=dtype, per_step=True)
        yield replace(sampled, dtype=dtype, positives="vectors", seeded=True)
        yield replace(bilinear, dtype=dtype)
    for scale in (-3.0, 100.0, 0.0, 0.01):
        yield replace(dense, scale=scale)
        yield replace(steps, scale=scale)
        yield replace(steps, m=sampled.m, scale=scale)
    for d in (640, 1024, 2048, 300, 1, 2):
        yield replace(dense, n=130, m=200, d=d, dtype="bfloat16" if d > 2 else "float32")
        yield replace(sampled, d=d)
    for n, m in ((1, 1), (1, 5), (5, 1), (0, 4), (4, 0), (0, 0), (1, 5000), (5000, 3)):
        yield replace(dense, n=n, m=m)
        yield replace(sampled, n=n, m=m)
    for base in (dense, sampled, large, steps):
        yield replace(base, strided=True)
        yield replace(base, reduction="mean")
        yield replace(base, reduction="sum", ids=True)


def make(probe: Probe) -> dict[str, Any]:
    g = torch.Generator().manual_seed(11)
    dtype = getattr(torch, probe.dtype)

    def random(*shape: int, size: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g) * size).to(dtype)

    n, m, d, k = probe.n, probe.m, probe.d, probe.k
    stepped = probe.op == "bilinear" or k > 1
    rows = (n, k) if stepped else (n,)
    own = random(*rows, d) if probe.positives == "vectors" else torch.randint(-1, m, rows, generator=g)
    made: dict[str, Any] = {
        "anchors": random(n, d, size=d**-0.5) if probe.op == "bilinear" else random(*rows, d, size=d**-0.5),
        "candidates": random(m, d),
        "positives": own,
        "scale": torch.tensor(probe.scale, dtype=torch.float64 if probe.dtype == "float64" else torch.float32),
        "upstream": torch.randn(rows, generator=g),
        "ids": (torch.arange(n) % 4, torch.arange(m) % 5) if probe.ids else None,
        "negatives": None,
    }
    if probe.op == "bilinear":
        made["weights"] = random(k, d, d, size=d**-0.5)
    if probe.s:
        made["negatives"] = torch.randint(-1, max(m, 0), (n, *((k,) if probe.per_step else ()), probe.s), generator=g)
    return made


def compute(
    probe: Probe, made: dict[str, Any], device: torch.device, dtype: torch.dtype | None, impl: str
) -> list[Tensor]:
    """Loss and gradients in `dtype` (None: the probe's own), on the CPU. impl "reference" is the spec."""

    def leaf(tensor: Tensor) -> Tensor:
        moved = tensor.to(device) if dtype is None else tensor.to(device, dtype)
        if probe.strided:  # every other feature of something wider
            moved = moved.repeat_interleave(2, -1)[..., ::2]
        return moved.detach().requires_grad_()

    q, z = leaf(made["anchors"]), leaf(made["candidates"])
    scale = made["scale"].to(device, torch.float64 if dtype == torch.float64 else made["scale"].dtype)
    scale = scale.detach().clone().requires_grad_()
    vectors = made["positives"].is_floating_point()
    own = leaf(made["positives"]) if vectors else made["positives"].to(device)
    ids: dict[str, Any] = {}
    if made["ids"] is not None:
        which = "pool_ids" if probe.op == "sampled" else "candidate_ids"
        ids = {"anchor_ids": made["ids"][0].to(device), which: made["ids"][1].to(device)}
    options = {"scale": scale, "reduction": probe.reduction, "impl": impl, **ids}
    listed = None if made["negatives"] is None else made["negatives"].to(device)
    if probe.seeded:
        listed = cpc_kernels.Negatives(probe.s, seed=99, per_step=probe.per_step)
    leaves = [q, z, scale] + ([own] if vectors else [])
    if probe.op == "dense":
        loss = cpc_kernels.info_nce(q, z, own, **options)
    elif probe.op == "sampled":
        loss = cpc_kernels.sampled_info_nce(q, z, own, listed, **options)  # pyright: ignore[reportArgumentType]
    else:
        weights = leaf(made["weights"])
        leaves.append(weights)
        if impl == "reference":
            options.pop("impl")
            loss = reference.bilinear_info_nce(q, weights, z, own, listed, **options)
        else:
            loss = cpc_kernels.bilinear_info_nce(q, weights, z, own, listed, **options)
    loss.backward(made["upstream"].to(loss) if loss.ndim else torch.tensor(0.37).to(loss))
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [loss.detach().cpu()] + [grad.cpu() for grad in grads]


def compute_stats(
    probe: Probe, made: dict[str, Any], device: torch.device, dtype: torch.dtype | None, impl: str
) -> list[Tensor]:
    """Loss, log-sum-exp, positive score and rank, on the CPU, of kernels that make no gradients, as scoring asks."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, dtype if tensor.is_floating_point() else None)
        return tensor.repeat_interleave(2, -1)[..., ::2] if probe.strided and tensor.is_floating_point() else tensor

    q, z, own = (moved(made[name]) for name in ("anchors", "candidates", "positives"))
    options: dict[str, Any] = {"scale": probe.scale, "impl": impl}
    if made["ids"] is not None:
        which = "pool_ids" if probe.op == "sampled" else "candidate_ids"
        options |= {"anchor_ids": made["ids"][0].to(device), which: made["ids"][1].to(device)}
    listed = None if made["negatives"] is None else made["negatives"].to(device)
    if probe.seeded:
        listed = cpc_kernels.Negatives(probe.s, seed=99, per_step=probe.per_step)
    if probe.op == "dense":
        found = cpc_kernels.info_nce_stats(q, z, own, **options)
    elif probe.op == "sampled":
        found = cpc_kernels.sampled_info_nce_stats(q, z, own, listed, **options)  # pyright: ignore[reportArgumentType]
    else:
        found = cpc_kernels.bilinear_info_nce_stats(q, moved(made["weights"]), z, own, listed, **options)
    return [found.loss.cpu(), found.lse.cpu(), found.positive.cpu(), found.rank.cpu().double()]


def upstream(probe: Probe, made: dict[str, Any]) -> Tensor:
    """d result / d loss of each row."""
    if probe.reduction == "none":
        return made["upstream"].double()
    own = made["positives"]
    counted = own.shape[:-1].numel() if own.is_floating_point() else int((own >= 0).sum())
    whole = 0.37 / (max(counted, 1) if probe.reduction == "mean" else 1)
    return torch.full_like(made["upstream"], whole, dtype=torch.float64)


def slopes(probe: Probe, made: dict[str, Any]) -> float:
    """What dscale is summed from: the sum of |g_i d loss_i / d scale|. Gradients of both signs cancel in the total."""
    step, cpu, wide = 1e-5, torch.device("cpu"), torch.float64
    rows = replace(probe, reduction="none")
    high, low = (
        compute(rows, made | {"scale": torch.tensor(probe.scale + h, dtype=wide)}, cpu, wide, "reference")[0]
        for h in (step, -step)
    )
    return float((upstream(probe, made) * (high - low) / (2 * step)).abs().sum())


def most(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def sizes(probe: Probe, made: dict[str, Any]) -> dict[str, float]:
    """By name, how large the terms are that a result is summed from; for the loss, a bound of |lse|."""
    q, z, own = (made[name].double() for name in ("anchors", "candidates", "positives"))
    if probe.op == "bilinear":
        q = torch.einsum("kdc,nc->nkd", made["weights"].double(), q)
    product, candidate = most(q @ z.T), most(z)
    if probe.positives == "vectors":
        product, candidate = max(product, most((q * own).sum(-1))), max(candidate, most(own))
    slope = most(upstream(probe, made))
    whole = abs(probe.scale) * slope
    return {
        "loss": abs(probe.scale) * product + math.log(1 + len(z)),
        "dq": whole * candidate,
        "dk": whole * most(q),
        "dscale": max(slopes(probe, made), slope * product),
        "dv or dw": whole * most(q),
    }


def check(probe: Probe, device: torch.device, impl: str = "triton") -> dict[str, Any]:
    """One line of the matrix: status passed, failed or raised; the worst error beside what was allowed."""
    told: dict[str, Any] = {"probe": probe.name}
    made, cpu = make(probe), torch.device("cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            truth = compute(probe, made, cpu, torch.float64, "reference")
            naive = compute(probe, made, cpu, None, "reference")
            ours = compute(probe, made, device, None, impl)
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                twice = [compute(probe, made, device, None, impl) for _ in range(2)]
            finally:
                torch.use_deterministic_algorithms(False)
            true_stats = compute_stats(probe, made, cpu, torch.float64, "reference")
            naive_stats = compute_stats(probe, made, cpu, None, "reference")
            widest = tiles.projected_max_d(16 if made["anchors"].dtype.itemsize == 2 else 32)
            fused = probe.op == "bilinear" and not probe.s and impl == "triton" and probe.d <= widest
            scored = [compute_stats(probe, made, device, None, way) for way in (impl, *["fused"] * fused)]
    except Exception as problem:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises where no call can succeed any more: another process must go on
        return told | {"status": "raised", "why": f"{type(problem).__name__}: {problem}"[:300]}
    dtype, terms = getattr(torch, probe.dtype), sizes(probe, made)
    rounding, kept = (torch.finfo(t).eps / 2 for t in (dtype, reference.compute_dtype(dtype)))
    worst = (0.0, "", 0.0, 0.0)
    for run in (ours, twice[0]):
        for name, a, b, c in zip(NAMES, run, naive, truth, strict=False):
            size = terms[name]
            top = size if name == "dscale" else most(c)
            theirs = 50 * rounding if probe.dtype == "float64" else error(b, c, size)
            summed = kept * size * (1 if name == "loss" else 1 + terms["loss"])
            allowed = 2 * (theirs + (rounding * top + summed) / max(top, size, 1e-300))
            found = error(a, c, size)
            excess = found / max(allowed, 1e-300) if found == found else torch.inf
            worst = max(worst, (excess, name, found, allowed))
    for run in scored:
        for name, a, b, c in zip(("loss", "lse", "positive"), run, naive_stats, true_stats, strict=False):
            if not torch.equal(a[a.isinf() | c.isinf()].double(), c[a.isinf() | c.isinf()]):
                worst = (torch.inf, name, torch.inf, 0.0)
                continue
            a, b, c = (t.double().where(c.isfinite(), 0.0) for t in (a, b, c))
            size = terms["loss"]
            theirs = 50 * rounding if probe.dtype == "float64" else error(b, c, size)
            allowed = 2 * (theirs + ((rounding + kept) * size) / max(most(c), size, 1e-300))
            found = error(a, c, size)
            excess = found / max(allowed, 1e-300) if found == found else torch.inf
            worst = max(worst, (excess, name, found, allowed))
        off, allowed = (most(rank - true_stats[3]) for rank in (run[3], naive_stats[3]))
        worst = max(worst, (off / (allowed + 1), "rank", off, allowed + 1))  # scores that round to a tie
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*twice, strict=True))
    told |= {"status": "passed" if worst[0] <= 1 and same else "failed", "error": worst[2], "allowed": worst[3]}
    if not same:
        told["why"] = "two runs differ in their bits"
    elif worst[0] > 1:
        told["why"] = f"{worst[1]} is off"
    return told


def main() -> int:
    """The small probes, one line each: what compute-sanitizer is run on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [check(probe, device) for probe in probes(small=True)]
    for row in found:
        print(row["status"], row["probe"], row.get("why", ""), flush=True)
    return int(any(row["status"] != "passed" for row in found))


if __name__ == "__main__":
    sys.exit(main())
