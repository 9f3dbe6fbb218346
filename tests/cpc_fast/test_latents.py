"""The kernel for the whole encoder against the modules that say what it computes."""

import copy

import pytest
import torch

from cpc_fast.config import preset
from cpc_fast.latents import PatchEncoder, encode, fuses
from cpc_fast.model import CPC
from cpc_fast.patches import extract_patches
from cpc_kernels.capabilities import PATCH_ENCODER
from tests.kernels.tolerance import assert_as_good_as_naive

pytestmark = pytest.mark.skipif(not PATCH_ENCODER.available, reason=PATCH_ENCODER.reason)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def plain(encoder, patches):
    return encoder(patches.flatten(0, 2)).unflatten(0, patches.shape[:3])


def make(channels=1, width=16, stem=2, norm="group"):
    torch.manual_seed(0)
    encoder = PatchEncoder(channels, width, stem, norm)
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.3, 1.0)
    return encoder


CASES = [
    pytest.param({}, 32, id="cpu-demo"),
    pytest.param({"stem": 4}, 64, id="cpu-demo at 256 px"),
    pytest.param({"stem": 4}, 32, id="maps of 2 x 2 pixels"),
    pytest.param({"channels": 3, "stem": 4}, 32, id="colour"),
    pytest.param({"stem": 1}, 16, id="stem 1"),
    pytest.param({"stem": 8}, 64, id="stem 8"),
    pytest.param({"width": 32, "norm": "none"}, 48, id="no norm, maps of 6 x 6 pixels"),
    pytest.param({"width": 64, "norm": "none"}, 64, id="paper"),
]


@pytest.mark.parametrize(("choices", "side"), CASES)
def test_latents_and_gradients_are_as_good_as_those_of_the_modules(choices, side):
    encoder = make(**choices)
    images = torch.randn(2, choices.get("channels", 1), 2 * side, 2 * side + 5)
    patches = extract_patches(images, side, side // 2)
    with bfloat16():
        assert fuses(encoder, patches)
        ours, naive = encode(encoder, patches), plain(encoder, patches)
    exact = copy.deepcopy(encoder).double()
    truth = plain(exact, patches.double())
    upstream = torch.rand(truth.shape)
    assert_as_good_as_naive(actual=ours.detach(), naive=naive.detach(), truth=truth.detach(), name="latents")
    names = [name for name, _ in encoder.named_parameters()]
    found = [
        torch.autograd.grad(z, list(module.parameters()), upstream.to(z.dtype))
        for module, z in ((encoder, ours), (encoder, naive), (exact, truth))
    ]
    for name, mine, theirs, right in zip(names, *found, strict=True):
        assert mine.shape == right.shape
        assert_as_good_as_naive(actual=mine, naive=theirs, truth=right, name=name, dtype=torch.bfloat16)


def test_a_latent_depends_on_its_own_patch_alone():
    encoder, patches = make(), torch.randn(3, 5, 4, 1, 32, 32)
    with bfloat16(), torch.no_grad():
        together = encode(encoder, patches)
        assert torch.equal(together[1:2], encode(encoder, patches[1:2]))
        assert torch.equal(together[2:, 4:, 3:], encode(encoder, patches[2:, 4:, 3:].contiguous()))
    with bfloat16():
        assert torch.equal(together, encode(encoder, patches))


def test_gradients_do_not_depend_on_the_number_of_threads():
    encoder, patches = make(), torch.randn(4, 6, 6, 1, 32, 32)
    upstream, found = torch.randn(4, 6, 6, 64, dtype=torch.bfloat16), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with bfloat16():
                latents = encode(encoder, patches)
            found.append((latents, *torch.autograd.grad(latents, list(encoder.parameters()), upstream)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_nan_stays_one():
    encoder, patches = make(), torch.randn(1, 1, 2, 1, 32, 32)
    patches[0, 0, 1, 0, 3, 4] = torch.nan
    with bfloat16(), torch.no_grad():
        latents = encode(encoder, patches)
    assert latents[0, 0, 0].isfinite().all()
    assert latents[0, 0, 1].isnan().any()


def test_the_modules_run_where_the_kernel_does_not():
    patches = torch.randn(1, 1, 2, 1, 32, 32)
    assert not fuses(make(), patches)  # float32
    with bfloat16():
        assert fuses(make(), patches)
        assert not fuses(make(norm="layer"), patches)
        assert not fuses(make(width=48), patches)
        assert not fuses(make(), torch.randn(1, 1, 2, 1, 40, 40))
        assert not fuses(make(), patches.requires_grad_())
        assert encode(make(width=8), torch.randn(1, 1, 2, 1, 32, 32)).shape == (1, 1, 2, 32)


@pytest.mark.parametrize("name", ["cpu-demo", "quality", "paper"])
def test_every_preset_runs_on_the_kernel(name):
    config = preset(name)
    patches = torch.zeros(1, 1, 1, config.channels, config.patch_size, config.patch_size)
    with bfloat16():
        assert fuses(CPC(config).encoder, patches)
