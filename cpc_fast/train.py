"""Normal images in, a trained CPC model out.

Everything random in an epoch comes from (seed, epoch), so a run that was interrupted and resumed ends with the same
weights as one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpc_kernels.capabilities import FAST_BF16

from .config import Config
from .errors import CpcFastError
from .model import CPC
from .shapes import Images
from .shifts import shift

MAX_BAD_STEPS = 20


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


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the device is fast at it, else a context that changes nothing."""
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else FAST_BF16.available
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def learning_rate(step: int, steps: int, peak: float, schedule: str = "cosine") -> float:
    """Linear warm-up over the first tenth, then half a cosine down to 0, or constant."""
    warm = max(1, steps // 10)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_batch(model: CPC, images: Sequence[np.ndarray], side: int, generator: torch.Generator) -> Images:
    """Random square windows of `side` pixels, standardised, with random brightness and contrast."""
    config = model.config
    windows = []
    for image in images:
        h, w = image.shape[:2]
        top = int(torch.randint(h - side + 1, (), generator=generator))
        left = int(torch.randint(w - side + 1, (), generator=generator))
        window = model.standardise(image)[:, top : top + side, left : left + side]
        if config.flips:
            axes = [axis for axis in (1, 2) if torch.rand((), generator=generator) < 0.5]
            window = window.flip(axes)
        windows.append(window)
    batch = torch.stack(windows)
    gain, offset = (torch.randn(2, len(batch), 1, 1, 1, generator=generator) * config.jitter).to(batch.device)
    return batch * (1 + gain) + offset


def make_optimizer(model: CPC, config: Config) -> torch.optim.AdamW:
    """AdamW on everything that learns (a frozen encoder of the user's own stays as it is)."""
    learns = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(learns, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def average_weights(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Move the running mean of the weights towards them; it lives in the optimiser's state and is saved with it.

    The mean over the last 1 / (1 - decay) steps, fewer at the start. Single weights wander from step to step, and the
    scores of unseen images with them; their mean does not.
    """
    rate = 1 - min(decay, (1 + step) / (10 + step))
    for group in optimizer.param_groups:
        for weight in group["params"]:
            mean = optimizer.state[weight].setdefault("average", weight.detach().clone())
            mean.lerp_(weight.detach(), rate)


def train(
    model: CPC,
    images: Sequence[np.ndarray],
    config: Config,
    *,
    optimizer: torch.optim.Optimizer,
    first_epoch: int = 0,
    on_step: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> None:
    """Train `model` in place on normal images, each uint8 (h, w, c); it ends with the running mean of its weights.

    Args:
        optimizer: from make_optimizer, with its state restored when resuming.
        first_epoch: how many epochs are done already.
        on_step, on_epoch: called with the progress after each step, with the number of epochs done after each epoch.

    Raises CpcFastError when the loss is not finite MAX_BAD_STEPS times in a row; such steps change nothing.
    """
    device = next(model.parameters()).device
    per_epoch = max(1, len(images) // config.batch_size)
    size = min(config.batch_size, len(images))
    total = per_epoch * config.epochs
    smallest = min(min(image.shape[:2]) for image in images)
    side = min(config.crop or smallest, smallest)
    started, done, bad = time.perf_counter(), 0, 0
    if first_epoch == 0:
        model.measure_pixels(images)
    model.train()
    for epoch in range(first_epoch, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=generator).tolist()
        for i in range(per_epoch):
            step = epoch * per_epoch + i
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, config.learning_rate, config.schedule)
            batch = make_batch(model, [images[j] for j in order[i * size : (i + 1) * size]], side, generator)
            copies = batch.repeat(config.shift_copies, 1, 1, 1)
            shifted = shift(copies, config.shifts, generator) if config.shifts else None
            with autocast(device):
                result = model(batch, shifted, seed=step)
            loss = float(result.loss.detach())
            if math.isfinite(loss):
                bad = 0
                optimizer.zero_grad(set_to_none=True)
                result.loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average_weights(optimizer, config.averaging, step)
            else:
                bad += 1
                if bad >= MAX_BAD_STEPS:
                    raise CpcFastError(
                        f"The loss was {loss} for {bad} steps in a row (epoch {epoch + 1}); "
                        "the last checkpoint is kept. Try a smaller learning_rate."
                    )
            done += 1
            if on_step:
                pace = done / (time.perf_counter() - started)
                left = (total - step - 1) / pace
                accuracy = float(result.accuracy)
                on_step(
                    Progress(epoch + 1, config.epochs, i + 1, per_epoch, loss, accuracy, pace * size, left)
                )  # fmt: skip
        if on_epoch:
            on_epoch(epoch + 1)
    with torch.no_grad():
        for weight, state in optimizer.state.items():
            weight.copy_(state["average"])
    model.eval()
