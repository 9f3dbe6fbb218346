"""images -> patches: overlapping square windows on a regular grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import CpcFastError
from .shapes import Frames, Images, Patches, Places
from .stages import stage


def grid_shape(height: int, width: int, size: int, stride: int) -> tuple[int, int]:
    """How many patches (gy, gx) cover height x width pixels; the last row and column may reach past the edge.

    >>> grid_shape(128, 128, size=32, stride=16)
    (7, 7)
    """
    if min(height, width) < size:
        raise CpcFastError(
            f"An image of {height} x {width} pixels is smaller than one patch ({size} pixels); "
            "use one at the scale of the images that are fitted on. (A fit with image_size enlarges small ones.)"
        )
    return -(-(height - size) // stride) + 1, -(-(width - size) // stride) + 1


def window_start(length: int, side: int, margin: int, generator: torch.Generator) -> int:
    """Where a random window of `side` of `length` pixels begins; one that would begin up to `margin` pixels outside is
    moved to the edge. So edges, which every image has and a test image shows whole, are seen often enough to be known.

    >>> window_start(96, 96, 32, torch.Generator())
    0
    """
    start = int(torch.randint(-margin, length - side + margin + 1, (), generator=generator))
    return min(max(start, 0), length - side)


@stage("patches")
def extract_patches(images: Images, size: int, stride: int) -> Patches:
    """Cut images into overlapping patches, mirroring pixels where the grid reaches past the lower right edge.

    >>> extract_patches(torch.zeros(2, 1, 128, 128), size=32, stride=16).shape
    torch.Size([2, 7, 7, 1, 32, 32])
    """
    images = cover(images, size, stride)
    return images.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)


def cover(images: Images, size: int, stride: int) -> Tensor:
    """Images as large as their grid of patches, pixels mirrored past the lower right edge where it reaches further.

    >>> cover(torch.zeros(2, 1, 100, 128), size=32, stride=16).shape
    torch.Size([2, 1, 112, 128])
    """
    height, width = images.shape[-2:]
    gy, gx = grid_shape(height, width, size, stride)
    below, right = (gy - 1) * stride + size - height, (gx - 1) * stride + size - width
    return F.pad(images, (0, right, 0, below), mode="reflect") if below or right else images


def patch_places(frames: Frames, grid: Sequence[int], size: int, stride: int) -> Places:
    """Where in its image each patch of a window's grid lies, (b, 4) -> (b, gy, gx, 2).

    >>> patch_places(torch.tensor([[64.0, 0.0, 128.0, 256.0]]), (3, 3), size=32, stride=16)[0, 2, 1]
    tensor([0.8750, 0.1250])
    """
    ys, xs = (torch.arange(cells, device=frames.device) * stride + size / 2 for cells in grid)
    y = (frames[:, 0, None] + ys) / frames[:, 2, None]
    x = (frames[:, 1, None] + xs) / frames[:, 3, None]
    shape = (len(frames), *grid)
    return torch.stack([y[:, :, None].expand(shape), x[:, None].expand(shape)], -1)
