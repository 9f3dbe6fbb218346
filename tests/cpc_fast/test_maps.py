"""The flow from losses to segments, and what feeds it: the bank and the shifted copies."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch._subclasses.fake_tensor import FakeTensorMode

from cpc_fast import shifts
from cpc_fast.anomaly_map import anomaly_map
from cpc_fast.bank import reservoir
from cpc_fast.config import SHIFTS
from cpc_fast.patches import patch_starts, window_start
from cpc_fast.scoring import at_places, closed, combined, patch_medians
from cpc_fast.segments import find_segments
from cpc_fast.shifts import FAMILIES, WHOLE, shift


def test_a_reservoir_does_not_depend_on_the_blocks():
    rows = torch.randn(1000, 3)
    whole = reservoir([rows], 50, seed=4)
    pieces = reservoir(rows.split(37), 50, seed=4)
    assert torch.equal(whole.sort(0).values, pieces.sort(0).values)
    assert not torch.equal(whole, reservoir([rows], 50, seed=5))
    with pytest.raises(ValueError, match="no rows"):
        reservoir([], 5)


def test_a_reservoir_is_uniform():
    counts = torch.zeros(20)
    for seed in range(500):
        counts[reservoir(torch.arange(20.0).split(6), 5, seed).long()] += 1
    assert (counts - 125).abs().max() < 45  # 4.6 standard deviations


@pytest.mark.parametrize("size", [1, 3, 5, 99])
def test_closing_is_the_morphological_one(size):
    grid = torch.randn(2, 9, 7, dtype=torch.float64)
    for ours, plane in zip(closed(grid, size), grid.numpy(), strict=True):
        wider = ndimage.maximum_filter(plane, size, mode="constant", cval=-np.inf)
        assert ours.numpy().tolist() == ndimage.minimum_filter(wider, size, mode="constant", cval=np.inf).tolist()
    assert torch.equal(closed(grid[0], size), closed(grid, size)[0])


def test_the_strangest_member_can_be_the_one_that_counts():
    said = torch.randn(3, 1, 4, 5)
    assert torch.equal(combined(said, "max"), said.amax(0))
    assert (combined(said, "rms") <= combined(said, "max") + 1e-6).all()


def test_patch_medians_fall_back_on_the_predicting_patch():
    losses = torch.tensor([1.0, 3.0, 9.0, 5.0, 8.0, 8.0])
    sources, targets = torch.tensor([0, 1, 0, 1, 4, 4]), torch.tensor([2, 3, 2, 4, 2, 3])
    medians = patch_medians(losses, sources, targets, [2, 2, 2], (1, 6))
    assert medians.tolist() == [[5.0, 4.0, 8.0, 5.5, 5.0, 0.0]]
    assert patch_medians(losses[:0], sources[:0], targets[:0], [0, 0], (1, 2)).tolist() == [[0.0, 0.0]]


def test_patch_medians_are_medians():
    counts = [4, 3, 4, 4, 2]
    targets = torch.cat([torch.randperm(7)[:count] for count in counts])
    losses = torch.randn(len(targets))
    found = patch_medians(losses, targets, targets, counts, (1, 7))
    expected = [losses[targets == i].quantile(0.5) if (targets == i).any() else torch.tensor(0.0) for i in range(7)]
    torch.testing.assert_close(found[0], torch.stack(expected))


def test_a_loss_that_is_none_does_not_pass_for_no_prediction():
    losses = torch.tensor([1.0, float("nan"), 2.0, 3.0, 4.0])
    targets = torch.tensor([0, 1, 0, 1, 1])  # of the three about patch 1, the middle one is a number
    found = patch_medians(losses, targets, targets, [2, 2, 1], (1, 3))
    assert found[0, 0] == 1.5
    assert found[0, 1].isnan()
    assert found[0, 2] == 0


def test_a_map_peaks_where_the_patch_is_and_keeps_constants():
    scores = torch.zeros(7, 7)
    scores[2, 5] = 1.0
    pixels = anomaly_map(scores, 32, 16, (128, 128), (256, 256))
    y, x = divmod(int(pixels.argmax()), 256)
    assert abs(y - 96) <= 2
    assert abs(x - 192) <= 2
    flat = anomaly_map(torch.full((4, 3), 0.7), 32, 16, (77, 60), (77, 60))
    torch.testing.assert_close(flat, torch.full((77, 60), 0.7))


def test_a_map_is_the_mean_of_the_patches_over_each_pixel():
    """Each patch counts by its bell, wherever the grid of an image puts it."""
    torch.manual_seed(0)
    size, (height, width), scores = 8, (29, 22), torch.randn(7, 5)
    bell = torch.exp(-0.5 * ((torch.arange(8) - 3.5) / 2) ** 2)
    total = torch.zeros(2, height, width)
    for i, y in enumerate(patch_starts(height, size, 4)):
        for j, x in enumerate(patch_starts(width, size, 4)):
            weight = bell[:, None] * bell
            total[:, y : y + size, x : x + size] += torch.stack([weight * scores[i, j], weight])
    found = anomaly_map(scores, size, 4, (height, width), (height, width))
    torch.testing.assert_close(found, total[0] / total[1])


def test_segments_are_connected_regions():
    scores = np.zeros((20, 30), np.float32)
    scores[2:5, 3:6] = 1.0
    scores[5, 6] = 2.0  # touches by a corner
    scores[15, 20] = 3.0
    mask, segments = find_segments(scores, 0.5)
    assert mask.sum() == 11
    assert [(s.area, s.peak, s.peak_at) for s in segments] == [(1, 3.0, (15, 20)), (10, 2.0, (5, 6))]
    mask, segments = find_segments(scores, 0.5, min_area=2)
    assert len(segments) == 1
    assert mask.sum() == 10


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("channels", [1, 3])
def test_shifts_change_the_images_and_repeat_with_the_seed(family, channels):
    images = torch.randn(3, channels, 64, 64)
    before = images.clone()
    first, second = (shift(images, (family,), torch.Generator().manual_seed(2)) for _ in range(2))
    assert torch.equal(images, before)
    assert torch.equal(first, second)
    assert first.shape == images.shape
    assert all((a != b).any() for a, b in zip(first, images, strict=True))


@pytest.mark.parametrize(
    "family", sorted(set(FAMILIES) - {"quarter-turn", "local-quarter-turn"})
)  # which asks for a number by then
def test_shifts_stay_on_a_gpu(family, monkeypatch):
    """Of tensors that have no numbers, but know where they lie."""
    monkeypatch.setattr(shifts, "_number", lambda low, high, generator: (low + high) / 2)
    monkeypatch.setattr(shifts, "_fields", lambda images, generator: None)
    with FakeTensorMode():
        images = torch.empty(4, 1, 64, 64, device="cuda")
        try:
            shifted = FAMILIES[family](images, torch.Generator(), 1.0)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
            pytest.skip("torch without CUDA cannot follow grids and slices there")
    assert shifted.device.type == "cuda"
    assert shifted.shape == images.shape


def test_every_shift_that_a_config_takes_is_there():
    assert set(SHIFTS) == set(FAMILIES)


@pytest.mark.parametrize("family", sorted(WHOLE))
def test_a_local_shift_leaves_half_of_the_image(family):
    images = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))

    def kept(name: str) -> float:
        change = shift(images, (name,), torch.Generator().manual_seed(0)) - images
        return (change.abs() < 0.05).float().mean().item()

    assert kept(family) < 0.15
    assert 0.5 < kept(f"local-{family}") < 0.8


def test_brightness_leaves_the_contrast_and_exposure_scales_it_along():
    images = torch.rand(16, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = 0.0
    brighter, exposed = (
        shift(images, (name,), torch.Generator().manual_seed(0)) for name in ("brightness", "exposure")
    )
    torch.testing.assert_close(brighter.std((1, 2, 3)), images.std((1, 2, 3)))
    factors = exposed.mean((1, 2, 3)) / images.mean((1, 2, 3))
    torch.testing.assert_close(exposed, images * factors.view(-1, 1, 1, 1))
    for moved in (brighter.mean((1, 2, 3)) - images.mean((1, 2, 3)), factors.log()):
        assert moved.min() < -0.5
        assert moved.max() > 0.3


def test_sizes_of_shifts_grow_with_the_patch():
    fine, coarse = (
        (shift(torch.zeros(8, 1, 128, 128), ("curves",), torch.Generator().manual_seed(0), unit) != 0).float().mean()
        for unit in (1.0, 4.0)
    )
    assert 0.5 < fine / coarse < 2  # lines four times as wide, and a quarter as many
    fine, coarse = (
        (shift(torch.zeros(8, 1, 256, 256), ("lines",), torch.Generator().manual_seed(0), unit).abs() > 0.1)
        .float()
        .mean()
        for unit in (1.0, 4.0)
    )
    assert 0.7 < fine / coarse < 1.4
    assert 0.02 < fine < 0.3  # they are thin
    grain = torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    soft, softer = (shift(grain, ("blur",), torch.Generator().manual_seed(0), unit).std() for unit in (1.0, 2.0))
    assert softer < 0.7 * soft


def test_images_of_several_sizes_share_the_places_at_their_edges():
    for size in (3, 9):
        table = torch.arange(2.0 * size * size).view(2, size, size)
        assert torch.equal(at_places(table, size, size), table)
    table = torch.arange(49.0).view(7, 7)
    large = at_places(table[None], 12, 9)[0]
    assert torch.equal(large[:3, :3], table[:3, :3])
    assert torch.equal(large[-3:, -3:], table[-3:, -3:])
    assert (large[3:9, 3:6] == table[3, 3]).all()


def test_each_edge_is_in_a_quarter_of_these_windows():
    generator = torch.Generator().manual_seed(0)
    starts = torch.tensor([window_start(200, 100, 50, generator) for _ in range(2000)])
    for edge in (starts.min(), starts.max()):
        assert edge in (0, 100)
        assert 0.2 < (starts == edge).float().mean() < 0.3
