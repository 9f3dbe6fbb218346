"""Each baseline finds the hole in a striped surface, at the resolution of the image."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from benchmarks.baselines import BASELINES, Autoencoder, Baseline, similarity
from cpc_fast.config import Config
from cpc_fast.detector import Detector
from cpc_fast.metrics import pixel_metrics

CONFIG = Config(
    image_size=None, width=8, stem=4, patch_size=16, patch_stride=8, steps=2, batch_size=4, epochs=2, bank_size=64
)


def surface(seed: int, hole: bool = False, side: int = 48) -> np.ndarray:
    """uint8 (side, side, 1): upright stripes, always in the same place, with grain."""
    random = np.random.default_rng(seed)
    image = np.tile(128 + 50 * np.sin(np.arange(side) / 3), (side, 1)) + random.normal(0, 8, (side, side))
    if hole:
        image[20:30, 12:26] = 20
    return image.clip(0, 255).astype(np.uint8)[..., None]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.fit([surface(i) for i in range(10)], CONFIG)


@pytest.mark.parametrize("name", BASELINES)
def test_it_finds_the_hole(name, detector):
    method = BASELINES[name](CONFIG, detector)
    if isinstance(method, Autoencoder):
        method.epochs = 15
    assert method.fit([surface(i) for i in range(10)]) is method
    good, bad = (method.inspect(surface(100, hole)) for hole in (False, True))
    mask = np.zeros((48, 48), bool)
    mask[20:30, 12:26] = True
    assert bad.map.dtype == np.float32
    assert bad.score == bad.map.max() > good.score
    auroc = pixel_metrics([bad.map], [mask])["auroc"]
    assert auroc is not None
    assert auroc > 0.8


@pytest.mark.parametrize("name", BASELINES)
def test_images_of_any_size_and_the_same_twice(name, detector):
    config = CONFIG.replace(image_size=32) if name != "latent neighbour" else CONFIG
    images = [surface(i, side=40 + i) for i in range(4)]
    maps = []
    for _ in range(2):
        method = BASELINES[name](config, detector)
        if isinstance(method, Autoencoder):
            method.epochs = 1
        maps.append(method.fit(images).inspect(surface(9)[:, :37]).map)
    assert maps[0].shape == (48, 37)
    assert np.array_equal(*maps)


def test_similarity_is_that_of_scikit_image():
    a, b = (surface(i)[..., 0] / 64.0 for i in (0, 1))
    ours = similarity(*(torch.from_numpy(x)[None, None] for x in (a, b)))[0, 0].numpy()
    theirs = structural_similarity(a, b, win_size=11, data_range=4, full=True, use_sample_covariance=False)[1]
    assert np.allclose(ours[6:-6, 6:-6], theirs[6:-6, 6:-6])


def test_what_a_baseline_must_bring():
    with pytest.raises(NotImplementedError):
        Baseline(CONFIG).fit([surface(0)])
    with pytest.raises(NotImplementedError):
        Baseline(CONFIG).inspect(surface(0))
