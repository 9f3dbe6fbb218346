"""How far a command has come: a live line on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from .train import Progress as Step


LAST = "the threshold, from the images held out"


def duration(seconds: float) -> str:
    """
    >>> duration(4.4), duration(75), duration(7330)
    ('4 s', '1 min 15 s', '2 h 2 min')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def describe(step: Step) -> str:
    """Loss, contrastive accuracy, images per second and time left."""
    left = f", {duration(step.seconds_left)} left" if step.seconds_left >= 0.5 else ""
    skipped = f", {step.skipped} steps skipped (not finite)" if step.skipped else ""
    return f"loss {step.loss:.3f}, accuracy {step.accuracy:.1%}, {step.images_per_s:.0f} images/s{left}{skipped}"


def _live(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(20), TextColumn("{task.fields[note]}"))
    return Progress(*columns, console=console, transient=True)


@contextmanager
def training(name: str) -> Iterator[Callable[[Step], None]]:
    """What to hand to Detector.fit as on_step; plain lines come once an epoch."""
    console = Console(file=sys.stderr, highlight=False)
    losses: list[float] = []

    def line(step: Step) -> str:
        return f"{name}: epoch {step.epoch} of {step.epochs}"

    def plain(step: Step) -> None:
        losses.append(step.loss)
        if step.step == step.steps:
            mean = sum(losses) / len(losses)
            losses.clear()
            text = describe(step).split(", ", 1)[1]
            console.print(f"{line(step)}: loss {mean:.3f}, {text}", markup=False, soft_wrap=True)
            if step.epoch == step.epochs:
                console.print(f"{name}: {LAST}", markup=False, soft_wrap=True)

    if not console.is_terminal:
        yield plain
        return
    with _live(console) as progress:
        task = progress.add_task(name, total=None, note="reading images")

        def live(step: Step) -> None:
            done, total = (step.epoch - 1) * step.steps + step.step, step.epochs * step.steps
            progress.update(
                task, description=line(step), completed=done, total=total, note=describe(step) if done < total else LAST
            )

        yield live


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """What to hand to evaluate and predict as on_image; plain lines come at most every 10 seconds."""
    console = Console(file=sys.stderr, highlight=False)
    if console.is_terminal:
        with _live(console) as progress:
            task = progress.add_task(what, total=None, note="")
            yield lambda done, total: progress.update(task, completed=done, total=total, note=f"{done} of {total}")
        return
    last = time.monotonic()

    def plain(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            console.print(f"{what}: {done} of {total}", markup=False, soft_wrap=True)

    yield plain
