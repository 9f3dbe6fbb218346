"""What a run folder holds, and what is said where it holds something else. Quick to import: no torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CpcFastError, UsageError
from .files import locked
from .images import digest, quoted

DETECTOR, CHECKPOINT, BEST = "model.safetensors", "checkpoint.safetensors", "best.safetensors"


def need_run(run: Path) -> None:
    """Raises UsageError where there is no such folder."""
    if not run.is_dir():
        raise UsageError(f"There is no run folder {quoted(run)}; fit makes one.")


def need_file(run: Path, name: str, what: str) -> None:
    """Raises UsageError where the file is missing; `what` says in a word what it would hold."""
    if (run / name).is_file():
        return
    if name == DETECTOR and (run / CHECKPOINT).is_file():
        raise UsageError(
            f"The fit in {quoted(run)} was not finished ({name} is missing); go on with cpc-fast fit ... --resume."
        )
    raise UsageError(f"There is no {what} in {quoted(run)} ({name} is missing); run fit first.")


def need_writable(folder: Path) -> None:
    """Raises CpcFastError where no file can be written there, as far as can be seen without writing one."""
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not os.path.isdir(there):
        raise CpcFastError(
            f"Could not write in the folder {quoted(folder)}: {quoted(there)} is none; choose another one."
        )
    if not os.access(there, os.W_OK | os.X_OK):
        why = "its file system is read-only" if os.statvfs(there).f_flag & os.ST_RDONLY else "you have no right to"
        raise CpcFastError(f"Could not write in the folder {quoted(folder)}: {why}; choose another one.")


def refuse_swapped(run: Path, others: Sequence[Path], command: str) -> None:
    """Raises UsageError where the run folder was named in another place than the first."""
    swapped = [other for other in others if (other / DETECTOR).is_file()]
    if swapped and not (run / DETECTOR).is_file():
        raise UsageError(f"The run folder comes first, and {quoted(swapped[0])} is one: cpc-fast {command}.")


def need_detector(run: Path) -> None:
    need_run(run)
    need_file(run, DETECTOR, "detector")


def own_threshold(value: float) -> float:
    """A threshold that somebody set, rounded to float32 as scores are. Raises UsageError where that is not finite."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not np.isfinite(rounded):
        raise UsageError(f"The threshold is {value}; it must be a finite float32, in the units of the scores.")
    return rounded


def need_checkpoint(run: Path) -> None:
    """Raises UsageError where nothing can be resumed."""
    if not (run / CHECKPOINT).is_file():
        raise UsageError(f"There is no checkpoint in {quoted(run)} to resume from; fit without resume.")


def origin(source: str, images: Sequence[str | os.PathLike | np.ndarray]) -> dict[str, str]:
    """What the records of a run say of the images that it is fitted on; `source` is where they are from."""
    return {"data": source, "normal images": str(len(images)), "digest": digest(images)}


def other_images(record: dict[str, Any], given: dict[str, str]) -> str:
    """In words that, and how, the record of a run is of other images than those `given` (an origin); else "".

    Records of older versions say less: those of detectors how many there were, those of checkpoints nothing.
    """
    found = record.get("trained_on")
    found = {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}
    there, now = (about.get("normal images", "").split(" ")[0] for about in (found, given))
    if found.get("digest", given["digest"]) == given["digest"] and there in ("", now):
        return ""
    differ = ", whose names or sizes differ" if there == now else ""
    data = quoted(found.get("data", "")[:200])
    return f"other images (there {data}, {there or 'some'}; now {quoted(given['data'])}, {now}{differ})"


def set_aside(runs: Sequence[Path]) -> list[Path]:
    """Rename the folders that hold a run, finished or not, to NAME.earlier (NAME.earlier-2, ...); returns the new ones.

    All or none: raises CpcFastError where another process writes one of them, or one cannot be renamed.
    """
    there = [run for run in runs if any((run / name).exists() for name in (DETECTOR, CHECKPOINT))]
    moved: list[tuple[Path, Path]] = []
    with ExitStack() as held:
        for run in there:
            held.enter_context(locked(run))
        try:
            for run in there:
                aside, number = run.with_name(f"{run.name}.earlier"), 1
                while os.path.lexists(aside):
                    number += 1
                    aside = run.with_name(f"{run.name}.earlier-{number}")
                run.rename(aside)
                moved.append((run, aside))
        except OSError as error:
            for run, aside in reversed(moved):
                aside.rename(run)
            raise CpcFastError(
                f"Could not set the earlier run {quoted(run)} aside: {error.strerror}; choose another folder."
            ) from None
        for _, aside in moved:
            (aside / "run.lock").unlink(missing_ok=True)
    return [aside for _, aside in moved]


def refuse_run(run: Path) -> None:
    """Raises UsageError where a run is already: it is resumed when asked, and never fitted over."""
    for name in (DETECTOR, CHECKPOINT):
        if (run / name).exists():
            raise UsageError(f"{quoted(run)} holds a run already ({name}); resume it, or choose another folder.")
