"""patch scores -> a score for every pixel of the original image."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .patches import patch_starts
from .shapes import AnomalyMap
from .stages import stage


@lru_cache(maxsize=4)
def pixel_weights(length: int, size: int, stride: int, device: torch.device) -> Tensor:
    """How much each patch along one axis counts at each of `length` pixels, (length, patches); 1 in all at each.

    A bell over every patch: its centre speaks louder than its edge.
    """
    pixels = torch.arange(length, dtype=torch.float32)[:, None]
    away = pixels - torch.tensor(patch_starts(length, size, stride), dtype=torch.float32) - (size - 1) / 2
    bells = torch.exp(-0.5 * (away / (size / 4)) ** 2).where(away.abs() < size / 2, 0.0)
    return (bells / bells.sum(1, keepdim=True)).to(device)


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
    rows, columns = (pixel_weights(length, size, stride, scores.device) for length in resized)
    pixels = rows @ scores @ columns.T
    if resized == original:
        return pixels
    return F.interpolate(pixels[None, None], size=original, mode="bilinear", align_corners=False)[0, 0]
