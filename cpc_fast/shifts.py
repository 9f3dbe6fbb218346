"""Shifted copies of normal images: a patch of a transformed image is one more wrong answer.

On a homogeneous texture all patches look alike and in-batch contrast has nothing to learn. A blurred or turned copy
gives it something: the right answer must be told from a patch that is *almost* right. The idea is CSI's (Tack et al.
2020, arXiv 2007.08176), carried from whole images to the candidates of CPC. The anomaly score stays the plain loss.

Most families change the whole image. `spots`, `curves` and `lines` change little of it, as defects do, and every patch.
Of each of the others there is a `local-` one, which acts inside islands only: harder to tell from what is normal, so
that alone they teach nothing in a short training, and beside whole ones a little.

A `unit` is 1/32 of a patch in pixels, so that what is learned does not depend on the resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .shapes import Images
from .stages import stage

Family = Callable[[Images, torch.Generator, float], Images]


def _pick(images: Images, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One random number in [low, high) for each image, (b, 1, 1, 1)."""
    drawn = torch.rand(len(images), 1, 1, 1, generator=generator)
    return (low + (high - low) * drawn).to(images.device)


def _number(low: float, high: float, generator: torch.Generator) -> float:
    """One random number in [low, high) for all images, known without waiting for a device."""
    return float(low + (high - low) * torch.rand(1, generator=generator))


def _fields(images: Images, generator: torch.Generator) -> torch.Generator:
    """What whole fields are drawn from, on the images' own device: of a GPU, one that the generator seeds."""
    if images.device.type == "cpu":
        return generator
    return torch.Generator(images.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))


def _sign(images: Images, generator: torch.Generator) -> Tensor:
    """Minus or plus one for each image, (b, 1, 1, 1)."""
    return (torch.randint(2, (len(images), 1, 1, 1), generator=generator) * 2 - 1).to(images.device)


def _quarter_turn(images: Images, generator: torch.Generator, unit: float) -> Images:
    return images.rot90(1 if torch.rand((), generator=generator) < 0.5 else 3, (2, 3))


def _magnify(images: Images, generator: torch.Generator, unit: float) -> Images:
    """The middle of the image, enlarged 1.3 to 2 times."""
    factor = _number(1.3, 2.0, generator)
    zoom = torch.eye(2, 3, device=images.device) / factor
    grid = F.affine_grid(zoom.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _turn(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Turned by any angle and scaled, 0.4 to 1.2 times."""
    angle, factor = _pick(images, 0.0, 2 * math.pi, generator), _pick(images, 0.4, 1.2, generator)
    cos, sin = torch.cos(angle) / factor, torch.sin(angle) / factor
    matrix = torch.cat([cos, -sin, 0 * cos, sin, cos, 0 * cos], 3).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _noise(images: Images, generator: torch.Generator, unit: float) -> Images:
    grain = torch.randn(images.shape, generator=_fields(images, generator), device=images.device)
    return images + grain * _pick(images, 0.2, 0.8, generator)


def _blur(images: Images, generator: torch.Generator, unit: float) -> Images:
    sigma = _number(1.0, 2.5, generator) * unit
    reach = math.ceil(6 * unit)
    axis = torch.arange(-reach, reach + 1, device=images.device)
    bell = torch.exp(-0.5 * (axis / sigma) ** 2)
    bell = (bell / bell.sum()).expand(images.shape[1], 1, 1, -1)
    images = F.conv2d(F.pad(images, (reach,) * 4, mode="reflect"), bell, groups=images.shape[1])
    return F.conv2d(images, bell.mT, groups=images.shape[1])


def _intensity(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Another brightness, and less contrast or more."""
    mean = images.mean((2, 3), keepdim=True)
    contrast = torch.exp(_pick(images, 0.3, 1.0, generator) * _sign(images, generator))
    return (images - mean) * contrast + mean + _pick(images, -1.5, 1.5, generator)


def _brightness(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Another brightness alone: with another contrast beside it, contrast is what tells the copy."""
    return images + _pick(images, -2.0, 2.0, generator)


def _exposure(images: Images, generator: torch.Generator, unit: float) -> Images:
    """0.3 to 1.8 times as bright, counted from the darkest pixel of all these images."""
    black = images.amin()
    return (images - black) * torch.exp(_pick(images, -1.2, 0.6, generator)) + black


def _sharpen(images: Images, generator: torch.Generator, unit: float) -> Images:
    return images + (images - _blur(images, generator, unit)) * _pick(images, 1.0, 2.0, generator)


def _shuffle(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Move every pixel a few places at random: the histogram stays, the texture goes."""
    b, _, h, w = images.shape
    reach = int(_number(2.0, 6.0, generator) * unit)
    fields = _fields(images, generator)
    dy, dx = torch.randint(-reach, reach + 1, (2, b, h, w), generator=fields, device=images.device)
    y = (torch.arange(h, device=images.device).unsqueeze(1) + dy).clamp(0, h - 1)
    x = (torch.arange(w, device=images.device) + dx).clamp(0, w - 1)
    flat = (y * w + x).view(b, 1, h * w).expand(b, images.shape[1], h * w)
    return images.flatten(2).gather(2, flat).view_as(images)


def _invert(images: Images, generator: torch.Generator, unit: float) -> Images:
    return images.mean((2, 3), keepdim=True) * 2 - images


def _warp(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Bend the image like soft rubber: smooth random displacements of a few pixels."""
    b, _, h, w = images.shape
    knots = max(2, int(h / (12 * unit))), max(2, int(w / (12 * unit)))
    coarse = torch.rand(b, 2, *knots, generator=generator).to(images.device) * 2 - 1
    bend = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    straight = F.affine_grid(torch.eye(2, 3, device=images.device).expand(b, 2, 3), [b, 1, h, w], align_corners=False)
    reach = torch.tensor([16 / w, 16 / h], device=images.device) * unit  # 8 units, where 2 spans the image
    reach = reach * _pick(images, 0.3, 1.0, generator)
    return F.grid_sample(images, straight + bend * reach, padding_mode="reflection", align_corners=False)


def _hills(images: Images, spacing: float, generator: torch.Generator) -> Tensor:
    """A smooth random landscape of mean 0 and spread 1 for each image, (b, 1, h, w), hills `spacing` pixels apart."""
    b, _, h, w = images.shape
    coarse = torch.randn(b, 1, max(3, round(h / spacing) + 1), max(3, round(w / spacing) + 1), generator=generator)
    hills = F.interpolate(coarse.to(images.device), size=(h, w), mode="bicubic", align_corners=True)
    return (hills - hills.mean((2, 3), keepdim=True)) / hills.std((2, 3), keepdim=True)


def _spots(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Islands all over the image: of another brightness, of one flat tone, or a piece of another image turned over."""
    spacing = _number(6.0, 14.0, generator) * unit
    inside = torch.sigmoid(8 * (_hills(images, spacing, generator) - _pick(images, 0.6, 1.2, generator)))
    offset = _pick(images, 0.8, 2.5, generator) * _sign(images, generator)
    shaded = images * _pick(images, 0.2, 0.8, generator) + offset
    flat = images.mean((2, 3), keepdim=True) + offset
    h, w = images.shape[2:]
    elsewhere = images.roll((1, h // 2, w // 3), (0, 2, 3)).flip(3)
    kind = torch.randint(3, (len(images), 1, 1, 1), generator=generator).to(images.device)
    painted = torch.where(kind == 0, elsewhere, torch.where(kind == 1, shaded, flat))
    return images.lerp(painted, inside)


def _curves(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Dark or bright winding lines: where a random landscape crosses its mean height."""
    hills = _hills(images, _number(14.0, 24.0, generator) * unit, generator)
    slope_y, slope_x = torch.gradient(hills, dim=(2, 3))
    pixels_away = hills / torch.hypot(slope_y, slope_x).clamp_min(0.01)
    inside = torch.exp(-((pixels_away / (_pick(images, 0.6, 2.0, generator) * unit)) ** 2))
    tone = images.mean((2, 3), keepdim=True) + _pick(images, 1.2, 3.0, generator) * _sign(images, generator)
    return images.lerp(tone.expand_as(images), inside)


def _lines(images: Images, generator: torch.Generator, unit: float) -> Images:
    """Thin straight lines side by side, a little darker or brighter, less than a patch apart."""
    h, w = images.shape[2:]
    angle, spacing = _pick(images, 0.0, math.pi, generator), _pick(images, 14.0, 24.0, generator) * unit
    y, x = torch.arange(h, device=images.device)[:, None], torch.arange(w, device=images.device)
    across = torch.cos(angle) * x + torch.sin(angle) * y + _pick(images, 0.0, 24.0, generator) * unit
    away = (across % spacing - spacing / 2) / (_pick(images, 0.6, 1.5, generator) * unit)
    return images + torch.exp(-(away**2)) * _pick(images, 0.3, 1.5, generator) * _sign(images, generator)


WHOLE: dict[str, Family] = {
    "quarter-turn": _quarter_turn,
    "turn": _turn,
    "magnify": _magnify,
    "noise": _noise,
    "blur": _blur,
    "intensity": _intensity,
    "brightness": _brightness,
    "exposure": _exposure,
    "sharpen": _sharpen,
    "shuffle": _shuffle,
    "invert": _invert,
    "warp": _warp,
}


def _locally(family: Family) -> Family:
    """The family inside islands, of any size and hardness, and the image as it is between them."""

    def shifted(images: Images, generator: torch.Generator, unit: float) -> Images:
        spacing, hardness = (_number(*limits, generator) for limits in ((6.0, 20.0), (4.0, 16.0)))
        inside = torch.sigmoid(
            hardness * (_hills(images, spacing * unit, generator) - _pick(images, 0.3, 1.1, generator))
        )
        strength = _pick(images, 0.4, 1.2, generator).clamp_max(1.0)
        return images.lerp(family(images, generator, unit), inside * strength)

    return shifted


LOCAL: dict[str, Family] = {"spots": _spots, "curves": _curves, "lines": _lines}
FAMILIES = WHOLE | LOCAL | {f"local-{name}": _locally(family) for name, family in WHOLE.items()}


@stage("shifts")
def shift(images: Images, families: tuple[str, ...], generator: torch.Generator, unit: float = 1.0) -> Images:
    """A transformed copy of each square image, the families taking turns from a random start.

    `unit`, 1/32 of a patch in pixels, is what the sizes of blur, spots and the like are counted in.

    >>> shift(torch.randn(4, 1, 64, 64), ("noise", "magnify"), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1, 64, 64])
    """
    start = int(torch.randint(len(families), (), generator=generator))
    shifted = torch.empty_like(images)
    for i, family in enumerate(families):
        rows = slice((start + i) % len(families), None, len(families))
        if len(images[rows]):
            shifted[rows] = FAMILIES[family](images[rows], generator, unit)
    return shifted
