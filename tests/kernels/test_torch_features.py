"""The ops in torch's hands: upstream gradients, transforms, meta tensors, export, DDP, the profiler, memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from cpc_kernels import Negatives, bilinear_info_nce, info_nce, sampled_info_nce
from cpc_kernels.autograd import learns
from cpc_kernels.capabilities import CPP
from cpc_kernels.ranges import SILENT, stage

HERE = Path(__file__).parent
needs_cpp = pytest.mark.skipif(not CPP.available, reason=CPP.reason)
OPS = {
    "dense, mean": (info_nce, "chunked", "mean"),
    "dense, none": (info_nce, "chunked", "none"),
    "sampled, gather": (sampled_info_nce, "gather", "mean"),
    "sampled, cpp": (sampled_info_nce, "cpp", "mean"),
    "sampled, cpp, none": (sampled_info_nce, "cpp", "none"),
}
every = pytest.mark.parametrize("name", [pytest.param(n, marks=needs_cpp) if "cpp" in n else n for n in OPS])


def make(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    anchors, pool = torch.randn(7, 6, generator=g).to(dtype), torch.randn(9, 6, generator=g).to(dtype)
    return anchors, pool, torch.randint(-1, 9, (7,), generator=g), torch.randint(-1, 9, (7, 5), generator=g)


def loss_of(name, impl=None, reduction=None):
    """anchors, pool -> the loss of that op and implementation."""
    op, own, usual = OPS[name]
    _, _, positives, negatives = make()
    listed = (negatives,) if op is sampled_info_nce else ()
    options = {"impl": impl or own, "reduction": reduction or usual, "scale": 0.7}
    return lambda anchors, pool: op(anchors, pool, positives, *listed, **options)


def leaves(dtype=torch.float32):
    return [t.requires_grad_() for t in make(dtype)[:2]]


@every
def test_autocast_reaches_no_product_inside(name):
    """float16, which a CPU computes in float32: to the bit as without, the scale's gradient too, which is an inner
    product; and a backward that runs inside."""
    op, impl, _ = OPS[name]
    _, _, positives, negatives = make()
    listed = (negatives,) if op is sampled_info_nce else ()

    def gradients(forward: bool, backward: bool):
        of = (*leaves(), torch.tensor([0.7], requires_grad=True))
        with torch.autocast("cpu", torch.float16, enabled=forward):
            loss = op(*of[:2], positives, *listed, scale=of[2], impl=impl)
        with torch.autocast("cpu", torch.float16, enabled=backward):
            return loss, *torch.autograd.grad(loss, of)

    plain = gradients(False, False)
    for inside in ((True, True), (True, False), (False, True)):
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(*inside), strict=True))


@pytest.mark.parametrize("side", ["contexts", "candidates"])
@pytest.mark.parametrize("listed", [False, True])
def test_autocast_reaches_no_projection(listed, side):
    """Of listed rows, index_add_ refused what autocast had rounded."""
    g = torch.Generator().manual_seed(0)
    contexts, weights, latents = (torch.randn(*shape, generator=g) for shape in ((6, 4), (2, 3, 4), (5, 3)))
    positives = torch.arange(6) % 5 if listed else torch.arange(12).view(6, 2) % 5
    rows = {"sources": torch.arange(6), "counts": [3, 3]} if listed else {}

    def gradients(forward: bool, backward: bool):
        of = [t.clone().requires_grad_() for t in (contexts, weights, latents)]
        with torch.autocast("cpu", torch.float16, enabled=forward):
            loss = bilinear_info_nce(*of, positives, side=side, **rows)
        with torch.autocast("cpu", torch.float16, enabled=backward):
            return loss, *torch.autograd.grad(loss, of)

    plain = gradients(False, False)
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(True, False), strict=True))
    if listed and side == "contexts":  # elsewhere torch's own products have their own backward, which autocast reaches
        assert all(torch.equal(a, b) for a, b in zip(plain, gradients(True, True), strict=True))


@every
@pytest.mark.parametrize("kind", ["ones", "mixed", "negative", "zero", "one row", "expanded"])
def test_any_upstream_gradient(name, kind):
    upstream = {
        "ones": torch.ones(7), "mixed": torch.tensor([1.0, -2, 0, 0.5, 0, -0.1, 3]), "negative": -torch.rand(7),
        "zero": torch.zeros(7), "one row": torch.eye(7)[2], "expanded": torch.tensor(-0.3).expand(7),
    }[kind]  # fmt: skip
    ours = torch.autograd.grad(loss_of(name, reduction="none")(*(x := leaves())), x, upstream)
    spec = loss_of(name, "reference", "none")
    truth = torch.autograd.grad(spec(*(x := leaves(torch.float64))), x, upstream.double())
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    for factor in (-2.0, 0.0):  # of a sum
        total = torch.autograd.grad(factor * loss_of(name, reduction="sum")(*(x := leaves())), x)
        expected = torch.autograd.grad(factor * spec(*(x := leaves(torch.float64))).sum(), x)
        for a, b in zip(total, expected, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(name, reentrant):
    loss = loss_of(name)
    truth = torch.autograd.grad(loss(*(x := leaves())).sum(), x)
    x = leaves()
    checkpoint(loss, *x, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(a.grad, b) for a, b in zip(x, truth, strict=True))


@every
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func's own
def test_derivatives_by_torch_func_are_refused(name):
    op, (anchors, pool, *_) = loss_of(name), make()

    def loss(q):
        return op(q, pool).sum()

    refused = pytest.raises(RuntimeError, match=r"info_nce: torch.func's derivatives .*impl=\"reference\"")
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with refused:
            transform(loss)(anchors)
    with refused:
        torch.func.jvp(loss, (anchors,), (anchors,))
    with refused, forward_ad.dual_level():
        loss(forward_ad.make_dual(anchors, anchors))
    with refused:
        torch.func.vmap(torch.func.grad(loss))(torch.stack([anchors, anchors]))


@every
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.func's own
def test_the_spec_takes_every_derivative(name):
    loss, (anchors, pool, *_) = loss_of(name, "reference", "sum"), make(torch.float64)
    by_func = torch.func.grad(loss)(anchors, pool)
    (by_autograd,) = torch.autograd.grad(loss(q := anchors.clone().requires_grad_(), pool), q)
    torch.testing.assert_close(by_func, by_autograd)
    assert torch.func.hessian(loss)(anchors, pool).isfinite().all()


@pytest.mark.parametrize("ids", [None, torch.arange(6) % 2])
def test_the_spec_takes_vmap_over_every_argument(ids):
    several = torch.randn(3, 6, 8), torch.randn(3, 6, 8), torch.stack([torch.randperm(6) for _ in range(3)])

    def loss(*given):
        return info_nce(*given, anchor_ids=ids, candidate_ids=ids, impl="reference")

    torch.testing.assert_close(torch.func.vmap(loss)(*several), torch.stack(list(map(loss, *several))))


@every
def test_vmap_loops(name):
    loss, (anchors, pool, *_) = loss_of(name), make()
    several = torch.stack([anchors, 2 * anchors, -anchors]).requires_grad_()
    together = torch.func.vmap(loss, (0, None))(several, pool)
    torch.testing.assert_close(together, torch.stack([loss(each, pool) for each in several]))
    (ours,) = torch.autograd.grad(together.sum(), several)
    (theirs,) = torch.autograd.grad(sum(loss(each, pool).sum() for each in several), several)
    torch.testing.assert_close(ours, theirs)


@every
def test_meta_tensors_have_shapes(name):
    op, impl, reduction = OPS[name]
    anchors, pool, positives, negatives = (t.to("meta") for t in make())
    x = anchors.requires_grad_(), pool.requires_grad_()
    for listed in (negatives, Negatives(3, 0)) if op is sampled_info_nce else (None,):
        rest = () if listed is None else (listed,)
        loss = op(*x, positives, *rest, impl=impl, reduction=reduction)
        assert loss.shape == (() if reduction == "mean" else (7,))
        assert [g.shape for g in torch.autograd.grad(loss.sum(), x)] == [t.shape for t in x]


class Objective(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(1)))

    def forward(self, contexts, candidates, positives):
        dense = bilinear_info_nce(contexts, self.weights, candidates, positives)
        return dense + bilinear_info_nce(contexts, self.weights, candidates, positives, Negatives(4, 0))


def batch(n, m):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, 6, generator=g), torch.randn(m, 6, generator=g), torch.randint(-1, m, (n, 2), generator=g)


def test_export_for_any_size(unpoisoned):
    objective = Objective()
    n, m = torch.export.Dim("n", min=2), torch.export.Dim("m", min=2)
    program = torch.export.export(objective, batch(5, 8), dynamic_shapes=({0: n}, {0: m}, {0: n}))
    called = {str(node.target) for node in program.graph.nodes}
    assert {"cpc_kernels.info_nce.default", "cpc_kernels.sampled_info_nce.default"} <= called
    for sizes in ((5, 8), (11, 30), (3, 4)):
        torch.testing.assert_close(program.module()(*batch(*sizes)), objective(*batch(*sizes)))


def test_data_parallel(tmp_path):
    def gradients(wrap):
        # gone before the group is: as its last owner, DDP may wait for a thread that waits for Python's lock
        objective = wrap(Objective())
        objective(*batch(5, 8)).backward()
        return [weight.grad for weight in objective.parameters()]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.testing.assert_close(gradients(torch.nn.parallel.DistributedDataParallel), gradients(lambda same: same))
    finally:
        torch.distributed.destroy_process_group()


STAGES = {
    "dense, mean": {"scores", "loss", "expectation", "gradients"},
    "dense, none": {"scores", "loss", "expectation", "gradients"},
    "sampled, gather": {"scores", "loss", "expectation", "gradients"},
    "sampled, cpp": {"forward", "backward", "sort", "sums"},
    "sampled, cpp, none": {"forward", "backward", "sort", "sums"},
}


@every
def test_the_profiler_sees_every_stage(name):
    x = leaves()
    with torch.profiler.profile() as profile:
        loss_of(name)(*x).sum().backward()
    seen = {event.key for event in profile.key_averages()}
    op = "info_nce" if "dense" in name else "sampled_info_nce"
    assert {f"cpc_kernels/{op}/{stage}" for stage in STAGES[name]} <= seen


def test_the_profiler_sees_the_projection():
    sources, counts = torch.tensor([0, 1, 0]), [2, 1]
    contexts, candidates, _ = batch(5, 8)
    weights = Objective().weights
    with torch.profiler.profile() as profile:
        bilinear_info_nce(
            contexts, weights, candidates, torch.tensor([0, 1, 2]), sources=sources, counts=counts
        ).backward()
    seen = {event.key for event in profile.key_averages()}
    assert {"cpc_kernels/bilinear_info_nce/predictions", "cpc_kernels/bilinear_info_nce/gradients"} <= seen


def test_nobody_learns_without_gradients():
    x = leaves()
    assert learns(*x)
    with torch.no_grad():
        assert not learns(*x)


@needs_cpp
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_sampled_memory():
    """Beyond the inputs: the gradients, N (S + 1) floats, and 4 MB for blocks, slices and the allocator."""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "sampled_memory.py"], capture_output=True, text=True, check=True
    )
    extra, gradients, scores = map(float, found.stdout.split())
    assert gradients > 16
    assert scores > 8
    assert extra <= gradients + scores + 4, f"{extra:.1f} MB, gradients {gradients:.1f}, scores {scores:.1f}"


def test_a_stage_is_named_once(monkeypatch):
    """Under emit_nvtx torch listens, and pushes each of its ranges to NVTX itself."""
    pushed = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", pushed.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    with stage("info_nce", "forward", torch.device("cuda")):
        assert pushed == ["cpc_kernels/info_nce/forward"]
    listening = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)
    with listening as watch, stage("info_nce", "forward", torch.device("cuda")):
        pass
    assert len(pushed) == 1
    assert [event.name for event in watch.events()] == ["cpc_kernels/info_nce/forward"]
    assert stage("info_nce", "forward", torch.device("cpu")) is SILENT
