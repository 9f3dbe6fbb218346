"""patch scores -> a score for every pixel of the original image."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import AnomalyMap
from .stages import stage


@lru_cache(maxsize=16)
def _window(size: int, device: torch.device) -> Tensor:
    """A bell over one patch, (p, p): its centre speaks louder than its edge."""
    axis = torch.arange(size, device=device, dtype=torch.float32) - (size - 1) / 2
    bell = torch.exp(-0.5 * (axis / (size / 4)) ** 2)
    return bell[:, None] * bell[None]


@stage("anomaly map")
def anomaly_map(
    scores: Tensor, size: int, stride: int, resized: tuple[int, int], original: tuple[int, int]
) -> AnomalyMap:
    """Spread patch scores over their pixels: a weighted mean of all patches that cover a pixel.

    Args:
        scores: (gy, gx), one for each patch.
        size, stride: of the patches, in pixels of the resized image.
        resized: (h, w) of the image the patches were cut from.
        original: (h, w) of the map.

    >>> anomaly_map(torch.rand(7, 7), 32, 16, (128, 128), (300, 300)).shape
    torch.Size([300, 300])
    """
    window = _window(size, scores.device)
    both = torch.stack([scores, torch.ones_like(scores)])[:, None]  # (2, 1, gy, gx)
    total, weight = F.conv_transpose2d(both, window[None, None], stride=stride)[:, 0]
    pixels = (total / weight)[: resized[0], : resized[1]]
    if resized == original:
        return pixels
    return F.interpolate(pixels[None, None], size=original, mode="bilinear", align_corners=False)[0, 0]
