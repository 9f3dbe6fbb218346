"""One image against a bank of normal latents: calibrated losses and the anomaly map.

loss of each prediction -> minus its normal mean, over its normal spread     (for each view, member, direction, step)
-> median over the predictions about a patch -> root mean square, or maximum, over the views and the members
-> minus its normal mean, over its normal spread                             (for each place of the grid)
   (where the model knows of places: what neighbours say and what the place says, each for itself; the higher counts)
-> dips between strange patches filled, where the config says so -> anomaly map

Views: the image, and its mirror images where the config says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anomaly_map import anomaly_map
from .bank import Bank
from .model import CPC, mirrors
from .patches import grid_shape
from .shapes import AnomalyMap
from .stages import stage
from .train import autocast

FOLDS = 5  # in which held-out images are calibrated by each other
SHRINK = 8.0  # how many images' worth of trust the overall statistics get against those of one grid position


Found = tuple[Tensor, Tensor, Tensor, list[int], tuple[int, int]]  # losses, sources, targets, counts; the grid


@dataclass(frozen=True)
class Calibration:
    """What is normal: means and spreads of the losses of held-out normal images."""

    step_mean: Tensor  # (views * members * (directions * K + place),)
    step_spread: Tensor  # the same
    # (voices, gy, gx), or odd (voices, n, n) of places by their distance from the edges, where grids differ; voices:
    # the neighbours and, where the model knows of places, the place
    place_mean: Tensor
    place_spread: Tensor


@dataclass(frozen=True)
class Surprise:
    """Calibrated losses of one image: what the map, the score and the explanation are made of."""

    values: Tensor  # (n,) calibrated loss of each prediction
    targets: Tensor  # (n,) flat grid index
    counts: list[int]  # predictions of each (view, member, direction, step)
    voices: Tensor  # (voices, gy, gx) neighbours and, where the model knows of places, place
    grid: Tensor  # (gy, gx) the higher of the voices


class Scorer(nn.Module):
    """image -> surprise -> map, for one image at a time.

    An image is always scored alone, so its score is the same to the last bit whatever it is handed in with.
    """

    bank: Bank

    def __init__(self, model: CPC, bank: Bank, calibration: Calibration | None = None) -> None:
        super().__init__()
        self.model, self.config = model.eval(), model.config
        if isinstance(bank, Tensor):
            self.register_buffer("bank", bank)
        else:
            self.bank = bank
        self.calibration = calibration

    def losses(self, image: np.ndarray) -> Found:
        """What the model finds in an image, uint8 (h, w, c), resized already."""
        device = self.bank.device
        pixels = self.model.standardise(image)
        gy, gx = grid_shape(pixels.shape[1], pixels.shape[2], self.config.patch_size, self.config.scoring_stride)
        with torch.inference_mode(), autocast(device, self.config.precision):
            losses, sources, targets, counts = self.model.surprise(pixels, self.bank)
        return losses.float(), sources, targets, counts, (gy, gx)

    @stage("surprise")
    def surprise(self, image: np.ndarray) -> Surprise:
        """uint8 (h, w, c), resized already."""
        return self.judge(self.losses(image))

    def judge(self, found: Found) -> Surprise:
        """The losses of an image, calibrated."""
        losses, sources, targets, counts, shape = self.by_steps(found)
        voices = self.voices((losses, sources, targets, counts, shape))
        if self.calibration is not None:
            mean, spread = (at_places(t, *shape) for t in (self.calibration.place_mean, self.calibration.place_spread))
            voices = (voices - mean) / spread
        return Surprise(losses, targets, counts, voices, self.together(voices))

    def by_steps(self, found: Found) -> Found:
        """The same with losses less the normal mean of their steps, over the normal spread."""
        losses, sources, targets, counts, shape = found
        if self.calibration is not None:
            steps = steps_of(counts, losses.device)
            losses = (losses - self.calibration.step_mean[steps]) / self.calibration.step_spread[steps]
        return losses, sources, targets, counts, shape

    def voices(self, found: Found) -> Tensor:
        """From losses that are calibrated by their steps what is said of each patch, (voices, gy, gx), by its
        neighbours and, where the model knows of places, by its place."""
        losses, sources, targets, counts, shape = found
        times = len(mirrors(self.config)) * self.config.members
        counts = counts[: len(counts) // times]
        ways = zip(losses.chunk(times), sources.chunk(times), targets.chunk(times), strict=True)
        return combined(torch.stack([self._of_one(*way, counts, shape) for way in ways]), self.config.ensemble)

    def _of_one(
        self, losses: Tensor, sources: Tensor, targets: Tensor, counts: list[int], shape: tuple[int, int]
    ) -> Tensor:
        """(voices, gy, gx), of one member in one view."""
        if not self.config.place:
            return self.about_patches(losses, sources, targets, counts, shape)[None]
        cut = sum(counts[:-1])  # predictions from places are the last
        ahead = self.about_patches(losses[:cut], sources[:cut], targets[:cut], counts[:-1], shape)
        return torch.stack([ahead, losses[cut:].view(shape)])

    def together(self, voices: Tensor) -> Tensor:
        """(voices, gy, gx) -> (gy, gx): a patch is as strange as the voice says that finds it stranger."""
        return voices.amax(0)

    def about_patches(
        self, losses: Tensor, sources: Tensor, targets: Tensor, counts: list[int], shape: tuple[int, int]
    ) -> Tensor:
        """One number for each patch, (gy, gx), from the calibrated losses of what its neighbours predict."""
        return patch_medians(losses, sources, targets, counts, shape)

    def look(self, image: np.ndarray, original: tuple[int, int]) -> tuple[Surprise, AnomalyMap]:
        """Surprise and anomaly map of a resized image, the map at the original (h, w)."""
        surprise = self.surprise(image)
        return surprise, self.spread(surprise, (image.shape[0], image.shape[1]), original)

    def spread(self, surprise: Surprise, size: tuple[int, int], original: tuple[int, int]) -> AnomalyMap:
        """The surprise of an image of that size (h, w), over the pixels of the original."""
        grid = closed(surprise.grid, self.config.closing)
        return anomaly_map(grid, self.config.patch_size, self.config.scoring_stride, size, original)

    def map(self, image: np.ndarray, original: tuple[int, int]) -> AnomalyMap:
        return self.look(image, original)[1]


def combined(surprises: Tensor, ensemble: str) -> Tensor:
    """Over the first dimension, "max": the highest; "rms": the root mean square of what lies above normal, and the mean
    of what lies below: one that is startled is heard, where their mean would drown it.

    >>> combined(torch.tensor([[7.0, -1.0], [1.0, -1.0]]), "rms")
    tensor([ 5., -1.])
    """
    if ensemble == "max":
        return surprises.amax(0)
    return surprises.clamp_min(0).square().mean(0).sqrt() + surprises.clamp_max(0).mean(0)


def closed(grid: Tensor, size: int) -> Tensor:
    """Morphological closing of each (gy, gx) of a grid (..., gy, gx) by a square of `size` cells, an odd number: a dip
    in which no such square fits is filled, and nothing gets lower. What lies beyond the edge counts for nothing.

    >>> closed(torch.tensor([[0.0, 0.0, 4.0, 1.0, 3.0, 0.0, 0.0, 0.0]]), 3)
    tensor([[0., 0., 4., 3., 3., 0., 0., 0.]])
    """
    if size == 1:
        return grid
    planes = grid.reshape(-1, *grid.shape[-2:])
    wider = F.max_pool2d(planes, size, 1, size // 2)
    return -F.max_pool2d(-wider, size, 1, size // 2).view(grid.shape)


def steps_of(counts: list[int], device: torch.device) -> Tensor:
    """Which step each prediction belongs to.

    >>> steps_of([2, 0, 3], torch.device("cpu"))
    tensor([0, 0, 2, 2, 2])
    """
    return torch.cat([torch.full((count,), i, device=device) for i, count in enumerate(counts)])


def patch_medians(
    losses: Tensor, sources: Tensor, targets: Tensor, counts: list[int], shape: tuple[int, int]
) -> Tensor:
    """Median loss of the predictions about each patch, (gy, gx): a few that are made from within a defect cannot make
    a normal patch strange.

    A patch that is never predicted (with one direction, the first rows) takes the median of the predictions made from
    it; one that does neither is neutral, 0.
    """
    found, steps = [], steps_of(counts, losses.device)
    for index in (targets, sources):
        table = losses.new_full((len(counts), shape[0] * shape[1]), torch.inf)
        said = torch.zeros_like(table, dtype=torch.bool)
        table[steps, index], said[steps, index] = losses, True  # a step says one thing about a patch
        rising, count = table.sort(0).values, said.sum(0)
        low, high = (rising.gather(0, ((count - more).clamp_min(0) // 2)[None])[0] for more in (1, 0))
        found.append((count > 0, ((low + high) / 2).masked_fill(table.isnan().any(0), torch.nan)))
    return torch.where(found[0][0], found[0][1], torch.where(found[1][0], found[1][1], 0.0)).view(shape)


def places(length: int, size: int) -> list[int]:
    """Which of `size` calibrated places each of `length` rows (or columns) of a grid is judged by: its own where the
    grid is the calibrated one, else that as far from the nearer edge, the middle one for all that are far from both.

    >>> places(8, 5), places(3, 5), places(5, 5)
    ([0, 1, 2, 2, 2, 2, 3, 4], [0, 1, 4], [0, 1, 2, 3, 4])
    """
    half = size // 2
    fore = [min(i, half) for i in range(length)]
    aft = [size - 1 - min(length - 1 - i, half) for i in range(length)]
    return [fore[i] if i <= length - 1 - i else aft[i] for i in range(length)] if length != size else list(range(size))


def at_places(table: Tensor, gy: int, gx: int) -> Tensor:
    """What tables over calibrated places say about each place of another grid, (voices, gy, gx)."""
    return table[:, places(gy, table.shape[1])][:, :, places(gx, table.shape[2])]


def calibrate(scorer: Scorer, found: Sequence[Found]) -> Calibration:
    """Means and spreads of the losses of held-out normal images.

    First for each direction and step over all places, then for each place of the grid over the images, drawn towards
    the overall figures as if SHRINK more losses had shown those. Images of several sizes share the places by their
    distance from the edges: a patch at the edge is predicted from fewer sides, and often shows the edge of a part.
    Of two voices the higher one counts, so they are made equally loud: on normal images the highest that one says is on
    average as high as the highest of the other.
    """
    steps = [
        torch.cat(parts) for parts in zip(*(losses.split(counts) for losses, _, _, counts, _ in found), strict=True)
    ]
    mean = torch.stack([step.mean() for step in steps])
    spread = torch.stack([step.std() for step in steps]).clamp_min(1e-6)
    neutral = (mean.new_zeros(1, 1, 1), mean.new_ones(1, 1, 1))
    partly = copy.copy(scorer)
    partly.calibration = Calibration(mean, spread, *neutral)
    grids = [partly.voices(partly.by_steps(one)) for one in found]
    everything = torch.cat([grid.flatten(1) for grid in grids], 1)
    middle, variance = everything.mean(1)[:, None, None], everything.var(1).clamp_min(1e-12)[:, None, None]
    means, spreads = middle, variance.sqrt()
    if len(grids) > 1:
        means, spreads = _of_places(grids, middle, variance, 2 * max(scorer.config.offsets) * scorer.config.finer + 1)
    peaks = []
    for grid in grids:
        usual, scale = (at_places(table, *grid.shape[1:]) for table in (means, spreads))
        peaks.append(((grid - usual) / scale).amax((1, 2)))
    highest = torch.stack(peaks).mean(0).clamp_min(0.1)
    return Calibration(mean, spread, means, spreads * (highest / highest[0])[:, None, None])


def _of_places(grids: Sequence[Tensor], middle: Tensor, variance: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """Mean and spread over images, of each voice at each place: (voices, n, n). `edge`: n where sizes differ, so that
    places differ as far as the number of predictions about a patch depends on the edge."""
    size = grids[0].shape[1:] if len({grid.shape for grid in grids}) == 1 else torch.Size((edge, edge))
    sums = torch.zeros(3, len(middle), *size, dtype=torch.float64, device=middle.device)  # of 1, x and x^2
    for grid in grids:
        rows, columns = (
            torch.tensor(places(n, m), device=grid.device) for n, m in zip(grid.shape[1:], size, strict=True)
        )
        x = (grid - middle).double()
        for total, power in zip(sums, (torch.ones_like(x), x, x**2), strict=True):
            for into, part in zip(total, power, strict=True):
                into.index_put_((rows[:, None], columns), part, accumulate=True)
    count = sums[0]
    means = sums[1] / count.clamp_min(1)
    variances = (sums[2] - count * means**2).clamp_min(0) / (count - 1).clamp_min(1)
    trust = count / (count + SHRINK)
    variances = trust * variances + (1 - trust) * variance
    return (middle + trust * means).float(), variances.sqrt().float()


def held_out_scores(
    scorer: Scorer, images: Iterable[np.ndarray], originals: Sequence[tuple[int, int]]
) -> tuple[list[float], Calibration]:
    """Scores of held-out normal images for a threshold, each calibrated by the others, a fold at a time; and the
    calibration by all of them, which the scorer is left with.

    originals: their (h, w) before they were resized, at which a new image gets its score, too.

    By means and spreads that they are part of, images score lower than new ones do, the more so the fewer they are.
    """
    found, sizes = zip(*((scorer.losses(image), image.shape[:2]) for image in images), strict=True)
    scores, folds = [0.0] * len(found), min(FOLDS, len(found))
    for fold in range(folds):
        others = [one for i, one in enumerate(found) if i % folds != fold]
        scorer.calibration = calibrate(scorer, others or found)
        for i in range(fold, len(found), folds):
            scores[i] = scorer.spread(scorer.judge(found[i]), sizes[i], originals[i]).max().item()
    scorer.calibration = calibration = calibrate(scorer, found)
    return scores, calibration
