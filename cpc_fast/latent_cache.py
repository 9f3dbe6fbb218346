"""images -> latents, once: what a frozen encoder says of the training images is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .model import CPC
from .patches import grid_shape, patch_places, window_start
from .shapes import Places
from .shifts import shift
from .stages import stage


class LatentCache:
    """Latents of whole images, each encoded once by a frozen encoder, and random windows of them.

    Windows begin on the grid, in steps of patch_stride. Jitter (of patches too), gamma and flips, which would need the
    encoder again, are left out; shifted copies are drawn once for each image. Up to `memory` bytes are kept, 4 d for
    each patch of an image and of its copies; what is more is encoded again each time.

    Args:
        model: with a frozen encoder.
        images: each uint8 (h, w, c).
        side: of the windows, in pixels, at most the shorter side of the smallest image.
    """

    def __init__(self, model: CPC, images: Sequence[np.ndarray], side: int, memory: int = 1 << 31) -> None:
        self.model, self.images, self.side, self.left = model, images, side, memory
        self.cells = grid_shape(side, side, model.config.patch_size, model.config.patch_stride)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.sides: dict[int, tuple[int, ...]] = {}  # of the images seen: these may have to be read from a disk

    def latents(self, i: int) -> tuple[Tensor, Tensor]:
        """(gy, gx, d) of image i, and (copies, *cells, d) of shifted copies of one window of it."""
        if (found := self.kept.get(i)) is not None:
            return found
        config, image = self.model.config, self.images[i]
        self.sides[i] = image.shape[:2]
        pixels = self.model.standardise(image)[None]
        with torch.no_grad():
            whole = self.model.latents(pixels)[0].float()
            copies = whole.new_empty(0, *self.cells, whole.shape[-1])
            if config.shifts:
                generator = torch.Generator().manual_seed(config.seed * 1_000_003 + i)
                top, left = (window_start(n, self.side, config.patch_size, generator) for n in pixels.shape[2:])
                window = pixels[..., top : top + self.side, left : left + self.side]
                window = window.repeat(config.shift_copies, 1, 1, 1)
                copies = self.model.latents(shift(window, config.shifts, generator, config.unit)).float()
        size = whole.nbytes + copies.nbytes
        if size <= self.left:
            self.left -= size
            self.kept[i] = whole, copies
        return whole, copies

    @stage("batch")
    def batch(self, chosen: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Places]:
        """Latents (b + b * copies, *cells, d) of windows, then of shifted copies; and the places of the windows'."""
        windows, shifted, places = [], [], []
        size, stride = self.model.config.patch_size, self.model.config.patch_stride
        for i in chosen:
            whole, copies = self.latents(i)
            sides = self.sides[i]
            top, left = (
                window_start(*cells, size // stride, generator)
                for cells in zip(whole.shape[:2], self.cells, strict=True)
            )
            here = slice(top, top + self.cells[0]), slice(left, left + self.cells[1])
            windows.append(whole[here])
            shifted.append(copies)
            places.append(patch_places(whole.new_tensor([[0.0, 0.0, *sides]]), sides, size, stride)[0][here])
        return torch.cat([torch.stack(windows), *shifted]), torch.stack(places)
