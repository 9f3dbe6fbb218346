"""Run folders: written whole or not at all, read with suspicion. Tensors are safetensors, everything else JSON.

RUN/config.json             the choices, the version, the threshold, what it was trained on
RUN/model.safetensors       weights, bank and calibration: the detector
RUN/checkpoint.safetensors  weights, optimiser and epoch while training
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import Config
from .errors import CpcFastError, UsageError
from .images import quoted
from .runs import CHECKPOINT, DETECTOR, need_checkpoint, need_file, need_run, refuse_run
from .version import __version__

FORMAT = 1  # of the run folder; raised when an older reader would misread it


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside, bring it to the disk, and rename it into place, so that the old one stays until then.

    Raises CpcFastError when the disk is full or the folder cannot be written; what was there before is untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        kept = " The file that was there before is untouched." if path.exists() else ""
        raise CpcFastError(
            f"Could not write {quoted(path)}: {reason}. Free some space or choose another folder.{kept}"
        ) from None
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A safetensors file with `about` as JSON in its header, whole or not at all."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_whole(path, lambda aside: save_file(plain, aside, {"about": json.dumps(about)}))


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of write_tensors. Raises CpcFastError for a file that is missing, damaged or not finite."""
    need_file(path.parent, path.name, what)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise CpcFastError(f"{quoted(path)} is damaged ({error}); restore it from a copy, or fit again.") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CpcFastError(
                f"{quoted(path)} holds weights that are not finite ({name}); restore a copy, or fit again."
            )
    return tensors, about


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"cpc_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}


def save_run(run: Path, tensors: dict[str, Tensor], config: Config, about: dict[str, Any]) -> None:
    """Write a detector. The weights file carries everything; config.json repeats the readable part beside it."""
    record = {"format": FORMAT, "versions": versions(), "config": config.to_json(), **about}
    write_tensors(run / DETECTOR, tensors, record)
    write_text(run / "config.json", json.dumps(record, indent=2) + "\n")


def load_run(run: Path) -> tuple[dict[str, Tensor], Config, dict[str, Any]]:
    """Read a detector: tensors, config, and the rest of its record."""
    need_run(run)
    tensors, about = read_tensors(run / DETECTOR, "detector")
    return tensors, _config(run, about), about


def _config(run: Path, about: dict[str, Any]) -> Config:
    if about.get("format") != FORMAT:
        made = about.get("versions", {}).get("cpc_fast", "unknown")
        raise CpcFastError(
            f"{quoted(run)} is from another version of cpc_fast ({made}, format {about.get('format')}; this is "
            f"{__version__}, format {FORMAT}); use that version, or fit again."
        )
    try:
        return Config.from_json(about["config"])
    except (KeyError, TypeError, UsageError) as error:
        raise CpcFastError(f"The config in {quoted(run)} cannot be read ({error}); fit again.") from None


def checkpoint_config(run: Path) -> tuple[Config, int]:
    """The config of an interrupted run, and how many epochs of it are saved.

    Raises UsageError where there is no checkpoint.
    """
    need_checkpoint(run)
    _, about = read_tensors(run / CHECKPOINT, "checkpoint")
    return _config(run, about), int(about["epoch"])


class Checkpoint:
    """The training state of a run, saved after every epoch."""

    def __init__(self, run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config) -> None:
        self.path = run / CHECKPOINT
        self.model, self.optimizer, self.config = model, optimizer, config

    def begin(self, resume: bool) -> int:
        """How many epochs are done. Without `resume`, a run that exists is not touched."""
        run = self.path.parent
        try:  # before an epoch is spent on it
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CpcFastError(
                f"Could not make the run folder {quoted(run)}: {error.strerror}; choose another one."
            ) from None
        if not resume:
            refuse_run(run)
            return 0
        tensors, about = read_tensors(self.path, "checkpoint to resume from")
        if _config(run, about) != self.config:
            saved, now = about["config"], json.loads(json.dumps(self.config.to_json()))
            differ = ", ".join(
                f"{name}: {saved.get(name)} there, {now[name]} now" for name in now if saved.get(name) != now[name]
            )
            raise UsageError(
                f"{quoted(run)} was begun with another config ({differ}); resume it with the same choices."
            )
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
        return int(about["epoch"])

    def save(self, epoch: int) -> None:
        """After `epoch` epochs."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            for key, value in slots.items():
                tensors[f"optimizer.{index}.{key}"] = value
        record = {"format": FORMAT, "versions": versions(), "config": self.config.to_json(), "epoch": epoch}
        write_tensors(self.path, tensors, record)
