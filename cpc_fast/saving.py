"""Run folders: written whole or not at all, read with suspicion. Tensors are safetensors, everything else JSON.

RUN/config.json             the choices, the version, the threshold, what it was trained on
RUN/model.safetensors       weights, bank and calibration: the detector
RUN/checkpoint.safetensors  the state of the training (checkpoint.py)
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import Config
from .errors import CpcFastError, UsageError
from .files import write_text, write_whole
from .images import quoted
from .model import CPC, mirrors
from .runs import CHECKPOINT, DETECTOR, need_file, need_run
from .version import __version__

FORMAT = 4  # of the run folder; raised when an older reader would misread it
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip

Spec = tuple[torch.dtype | None, tuple[int, ...]]  # what a tensor in a file is; None: of a type not written here


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A safetensors file with `about` as JSON in its header, whole or not at all."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    def write(aside: Path) -> None:
        aside.touch()  # with the rights that the user gives new files; save_file keeps its own to the owner
        rights = aside.stat().st_mode
        try:
            save_file(plain, aside, {"about": json.dumps(about)})
        except SafetensorError as error:  # most likely a full disk
            raise OSError(str(error)) from None
        aside.chmod(rights)

    write_whole(path, write)


def read_tensors(
    path: Path, what: str, expect: Callable[[dict[str, Any]], dict[str, Spec]] | None = None, leave: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of write_tensors.

    `expect` turns the record into the name, type and shape of every tensor there must be (a length of -1 is free);
    they are compared with the header before a tensor is read; the tensor called `leave` is not read. Raises
    CpcFastError for a file that is missing, damaged, other than expected, or not finite.
    """
    with _opened(path, what) as (file, about):
        names = file.keys()
        if expect is not None:
            slices = {name: file.get_slice(name) for name in names}
            found = {name: (DTYPES.get(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
            _compare(path, found, expect(about))
        tensors = {name: file.get_tensor(name) for name in names if name != leave}
    for name, value in tensors.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise CpcFastError(f"{quoted(path)} holds weights that are not finite ({name}); {remedy(path)}.")
    return tensors, about


def read_record(path: Path, what: str) -> dict[str, Any]:
    """The record in such a file; no tensor is read. Raises CpcFastError for a file that is missing or cut short."""
    with _opened(path, what) as (_, about):
        return about


@contextmanager
def _opened(path: Path, what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file and its record; what cannot be read inside is damage."""
    need_file(path.parent, path.name, what)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if not isinstance(about, dict):
                raise ValueError("its record is no JSON object")
            yield file, about
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CpcFastError(f"{quoted(path)} is damaged ({in_short(error)}); {remedy(path)}.") from None


def remedy(path: Path) -> str:
    """What to do about a file that is no good."""
    if path.name == DETECTOR and (path.parent / CHECKPOINT).is_file():
        return "cpc-fast fit ... --resume makes it anew from the checkpoint"
    return "restore it from a copy, or fit again"


def _compare(path: Path, found: dict[str, Spec], expected: dict[str, Spec]) -> None:
    def fits(name: str) -> bool:
        (dtype, shape), (wanted, lengths) = found[name], expected[name]
        same = len(shape) == len(lengths) and all(b in (-1, a) for a, b in zip(shape, lengths, strict=True))
        return dtype == wanted and same

    def said(name: str, specs: dict[str, Spec]) -> str:
        dtype, shape = specs[name]
        return f"{str(dtype).removeprefix('torch.')} {tuple('any' if n < 0 else n for n in shape)}"

    wrong = [f"{name!r} is missing" for name in expected if name not in found]
    wrong += [f"{name!r} is not expected" for name in found if name not in expected]
    wrong += [
        f"{name!r} is {said(name, found)}, not {said(name, expected)}"
        for name in found
        if name in expected and not fits(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CpcFastError(
            f"The weights in {quoted(path)} do not fit its config ({in_short('; '.join(wrong[:3]))}{more}); "
            "if it was fitted with an encoder of your own, hand the same one to load, else fit again."
        )


def model_specs(config: Config, encoder: nn.Module | None = None) -> dict[str, Spec]:
    """What the weights of a model of this config are, by name; the built-in encoder's without any memory for them."""
    if encoder is None:
        with torch.device("meta"):
            model = CPC(config)
    else:
        model = CPC(config, encoder)
    return {f"model.{name}": (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"cpc_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}


def save_run(run: Path, tensors: dict[str, Tensor], config: Config, about: dict[str, Any]) -> None:
    """Write a detector. The weights file carries everything; config.json repeats the readable part beside it."""
    record = {"format": FORMAT, "versions": versions(), "config": config.to_json(), **about}
    write_tensors(run / DETECTOR, tensors, record)
    write_text(run / "config.json", json.dumps(record, indent=2) + "\n")


def load_run(
    run: Path, encoder: nn.Module | None = None, leave: str = ""
) -> tuple[dict[str, Tensor], Config, dict[str, Any]]:
    """Read a detector: tensors, except one to `leave`, config, and the rest of its record."""
    need_run(run)

    def expect(about: dict[str, Any]) -> dict[str, Spec]:
        config = read_config(run, about)
        specs = model_specs(config, encoder)
        features = specs["model.members.0.predictor.weight"][1][-1] * config.members
        steps = len(config.predicts) * config.members * len(mirrors(config))
        specs["bank"] = (torch.float32, (-1, features))
        for name in ("mean", "spread"):
            specs[f"calibration.step_{name}"] = (torch.float32, (steps,))
            specs[f"calibration.place_{name}"] = (torch.float32, (1 + config.place, -1, -1))
        return specs

    tensors, about = read_tensors(run / DETECTOR, "detector", expect, leave)
    mean, spread = (tuple(tensors[f"calibration.place_{name}"].shape) for name in ("mean", "spread"))
    if mean != spread or 0 in mean:
        raise CpcFastError(
            f"The calibration in {quoted(run)} is damaged (means {mean}, spreads {spread}: one shape, and not empty); "
            f"{remedy(run / DETECTOR)}."
        )
    return tensors, read_config(run, about), about


def edited(run: Path) -> str:
    """A sentence where config.json no longer repeats the choices and the threshold of the detector; else ""."""
    path = run / "config.json"
    if not path.is_file():
        return ""
    kept = read_record(run / DETECTOR, "detector")
    try:
        beside = json.loads(path.read_text(encoding="utf-8-sig"))
        pairs = [(part, name) for part in ("config", "threshold") for name in {**kept[part], **beside[part]}]
        differ = [(part, name) for part, name in pairs if beside[part].get(name) != kept[part].get(name)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{quoted(path)} cannot be read, which changes nothing: {DETECTOR} holds the settings."
    if not differ:
        return ""
    said = ", ".join(
        f"{name} {in_short(beside[part].get(name))} for {in_short(kept[part].get(name))}" for part, name in differ[:3]
    )
    return (
        f"{quoted(path)} is not what this detector was fitted with ({said}{', ...' if len(differ) > 3 else ''}), which "
        f"changes nothing: {DETECTOR} holds the settings. For other ones fit again; for another threshold there is "
        "predict --threshold."
    )


def read_config(run: Path, about: dict[str, Any]) -> Config:
    """The config in the record of a file in `run`."""
    if about.get("format") != FORMAT:
        made = about.get("versions")
        made = made.get("cpc_fast", "unknown") if isinstance(made, dict) else "unknown"
        raise CpcFastError(
            f"{quoted(run)} is from another version of cpc_fast ({in_short(made)}, format "
            f"{in_short(about.get('format'))}; this is {__version__}, format {FORMAT}); use that version, or fit again."
        )
    try:
        return Config.from_json(about["config"])
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise CpcFastError(f"The config in {quoted(run)} cannot be read ({in_short(error)}); fit again.") from None


def in_short(what: object) -> str:
    """One line of ASCII, as of what was read from a file."""
    what = f"{what} is missing" if isinstance(what, KeyError) else what
    return ascii(" ".join(str(what).split())[:200])[1:-1]
