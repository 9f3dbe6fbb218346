"""images -> patches: overlapping square windows on a grid from edge to edge.

Where an image is a whole number of strides long, that is the grid's step; where it is not, the grid closes up until its
last row and column end with the image: every pixel is in a patch, and no patch holds pixels that the image has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .errors import ImageError
from .shapes import Frames, Images, Patches, Places
from .stages import stage


def grid_shape(height: int, width: int, size: int, stride: int) -> tuple[int, int]:
    """How many patches (gy, gx) cover height x width pixels.

    >>> grid_shape(128, 100, size=32, stride=16)
    (7, 6)
    """
    if min(height, width) < size:
        raise ImageError(
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


def patch_starts(length: int, size: int, stride: int) -> list[int]:
    """Where the patches of `length` pixels begin: at most a stride apart, alike from both ends (where that takes half a
    pixel, but for the one in the middle).

    >>> patch_starts(64, size=32, stride=16), patch_starts(100, size=32, stride=16)
    ([0, 16, 32], [0, 14, 27, 41, 54, 68])
    """
    last = length - size
    steps = -(-last // stride)
    fore = [(2 * i * last + steps) // (2 * steps or 1) for i in range(steps // 2 + 1)]
    return fore + [last - start for start in reversed(fore[: steps + 1 - len(fore)])]


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what scoring made first, training can use too
def starts_on(length: int, size: int, stride: int, device: torch.device) -> Tensor:
    """patch_starts as a tensor, made and sent once."""
    return torch.tensor(patch_starts(length, size, stride), device=device)


@stage("patches")
def extract_patches(images: Images, size: int, stride: int) -> Patches:
    """Cut images into overlapping patches.

    >>> extract_patches(torch.zeros(2, 1, 128, 100), size=32, stride=16).shape
    torch.Size([2, 7, 6, 1, 32, 32])
    """
    grid_shape(images.shape[2], images.shape[3], size, stride)  # refuses what is smaller than a patch
    for axis in (2, 3):
        starts = patch_starts(images.shape[axis], size, stride)
        apart = {after - before for before, after in pairwise(starts)}
        if len(apart) > 1:
            rows = starts_on(images.shape[axis], size, stride, images.device)[:, None]
            rows = rows + torch.arange(size, device=images.device)
            images = images.index_select(axis, rows.flatten()).unflatten(axis, rows.shape).movedim(axis + 1, -1)
        else:  # evenly: no copy
            images = images.unfold(axis, size, *apart or (1,))
    return images.permute(0, 2, 3, 1, 4, 5)


def jittered(pixels: Tensor, spread: float, generator: torch.Generator, each: int) -> Tensor:
    """Standardised pixels with a random contrast and brightness, of that spread, for each entry of the first `each`
    dimensions: 1 for images, 3 for patches.

    >>> jittered(torch.zeros(2, 7, 7, 1, 32, 32), 0.1, torch.Generator(), each=3).flatten(3).std(3).max()
    tensor(0.)
    """
    shape = *pixels.shape[:each], *[1] * (pixels.ndim - each)
    gain, offset = (torch.randn(2, *shape, generator=generator) * spread).to(pixels.device)
    return pixels * (1 + gain) + offset


def patch_places(frames: Frames, window: Sequence[int], size: int, stride: int) -> Places:
    """Where in its image the centre of each patch of a window lies, (b, 4) -> (b, gy, gx, 2).

    window: height and width of all of them, in pixels.

    >>> patch_places(torch.tensor([[64.0, 0.0, 128.0, 256.0]]), (64, 64), size=32, stride=16)[0, 2, 1]
    tensor([0.8750, 0.1250])
    """
    ys, xs = (starts_on(length, size, stride, frames.device).to(frames.dtype) + size / 2 for length in window)
    y = (frames[:, 0, None] + ys) / frames[:, 2, None]
    x = (frames[:, 1, None] + xs) / frames[:, 3, None]
    shape = (len(frames), len(ys), len(xs))
    return torch.stack([y[:, :, None].expand(shape), x[:, None].expand(shape)], -1)


def turned_over(patches: Patches, axes: tuple[int, ...]) -> Patches:
    """The patches of an image of (c, h, w) with these axes turned over."""
    return patches.flip([*axes, *(axis + 3 for axis in axes)]) if axes else patches  # flip copies


def places_turned_over(places: Places, axes: tuple[int, ...]) -> Places:
    """Where each patch lies in the image with these axes (of c, h, w) turned over."""
    return torch.stack([1 - part if i + 1 in axes else part for i, part in enumerate(places.unbind(-1))], -1)
