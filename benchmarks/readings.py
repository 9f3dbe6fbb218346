"""A fitted detector read in another way: other losses, bank, calibration or pooling, without fitting anew.

form          loss = softplus(lse - s_p); lse: of the negatives' scores; positive = -s_p;
              margin = max over negatives of s_j - s_p; rank: how many negatives score above the positive;
              nearest: no contrast, the distance of a patch's latent from the nearest normal one;
              loss and nearest: what neighbours say, and that distance, which counts as much
calibration   both; step: of each direction and step alone; place: of each position alone; none
pool          image score: max, mean or top (mean of the highest 1%) of the map; learned: the mean of the three, each
              less its mean on held-out normal images and over its spread there
bank_size     how many normal latents
finer         grid cells of scoring in one of training, each way
closing       cells of the closing of the map
mirrored      mirror images are scored too, where the detector does not score them anyway
about         mean or median of the predictions about a patch
Merged        the mean of the maps of several detectors (patches of several sizes), each calibrated by its own
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import cycle

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_fast.bank import reservoir
from cpc_fast.config import Config
from cpc_fast.detector import Detector, split
from cpc_fast.model import CPC
from cpc_fast.predictions import Predictions
from cpc_fast.scoring import Calibration, Scorer, calibrate
from cpc_fast.train import autocast
from cpc_kernels import info_nce_stats

from .baselines import Answer, Baseline

ABOUTS = ("mean", "median")
FORMS = ("loss", "lse", "positive", "margin", "rank", "nearest", "loss and nearest")
CALIBRATIONS = ("both", "step", "place", "none")


def top(map: np.ndarray) -> float:
    """The mean of the highest hundredth."""
    count = max(1, map.size // 100)
    return float(np.partition(map.ravel(), -count)[-count:].mean())


POOLS: dict[str, Callable[[np.ndarray], float]] = {
    "max": lambda map: float(map.max()),
    "mean": lambda map: float(map.mean()),
    "top": top,
}


class Form(CPC):
    """A fitted model whose losses are of another form; it shares everything with that model."""

    form: str

    @classmethod
    def of(cls, model: CPC, form: str) -> Form:
        other = copy.copy(model)
        other.__class__, other.form = cls, form  # type: ignore[assignment]
        return other  # type: ignore[return-value]

    def losses(self, examined: Sequence[tuple[Tensor, Predictions]], bank: Tensor) -> Tensor:
        found = []
        width = examined[0][0].shape[-1]
        for (latents, told), rows in zip(examined, cycle(bank.split(width, 1)), strict=False):
            found.append(self._contrast(latents, told, rows))
            if "nearest" in self.form:  # of each patch by itself, behind the predictions as a place's are
                found.append(torch.cdist(latents.flatten(0, 2).float(), rows.float()).amin(1))
        return torch.cat(found)

    def _contrast(self, latents: Tensor, told: Predictions, rows: Tensor) -> Tensor:
        pairs = zip(told.sources.split(told.counts), told.weight, strict=True)
        predictions = torch.cat([F.linear(told.contexts[sources], matrix) for sources, matrix in pairs])
        stats = info_nce_stats(predictions, rows, latents.flatten(0, 2)[told.targets])
        if self.form == "margin":
            nearest = torch.cat([(some.float() @ rows.float().T).amax(1) for some in predictions.split(4096)])
            return nearest - stats.positive
        values = {"lse": stats.lse, "positive": -stats.positive, "rank": stats.rank.float()}
        return values.get(self.form, stats.loss)


class MeanScorer(Scorer):
    """A patch is the mean of what all predictions about it say."""

    def about_patches(
        self, losses: Tensor, sources: Tensor, targets: Tensor, counts: list[int], shape: tuple[int, int]
    ) -> Tensor:
        totals = losses.new_zeros(2, 2, shape[0] * shape[1])
        for i, index in enumerate((targets, sources)):
            totals[i, 0].index_add_(0, index, losses)
            totals[i, 1].index_add_(0, index, torch.ones_like(losses))
        means = totals[:, 0] / totals[:, 1].clamp_min(1)
        return torch.where(totals[0, 1] > 0, means[0], means[1]).view(shape)


class DistanceScorer(Scorer):
    """Only the distance counts, which stands where the loss from a place would."""

    def together(self, voices: Tensor) -> Tensor:
        return voices[1]


class BothScorer(Scorer):
    """What neighbours say and the distance count alike."""

    def together(self, voices: Tensor) -> Tensor:
        return voices.mean(0)


@dataclass(frozen=True)
class Other:
    """How to read a detector otherwise; the defaults read it as it reads itself."""

    form: str = "loss"
    calibration: str = "both"
    pool: str = "max"
    bank_size: int = 0  # 0: the detector's own bank
    finer: int = 0  # 0: the detector's own grid
    about: str = "median"
    closing: int = 0  # 0: the detector's own
    mirrored: bool = False

    def __post_init__(self) -> None:
        for name, known in (
            ("form", FORMS),
            ("about", ABOUTS),
            ("calibration", CALIBRATIONS),
            ("pool", (*POOLS, "learned")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}.")

    @property
    def name(self) -> str:
        return ", ".join(
            f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default
        )

    def make(self, config: Config, detectors: Sequence[Detector]) -> Baseline:
        return Reread(detectors[0], self)


class Reread(Baseline):
    """One detector, read as `how` says."""

    def __init__(self, detector: Detector, how: Other) -> None:
        super().__init__(detector.config)
        self.detector, self.how = detector, how

    def learn(self, images: list[np.ndarray]) -> None:
        model, bank, how = self.detector.model, self.detector.bank, self.how
        training, held_out = split(len(images), self.config)
        if how.bank_size:
            with torch.inference_mode(), autocast(bank.device, self.config.precision):
                rows = (model.latents(model.standardise(images[i])[None]).flatten(0, 2).float() for i in training)
                bank = reservoir(rows, how.bank_size, self.config.seed)
        form = Form.of(model, how.form)
        if how.finer:
            form.config = form.config.replace(finer=how.finer)
        if how.closing:
            form.config = form.config.replace(closing=how.closing)
        if how.mirrored:
            form.config = form.config.replace(mirrored=True)
        if "nearest" in how.form:  # the distance stands where the loss from a place would
            if form.config.place:
                raise ValueError(f"form {how.form} is for models that know of no places.")
            form.config = form.config.replace(place=True)
        kind = {"nearest": DistanceScorer, "loss and nearest": BothScorer}.get(how.form, Scorer)
        self.scorer = (MeanScorer if how.about == "mean" else kind)(form, bank)
        normal = [images[i] for i in held_out]
        found = calibrate(self.scorer, [self.scorer.losses(image) for image in normal])
        zero, one = found.step_mean.new_zeros(1, 1, 1), found.step_mean.new_ones(1, 1, 1)
        if how.calibration == "step":
            found = Calibration(found.step_mean, found.step_spread, zero, one)
        elif how.calibration != "both":
            flat = Calibration(0 * found.step_mean, 0 * found.step_spread + 1, zero, one)
            found = flat if how.calibration == "none" else self._places(flat, normal)
        self.scorer.calibration = found
        self.normal = dict.fromkeys(POOLS, (0.0, 1.0))
        if how.pool == "learned":
            maps = [self.surprise(image) for image in normal]
            for name, pool in POOLS.items():
                scores = [pool(map) for map in maps]
                self.normal[name] = float(np.mean(scores)), float(np.std(scores)) + 1e-9

    def _places(self, flat: Calibration, normal: list[np.ndarray]) -> Calibration:
        """Means and spreads of each position, of losses as they are."""
        self.scorer.calibration = flat
        grids = [self.scorer.voices(self.scorer.losses(image)) for image in normal]
        if len({grid.shape for grid in grids}) > 1 or len(grids) < 2:
            every = torch.cat([grid.flatten(1) for grid in grids], 1)
            middle, spread = (one[:, None, None] for one in (every.mean(1), every.std(1)))
            return Calibration(flat.step_mean, flat.step_spread, middle, spread)
        stack = torch.stack(grids)
        return Calibration(flat.step_mean, flat.step_spread, stack.mean(0), stack.std(0).clamp_min(1e-6))

    def surprise(self, image: np.ndarray) -> np.ndarray:
        return self.scorer.map(image, image.shape[:2]).cpu().numpy()

    def inspect(self, image: np.ndarray) -> Answer:
        map = super().inspect(image).map
        pools = POOLS if self.how.pool == "learned" else {self.how.pool: POOLS[self.how.pool]}
        scores = [(pool(map) - self.normal[name][0]) / self.normal[name][1] for name, pool in pools.items()]
        return Answer(map, float(np.mean(scores)))


@dataclass(frozen=True)
class Merge:
    """The mean of the maps of several detectors."""

    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return "merged: " + ", ".join(self.names)

    def make(self, config: Config, detectors: Sequence[Detector]) -> Baseline:
        return Merged(config, detectors)


class Merged(Baseline):
    def __init__(self, config: Config, detectors: Sequence[Detector]) -> None:
        super().__init__(config)
        self.detectors = detectors

    def learn(self, images: list[np.ndarray]) -> None:
        """Nothing is left to learn."""

    def inspect(self, image: np.ndarray) -> Answer:
        return Answer(np.mean([detector.inspect(image).map for detector in self.detectors], axis=0))
