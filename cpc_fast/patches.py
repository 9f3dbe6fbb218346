"""images -> patches: overlapping square windows on a grid from edge to edge.

The grid's step is the stride where the image is so many strides long, and a little less where it is not: the last row
and column end with the image, whose every pixel is in a patch, and no patch holds pixels that the image has not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from .errors import CpcFastError
from .shapes import Frames, Images, Patches, Places
from .stages import stage


def grid_shape(height: int, width: int, size: int, stride: int) -> tuple[int, int]:
    """How many patches (gy, gx) cover height x width pixels.

    >>> grid_shape(128, 100, size=32, stride=16)
    (7, 6)
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


def patch_starts(length: int, size: int, stride: int) -> list[int]:
    """Where the patches of `length` pixels begin: at most a stride apart, alike from both ends.

    >>> patch_starts(64, size=32, stride=16), patch_starts(100, size=32, stride=16)
    ([0, 16, 32], [0, 14, 27, 41, 54, 68])
    """
    last = length - size
    steps = max(1, -(-last // stride))
    fore = [(2 * i * last + steps) // (2 * steps) for i in range(steps // 2 + 1)]
    return fore + [last - start for start in reversed(fore[: -(-last // stride) + 1 - len(fore)])]


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
            rows = torch.tensor(starts, device=images.device)[:, None] + torch.arange(size, device=images.device)
            images = images.index_select(axis, rows.flatten()).unflatten(axis, rows.shape).movedim(axis + 1, -1)
        else:  # evenly: no copy
            images = images.unfold(axis, size, *apart or (1,))
    return images.permute(0, 2, 3, 1, 4, 5)


def patch_places(frames: Frames, window: Sequence[int], size: int, stride: int) -> Places:
    """Where in its image the centre of each patch of a window lies, (b, 4) -> (b, gy, gx, 2).

    window: height and width of all of them, in pixels.

    >>> patch_places(torch.tensor([[64.0, 0.0, 128.0, 256.0]]), (64, 64), size=32, stride=16)[0, 2, 1]
    tensor([0.8750, 0.1250])
    """
    ys, xs = (frames.new_tensor(patch_starts(length, size, stride)) + size / 2 for length in window)
    y = (frames[:, 0, None] + ys) / frames[:, 2, None]
    x = (frames[:, 1, None] + xs) / frames[:, 3, None]
    shape = (len(frames), len(ys), len(xs))
    return torch.stack([y[:, :, None].expand(shape), x[:, None].expand(shape)], -1)


def turned_over(patches: Patches, axes: tuple[int, ...]) -> Patches:
    """The patches of an image of (c, h, w) with these axes turned over."""
    return patches.flip([*axes, *(axis + 3 for axis in axes)])


def places_turned_over(places: Places, axes: tuple[int, ...]) -> Places:
    """Where each patch lies in the image with these axes (of c, h, w) turned over."""
    over = torch.tensor([axis in axes for axis in (1, 2)], device=places.device)
    return torch.where(over, 1 - places, places)
