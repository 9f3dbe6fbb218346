"""The whole training step and the scoring of one image, against the plain version of the same model.

Plain: eager float32, contiguous NCHW patches, torch's own AdamW, and the loss as one writes it first (all scores in one
matrix, cross entropy; or the gather). Same weights, same images, and the same result, which is checked before anything
is timed. Ours is the code that trains and scores, called as `Detector` calls it: `train.train` for one step, batch
making and shifts included, and `Scorer.map`, from uint8 pixels in memory to a map in memory, copies to and from the
device included.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cpc_fast.config import Config, preset
from cpc_fast.loss import cpc_loss
from cpc_fast.model import CPC
from cpc_fast.patches import extract_patches, grid_shape
from cpc_fast.predictions import Predictions
from cpc_fast.scoring import Calibration, Scorer
from cpc_fast.shifts import shift
from cpc_fast.train import Position, autocast, in_bfloat16, make_batch, make_optimizer, train

from . import measure
from .cases import contest_name

LOSS_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}


@dataclass
class Contest:
    """Callables that take turns; the first is ours. parts: pieces of ours and of the other, timed too."""

    name: str
    device: torch.device
    lanes: dict[str, Callable[[], Any]]
    images: int  # per call
    errors: dict[str, float]  # of ours against plain
    tolerance: float
    parts: dict[str, Callable[[], Any]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.clock = measure.Clock(self.device)

    @property
    def everything(self) -> dict[str, Callable[[], Any]]:
        return self.lanes | self.parts

    def others(self) -> None:
        """One round of everything but ours."""
        for name in list(self.everything)[1:]:
            self._time(name)

    def ours(self) -> None:
        next(iter(self.lanes.values()))()

    def _time(self, name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.samples.setdefault(name, []).append(self.clock.wall(self.everything[name]))

    def run(self, rounds: int) -> None:
        for run in self.everything.values():
            run()
        for _ in range(rounds):
            self.others()
            self._time(next(iter(self.lanes)))

    def record(self) -> dict[str, Any]:
        first = next(iter(self.lanes))
        right = all(error <= self.tolerance for error in self.errors.values())
        rows = []
        for name in self.lanes:
            median, quartiles = measure.spread(self.samples[name])
            ratios = [a / b for a, b in zip(self.samples[name], self.samples[first], strict=False)]
            row: dict[str, Any] = {
                "provider": name, "ours": name == first, "status": "ok" if right or name != first else "wrong",
                "median_ms": median, "quartiles_ms": quartiles, "rounds": len(self.samples[name]),
                "images_per_s": 1e3 * self.images / median,
            }  # fmt: skip
            row["ratio"], row["ratio_quartiles"] = measure.spread(ratios)
            if name == first:
                row["dtype"] = str(computing(self.device)).removeprefix("torch.")
                row["errors"] = self.errors
                if not right:
                    row["why"] = ", ".join(f"{what} off by {error:.1e}" for what, error in self.errors.items())
            rows.append(row)
        shares = {}
        for part in self.parts:
            whole = first if part.startswith(first) else list(self.lanes)[1]
            shares[part] = statistics.median(self.samples[part]) / statistics.median(self.samples[whole])
        return {
            "environment": measure.environment(self.device), "images": self.images, "shares": shares, "rows": rows,
        }  # fmt: skip


def make_images(count: int, side: int, channels: int) -> list[np.ndarray]:
    """Seeded textures: waves and grain, uint8 (side, side, channels)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / 32
    waves = [np.sin(x * rng.uniform(1, 4) + rng.uniform(0, 6)) + np.cos(y * rng.uniform(1, 4)) for _ in range(count)]
    grain = [rng.normal(0, 0.5, (side, side, channels)) for _ in range(count)]
    return [np.clip(128 + 30 * (w[..., None] + g), 0, 255).astype(np.uint8) for w, g in zip(waves, grain, strict=True)]


# --- the plain version ----------------------------------------------------------------------------------------------


def plain_latents(model: CPC, images: Tensor) -> Tensor:
    config = model.config
    patches = extract_patches(images, config.patch_size, config.patch_stride)
    return model.members[0].encoder(patches.flatten(0, 2).contiguous()).unflatten(0, patches.shape[:3])


def plain_predictions(predictions: Predictions) -> Tensor:
    """(n, d): one gather and one product for each direction and step."""
    parts = zip(predictions.sources.split(predictions.counts), predictions.weight, strict=True)
    return torch.cat([predictions.contexts[rows] @ weight.T for rows, weight in parts])


def plain_cpc_loss(predictions: Tensor, candidates: Tensor, targets: Tensor, negatives: Tensor | None) -> Tensor:
    if negatives is None:
        return F.cross_entropy(predictions @ candidates.T, targets)
    own = (predictions * candidates[targets]).sum(-1, keepdim=True)
    others = torch.einsum("nd,nsd->ns", predictions, candidates[negatives])
    return F.cross_entropy(torch.cat([own, others], 1), torch.zeros_like(targets))


def plain_loss(model: CPC, images: Tensor, shifted: Tensor | None, seed: int) -> Tensor:
    from cpc_kernels import Negatives, draw_negatives

    config, count = model.config, len(images)
    everything = plain_latents(model, images if shifted is None else torch.cat([images, shifted]))
    latents = everything[:count]
    predictions = model.members[0].predictions(latents, None)
    targets, made = predictions.targets, plain_predictions(predictions)
    if config.negatives == "sampled":
        own = latents.flatten(0, 2)
        drawn = draw_negatives(Negatives(config.negatives_count, seed), targets, len(own), len(targets))
        return plain_cpc_loss(made, own, targets, drawn)
    return plain_cpc_loss(made, everything.flatten(0, 2), targets, None)


class PlainScorer(Scorer):
    """The same scores from one matrix of all of them."""

    bank: Tensor

    def losses(self, image: np.ndarray):
        with torch.no_grad():
            pixels = self.model.standardise(image)
            latents = plain_latents(self.model, pixels[None])
            predictions = self.model.members[0].predictions(latents, None)
            targets, made = predictions.targets, plain_predictions(predictions)
            own = (made * latents.flatten(0, 2)[targets]).sum(-1, keepdim=True)
            logits = torch.cat([own, made @ self.bank.T], 1)
            losses = F.cross_entropy(logits, torch.zeros_like(targets), reduction="none")
        _, height, width = pixels.shape
        shape = grid_shape(height, width, self.config.patch_size, self.config.patch_stride)
        sources = predictions.sources % (shape[0] * shape[1])
        return losses, sources, targets, predictions.counts, shape


# --- the contests ---------------------------------------------------------------------------------------------------


def make_model(config: Config, device: torch.device) -> CPC:
    if config.members > 1 or config.place or config.mirrored:
        raise ValueError("The plain version is of one network, no places and no mirror images; use another preset.")
    torch.manual_seed(0)
    return CPC(config).to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def computing(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if in_bfloat16(device) else torch.float32


def training(
    device: torch.device, *, name: str = "cpu-demo", side: int = 256, batch: int = 8, **changes: Any
) -> Contest:
    """One optimisation step of a preset on `batch` images."""
    config = preset(name).replace(batch_size=batch, **changes).fitted_to([side])
    images = make_images(batch, side, config.channels)
    model = make_model(config, device)
    model.measure_pixels(images)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    generator = torch.Generator().manual_seed(1)

    def make() -> tuple[Tensor, Tensor | None]:
        pixels, _ = make_batch(model, images, config.window(side), generator)
        copies = pixels.repeat(config.shift_copies, 1, 1, 1)
        return pixels, shift(copies, config.shifts, generator, config.unit) if config.shifts else None

    pixels, shifted = make()
    with autocast(device):
        mine = model(pixels, shifted, seed=3).loss
    expected = plain_loss(plain, pixels, shifted, 3)
    errors = {"loss": float(((mine - expected).abs() / expected.abs()).detach())}

    optimizer = make_optimizer(model, config)
    plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    done = 0

    def ours() -> None:
        nonlocal done
        done += 1
        train(model, images, config.replace(epochs=done + 1), optimizer=optimizer, position=Position(done))

    def theirs() -> None:
        pixels, shifted = make()
        loss = plain_loss(plain, pixels, shifted, done)
        plain_optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_optimizer.step()

    with torch.no_grad(), autocast(device):
        everything = model.latents(pixels if shifted is None else torch.cat([pixels, shifted]))
        predictions = model.members[0].predictions(everything[:batch], None)
    leaves = [t.detach().requires_grad_() for t in (predictions.contexts, predictions.weight, everything)]

    def our_loss() -> None:
        contexts, weight, everything = leaves
        with autocast(device):
            loss = cpc_loss(
                predictions._replace(contexts=contexts, weight=weight), everything, negatives=config.negatives,
                count=config.negatives_count, shifted=len(everything) - batch,
            )  # fmt: skip
        loss.backward()

    plain_leaves = [t.detach().float().requires_grad_() for t in leaves]

    def plain_part() -> None:
        from cpc_kernels import Negatives, draw_negatives

        contexts, weight, everything = plain_leaves
        targets, negatives = predictions.targets, None
        if config.negatives == "sampled":
            everything = everything[:batch]
            rows = len(everything.flatten(0, 2))
            negatives = draw_negatives(Negatives(config.negatives_count, 3), targets, rows, len(targets))
        made = plain_predictions(predictions._replace(contexts=contexts, weight=weight))
        plain_cpc_loss(made, everything.flatten(0, 2), targets, negatives).backward()

    named = contest_name("training", name=name, side=side, batch=batch)
    return Contest(
        named, device, {"ours": ours, "plain eager fp32": theirs}, batch,
        errors, LOSS_TOLERANCE[computing(device)],
        parts={"ours: the loss": our_loss, "ours: batch and shifted copies": make, "plain: the loss": plain_part},
    )  # fmt: skip


def scoring(device: torch.device, *, name: str = "cpu-demo", side: int = 256, **changes: Any) -> Contest:
    """One image, uint8 in memory to a map in memory."""
    config = preset(name).replace(**changes).fitted_to([side])
    image = make_images(1, side, config.channels)[0]
    model = make_model(config, device).eval()
    model.measure_pixels([image])
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    bank = torch.randn(config.bank_size, config.features, generator=torch.Generator().manual_seed(0)).to(device)
    steps = config.directions * config.steps
    one = torch.ones(1, 1, 1, device=device)
    calibration = Calibration(torch.zeros(steps, device=device), torch.ones(steps, device=device), 0 * one, one)
    scorers = {
        "ours": Scorer(model, bank, calibration),
        "plain eager fp32": PlainScorer(plain, bank.float(), calibration),
    }
    maps = {who: scorer.map(image, image.shape[:2]).float() for who, scorer in scorers.items()}
    difference = torch.linalg.vector_norm(maps["ours"] - maps["plain eager fp32"])
    errors = {"map": float(difference / torch.linalg.vector_norm(maps["plain eager fp32"]))}
    lanes = {
        who: (lambda scorer=scorer: scorer.map(image, image.shape[:2]).cpu().numpy()) for who, scorer in scorers.items()
    }
    named = contest_name("scoring", name=name, side=side)
    return Contest(named, device, lanes, 1, errors, LOSS_TOLERANCE[computing(device)])
