"""What `cpc-fast predict` leaves on disk: an answer for each image, under names that cannot do harm.

    OUT/scores.csv          path, name, score, flagged, threshold, number of segments, the largest one
    OUT/predictions.json    the same with every segment's outline, and why: see _entry; what was skipped
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
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from .detector import Detector, Explanation, Prediction
from .errors import CpcFastError
from .images import quoted, read_image
from .inputs import has_colour, plan
from .report import mask_outline, overlay, printable
from .saving import write_text, write_whole
from .segments import outline
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
    in_colour: int = 0  # of the images

    @property
    def flagged(self) -> int:
        return sum(image["flagged"] for image in self.images)


def predict(
    detector: Detector,
    images: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    tiff: bool = False,
    min_area: int = 1,
    on_image: Callable[[int, int], None] | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Answers:
    """Score images and write the answers; an image that cannot be used is skipped and named, the others go on.

    Args:
        images: files and folders.
        out: the folder to write to; answers of an earlier call there are replaced, an image of `images` never is.
        min_area: regions of fewer pixels are left out, and an image with no region left is not flagged.
        on_image, on_skip: called with how many are done of how many, and with why an image was skipped.

    Raises UsageError where nothing can be found or an input would be overwritten, CpcFastError where `out` cannot be
    written. On Ctrl-C the answers so far are written.
    """
    out = Path(out)
    inputs, kinds = plan(images, out, tiff=tiff)
    answers = Answers()
    try:
        for done, (path, name) in enumerate(inputs, start=1):
            try:
                image = read_image(path)
                answer = detector.inspect(image, min_area)
                why = detector.explain(image) if answer.flagged else None
            except CpcFastError as error:
                reason = str(error) if quoted(path) in str(error) else f"{quoted(path)}: {error}"
                answers.skipped.append({"path": _text(path), "reason": printable(reason)})
                if on_skip:
                    on_skip(reason)
            else:
                _write_pictures(detector, image, answer, {kind: out / kind / f"{name}{kinds[kind]}" for kind in kinds})
                answers.images.append(_entry(detector, path, name, answer, why, kinds))
                answers.in_colour += has_colour(image)
            if on_image:
                on_image(done, len(inputs))
    finally:
        if answers.images or answers.skipped:
            _write_lists(detector, answers, out, min_area)
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


def _entry(
    detector: Detector, path: Path, name: str, answer: Prediction, why: Explanation | None, kinds: dict[str, str]
) -> dict[str, Any]:
    """One image in predictions.json.

    segments[].outline: closed polygons of [y, x] (segments.py). most_surprising: of a flagged image, the patch that is,
    its box, the direction and step (`worst`) that found it so, and the mean loss of each direction and step in units
    of its normal spread.
    """
    return {
        "path": _text(path),
        "name": name,
        "score": answer.score,
        "flagged": answer.flagged,
        "threshold": detector.threshold.value,
        "height": answer.map.shape[0],
        "width": answer.map.shape[1],
        "files": [f"{kind}/{name}{suffix}" for kind, suffix in kinds.items()],
        "segments": [{**asdict(segment), "outline": outline(answer.mask, segment)} for segment in answer.segments],
        "most_surprising": None if why is None else asdict(why),
    }


def _write_lists(detector: Detector, answers: Answers, out: Path, min_area: int) -> None:
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
        "min_area": min_area,
        "images": answers.images,
        "skipped": answers.skipped,
    }
    write_text(out / "predictions.json", json.dumps(record, indent=1, allow_nan=False) + "\n")


def _text(path: Path) -> str:
    """A path for a table: on one line, and nothing that a spreadsheet would take for a formula."""
    text = printable(os.fspath(path))
    return f"./{text}" if text[:1] in ("=", "+", "-", "@") else text
