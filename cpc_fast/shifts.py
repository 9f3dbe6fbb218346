"""Shifted copies of normal images: a patch of a transformed image is one more wrong answer.

On a homogeneous texture all patches look alike and in-batch contrast has nothing to learn. A blurred or turned copy
gives it something: the right answer must be told from a patch that is *almost* right. The idea is CSI's (Tack et al.
2020, arXiv 2007.08176), carried from whole images to the candidates of CPC. The anomaly score stays the plain loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Images
from .stages import stage


def _pick(images: Images, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One random number in [low, high) for each image, (b, 1, 1, 1)."""
    drawn = torch.rand(len(images), 1, 1, 1, generator=generator)
    return (low + (high - low) * drawn).to(images.device)


def _quarter_turn(images: Images, generator: torch.Generator) -> Images:
    return images.rot90(1 if torch.rand((), generator=generator) < 0.5 else 3, (2, 3))


def _magnify(images: Images, generator: torch.Generator) -> Images:
    """The middle of the image, enlarged 1.3 to 2 times."""
    factor = float(_pick(images[:1], 1.3, 2.0, generator))
    zoom = torch.eye(2, 3, device=images.device) / factor
    grid = F.affine_grid(zoom.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _noise(images: Images, generator: torch.Generator) -> Images:
    grain = torch.randn(images.shape, generator=generator).to(images.device)
    return images + grain * _pick(images, 0.2, 0.8, generator)


def _blur(images: Images, generator: torch.Generator) -> Images:
    sigma = float(_pick(images[:1], 1.0, 2.5, generator))
    axis = torch.arange(-6, 7, device=images.device)
    bell = torch.exp(-0.5 * (axis / sigma) ** 2)
    kernel = (bell[:, None] * bell / bell.sum() ** 2).expand(images.shape[1], 1, 13, 13)
    return F.conv2d(F.pad(images, (6, 6, 6, 6), mode="reflect"), kernel, groups=images.shape[1])


def _intensity(images: Images, generator: torch.Generator) -> Images:
    return images * _pick(images, 0.4, 0.8, generator) + _pick(images, -1.5, 1.5, generator)


def _sharpen(images: Images, generator: torch.Generator) -> Images:
    return images + (images - _blur(images, generator)) * _pick(images, 1.0, 2.0, generator)


def _shuffle(images: Images, generator: torch.Generator) -> Images:
    """Move every pixel a few places at random: the histogram stays, the texture goes."""
    b, _, h, w = images.shape
    reach = int(_pick(images[:1], 2.0, 6.0, generator))
    dy, dx = torch.randint(-reach, reach + 1, (2, b, h, w), generator=generator)
    y = (torch.arange(h)[:, None] + dy).clamp(0, h - 1)
    x = (torch.arange(w) + dx).clamp(0, w - 1)
    flat = (y * w + x).view(b, 1, h * w).expand(b, images.shape[1], h * w).to(images.device)
    return images.flatten(2).gather(2, flat).view_as(images)


def _invert(images: Images, generator: torch.Generator) -> Images:
    return images.mean((2, 3), keepdim=True) * 2 - images


def _warp(images: Images, generator: torch.Generator) -> Images:
    """Bend the image like soft rubber: smooth random displacements of a few pixels."""
    b, _, h, w = images.shape
    coarse = torch.rand(b, 2, max(2, h // 12), max(2, w // 12), generator=generator).to(images.device) * 2 - 1
    bend = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3, device=images.device).expand(b, 2, 3), [b, 1, h, w], align_corners=False)
    reach = torch.tensor([16 / w, 16 / h], device=images.device)  # 8 pixels, where 2 spans the image
    reach = reach * _pick(images, 0.3, 1.0, generator)
    return F.grid_sample(images, straight + bend * reach, padding_mode="reflection", align_corners=False)


FAMILIES: dict[str, Callable[[Images, torch.Generator], Images]] = {
    "quarter-turn": _quarter_turn,
    "magnify": _magnify,
    "noise": _noise,
    "blur": _blur,
    "intensity": _intensity,
    "sharpen": _sharpen,
    "shuffle": _shuffle,
    "invert": _invert,
    "warp": _warp,
}


@stage("shifts")
def shift(images: Images, families: tuple[str, ...], generator: torch.Generator) -> Images:
    """A transformed copy of each square image, the families taking turns from a random start.

    >>> shift(torch.randn(4, 1, 64, 64), ("noise", "magnify"), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1, 64, 64])
    """
    start = int(torch.randint(len(families), (), generator=generator))
    shifted = torch.empty_like(images)
    for i, family in enumerate(families):
        rows = slice((start + i) % len(families), None, len(families))
        if len(images[rows]):
            shifted[rows] = FAMILIES[family](images[rows], generator)
    return shifted
