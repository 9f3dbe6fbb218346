"""Each metric against its definition, written out slowly; and against scikit-learn."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from cpc_fast.errors import UsageError
from cpc_fast.images import find_test, read_image, read_mask
from cpc_fast.metrics import au_pro, image_metrics, pixel_metrics, pro_curve, roc_curve

TILES = Path(__file__).parents[2].parent / "shared" / "data" / "magnetic_tile"


def regions_of(mask) -> list[set[tuple[int, int]]]:
    """The 8-connected regions, by walking."""
    left, regions = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            y, x = edge.pop()
            region.add((y, x))
            for near in ((y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        regions.append(region)
    return regions


def slow_curve(maps, masks):
    """One threshold after another: (FPR, PRO) of all pixels at or above it."""
    thresholds = sorted({value for m in maps for value in m.ravel().tolist()}, reverse=True)
    regions = [(m, region) for m, mask in zip(maps, masks, strict=True) for region in regions_of(mask)]
    normal = np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)]).tolist()
    points = [(0.0, 0.0)]
    for t in thresholds:
        fpr = sum(value >= t for value in normal) / len(normal)
        overlaps = [sum(bool(m[at] >= t) for at in region) / len(region) for m, region in regions]
        points.append((fpr, sum(overlaps) / len(overlaps)))
    return points


def slow_au_pro(maps, masks, limit):
    area = 0.0
    points = slow_curve(maps, masks)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def random_set(seed: int):
    """Small maps of different sizes, some coarsely rounded so that most values are tied, with ragged masks."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for _ in range(rng.integers(1, 5)):
        shape = tuple(rng.integers(3, 14, 2))
        mask = rng.random(shape) < rng.choice([0, 0.1, 0.4])
        values = rng.standard_normal(shape) + mask * rng.choice([0, 1, 3])
        maps.append(np.round(values * rng.choice([1, 3, 1e6])).astype(rng.choice(["float32", "float64"])))
        masks.append(mask)
    masks[0][0, 0], masks[0][-1, -1] = True, False
    return maps, masks


@pytest.mark.parametrize("seed", range(40))
def test_au_pro_is_the_literal_definition(seed):
    maps, masks = random_set(seed)
    for limit in (0.05, 0.3, 1.0, 1 / 7):
        assert au_pro(maps, masks, limit) == pytest.approx(slow_au_pro(maps, masks, limit), abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_pixel_metrics_are_those_of_scikit_learn(seed):
    maps, masks = random_set(seed)
    result = pixel_metrics(maps, masks)
    flat = np.concatenate([m.ravel() for m in maps]).astype(float)
    truth = np.concatenate([m.ravel() for m in masks])
    assert list(result) == ["auroc", "ap", "au_pro_0.30", "au_pro_0.05"]
    assert result["auroc"] == pytest.approx(roc_auc_score(truth, flat), abs=1e-12)
    assert result["ap"] == pytest.approx(average_precision_score(truth, flat), abs=1e-12)
    assert result["au_pro_0.30"] == au_pro(maps, masks, 0.30)
    assert result["au_pro_0.05"] == au_pro(maps, masks, 0.05)


def test_hand_made_au_pro():
    # Two regions of 4 pixels and of 1 (they do not touch, even at corners), 15 normal pixels.
    mask = np.zeros((4, 5), bool)
    mask[:2, :2] = mask[3, 4] = True
    values = np.zeros((4, 5))
    values[:2, :2] = 2  # the large region is found before any false positive, the small one at the end: PRO = 1/2
    assert au_pro([values], [mask], 0.3) == pytest.approx(0.5 + 0.5 * 0.3 / 2)  # the last tie is one straight line
    values[3, 4] = 2
    assert au_pro([values], [mask], 0.3) == pytest.approx(1)
    # Pixels that touch at a corner are one region.
    corner = np.array([[True, False, False], [False, True, False], [False, False, False]])
    assert au_pro([np.array([[9.0, 0, 0], [0, -1, 0], [0, 0, 0]])], [corner], 0.5) == pytest.approx(0.5)


def test_worst_and_constant_maps():
    mask = np.eye(6, dtype=bool)
    assert pixel_metrics([-mask.astype(float)], [mask])["auroc"] == 0
    assert au_pro([-mask.astype(float)], [mask], 0.3) == 0
    constant = pixel_metrics([np.ones((6, 6))], [mask])
    assert constant["auroc"] == pytest.approx(0.5)
    assert constant["au_pro_0.30"] == pytest.approx(0.15)


def test_scores_are_used_raw():
    """Neither an offset that float32 would swallow nor a strictly rising change of scale matters."""
    maps, masks = random_set(3)
    maps = [np.round(m.astype(float)) for m in maps]
    expected = pixel_metrics(maps, masks)
    assert pixel_metrics([m + 2.0**40 for m in maps], masks) == expected
    assert pixel_metrics([np.arctan(m / 1e4) for m in maps], masks) == expected


def test_no_meaning_is_none():
    values, nothing, everything = np.ones((3, 3)), np.zeros((3, 3), bool), np.ones((3, 3), bool)
    for masks in ([nothing], [everything], [None]):
        assert set(pixel_metrics([values], masks).values()) == {None}
        assert au_pro([values], masks, 0.3) is None
        assert pro_curve([values], masks)[0].shape == (0,)
    assert set(pixel_metrics([], []).values()) == {None}
    for labels in ([0, 0], [1, 1]):
        assert image_metrics([1, 2], labels) == {"auroc": None, "ap": None, "f1_max": None}
        assert roc_curve([1, 2], labels)[1].shape == (0,)
    assert image_metrics([], [])["auroc"] is None


def test_an_image_of_unknown_truth_is_left_out():
    maps, masks = random_set(1)
    assert pixel_metrics([*maps, np.full((5, 5), 1e9)], [*masks, None]) == pixel_metrics(maps, masks)


def test_image_metrics():
    rng = np.random.default_rng(0)
    for levels in (3, 1000):
        labels = rng.random(80) < 0.4
        scores = np.round((rng.standard_normal(80) + labels) * levels) / levels
        best = 0
        for t in scores:
            hit = (scores >= t) & labels
            best = max(best, 2 * hit.sum() / ((scores >= t).sum() + labels.sum()))
        result = image_metrics(scores, labels)
        assert result["auroc"] == pytest.approx(roc_auc_score(labels, scores))
        assert result["ap"] == pytest.approx(average_precision_score(labels, scores))
        assert result["f1_max"] == pytest.approx(best)
    assert image_metrics([3, 1, 2], [True, False, False]) == {"auroc": 1.0, "ap": 1.0, "f1_max": 1.0}
    assert type(result["f1_max"]) is float  # json takes it


def test_curves_are_thin_and_true():
    rng = np.random.default_rng(0)
    masks = [rng.random((40, 50)) < 0.1 for _ in range(3)]
    maps = [rng.standard_normal((40, 50)) + mask for mask in masks]
    x, y = pro_curve(maps, masks, 0.3)
    assert len(x) == len(y) <= 200
    assert (x[0], y[0], x[-1]) == (0, 0, 0.3)
    assert (np.diff(x) >= 0).all()
    assert (np.diff(y) >= 0).all()
    assert np.trapezoid(y, x) / 0.3 == pytest.approx(au_pro(maps, masks, 0.3), abs=2e-3)

    labels = rng.random(5000) < 0.3
    scores = rng.standard_normal(5000) + labels
    x, y = roc_curve(scores, labels, points=50)
    assert len(x) <= 50
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(y, x) == pytest.approx(roc_auc_score(labels, scores), abs=5e-3)


def test_refusals_repeat_what_was_given():
    values, mask = np.ones((3, 4)), np.eye(3, 4, dtype=bool)
    with pytest.raises(UsageError, match="Got 2 maps and 1 masks"):
        pixel_metrics([values, values], [mask])
    with pytest.raises(UsageError, match=r"Map 0 is \(3, 4\), its mask \(4, 3\)"):
        pixel_metrics([values], [mask.T])
    with pytest.raises(UsageError, match="Map 1 holds values that are not finite"):
        au_pro([values, values * np.nan], [mask, mask], 0.3)
    for limit in (0, 1.5, -1):
        with pytest.raises(UsageError, match=f"Got {limit}"):
            au_pro([values], [mask], limit)
    with pytest.raises(UsageError, match=r"scores \(2,\), labels \(3,\)"):
        image_metrics([1, 2], [0, 1, 1])
    with pytest.raises(UsageError, match="score of image 1 is not finite"):
        image_metrics([1, np.nan, 3], [0, 1, 1])


@pytest.mark.slow
def test_twenty_large_images_fit_time_and_memory():
    """A fifth of 100 images of 1024 x 1024 in a fifth of 60 s of CPU time and of 4 GB."""
    command = [sys.executable, "-m", "benchmarks.au_pro", "20"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
    seconds, megabytes = (float(part.split()[0]) for part in told.split(", ")[:2])
    assert seconds < 12
    assert megabytes < 800


@pytest.mark.skipif(not TILES.is_dir(), reason="the magnetic tiles are not beside this checkout")
def test_magnetic_tiles_agree_with_scikit_learn():
    """Real masks and sizes, with darkness for a score: whatever it is worth, both count it the same."""
    found = find_test(TILES)[::25]
    maps, masks = [], []
    for test in found:
        image = read_image(test.path)[..., 0]
        maps.append(255 - image.astype(np.float32))
        masks.append(read_mask(test.mask_path, image.shape) if test.mask_path else np.zeros(image.shape, bool))
    flat, truth = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))
    result = pixel_metrics(maps, masks)
    assert result["auroc"] == pytest.approx(roc_auc_score(truth, flat), abs=1e-9)
    assert result["ap"] == pytest.approx(average_precision_score(truth, flat), abs=1e-9)
    assert 0 < result["au_pro_0.05"] < result["au_pro_0.30"] < 1
