"""Options that several commands take, and how they are read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import config as configs
from ..errors import UsageError

if TYPE_CHECKING:
    import torch

    from ..config import Config

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any field of the config, e.g. --set crop=96; a wrong name lists them. Repeat as needed.",
    ),
]


def by_preset(name: str) -> str:
    """What each preset has in a field, for a help text.

    >>> by_preset("steps")
    'cpu-demo, quality, texture, aligned, fast 3; paper 5'
    """
    values: dict[str, list[str]] = {}
    for preset, config in configs.PRESETS.items():
        value = getattr(config, name)
        values.setdefault("as they are" if value is None else str(value), []).append(preset)
    if len(values) == 1:
        return next(iter(values))
    return "; ".join(f"{', '.join(presets)} {value}" for value, presets in values.items())


def again_as(*words: object, **options: Any) -> str:
    """The command of these words and options; those that are None, False or "auto" are left out.

    >>> again_as("fit", "parts", out="runs/my parts", resume=True, device="auto", set=["place=false", "skip=0"])
    "cpc-fast fit parts --out 'runs/my parts' --resume --set place=false --set skip=0"
    """
    parts = ["cpc-fast", *map(str, words)]
    for name, told in options.items():
        for value in told if isinstance(told, list) else [told]:
            if value is not None and value is not False and value != "auto":
                parts += [f"--{name.replace('_', '-')}"] + [str(value)] * (value is not True)
    return shlex.join(parts)


def check_device(name: str) -> None:
    """Refuse what no machine has, before torch is asked."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name}: there is no such device; cpu, cuda, cuda:1 and auto are what there is.")


def choose_device(name: str) -> torch.device:
    check_device(name)
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")  # under torchrun: see own_gpu
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here; `cpc-fast doctor` says more."
        )
    return device


def choose_config(
    preset: str | None, options: dict[str, Any], settings: list[str] | None, resume: Path | None = None
) -> Config:
    """The preset (or the config of the run to resume), with what was asked for on top."""
    base = configs.preset(preset or "cpu-demo")
    changes = configs.read_settings(settings or [])
    changes |= {name: value for name, value in options.items() if value is not None}
    if resume is not None and preset is None:
        from ..checkpoint import checkpoint_config

        base = checkpoint_config(resume)[0]
    return base.replace(**changes)
