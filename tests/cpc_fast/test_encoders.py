"""A frozen encoder of one's own: untouched, run once for each image, and the rest learns from what it said."""

import numpy as np
import pytest
import torch
from samples import TINY_CONFIG, holed, texture
from torch import nn

from cpc_fast.config import Config
from cpc_fast.detector import Detector
from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.latent_cache import LatentCache
from cpc_fast.model import CPC, IMAGENET
from cpc_fast.patches import extract_patches, patch_starts

IMAGES = [texture(i) for i in range(10)]
SHIFTED = TINY_CONFIG.replace(shifts=("noise", "quarter-turn"), shift_copies=2, epochs=3)


class Backbone(nn.Module):
    """A small random network with all that a frozen one must not use: batch norm and dropout. It counts its patches."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        self.seen = 0

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        self.seen += len(patches)
        return self.net(patches)


def frozen() -> Backbone:
    return Backbone().requires_grad_(False)


@pytest.mark.parametrize("config", [TINY_CONFIG, SHIFTED, TINY_CONFIG.replace(context="masked-conv", flips=True)])
def test_it_stays_as_it_is_and_runs_once(config):
    encoder = frozen()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    detector = Detector.fit(IMAGES, config, encoder=encoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.training
    moved = detector.model.members[0].predictor.weight
    assert not torch.equal(moved, CPC(config, frozen()).members[0].predictor.weight)
    patches, copies = 25, config.shift_copies if config.shifts else 0
    learnt, held_out = 8, 2
    # one zero patch for its length; to learn from; for the bank; for calibration and the threshold
    assert encoder.seen <= 1 + patches * (learnt * (1 + copies) + learnt + held_out)


def test_the_loss_is_that_of_the_pixels():
    """Windows as large as the images leave nothing to chance: latents from the cache are those of the images."""
    torch.manual_seed(0)
    model = CPC(TINY_CONFIG, frozen()).train()
    model.measure_pixels(IMAGES)
    cache = LatentCache(model, IMAGES, side=48)
    latents, places = cache.batch([3, 1], torch.Generator().manual_seed(0))
    plain = model(torch.stack([model.standardise(IMAGES[i]) for i in (3, 1)]))
    cached = model.members[0].compare(latents, 2, places)
    assert float(cached.loss.detach()) == pytest.approx(float(plain.loss.detach()), rel=1e-5)


def test_windows_lie_on_the_grid_and_copies_come_last():
    model = CPC(SHIFTED, frozen()).train()
    cache = LatentCache(model, [texture(0, 48, 61), texture(1, 56, 48)], side=32)
    latents, places = cache.batch([0, 1], torch.Generator().manual_seed(0))
    assert (places.shape, latents.shape) == ((2, 3, 3, 2), (2 + 2 * 2, 3, 3, 32))
    whole = cache.latents(0)[0]
    windows = {(y, x): whole[y : y + 3, x : x + 3] for y in range(3) for x in range(5)}
    (top, left), *_ = [corner for corner, window in windows.items() if torch.equal(latents[0], window)]
    centre = torch.tensor([8 * top + 8, patch_starts(61, 16, 8)[left] + 8]) / torch.tensor([48, 61])
    torch.testing.assert_close(places[0, 0, 0], centre)
    assert torch.equal(latents[2:4], cache.latents(0)[1])


def test_windows_reach_the_edges_more_often_than_by_chance():
    model = CPC(SHIFTED, frozen()).train()
    cache = LatentCache(model, [texture(0, 48, 64)], side=32)
    whole, generator = cache.latents(0)[0], torch.Generator().manual_seed(0)
    drawn = [cache.batch([0], generator)[0][0] for _ in range(300)]
    left = sum(any(torch.equal(window, whole[y : y + 3, :3]) for y in range(3)) for window in drawn)
    assert 0.25 < left / 300 < 0.42  # 3 of 9; 1 of 5 by chance


def test_what_does_not_fit_is_encoded_again_to_the_same():
    encoder = frozen()
    model = CPC(SHIFTED, encoder).train()
    small, large = (LatentCache(model, IMAGES, 48, memory=memory) for memory in (0, 1 << 20))
    for cache in (small, large):
        cache.batch([0, 1], torch.Generator())
        before = encoder.seen
        cache.batch([0, 1], torch.Generator())
        assert (encoder.seen == before) == (cache is large)
    assert torch.equal(small.latents(1)[1], large.latents(1)[1])


def test_saved_loaded_and_resumed(tmp_path):
    whole = Detector.fit(IMAGES, SHIFTED, out=tmp_path / "whole", encoder=frozen())

    def stop(step: object, seen: list[int] = []) -> None:  # noqa: B006
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector.fit(IMAGES, SHIFTED, out=tmp_path / "cut", encoder=frozen(), on_step=stop)
    cut = Detector.fit(IMAGES, SHIFTED, out=tmp_path / "cut", encoder=frozen(), resume=True)
    image = holed(9)[0]
    loaded = Detector.load(tmp_path / "whole", encoder=Backbone())
    scores = {detector.inspect(image).score for detector in (whole, cut, loaded)}
    assert len(scores) == 1
    with pytest.raises(CpcFastError, match="hand the same one to load"):
        Detector.load(tmp_path / "whole")


def test_one_made_under_inference_mode_is_frozen_or_refused(tmp_path):
    with torch.inference_mode():
        encoder, again, trunk = Backbone(), Backbone(), nn.Conv2d(1, 4, 3, 2).requires_grad_(False)
    with pytest.raises(UsageError, match=r"made under torch\.inference_mode, so it cannot learn; make it outside"):
        Detector.fit(IMAGES, TINY_CONFIG, encoder=encoder, epochs=1)
    fitted = Detector.fit(IMAGES, TINY_CONFIG, encoder=encoder.requires_grad_(False), epochs=1, out=tmp_path)
    loaded = Detector.load(tmp_path, encoder=again)
    resumed = Detector.fit(
        IMAGES, TINY_CONFIG, encoder=again.requires_grad_(False), epochs=1, out=tmp_path, resume=True
    )
    assert len({detector.inspect(IMAGES[0]).score for detector in (fitted, loaded, resumed)}) == 1
    behind = nn.Sequential(trunk, nn.Flatten(), nn.LazyLinear(8))  # what is behind a frozen one may learn
    Detector.fit(IMAGES, TINY_CONFIG, encoder=behind, epochs=1)


def test_an_encoder_that_learns_is_trained_along():
    encoder = Backbone()
    before = encoder.net[0].weight.detach().clone()  # type: ignore[union-attr]
    Detector.fit(IMAGES, TINY_CONFIG, encoder=encoder, epochs=1)
    assert not torch.equal(encoder.net[0].weight, before)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [1, 3])
def test_imagenet_pixels(channels):
    model = CPC(Config(width=8, channels=channels, standardise="imagenet"))
    image = np.random.default_rng(0).integers(0, 256, (40, 50, channels), np.uint8)
    pixels = model.standardise(image)
    mean, spread = IMAGENET[channels]
    assert torch.allclose(pixels[-1], (torch.tensor(image[..., -1]) / 255 - mean[-1]) / spread[-1])
    assert pixels.shape == (channels, 40, 50)
    assert extract_patches(pixels[None], 32, 16).shape[3] == channels
