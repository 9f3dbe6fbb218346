"""Normal images in, a trained CPC model out.

Everything random in an epoch comes from (seed, epoch), and a Position says how much of it was drawn, so a run that was
interrupted after any step and resumed ends with the same weights as one that was not (on a GPU, to rounding).

On several ranks of torch.distributed a batch is cut into as many parts: the loss is that of the whole batch, every rank
takes the same steps, and the first one saves. Only the random numbers of the images' windows, brightness and shifted
copies are each rank's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cpc_kernels.capabilities import FAST_BF16
from cpc_kernels.exchange import everyones, from_first, rank_and_world

from .config import Config
from .errors import CpcFastError, Stopped
from .latent_cache import LatentCache
from .latents import PatchEncoder
from .model import CPC
from .patches import grid_shape, jittered, window_start
from .shapes import Frames, Images
from .shifts import shift
from .stages import stage

MAX_BAD_STEPS = 20
SAVE_SECONDS = 600.0  # a long epoch is saved on the way


@dataclass(frozen=True)
class Position:
    """Where a run is: what a checkpoint holds besides the weights and the optimiser."""

    epoch: int = 0  # whole epochs
    step: int = 0  # steps of the epoch after those
    sampler: Tensor | None = None  # state of the epoch's generator after these steps
    losses: tuple[float, int] = (0.0, 0)  # sum and count of the finite losses of these steps
    loss: float | None = None  # mean of the last whole epoch
    best: float | None = None  # lowest such mean
    skipped: int = 0  # steps that were not finite, in all


@dataclass(frozen=True)
class Progress:
    """What a progress line shows after each step."""

    epoch: int  # counted from 1
    epochs: int
    step: int  # within the epoch, counted from 1
    steps: int
    loss: float
    accuracy: float  # share of predictions that rank their own patch first, 0..1
    images_per_s: float
    seconds_left: float
    guessing: float  # the loss of a model that knows nothing: the log of how many candidates a prediction has
    skipped: int = 0  # steps so far that changed nothing, because the loss or its gradient was not finite


def in_bfloat16(device: torch.device, precision: str = "auto") -> bool:
    """Whether the device is fast at bfloat16, and float32 was not asked for."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else FAST_BF16.available
    return fast and precision == "auto"


@contextmanager
def convolutions(device: torch.device, precision: str = "auto") -> Iterator[None]:
    """For "float32", those of a GPU in float32: torch gives them to TF32, which keeps ten bits of each factor."""
    if device.type != "cuda" or precision != "float32":
        yield
        return
    cudnn = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before, cudnn.fp32_precision = cudnn.fp32_precision, "ieee"
    try:
        yield
    finally:
        cudnn.fp32_precision = before


@contextmanager
def autocast(device: torch.device, precision: str = "auto") -> Iterator[None]:
    """bfloat16 where it is fast, else (and for "float32") the dtype of what comes in."""
    enabled = in_bfloat16(device, precision)
    with torch.autocast(device.type, torch.bfloat16, enabled=enabled), convolutions(device, precision):
        yield


def learning_rate(step: int, steps: int, peak: float, schedule: str = "cosine") -> float:
    """Linear warm-up over the first tenth, then half a cosine down to 0, or constant."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@stage("batch")
def make_batch(
    model: CPC, images: Sequence[np.ndarray], side: int, generator: torch.Generator
) -> tuple[Images, Frames]:
    """Random square windows of `side` pixels, standardised, with random brightness, contrast and gamma; and their
    frames, in their images as they are shown: of a mirrored window, in the mirrored image. A frozen encoder sees them
    as they are."""
    config = model.config
    gamma, flips, jitter = (0.0, False, 0.0) if model.frozen else (config.gamma, config.flips, config.jitter)
    if not images:
        return model.pixel_mean.new_empty(0, config.channels, side, side), model.pixel_mean.new_empty(0, 4)
    windows, frames = [], []
    for image in images:
        start = [window_start(length, side, config.patch_size, generator) for length in image.shape[:2]]
        rows, columns = (slice(first, first + side) for first in start)
        whole = config.standardise == "image"  # by the mean and spread of all of it
        window = image if whole else image[rows, columns]
        if gamma:
            power = math.exp(gamma * float(torch.randn((), generator=generator)))
            window = 255 * (window.astype(np.float32) / 255) ** np.float32(power)
        if whole:
            window = model.standardise(window)[:, rows, columns]
        else:
            window = torch.tensor(np.ascontiguousarray(window)).permute(2, 0, 1)
        if flips:
            axes = [axis for axis in (1, 2) if torch.rand((), generator=generator) < 0.5]
            window = window.flip(axes)
            for axis in axes:
                start[axis - 1] = image.shape[axis - 1] - side - start[axis - 1]
        windows.append(window)
        frames.append([*start, *image.shape[:2]])
    batch = torch.stack(windows)
    batch = batch if config.standardise == "image" else model.rescaled(batch)  # to the device in one piece
    batch = jittered(batch, jitter, generator, each=1)
    return batch, torch.tensor(frames, dtype=torch.float32, device=batch.device)


def make_optimizer(model: CPC, config: Config) -> torch.optim.AdamW:
    """AdamW on everything that learns (a frozen encoder of the user's own stays as it is)."""
    learns = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learns, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


@stage("weights")
def average_weights(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Move the running mean of the weights towards them; it lives in the optimiser's state and is saved with it.

    The mean over the last 1 / (1 - decay) steps, but never over more than about a ninth of those so far. Single weights
    wander from step to step, and the scores of unseen images with them; their mean does not.
    """
    weights = [weight.detach() for weight in optimizer.state]  # not of one that never had a gradient: it has not moved
    for weight, state in zip(weights, optimizer.state.values(), strict=True):
        if "average" not in state:
            state["average"] = weight.clone()
    means = [state["average"] for state in optimizer.state.values()]
    get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(means, weights, None)


def rank_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """What a further rank draws from in a step; nothing of it needs to be saved."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**63)


def share(rows: list[int], rank: int, world: int) -> list[int]:
    """A rank's part of a batch; the first ranks have one more where it does not divide.

    >>> share([3, 1, 4, 1, 5], 0, 2), share([3, 1, 4, 1, 5], 1, 2), share([3], 1, 2)
    ([3, 1, 4], [1, 5], [])
    """
    size, more = divmod(len(rows), world)
    first = rank * size + min(rank, more)
    return rows[first : first + size + (rank < more)]


def guessing(config: Config, images: int, side: int) -> float:
    """The loss of a model that knows nothing: the log of how many candidates each prediction has.

    images: in a batch, each a window of `side` pixels.

    >>> round(math.exp(guessing(Config(patch_size=32, patch_stride=16), images=8, side=96)))
    200
    """
    if config.negatives == "sampled":
        return math.log(1 + config.negatives_count)
    gy, gx = grid_shape(side, side, config.patch_size, config.patch_stride)
    whole = images * (1 + config.shift_copies) if config.shifts else images
    if config.negatives == "hard":
        return math.log(min(1 + config.negatives_count, whole * gy * gx))
    return math.log((whole - 1) * gy * gx + 1 if config.negatives == "other-images" else whole * gy * gx)


def train(
    model: CPC,
    images: Sequence[np.ndarray],
    config: Config,
    *,
    optimizer: torch.optim.Optimizer,
    position: Position | None = None,
    on_step: Callable[[Progress], None] | None = None,
    save: Callable[[Position], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[float | None, float]:
    """Train `model` in place on normal images, each uint8 (h, w, c); it ends with the running mean of its weights.

    Returns the mean loss of the last epoch (None: no step had one), and that of guessing.

    With a frozen encoder the rest learns from cached latents: see LatentCache. On several ranks nothing is cached.

    Args:
        optimizer: from make_optimizer, with its state restored when resuming.
        position: where to go on from; the beginning by default.
        on_step: called with the progress after each step.
        save: for the first rank; called after each epoch, every SAVE_SECONDS, and before Stopped or CpcFastError is
            raised.
        stop: asked after each step whether to stop there.

    A step whose loss or gradient is not finite changes nothing. Raises CpcFastError after MAX_BAD_STEPS of them in a
    row, Stopped where `stop` said so, on any rank.
    """
    device = next(model.parameters()).device
    rank, world = rank_and_world()
    forward = model
    if world > 1:
        forward = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            # an encoder of the user's own may hold weights that it does not use; torch warns once where it has none
            find_unused_parameters=not model.frozen and not isinstance(model.members[0].encoder, PatchEncoder),
        )
    per_epoch = max(1, len(images) // config.batch_size)
    size = min(config.batch_size, len(images))
    total = per_epoch * config.epochs
    smallest = min(min(image.shape[:2]) for image in images)
    side = config.window(smallest)
    local = config.across_ranks == "local" or config.negatives == "hard"
    together = len(share(list(range(size)), 0, world)) if local else size
    chance = guessing(config, together, side)
    at = position or Position()
    started, done, bad, saved = time.perf_counter(), 0, 0, time.monotonic()
    if at.epoch == at.step == 0:
        model.measure_pixels(images)
    model.train()
    cache = LatentCache(model, images, side) if model.frozen and world == 1 else None  # DDP listens to forward alone
    for epoch in range(at.epoch, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        orders = [torch.randperm(len(images), generator=generator).tolist() for _ in model.members]
        if at.sampler is not None:
            generator.set_state(at.sampler)
        for i in range(at.step, per_epoch):
            step = epoch * per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config.learning_rate, config.schedule)
            own = [j for order in orders for j in share(order[i * size : (i + 1) * size], rank, world)]
            draws = generator if rank == 0 else rank_generator(config.seed, step, rank)
            if cache is not None:
                with autocast(device, config.precision):
                    latents, places = cache.batch(own, draws)
                    result = model.members[0].compare(latents, len(own), places, step)
            else:
                batch, frames = make_batch(model, [images[j] for j in own], side, draws)
                parts = batch.tensor_split(len(orders))
                copies = torch.cat([part.repeat(config.shift_copies, 1, 1, 1) for part in parts])
                shifted = shift(copies, config.shifts, draws, config.unit) if config.shifts else None
                with autocast(device, config.precision):
                    result = forward(batch, shifted, seed=step, frames=frames, draws=None if model.frozen else draws)
            optimizer.zero_grad(set_to_none=True)
            total_loss = result.loss * len(model.members)  # each member learns as if alone
            with convolutions(device, config.precision):
                stage("backward")(total_loss.backward)()
            torch.clear_autocast_cache()  # inside of the caller's autocast, rounded weights would outlive the step
            norms = [torch.nn.utils.clip_grad_norm_(member.parameters(), 1.0) for member in model.members]
            norm = torch.stack(norms).sum().float()
            told = [result.loss.detach().float(), norm, result.accuracy.float()]
            loss, slope, accuracy = torch.stack(told).tolist()  # one wait for the device
            at = replace(at, epoch=epoch, step=i + 1, sampler=generator.get_state())
            if math.isfinite(loss) and math.isfinite(slope):
                bad = 0
                stage("weights")(optimizer.step)()
                average_weights(optimizer, config.averaging, step)
                at = replace(at, losses=(at.losses[0] + loss, at.losses[1] + 1))
            else:
                bad += 1
                at = replace(at, skipped=at.skipped + 1)
                if bad >= MAX_BAD_STEPS:
                    if save:
                        save(at)
                    what = f"loss was {loss}" if not math.isfinite(loss) else f"gradient's norm was {slope}"
                    raise CpcFastError(
                        f"The {what} for {bad} steps in a row (epoch {epoch + 1}); they changed nothing, and the "
                        f"weights before them are {'saved' if save else 'kept'}. Try a smaller learning_rate."
                    )
            done += 1
            if on_step:
                pace = done / (time.perf_counter() - started)
                left = (total - step - 1) / pace
                on_step(
                    Progress(
                        epoch + 1, config.epochs, i + 1, per_epoch, loss, accuracy, pace * size, left, chance,
                        at.skipped,
                    )
                )  # fmt: skip
            asked = stop is not None and stop()
            if any(each[0] for each in everyones([int(asked)], device)):
                if save:
                    save(at)
                raise Stopped(f"Stopped in epoch {epoch + 1} of {config.epochs}, after step {i + 1} of {per_epoch}.")
            if save and time.monotonic() - saved > SAVE_SECONDS and i + 1 < per_epoch:
                save(at)
                saved = time.monotonic()
        mean = at.losses[0] / at.losses[1] if at.losses[1] else None
        best = min((loss for loss in (mean, at.best) if loss is not None), default=None)
        at = Position(epoch=epoch + 1, loss=mean, best=best, skipped=at.skipped)
        if save:
            save(at)
            saved = time.monotonic()
    with torch.no_grad():
        for weight, state in optimizer.state.items():
            weight.copy_(state["average"])
    from_first(model.buffers())  # a batch norm has counted its own rank's images
    model.eval()
    return at.loss, chance
