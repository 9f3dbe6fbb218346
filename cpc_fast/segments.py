"""anomaly map -> segments: connected regions above a threshold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skimage.measure import approximate_polygon, find_contours, label, regionprops

from .stages import stage


@dataclass(frozen=True)
class Segment:
    """One anomalous region; lengths are pixels of the original image.

    Attributes:
        box: (top, left, bottom, right), the last two exclusive.
        area: number of pixels.
        peak: the highest score inside.
        peak_at: (y, x) of the peak.
    """

    box: tuple[int, int, int, int]
    area: int
    peak: float
    peak_at: tuple[int, int]


@stage("segments")
def find_segments(scores: np.ndarray, threshold: float, min_area: int = 1) -> tuple[np.ndarray, list[Segment]]:
    """The mask of a map, and its 8-connected regions, highest peak first.

    Args:
        scores: (h, w) anomaly map.
        threshold: pixels above it are anomalous.
        min_area: regions of fewer pixels are dropped from both results.

    >>> mask, segments = find_segments(np.pad(np.ones((2, 3)), 4), 0.5)
    >>> int(mask.sum()), segments[0].box
    (6, (4, 4, 6, 7))
    """
    regions = np.asarray(label(scores > threshold, connectivity=2))
    mask = np.zeros(scores.shape, dtype=bool)
    segments = []
    for region in regionprops(regions, intensity_image=scores):
        if region.area < min_area:
            continue
        top, left, bottom, right = region.bbox
        mask[top:bottom, left:right] |= region.image
        inside = np.where(region.image, scores[top:bottom, left:right], -np.inf)
        y, x = np.unravel_index(int(inside.argmax()), inside.shape)
        peak_at = (int(y) + top, int(x) + left)
        segments.append(Segment((top, left, bottom, right), int(region.area), float(inside.max()), peak_at))
    return mask, sorted(segments, key=lambda segment: -segment.peak)


def outline(mask: np.ndarray, segment: Segment, tolerance: float = 0.25) -> list[list[list[float]]]:
    """A segment of a mask as closed polygons of [y, x]: its outer border first, then its holes.

    Whole numbers are the centres of pixels, so a border runs half-way between two pixels; the corners left out move it
    by at most `tolerance` pixels.

    >>> mask, segments = find_segments(np.pad(np.ones((2, 3)), 4), 0.5)
    >>> outline(mask, segments[0])[0][:2]
    [[5.5, 6.0], [5.5, 4.0]]
    """
    top, left, bottom, right = segment.box
    regions = np.asarray(label(np.pad(mask[top:bottom, left:right], 1), connectivity=2))
    y, x = segment.peak_at
    region = regions == regions[y - top + 1, x - left + 1]
    rings = find_contours(region.astype(float), 0.5, fully_connected="high")
    rings = sorted(
        (approximate_polygon(ring, tolerance) for ring in rings), key=lambda ring: -np.ptp(ring, axis=0).sum()
    )
    return [np.add(ring, (top - 1, left - 1)).round(2).tolist() for ring in rings]
