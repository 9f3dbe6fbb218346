"""The state of a training run on disk: it can be stopped at any moment and goes on to the same weights.

RUN/checkpoint.safetensors  the last state: weights, optimiser, random numbers, and where in the data it was
RUN/best.safetensors        the state after the epoch with the lowest mean loss; resumable when copied there
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import Config
from .errors import CpcFastError, UsageError
from .files import remove_asides
from .images import quoted
from .runs import BEST, CHECKPOINT, DETECTOR, need_checkpoint, other_images, refuse_run
from .saving import FORMAT, Spec, read_config, read_record, read_tensors, versions, write_tensors
from .train import Position


def checkpoint_config(run: Path) -> tuple[Config, Position]:
    """The config of an interrupted run, and how far it is saved.

    Only its record is read. Raises UsageError where there is no checkpoint.
    """
    need_checkpoint(run)
    path = run / CHECKPOINT
    with _best_named(run):
        about = read_record(path, "checkpoint")
        return read_config(run, about), _position(path, about)


@contextmanager
def _best_named(run: Path) -> Iterator[None]:
    """What is wrong with the checkpoint, and whether there is another state."""
    try:
        yield
    except UsageError:
        raise
    except CpcFastError as error:
        path, best = run / CHECKPOINT, run / BEST
        if not best.is_file() or os.path.samefile(path, best):
            raise
        raise CpcFastError(f"{error} {quoted(best)} is another state of it: copy it to {quoted(path)}.") from None


class Checkpoint:
    """The training state of a run: begin restores it, save writes it."""

    def __init__(
        self, run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, images: dict[str, str]
    ) -> None:
        """images: an origin (runs.py)."""
        self.path, self.best = run / CHECKPOINT, run / BEST
        self.model, self.optimizer, self.config, self.images = model, optimizer, config, images
        self._replaced: tuple[Path, ...] = ()  # files of an earlier run, which go once the first state is on disk

    def begin(self, resume: bool, fresh: bool = False) -> Position:
        """Where to go on. A run that exists and is not resumed is refused, or kept until the first save (`fresh`)."""
        run = self.path.parent
        if fresh:
            self._replaced = (run / DETECTOR, run / "config.json", self.best)
        elif not resume:
            refuse_run(run)
        for path in (self.path, self.best, run / DETECTOR, run / "config.json"):
            remove_asides(path)
        if not resume:
            return Position()
        with _best_named(run):
            tensors, about = read_tensors(self.path, "checkpoint to resume from", self._expected)
        with torch.inference_mode():  # as a frozen encoder may have been made
            self.model.load_state_dict(
                {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
            )
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state["state"].setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(state)
        for parameter, slots in self.optimizer.state.items():  # fused AdamW pairs elements by their place in memory
            for key, value in slots.items():
                if value.shape == parameter.shape:
                    slots[key] = torch.empty_like(parameter).copy_(value)
        position = _position(self.path, about)
        try:
            torch.set_rng_state(tensors["random.cpu"])
            if "random.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random.cuda"], next(self.model.parameters()).device)
            if "random.sampler" in tensors:
                torch.Generator().set_state(tensors["random.sampler"])
                position = replace(position, sampler=tensors["random.sampler"])
        except RuntimeError as error:
            raise CpcFastError(
                f"{quoted(self.path)} is damaged (its random numbers: {str(error)[:100]}); restore it from a copy, or "
                "fit again."
            ) from None
        self._keep_best(position)  # where it was killed between the two
        return position

    def save(self, position: Position) -> None:
        """Write the state at `position`. Raises CpcFastError, and keeps the last one, where weights are not finite."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            for key, value in slots.items():
                tensors[f"optimizer.{index}.{key}"] = value
        for name, value in tensors.items():
            if not value.isfinite().all():
                raise CpcFastError(
                    f"The weights are no longer finite ({name}), so they were not saved; what was saved before in "
                    f"{quoted(self.path.parent)} is kept. Try a smaller learning_rate."
                )
        tensors["random.cpu"] = torch.get_rng_state()
        if self._on_gpu:
            tensors["random.cuda"] = torch.cuda.get_rng_state(next(self.model.parameters()).device)
        if position.sampler is not None:
            tensors["random.sampler"] = position.sampler
        where = {name: value for name, value in vars(position).items() if name != "sampler"}
        record = {
            "format": FORMAT, "versions": versions(), "config": self.config.to_json(), "position": where,
            "trained_on": self.images, "slots": sorted(name for name in tensors if name.startswith("optimizer.")),
        }  # fmt: skip
        write_tensors(self.path, tensors, record)
        for path in self._replaced:
            path.unlink(missing_ok=True)
        self._replaced = ()
        self._keep_best(position)

    @property
    def _on_gpu(self) -> bool:
        return next(self.model.parameters()).device.type == "cuda"

    def _keep_best(self, position: Position) -> None:
        """Give the checkpoint a second name; it is never written in place, so the second stays what it is."""
        if position.step or position.loss is None or position.loss != position.best:
            return
        aside = self.best.with_name(f".{self.best.name}.{os.getpid()}.tmp")
        try:
            os.link(self.path, aside)
            os.replace(aside, self.best)
            aside.unlink(missing_ok=True)  # a rename between two names of one file does nothing
        except OSError:  # a file system without links: the last state is there all the same
            aside.unlink(missing_ok=True)

    def _expected(self, about: dict[str, Any]) -> dict[str, Spec]:
        config = read_config(self.path.parent, about)
        if others := other_images(about, self.images):
            raise UsageError(
                f"{quoted(self.path.parent)} was begun on {others}; name its own again, or choose another run folder."
            )
        if config != self.config:
            raise UsageError(
                f"{quoted(self.path.parent)} was begun with another config ({self.config.unlike(config)}); resume it "
                "with the same choices, which --resume finds by itself where no --preset is named."
            )
        position = _position(self.path, about)
        specs: dict[str, Spec] = {
            f"model.{name}": (value.dtype, tuple(value.shape)) for name, value in self.model.state_dict().items()
        }
        learns = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        slots = about.get("slots")
        for slot in slots if isinstance(slots, list) else [None]:  # not every weight has all: it may get no gradient
            match = re.fullmatch(r"optimizer\.(\d{1,6})\.(exp_avg|exp_avg_sq|average|step)", str(slot))
            if match is None or int(match[1]) >= len(learns):
                raise CpcFastError(f"{quoted(self.path)} is damaged (its slots); restore it from a copy, or fit again.")
            weight = learns[int(match[1])]
            specs[match[0]] = (torch.float32, ()) if match[2] == "step" else (weight.dtype, tuple(weight.shape))
        specs["random.cpu"] = (torch.uint8, (-1,))
        if self._on_gpu:
            specs["random.cuda"] = (torch.uint8, (-1,))
        if position.step:
            specs["random.sampler"] = (torch.uint8, (-1,))
        return specs


def _position(path: Path, about: dict[str, Any]) -> Position:
    """Raises CpcFastError for a record that is none."""
    found = about.get("position")
    try:
        assert isinstance(found, dict)
        total, count = found["losses"]
        counts = [found["epoch"], found["step"], found["skipped"], count]
        numbers = [total, *(found[name] for name in ("loss", "best") if found[name] is not None)]
        assert all(type(n) is int and 0 <= n < 1 << 53 for n in counts)
        assert all(type(n) in (int, float) and math.isfinite(n) for n in numbers)
    except (AssertionError, KeyError, TypeError, ValueError):
        said = json.dumps(found)[:100]
        raise CpcFastError(
            f"{quoted(path)} is damaged (its position: {said}); restore it from a copy, or fit again."
        ) from None
    return Position(
        found["epoch"], found["step"], None, (float(total), count), found["loss"], found["best"], found["skipped"]
    )
