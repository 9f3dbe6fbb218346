"""What `cpc-fast predict` leaves on disk: an answer for each image, under names that cannot do harm.

    OUT/scores.csv          path, name, score, flagged, threshold, number of segments, the largest one
    OUT/predictions.json    the same with every segment, and what was skipped and why
    OUT/overlays/NAME.png   the map laid over the image, the mask outlined
    OUT/masks/NAME.png      0 and 255
    OUT/maps/NAME.tiff      float32 scores, in the units of scores.csv (with tiff=True)

NAME is the image's path below the folder that was named, so a folder `test` with `<defect>/000.png` inside gives
`maps/<defect>/000.tiff`, the layout that official evaluations read.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from .detector import Detector, Prediction
from .errors import CpcFastError, UsageError
from .images import SUFFIXES, quoted, read_image
from .report import mask_outline, overlay, printable
from .saving import write_text, write_whole
from .version import __version__

COLUMNS = (
    "path", "name", "score", "flagged", "threshold", "segments",
    "largest_area", "largest_top", "largest_left", "largest_bottom", "largest_right",
)  # fmt: skip


@dataclass
class Answers:
    """What was predicted so far: `images` and `skipped` as predictions.json has them."""

    images: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def flagged(self) -> int:
        return sum(image["flagged"] for image in self.images)


def find_inputs(images: Sequence[str | os.PathLike]) -> list[tuple[Path, str]]:
    """Files and folders (searched to the bottom) as (path, NAME) in the order given, each NAME once.

    Raises UsageError for a folder without images.
    """
    found: list[tuple[Path, PurePath]] = []
    for given in map(Path, images):
        if not os.path.isdir(given):
            found.append((given, PurePath(given.name)))
            continue
        inside = sorted(_walk(given))
        if not inside:
            raise UsageError(f"{quoted(given)} holds no images ({' '.join(SUFFIXES)}); name images, or another folder.")
        found += [(path, path.relative_to(given)) for path in inside]
    taken: set[str] = set()
    inputs = []
    for path, below in found:
        name = first = "/".join(_harmless(part) for part in below.with_suffix("").parts) or "image"
        count = 1
        while name.casefold() in taken:
            count += 1
            name = f"{first}_{count}"
        taken.add(name.casefold())
        inputs.append((path, name))
    return inputs


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise UsageError(f"Cannot list the folder {quoted(error.filename)}: {error.strerror}.")

    found = []
    for here, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(here, name) for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    return found


def _harmless(part: str) -> str:
    """A file name for any system: what does not print, and what some file system or shell minds, becomes `_`."""
    clean = (
        "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in part).lstrip(".-~ =+@").rstrip(". ")
    )
    return clean.encode()[:150].decode(errors="ignore") or "image"


def predict(
    detector: Detector,
    images: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    tiff: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Answers:
    """Score images and write the answers; an image that cannot be used is skipped and named, the others go on.

    Args:
        images: files and folders.
        out: the folder to write to; answers of an earlier call there are replaced, an image of `images` never is.
        on_image, on_skip: called with how many are done of how many, and with why an image was skipped.

    Raises UsageError where nothing can be found or an input would be overwritten, CpcFastError where `out` cannot be
    written. On Ctrl-C the answers so far are written.
    """
    out, inputs = Path(out), find_inputs(images)
    kinds = {"overlays": ".png", "masks": ".png"} | ({"maps": ".tiff"} if tiff else {})
    sources = {os.path.realpath(path) for path, _ in inputs}
    targets = [out / kind / f"{name}{suffix}" for _, name in inputs for kind, suffix in kinds.items()]
    for target in (*targets, out / "scores.csv", out / "predictions.json"):
        if os.path.realpath(target) in sources:
            raise UsageError(
                f"Writing to {quoted(out)} would overwrite the image {quoted(target)}; choose another --out."
            )
    answers = Answers()
    try:
        for done, (path, name) in enumerate(inputs, start=1):
            try:
                image = read_image(path)
                answer = detector.inspect(image)
            except CpcFastError as error:
                reason = str(error) if quoted(path) in str(error) else f"{quoted(path)}: {error}"
                answers.skipped.append({"path": _text(path), "reason": printable(reason)})
                if on_skip:
                    on_skip(reason)
            else:
                _write_pictures(detector, image, answer, {kind: out / kind / f"{name}{kinds[kind]}" for kind in kinds})
                answers.images.append(_entry(detector, path, name, answer, kinds))
            if on_image:
                on_image(done, len(inputs))
    finally:
        if answers.images or answers.skipped:
            _write_lists(detector, answers, out)
    return answers


def _write_pictures(detector: Detector, image: np.ndarray, answer: Prediction, paths: dict[str, Path]) -> None:
    threshold = detector.threshold.value
    low = min(0.0, threshold - 1)  # 0 is average for normal images
    heat = overlay(image, answer.map, low, low + 2.5 * (threshold - low))
    _write_png(paths["overlays"], mask_outline(heat, answer.mask))
    _write_png(paths["masks"], answer.mask.astype(np.uint8) * 255)
    if "maps" in paths:
        write_whole(paths["maps"], lambda aside: tifffile.imwrite(aside, answer.map.astype(np.float32)))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    write_whole(path, lambda aside: Image.fromarray(pixels).save(aside, "PNG"))


def _entry(detector: Detector, path: Path, name: str, answer: Prediction, kinds: dict[str, str]) -> dict[str, Any]:
    return {
        "path": _text(path),
        "name": name,
        "score": answer.score,
        "flagged": answer.flagged,
        "threshold": detector.threshold.value,
        "height": answer.map.shape[0],
        "width": answer.map.shape[1],
        "files": [f"{kind}/{name}{suffix}" for kind, suffix in kinds.items()],
        "segments": [asdict(segment) for segment in answer.segments],
    }


def _write_lists(detector: Detector, answers: Answers, out: Path) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in answers.images:
        largest = max(entry["segments"], key=lambda segment: segment["area"], default=None)
        writer.writerow([
            entry["path"], entry["name"], repr(entry["score"]), str(entry["flagged"]).lower(),
            repr(entry["threshold"]), len(entry["segments"]),
            *([largest["area"], *largest["box"]] if largest else [0, "", "", "", ""]),
        ])  # fmt: skip
    write_text(out / "scores.csv", table.getvalue())
    record = {
        "version": __version__,
        "threshold": detector.threshold.value,
        "images": answers.images,
        "skipped": answers.skipped,
    }
    write_text(out / "predictions.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def _text(path: Path) -> str:
    """A path for a table: on one line, and nothing that a spreadsheet would take for a formula."""
    text = printable(os.fspath(path))
    return f"./{text}" if text[:1] in ("=", "+", "-", "@") else text
