"""Each drop-in against the package it replaces: values, gradients, refusals, and several processes."""

import copy
import doctest
import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import originals
import pytest
import torch
from torch.nn import functional as F

from cpc_fast import dropin
from cpc_fast.dropin import lightly, pytorch_metric_learning
from cpc_kernels import reference
from cpc_kernels.exchange import gather_rows, gather_rows_with_grad, shares
from tests import processes

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "greedy_infomax_infonce.npz"
PACKAGE = Path(dropin.__file__).parent
DTYPES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: None}


def original(name):
    try:
        return getattr(originals, name)()
    except originals.Missing as missing:
        pytest.skip(str(missing))


def leaves(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def both(ours, theirs, *tensors, weights=None):
    """Values and gradients of two functions of the same tensors, (value, gradients) each."""
    results = []
    for loss in (ours, theirs):
        inputs = [t.detach().clone().requires_grad_() for t in tensors]
        value = loss(*inputs)
        upstream = torch.ones_like(value) if weights is None else weights.to(value.dtype)
        (value * upstream).sum().backward()
        zero = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
        results.append((value.detach(), zero))
    return results


def assert_same(ours, theirs, *tensors, weights=None, normalising=False):
    """Equal to rounding of the largest entry (1e-11 in float64, 2e-5 in float32). In 16 bits the originals err
    themselves: ours may err twice as much as they do, plus one rounding, against the original in float64.

    normalising: both normalise the vectors, so that of one feature nothing but rounding is left of the gradients."""
    dtype = tensors[0].dtype
    (value, grads), (expected, wanted) = both(ours, theirs, *tensors, weights=weights)
    assert value.shape == expected.shape
    assert [g.dtype for g in grads] == [g.dtype for g in wanted]
    got, expected = [value, *grads], [expected, *wanted]
    if dtype == torch.bfloat16:
        double = [t.double() for t in tensors]
        _, (value, grads) = both(ours, theirs, *double, weights=weights)
        truth, rounding = [value, *grads], torch.finfo(dtype).eps
    else:
        truth, rounding = expected, DTYPES[dtype]
    names = ["value", *range(len(grads))]
    if normalising and tensors[0].shape[-1] == 1:
        for grad, limit in zip(got[1:], rounding_of_parts(theirs, *tensors, weights=weights), strict=True):
            assert float(grad.abs().max()) <= limit
        names, got, expected, truth = names[:1], got[:1], expected[:1], truth[:1]
    for name, mine, other, true in zip(names, got, expected, truth, strict=True):
        size = float(true.abs().max()) + 1e-3
        error, allowed = (float((t.double() - true.double()).abs().max()) / size for t in (mine, other))
        assert error <= 2 * (allowed + rounding), f"{name}: off by {error:.2e}; the original is off by {allowed:.2e}"


def rounding_of_parts(theirs, *tensors, weights=None):
    """How far from 0 the gradients of vectors of one feature that `theirs` normalises may be by rounding, for each.

    With u = x / |x| a gradient is (g - u u g) / |x|, g that of u: two parts of one size cancel, each rounded. (Where
    the parts of g cancel in their turn, their rounding may exceed this; they do not in the vectors drawn here.)
    """
    units = [F.normalize(t.double(), dim=-1).requires_grad_() for t in tensors]
    with mock.patch.object(F, "normalize", lambda x, **_: x):
        value = theirs(*units)
    (value if weights is None else value * weights).sum().backward()
    steepest = max(float(unit.grad.abs().max()) for unit in units)
    return [2 * torch.finfo(t.dtype).eps * steepest / float(t.abs().min()) for t in tensors]


# --- info-nce-pytorch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["in-batch", "unpaired", "paired"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_info_nce_is_info_nce_pytorch(dtype, mode, reduction):
    theirs = original("info_nce")
    for n, m, d, temperature in [(7, 11, 5, 0.1), (1, 3, 1, 1.0), (33, 2, 17, 0.02), (12, 40, 64, 7.0)]:
        shapes = [(n, d), (n, d)] + {"in-batch": [], "unpaired": [(m, d)], "paired": [(n, m, d)]}[mode]
        options = {"temperature": temperature, "reduction": reduction}
        options["negative_mode"] = "unpaired" if mode == "in-batch" else mode
        weights = torch.linspace(0.5, 2, n) if reduction == "none" else None
        tensors = leaves(*shapes, dtype=dtype)
        ours = dropin.InfoNCE(**options)
        assert_same(ours, theirs.InfoNCE(**options), *tensors, weights=weights, normalising=True)
        assert_same(lambda *t, o=options: dropin.info_nce(*t, **o), ours, *tensors)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("negatives", [None, (20, 6), (9, 4, 6)])
def test_a_learnable_temperature_learns_the_same(negatives, shape):
    theirs = original("info_nce")
    query, key = leaves((9, 6), (9, 6))
    temperature = torch.full(shape, 0.2, dtype=torch.float64)
    extra = leaves(negatives, seed=1) if negatives else []
    mode = "paired" if negatives and len(negatives) == 3 else "unpaired"
    for reduction in ("mean", "none"):
        options = {"negative_mode": mode, "reduction": reduction}
        weights = torch.linspace(0.5, 2, 9) if reduction == "none" else None
        assert_same(
            lambda q, k, t, o=options: dropin.info_nce(q, k, *extra, temperature=t, **o),
            lambda q, k, t, o=options: theirs.info_nce(q, k, *extra, temperature=t, **o),
            query,
            key,
            temperature,
            weights=weights,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_inverse_of_a_16_bit_temperature_is_not_rounded(dtype):
    query, key = (t.detach() for t in leaves((9, 6), (9, 6), dtype=torch.float32))
    temperature = torch.tensor(0.013, dtype=dtype)
    ours = dropin.info_nce(query, key, temperature=temperature)
    torch.testing.assert_close(ours, dropin.info_nce(query, key, temperature=float(temperature)))


def test_zero_vectors_and_strides():
    theirs = original("info_nce")
    query, key, negatives = leaves((6, 8), (6, 8), (6, 5, 8))
    query[1], negatives[2, 3] = 0, 0
    for mode, negs in (("paired", negatives), ("unpaired", negatives[:, 0])):
        assert_same(
            lambda q, k, n, m=mode: dropin.info_nce(q[:, ::2], k[:, ::2], n[..., ::2], negative_mode=m),
            lambda q, k, n, m=mode: theirs.info_nce(q[:, ::2], k[:, ::2], n[..., ::2], negative_mode=m),
            query,
            key,
            negs,
        )


def test_tiny_losses_keep_their_gradients():
    key = F.normalize(torch.eye(64)[:8] + 0.001, dim=1)
    query = key.clone().requires_grad_()
    exact = key.double().requires_grad_()
    for q, k in ((query, key), (exact, key.double())):
        dropin.info_nce(q * 2, k, temperature=0.02).backward()
    assert 0 < exact.grad.abs().max() < 1e-17
    torch.testing.assert_close(query.grad.double(), exact.grad, rtol=1e-3, atol=1e-3 * float(exact.grad.abs().max()))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([(4, 3, 2), (4, 2)], {}, r"query and positive_key must both be \(N, D\). Got query \(4, 3, 2\)"),
        ([(4, 2), (5, 2)], {}, r"as many rows. Got query \(4, 2\), positive_key \(5, 2\)"),
        ([(4, 2), (4, 3)], {}, r"as many features. Got query \(4, 2\), positive_key \(4, 3\)"),
        ([(4, 2), (4, 2), (4, 3, 2)], {}, r"negative_keys must be \(M, D\) when they are unpaired"),
        ([(4, 2), (4, 2), (4, 2)], {"negative_mode": "paired"}, r"\(N, M, D\) when they are paired"),
        ([(4, 2), (4, 2), (5, 3, 2)], {"negative_mode": "paired"}, r"paired negative_keys must have as many rows"),
        ([(4, 2), (4, 2), (5, 3)], {}, r"features. Got query \(4, 2\), positive_key \(4, 2\), negative_keys \(5, 3\)"),
        ([(4, 2), (4, 2)], {"reduction": "average"}, r"reduction must be none, sum or mean. Got 'average'"),
        ([(4, 2), (4, 2)], {"negative_mode": "in-batch"}, r"negative_mode must be unpaired or paired. Got 'in-batch'"),
    ],
)
def test_info_nce_refuses_as_the_original_does_and_says_more(shapes, options, message):
    tensors = leaves(*shapes)
    with pytest.raises(ValueError, match=message):
        dropin.InfoNCE(**options)(*tensors)


WRONG = [  # what is given, and what the error must say of it
    (lambda x: x.tolist(), TypeError, "{name} must be a torch.Tensor. Got list"),
    (lambda x: x.long(), TypeError, "{name} must be floating point. Got torch.int64"),
    (lambda x: x.half(), TypeError, "{name} must have the dtype of {first}. Got torch.float16 and torch.float32"),
    (lambda x: x.to("meta"), ValueError, "{name} must be on the device of {first}. Got meta and cpu"),
]
TWO = {  # loss: the names of its two tensors, and how it is called
    "info_nce": ("query", "positive_key", dropin.InfoNCE()),
    "NTXentLoss": ("out0", "out1", lightly.NTXentLoss()),
    "ClipLoss": ("image_features", "text_features", lambda a, b: dropin.ClipLoss()(a, b, 1.0)),
    "GreedyInfoMaxLoss": (
        "z", "c", lambda a, b: dropin.GreedyInfoMaxLoss(SimpleNamespace(negative_samples=2, prediction_step=1), 4, 4)(
            *(x if isinstance(x, list) else x.expand(2, 4, 4, 4) for x in (a, b)))),
    "SupConLoss": (
        "embeddings", "ref_emb",
        lambda a, b: dropin.SupConLoss()(a, torch.arange(4), ref_emb=b, ref_labels=torch.arange(4))),
}  # fmt: skip


@pytest.mark.parametrize("loss", TWO)
def test_errors_speak_the_callers_names(loss):
    first, second, call = TWO[loss]
    x = torch.ones(4, 4)
    for spoil, kind, message in WRONG:
        with pytest.raises(kind, match=f"{loss}: " + message.format(name=second, first=first)):
            call(x, spoil(x))
    with pytest.raises(TypeError, match=f"{loss}: {first} must be floating point. Got torch.int64"):
        call(x.long(), x)
    with torch.autocast("cpu", torch.bfloat16):  # which unites them
        call(x, x.bfloat16())
        with pytest.raises(TypeError, match=f"{loss}: {second} must have the dtype of {first}. Got torch.float64"):
            call(x, x.double())


def test_temperatures_and_scales_are_one_number():
    x, three = torch.ones(4, 4), torch.ones(3)
    losses = {
        "info_nce": lambda t: dropin.InfoNCE(temperature=t)(x, x),
        "SupConLoss": lambda t: dropin.SupConLoss(temperature=t)(x, torch.arange(4)),
        "NTXentLoss": lambda t: lightly.NTXentLoss(temperature=t)(x, x),
    }
    for loss, call in losses.items():
        with pytest.raises(ValueError, match=rf"{loss}: temperature must be .* one element. Got shape \(3,\)"):
            call(three)
        with pytest.raises(TypeError, match=rf"{loss}: temperature must be a number .* Got '0.1'"):
            call("0.1")
        with pytest.raises(ValueError, match=rf"{loss}: .*temperature.* it divides"):
            call(0)
        with pytest.raises(ValueError, match=rf"{loss}: temperature must be finite. Got nan"):
            call(float("nan"))
        assert call(np.float32(0.5)) == call(np.int64(2) / 4) == call(0.5)
    with pytest.raises(ValueError, match=r"ClipLoss: logit_scale must be .* Got shape \(3,\)"):
        dropin.ClipLoss()(x, x, three)


# --- lightly ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (2, 1), (9, 17), (40, 64)])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_nt_xent_of_two_views_is_lightlys(dtype, shape, temperature):
    theirs = original("lightly")
    tensors = leaves(shape, shape, dtype=dtype)
    assert_same(lightly.NTXentLoss(temperature), theirs.NTXentLoss(temperature), *tensors, normalising=True)


def test_nt_xent_with_a_memory_bank_is_lightlys_step_by_step():
    theirs = original("lightly")
    criteria = []
    for make in (lightly.NTXentLoss, theirs.NTXentLoss):
        torch.manual_seed(5)
        criteria.append(make(temperature=0.2, memory_bank_size=(20, 6)))
    ours, expected = criteria
    assert torch.equal(ours.memory_bank.bank, expected.memory_bank.bank)
    assert ours.state_dict().keys() == expected.state_dict().keys()
    for step, n in enumerate([8, 8, 8, 3, 20, 1, 30, 7]):
        tensors = leaves((n, 6), (n, 6), dtype=torch.float32, seed=step)
        assert_same(ours, expected, *tensors)
        assert torch.equal(ours.memory_bank.bank, expected.memory_bank.bank)
        assert torch.equal(ours.memory_bank.bank_ptr, expected.memory_bank.bank_ptr)
    with torch.no_grad():  # a validation batch leaves the bank as it is
        bank = ours.memory_bank.bank.clone()
        assert torch.allclose(ours(*tensors), expected(*tensors), rtol=1e-5)
    assert torch.equal(ours.memory_bank.bank, bank)
    assert ours(*leaves((4, 6), (4, 6))).dtype == torch.float64  # the original refuses float64 with a bank


def test_lightly_refusals():
    for size, message in ((8, r"say \(8, 128\)"), ((-1, 4), "cannot be negative"), ((2, 3, 4), r"\(rows, features\)")):
        with pytest.raises(ValueError, match=message):
            lightly.NTXentLoss(memory_bank_size=size)
    with pytest.raises(ValueError, match=r"at least 1e-8; it divides. Got 0"):
        lightly.NTXentLoss(temperature=0)
    with pytest.raises(ValueError, match=r"Got out0 \(4, 2\), out1 \(3, 2\)"):
        lightly.NTXentLoss()(torch.zeros(4, 2), torch.zeros(3, 2))
    with pytest.raises(
        ValueError, match=r"holds 6 features, the views have 5. Build it with memory_bank_size=\(8, 5\)"
    ):
        lightly.NTXentLoss(memory_bank_size=(8, 6))(torch.zeros(4, 5), torch.zeros(4, 5))


# --- open_clip --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (9, 17), (40, 64)])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_clip_loss_is_open_clips(dtype, shape, scale):
    theirs = original("open_clip")
    images, texts = (F.normalize(t, dim=1) for t in leaves(shape, shape, dtype=dtype))
    scale = torch.tensor(scale, dtype=dtype)
    assert_same(dropin.ClipLoss(), theirs.ClipLoss(), images, texts, scale)


def test_clip_loss_takes_what_open_clip_takes():
    theirs = original("open_clip")
    images, texts = leaves((6, 4), (6, 4))
    scale, bias = torch.tensor(5.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)
    assert_same(dropin.ClipLoss(cache_labels=True), theirs.ClipLoss(cache_labels=True), images, texts, scale, bias)
    ours = dropin.ClipLoss()(images, texts, scale, output_dict=True)
    assert ours.keys() == theirs.ClipLoss()(images, texts, scale, output_dict=True).keys()
    assert dropin.ClipLoss()(images, texts, 5.0) == ours["contrastive_loss"]
    assert dropin.ClipLoss()(images.float(), texts.float(), 5.0, bias).dtype == torch.float32


def test_clip_loss_refusals():
    x = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"Use torch.distributed, with use_horovod=False"):
        dropin.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="Got rank 2, world_size 2"):
        dropin.ClipLoss(rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"Got image_features \(4, 2\), text_features \(3, 2\)"):
        dropin.ClipLoss()(x, x[:3], 1.0)
    with pytest.raises(ValueError, match=r"one number, the same for all pairs. Got shape \(4,\)"):
        dropin.ClipLoss()(x, x, 1.0, torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"world_size is 2, but torch.distributed has not been started"):
        dropin.ClipLoss(world_size=2)(x, x, 1.0)


# --- Greedy InfoMax ---------------------------------------------------------------------------------------------------


def gim_options(samples, steps, **more):
    return SimpleNamespace(negative_samples=samples, prediction_step=steps, **more)


@pytest.mark.skipif(not GOLDEN.exists(), reason="shared/golden is not beside the checkout")
@pytest.mark.parametrize("case", ["a", "b", "c"])
@pytest.mark.parametrize("eps", [1e-11, 0.0])
def test_greedy_infomax_reproduces_the_published_loss(case, eps):
    golden = np.load(GOLDEN)
    get = {key.split(".")[1]: torch.from_numpy(golden[key]) for key in golden if key.startswith(case)}
    _b, channels, _h, _w, steps, samples, skip = get["meta"].tolist()
    loss = dropin.GreedyInfoMaxLoss(gim_options(samples, steps), channels, channels, eps=eps).double()
    loss.load_state_dict({f"W_k.{k}.weight": w[:, :, None, None] for k, w in enumerate(get["W"])})
    z, c = get["z"].requires_grad_(), get["c"].requires_grad_()
    value = loss(z, c, skip, negatives=[get[f"idx{k + 1}"] for k in range(steps)])
    value.backward()
    got = {"loss": value.detach(), "dz": z.grad, "dc": c.grad, "dW": torch.stack([w.weight.grad for w in loss.W_k])}
    if eps == 0:  # what the published loss is without its cap
        leaf = {name: get[name].detach().clone().requires_grad_() for name in ("z", "c", "W")}
        expected = reference_greedy(*leaf.values(), [get[f"idx{k + 1}"].long() for k in range(steps)], skip)
        expected.backward()
        assert expected >= get["loss"]
        get |= {"loss": expected.detach()} | {f"d{name}": tensor.grad for name, tensor in leaf.items()}
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, get[name].view_as(tensor), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_greedy_infomax_draws_what_the_published_code_draws(skip):
    z, c = leaves((2, 6, 7, 5), (2, 9, 7, 5))
    loss = dropin.GreedyInfoMaxLoss(gim_options(4, 3, weight_init=True), 6, 9).double()
    first = loss.W_k[0].weight[:, :, 0, 0].detach()  # (9, 6), orthonormal in float32
    torch.testing.assert_close(first.T @ first, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.manual_seed(3)
    value = loss(z, c, skip)
    torch.manual_seed(3)
    drawn = []
    for k in range(1, 4):  # as the published code: one index per negative, over the step's targets
        count = (7 - k - skip) * 5 * 2
        drawn.append(torch.randint(count, (count * 4, 1), dtype=torch.long))
    assert value == loss(z, c, skip, negatives=drawn)
    weights = torch.stack([w.weight[:, :, 0, 0] for w in loss.W_k])
    torch.testing.assert_close(value, reference_greedy(z, c, weights, drawn, skip), rtol=1e-12, atol=0)


def reference_greedy(z, c, weights, drawn, skip):
    """The loss spelled out: gather, softmax, log."""
    total = 0.0
    for step, (weight, index) in enumerate(zip(weights, drawn, strict=True), start=1):
        targets = (z[:, :, step + skip :].permute(2, 3, 0, 1) @ weight.T).flatten(0, 2)
        anchors = c[:, :, : -(step + skip)].permute(2, 3, 0, 1).flatten(0, 2)
        others = targets[index.view(len(targets), -1)]  # (n, S, C)
        scores = (torch.cat([targets[:, None], others], 1) @ anchors[..., None])[..., 0]
        total = total - scores.log_softmax(1)[:, 0].mean()
    return total / len(weights)


def test_greedy_infomax_of_an_empty_batch_is_0():
    loss, nobody = dropin.GreedyInfoMaxLoss(gim_options(4, 2), 8, 8), torch.randn(0, 8, 6, 6)
    for negatives in (None, [torch.zeros(0, dtype=torch.long)] * 2):
        assert loss(nobody, nobody, negatives=negatives) == 0


@pytest.mark.parametrize("loss", [dropin.InfoNCE(), dropin.ClipLoss(), lightly.NTXentLoss()])
def test_a_schedule_of_temperatures_compiles_once_for_all(loss):
    q, k = leaves((6, 8), (6, 8), dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for value in (0.1, 0.2, 0.3):
        if isinstance(loss, dropin.ClipLoss):
            torch.testing.assert_close(compiled(q, k, 1 / value), loss(q, k, 1 / value))
        else:
            loss.temperature = value
            torch.testing.assert_close(compiled(q, k), loss(q, k))


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which goes on working all the same
def test_info_nce_can_be_traced():
    q, k = leaves((6, 8), (6, 8), dtype=torch.float32)
    torch.testing.assert_close(torch.jit.trace(dropin.InfoNCE(), (q, k))(q + 1, k), dropin.InfoNCE()(q + 1, k))


EXPORTED = {
    "InfoNCE": dropin.InfoNCE(),
    "InfoNCE paired": dropin.InfoNCE(negative_mode="paired"),
    "ClipLoss": dropin.ClipLoss(),
    "NTXentLoss": lightly.NTXentLoss(),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_loss_takes_any_batch(name):
    def given(n):
        more = {"ClipLoss": [torch.tensor(3.0)], "InfoNCE paired": [torch.ones(n, 3, 8).cumsum(0)]}
        return *leaves((n, 8), (n, 8), dtype=torch.float32), *more.get(name, [])

    loss, rows = EXPORTED[name], torch.export.Dim("rows", min=2)
    shapes = tuple({0: rows} if t.ndim else None for t in given(6))
    exported = torch.export.export(loss, given(6), dynamic_shapes=shapes)
    torch.testing.assert_close(exported.module()(*given(9)), loss(*given(9)))


def test_greedy_infomax_refusals():
    with pytest.raises(ValueError, match=r"opt.negative_samples must be 1 or more. Got None"):
        dropin.GreedyInfoMaxLoss(SimpleNamespace(prediction_step=2), 4, 4)
    loss = dropin.GreedyInfoMaxLoss(gim_options(4, 5), 4, 4)
    z = torch.zeros(2, 4, 6, 6)
    with pytest.raises(ValueError, match=r"5 steps after skipping 1 need at least 7 rows of patches. Got 6"):
        loss(z, z)
    with pytest.raises(ValueError, match=r"in_channels=4, out_channels=4, .* Got z \(2, 5, 6, 6\), c \(2, 4, 6, 6\)"):
        loss(torch.zeros(2, 5, 6, 6), z)
    with pytest.raises(IndexError, match=r"negatives of step 1 must lie between 0 and 47 .* 48 rows\). Got .* to 48"):
        dropin.GreedyInfoMaxLoss(gim_options(1, 1), 4, 4)(z, z, negatives=[torch.arange(1, 49)])
    with pytest.raises(ValueError, match=r"skip_step must be 0 or more. Got -2"):
        loss(z, z, -2)
    with pytest.raises(TypeError, match=r"weight must have the dtype of z. Got torch.float32 and torch.float16"):
        loss(z.half(), z.half())
    with pytest.raises(ValueError, match=r"Got z \(2, 4, 6, 6\), c \(2, 4, 6, 5\)"):
        loss(z, z[..., :5])
    with pytest.raises(ValueError, match=r"one tensor for each of the 5 steps. Got 1"):
        loss(z, z, 0, negatives=[torch.zeros(1)])
    with pytest.raises(ValueError, match=r"step 1 needs 60 x 4 negatives. Got \(3,\)"):
        loss(z, z, 0, negatives=[torch.zeros(3, dtype=torch.long)] * 5)


# --- pytorch-metric-learning ------------------------------------------------------------------------------------------

LABELS = {
    "two views": [0, 1, 2, 3, 0, 1, 2, 3],
    "some alone": [0, 1, 1, 2, 5, 1, 0, 9],
    "unsorted, one large": [3, 1, 3, 3, 0, 3, 3, 1],
    "all the same": [4, 4, 4],
    "all different": [0, 1, 2, 3],
    "one pair": [0, 0],
    "one pair and one other": [0, 0, 1],
    "one": [7],
    "some of NaN, nobody's": [0, 1, float("nan"), 1, float("nan"), 0],
}
REFERENCES = {
    "none": None,
    "some of each": [1, 0, 3, 3, 7, 2, 1, 9, 4, 4],
    "one each": [0, 1, 2, 3],
    "two": [0, 1],
    "one": [0],
}


def label_losses():
    theirs = original("pytorch_metric_learning")
    reducers = importlib.import_module("pytorch_metric_learning.reducers")
    distances = importlib.import_module("pytorch_metric_learning.distances")
    return theirs, reducers, distances


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
@pytest.mark.parametrize("references", REFERENCES)
@pytest.mark.parametrize("labels", LABELS)
def test_label_losses_are_pytorch_metric_learnings(name, references, labels):
    theirs, reducers, _ = label_losses()
    tags = torch.tensor(LABELS[labels])
    others = None if references == "none" else torch.tensor(REFERENCES[references])
    for d, temperature in ((5, 0.1), (16, 1.0), (3, 0.02)):
        tensors = leaves((len(tags), d), *([] if others is None else [(len(others), d)]), seed=d)
        # at 0.02 some SupCon losses round to 0 in the original, and its own reducer then leaves those rows out
        reducer = reducers.MeanReducer() if temperature == 0.02 else None
        ours, expected = (
            getattr(m, name)(temperature=temperature, reducer=reducer) for m in (pytorch_metric_learning, theirs)
        )
        call = lambda loss: lambda e, r=None: loss(e, tags, ref_emb=r, ref_labels=others)  # noqa: E731
        assert_same(call(ours), call(expected), *tensors)


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_label_losses_in_other_dtypes(name, dtype):
    theirs, _, _ = label_losses()
    generator = torch.Generator().manual_seed(1)
    for classes, n in ((3, 24), (40, 80), (64, 128)):  # the original holds positive pairs x negative pairs
        tags = torch.randint(classes, (n,), generator=generator)
        (embeddings,) = leaves((n, 32), dtype=dtype)
        ours, expected = (getattr(m, name)(temperature=0.2) for m in (pytorch_metric_learning, theirs))
        assert_same(lambda e, f=ours, t=tags: f(e, t), lambda e, f=expected, t=tags: f(e, t), embeddings)


def spelled_out(name, embeddings, tags, others, other_tags, temperature):
    """The two formulas over the whole matrix."""
    scores = F.normalize(embeddings, dim=1) @ F.normalize(others, dim=1).T / temperature
    same = tags[:, None] == other_tags
    itself = torch.eye(len(tags), dtype=torch.bool) if others is embeddings else torch.zeros_like(same)
    positive = same & ~itself
    if name == "NTXentLoss":
        lse = scores.masked_fill(same, -torch.inf).logsumexp(1)
        return F.softplus(lse[:, None] - scores)[positive].mean()
    lse = scores.masked_fill(itself, -torch.inf).logsumexp(1)
    return (lse - (scores * positive).sum(1) / positive.sum(1)).mean()


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("references", [False, True])
def test_label_losses_over_several_blocks_of_rows(name, dtype, references):
    loss = getattr(pytorch_metric_learning, name)(temperature=0.1)
    tags, other_tags = torch.arange(600) % 5 // 2, torch.arange(330) % 3
    embeddings, others = leaves((600, 16), (330, 16), dtype=dtype)
    if references:
        assert_same(
            lambda e, r: loss(e, tags, ref_emb=r, ref_labels=other_tags),
            lambda e, r: spelled_out(name, e, tags, r, other_tags, 0.1),
            embeddings,
            others,
        )
    else:
        assert_same(lambda e: loss(e, tags), lambda e: spelled_out(name, e, tags, e, tags, 0.1), embeddings)


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_the_same_labels_object_for_references_means_the_same_rows(name):
    theirs, _, _ = label_losses()
    tags = torch.tensor([0, 0, 1, 1, 2, 0])
    tensors = leaves((6, 4), (6, 4))
    for ref in (tags, tags.clone()):
        ours, expected = (getattr(m, name)() for m in (pytorch_metric_learning, theirs))
        assert_same(
            lambda e, r, t=ref, f=ours: f(e, tags, ref_emb=r, ref_labels=t),
            lambda e, r, t=ref, f=expected: f(e, tags, ref_emb=r, ref_labels=t),
            *tensors,
        )


def test_reducers_and_distances_of_the_original_work():
    theirs, reducers, distances = label_losses()
    tags = torch.tensor([0, 1, 1, 2, 5, 1, 0, 9])
    (embeddings,) = leaves((8, 6))
    cases = [("SupConLoss", r) for r in ("MeanReducer", "SumReducer", "AvgNonZeroReducer", "PerAnchorReducer")]
    cases += [("NTXentLoss", r) for r in ("MeanReducer", "SumReducer")]
    for name, reducer in cases:
        temperature = 0.03 if reducer in ("MeanReducer", "SumReducer") else 0.1  # tiny losses count alike in these
        for distance in ("CosineSimilarity", "DotProductSimilarity"):
            ours, expected = (
                getattr(m, name)(
                    temperature=temperature,
                    reducer=getattr(reducers, reducer)(),
                    distance=getattr(distances, distance)(),
                )
                for m in (pytorch_metric_learning, theirs)
            )
            assert_same(lambda e, f=ours: f(e, tags), lambda e, f=expected: f(e, tags), embeddings * 0.3)
    alone = torch.arange(8)
    assert pytorch_metric_learning.SupConLoss(reducer=reducers.MeanReducer())(embeddings, alone) == 0


def test_the_self_supervised_wrapper_takes_a_drop_in():
    theirs, _, _ = label_losses()
    tensors = leaves((6, 4), (6, 4))
    for name in ("SupConLoss", "NTXentLoss"):
        ours, expected = (theirs.SelfSupervisedLoss(getattr(m, name)()) for m in (pytorch_metric_learning, theirs))
        assert_same(ours, expected, *tensors)


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_the_temperature_of_label_losses_may_learn(name):
    theirs, _, _ = label_losses()
    temperature = torch.tensor([0.3], dtype=torch.float64)
    for labels in ("two views", "unsorted, one large"):
        tags = torch.tensor(LABELS[labels])

        def call(module, tags=tags):
            def loss(vectors, temperature):
                criterion = getattr(module, name)()
                criterion.temperature = temperature
                return criterion(vectors, tags)

            return loss

        (embeddings,) = leaves((len(tags), 5))
        assert_same(call(pytorch_metric_learning), call(theirs), embeddings, temperature)


def test_positives_far_apart_keep_their_gradient():
    """At temperature 0.005 one positive scores 200, another 20: the second is the one to learn from."""
    embeddings = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.1, 1.0, 0.0], [0.08, 0.0, 1.0]])
    tags = torch.tensor([0, 0, 0, 1])
    results = []
    for dtype in (torch.float32, torch.float64):
        e = embeddings.to(dtype, copy=True).requires_grad_()
        loss = pytorch_metric_learning.NTXentLoss(temperature=0.005)(e, tags)
        loss.backward()
        results.append((loss.item(), e.grad.double()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert float(results[1][1].abs().max()) > 0.1
    torch.testing.assert_close(*(grad for _, grad in results), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("length", [1.0, 1e2, 1e4])
def test_one_long_embedding_ruins_nobody_elses_loss(length):
    """Dot products of vectors that are not normalised: the long one is orthogonal to all others."""
    metric, distances = original("pytorch_metric_learning"), pytest.importorskip("pytorch_metric_learning.distances")
    distance = distances.DotProductSimilarity(normalize_embeddings=False)
    (x,) = leaves((9, 8), dtype=torch.float32)
    x[:, 0] = x[8] = 0
    x[8, 0] = length
    labels = torch.arange(3).repeat_interleave(3)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = pytorch_metric_learning.NTXentLoss(0.1, distance=distance)(ours, labels)
    expected = metric.NTXentLoss(0.1, distance=distance)(theirs, labels)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.grad[:8].double(), theirs.grad[:8], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SupConLoss", "NTXentLoss"])
def test_an_empty_batch_of_labels_is_0(name):
    loss, nobody = getattr(pytorch_metric_learning, name)(), torch.zeros(0, dtype=torch.long)
    for dtype, found in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        value = loss(torch.zeros(0, 4, dtype=dtype, requires_grad=True), nobody)
        assert (value.dtype, value.item(), value.requires_grad) == (found, 0, True)


def test_label_loss_refusals():
    _, _, distances = label_losses()
    x, tags = torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])
    for name in ("SupConLoss", "NTXentLoss"):
        make = getattr(pytorch_metric_learning, name)
        with pytest.raises(ValueError, match=f"{name}: distance must be CosineSimilarity"):
            make(distance=distances.LpDistance())
        with pytest.raises(ValueError, match=f"{name}: indices_tuple is not supported"):
            make()(x, tags, indices_tuple=(tags,) * 4)
        with pytest.raises(ValueError, match=f"{name}: labels are needed"):
            make()(x)
        with pytest.raises(ValueError, match="given together"):
            make()(x, tags, ref_emb=x)
        with pytest.raises(ValueError, match=r"labels \(N,\). Got embeddings \(4, 2\), labels \(3,\)"):
            make()(x, tags[:3])
        with pytest.raises(ValueError, match=r"as many features as embeddings. .* ref_emb \(4, 3\)"):
            make()(x, tags, ref_emb=torch.zeros(4, 3), ref_labels=tags)
    with pytest.raises(ValueError, match=r"reducer must be None, MeanReducer\(\) or SumReducer\(\)"):
        pytorch_metric_learning.NTXentLoss(reducer=object())


# --- all --------------------------------------------------------------------------------------------------------------


AUTOCAST = {
    "InfoNCE": lambda a, b, tags: dropin.InfoNCE()(a, b),
    "InfoNCE, unpaired": lambda a, b, tags: dropin.InfoNCE()(a, a.flip(0), b),
    "InfoNCE, paired": lambda a, b, tags: dropin.InfoNCE(negative_mode="paired")(a, b, torch.stack([a, b], 1)),
    "lightly": lambda a, b, tags: lightly.NTXentLoss()(a, b),
    "ClipLoss": lambda a, b, tags: dropin.ClipLoss()(a, b, torch.tensor(3.0)),
    "SupConLoss": lambda a, b, tags: dropin.SupConLoss()(a, tags, ref_emb=b, ref_labels=tags.clone()),
    "NTXentLoss": lambda a, b, tags: pytorch_metric_learning.NTXentLoss()(a, tags),
    "NTXentLoss, references": lambda a, b, tags: pytorch_metric_learning.NTXentLoss()(
        a, tags, ref_emb=b, ref_labels=tags.clone()
    ),
    "GreedyInfoMaxLoss": lambda a, b, tags: greedy_infomax(a.T.reshape(1, 8, 6, 2), b.T.reshape(1, 8, 6, 2)),
}


def greedy_infomax(z, c):
    loss = dropin.GreedyInfoMaxLoss(gim_options(1, 1), 8, 8)
    torch.nn.init.eye_(loss.W_k[0].weight.data[:, :, 0, 0])
    return loss(z, c, negatives=[torch.arange(8)])


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_gives_a_16_bit_view_and_a_float32_one_their_loss(name):
    """Under autocast, one side comes from a layer in bfloat16, the other (a teacher's, a bank's) is float32."""
    x, b, weight = leaves((12, 5), (12, 8), (8, 5), dtype=torch.float32)
    tags = torch.arange(12) % 5 // 2
    results = []
    for autocast in (True, False):
        w = weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = AUTOCAST[name](F.linear(x, w), b, tags)
        value.backward()
        results.append((value.detach(), w.grad))
    (value, grad), (expected, wanted) = results
    assert value.dtype == torch.float32
    assert value == pytest.approx(float(expected), rel=0.02, abs=0.02)
    torch.testing.assert_close(grad, wanted, rtol=0, atol=0.05 * float(wanted.abs().max()))


def test_two_losses_share_a_name_and_none_is_guessed():
    with pytest.raises(
        ImportError, match=r"cpc_fast.dropin.lightly \(two views\) or .*pytorch_metric_learning \(labels"
    ):
        from cpc_fast.dropin import NTXentLoss  # noqa: F401
    assert lightly.NTXentLoss().temperature == 0.5
    assert pytorch_metric_learning.NTXentLoss().temperature == 0.07
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        dropin.Nothing  # noqa: B018


def test_losses_are_modules_that_copy_and_print():
    losses = [
        dropin.InfoNCE(),
        lightly.NTXentLoss(memory_bank_size=(4, 2)),
        dropin.ClipLoss(),
        dropin.GreedyInfoMaxLoss(gim_options(2, 2), 4, 4),
        dropin.SupConLoss(),
        pytorch_metric_learning.NTXentLoss(),
    ]
    for loss in losses:
        again = copy.deepcopy(loss)
        again.load_state_dict(loss.state_dict())
        assert type(loss).__name__ in repr(again)


def test_importing_the_drop_ins_imports_neither_the_originals_nor_triton():
    code = (
        "import sys, cpc_fast.dropin; "
        "print([m for m in ('lightly', 'open_clip', 'info_nce', 'pytorch_metric_learning', 'triton') "
        "if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["", *(f".{path.stem}" for path in PACKAGE.glob("[!_]*.py"))])
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"cpc_fast.dropin{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.failed == 0
    assert result.attempted > 0


def test_the_clip_reference_agrees():
    """Against the kernels' own reference, so that something is compared where no original is installed."""
    images, texts = leaves((6, 4), (6, 4))
    own = torch.arange(6)
    expected = (reference.info_nce(images, texts, own) + reference.info_nce(texts, images, own)) / 2
    assert torch.allclose(dropin.ClipLoss()(images, texts, 1.0), expected, rtol=1e-12)


# --- several processes ------------------------------------------------------------------------------------------------


def beside_the_originals(rank, world):
    everyone = leaves((2, 5, 8), (2, 5, 8), seed=4)
    tensors = [F.normalize(t[rank], dim=1) for t in everyone]
    ours = lightly.NTXentLoss(0.3, gather_distributed=True)
    assert_same(ours, originals.lightly().NTXentLoss(0.3, gather_distributed=True), *tensors)
    banks = []
    for make in (lightly.NTXentLoss, originals.lightly().NTXentLoss):
        torch.manual_seed(1)
        banks.append(make(0.3, memory_bank_size=(24, 8), gather_distributed=True))
    for _ in range(3):
        assert_same(*banks, *(t.float() for t in tensors))
        assert torch.equal(banks[0].memory_bank.bank, banks[1].memory_bank.bank)
    scale = torch.tensor(7.0, dtype=torch.float64)
    for local in (False, True):
        for with_grad in (False, True):
            options = {"local_loss": local, "gather_with_grad": with_grad, "rank": rank, "world_size": world}
            assert_same(dropin.ClipLoss(**options), originals.open_clip().ClipLoss(**options), *tensors, scale)


def test_two_processes_get_the_losses_and_gradients_of_the_originals(tmp_path):
    original("lightly")
    original("open_clip")
    processes.run(2, beside_the_originals, tmp_path)


COUNTS = {2: (5, 2), 4: (3, 0, 4, 1)}


def supervised(a, b):
    """All processes' rows and references, gathered."""
    of = shares(len(a), a.device)
    tags = gather_rows((torch.arange(len(a)) + of.first()) % 3, of)
    a, b = (gather_rows_with_grad(t, of) for t in (a, b))
    return dropin.SupConLoss()(a, tags, ref_emb=b, ref_labels=tags)


def shared_losses(rank=0, world=1):
    yield supervised, False
    yield lightly.NTXentLoss(0.3, gather_distributed=True), False
    torch.manual_seed(1)
    yield lightly.NTXentLoss(0.3, memory_bank_size=(24, 6), gather_distributed=True), False
    for local in (False, True):
        clip = dropin.ClipLoss(local_loss=local, gather_with_grad=True, rank=rank, world_size=world)
        yield lambda *t, clip=clip: clip(*t[:2], logit_scale=t[2]), True


def of_a_rank(rank, world):
    """(loss, gradients) of this rank's rows."""
    counts, answers = COUNTS[world], []
    for loss, scaled in shared_losses(rank, world):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        tensors = [t.detach()[own].requires_grad_() for t in leaves((sum(counts), 6), (sum(counts), 6), seed=2)]
        tensors += [torch.tensor(3.0, dtype=torch.float64, requires_grad=True)] if scaled else []
        value = loss(*tensors)
        value.backward()
        answers.append((value.detach(), [t.grad for t in tensors]))
    return answers


@pytest.mark.parametrize("world", [2, 4])
def test_processes_together_are_one(world, tmp_path):
    """Averaged as DistributedDataParallel does, also where they hold different numbers of rows, or none."""
    answers = processes.run(world, of_a_rank, tmp_path)
    for at, (loss, scaled) in enumerate(shared_losses()):
        tensors = [t.requires_grad_() for t in leaves((sum(COUNTS[world]), 6), (sum(COUNTS[world]), 6), seed=2)]
        tensors += [torch.tensor(3.0, dtype=torch.float64, requires_grad=True)] if scaled else []
        value = loss(*tensors)
        value.backward()
        found = torch.stack([each[at][0] for each in answers]).mean()
        torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=0)
        for i, tensor in enumerate(tensors):
            parts = [each[at][1][i] for each in answers]
            together = torch.cat(parts) if tensor.ndim else torch.stack(parts).sum()
            torch.testing.assert_close(together / world, tensor.grad, rtol=1e-10, atol=1e-13)
