"""latents -> contexts: what is known when a prediction is made.

With `none` a patch's context is its own latent. With `masked-conv` it also sees the patches behind it (a small
PixelCNN, one for each direction of prediction): for "down", everything above and, in its own row, to the left.

A place is a context too, without a latent: what belongs there, whatever its neighbours look like.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shapes import Contexts, Latents, Places
from .stages import stage

DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1))  # (dy, dx): down, up, right, left


def turn(grid: Tensor, direction: int) -> Tensor:
    """Turn (b, gy, gx, d) so that `direction` becomes down."""
    return (grid, grid.flip(1), grid.transpose(1, 2), grid.flip(2).transpose(1, 2))[direction]


def turn_back(grid: Tensor, direction: int) -> Tensor:
    """The inverse of turn."""
    return (grid, grid.flip(1), grid.transpose(1, 2), grid.transpose(1, 2).flip(2))[direction]


class MaskedConv(nn.Conv2d):
    """3 x 3 convolution that sees the row above, the pixel to the left and itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        mask = torch.zeros(3, 3)
        mask[0], mask[1, :2] = 1, 1
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, input: Tensor, apart: int = 1) -> Tensor:
        mask: Tensor = self.mask  # pyright: ignore[reportAssignmentType]
        return F.conv2d(input, self.weight * mask, self.bias, padding=apart, dilation=apart)


class ContextNet(nn.Module):
    """Contexts: (b, gy, gx, d) -> (a, b, gy, gx, d), a = 1 when the directions share theirs, else one for each.

    >>> ContextNet("masked-conv", features=8, directions=2)(torch.zeros(1, 4, 4, 8)).shape
    torch.Size([2, 1, 4, 4, 8])
    """

    def __init__(self, kind: str, features: int, directions: int) -> None:
        super().__init__()
        self.nets = nn.ModuleList()
        if kind == "masked-conv":
            for _ in range(directions):
                self.nets.append(nn.Sequential(MaskedConv(features), nn.ReLU(), MaskedConv(features)))

    @stage("contexts")
    def forward(self, latents: Latents, apart: int = 1) -> Contexts:
        """apart: how many rows or columns lie between neighbours, for a grid that is finer than that of training."""
        if not self.nets:
            return latents[None]
        contexts = []
        for direction, (first, relu, second) in enumerate(self.nets):  # pyright: ignore[reportGeneralTypeIssues]
            turned = turn(latents, direction)
            seen = turned + second(relu(first(turned.permute(0, 3, 1, 2), apart)), apart).permute(0, 2, 3, 1)
            contexts.append(turn_back(seen, direction))
        return torch.stack(contexts)


class PlaceNet(nn.Module):
    """Contexts from places alone: (b, gy, gx, 2) -> (b, gy, gx, d).

    Sines and cosines of OCTAVES wavelengths, the longest two images long, through a layer between.

    >>> PlaceNet(features=8)(torch.rand(1, 4, 4, 2)).shape
    torch.Size([1, 4, 4, 8])
    """

    OCTAVES = 4

    def __init__(self, features: int, hidden: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4 * self.OCTAVES, hidden), nn.ReLU(), nn.Linear(hidden, features))

    @stage("contexts")
    def forward(self, places: Places) -> Latents:
        waves = torch.cat([math.pi * 2.0**octave * places for octave in range(self.OCTAVES)], -1)
        return self.layers(torch.cat([waves.sin(), waves.cos()], -1))
