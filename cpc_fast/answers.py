"""What `cpc-fast predict` leaves on disk: an answer for each image, under names that cannot do harm.

    OUT/scores.csv          path, name, score, flagged, threshold, number of segments, the largest one, other_light
    OUT/predictions.json    the same with every segment's outline, and why: see _answer; what was skipped
    OUT/overlays/NAME.png   the map laid over the image, the mask outlined
    OUT/masks/NAME.png      0 and 255
    OUT/maps/NAME.tiff      float32 scores, in the units of scores.csv (with tiff=True)
    OUT/progress/           the answers line by line, for --resume (journal.py)

NAME is the image's path below the folder that was named, so a folder `test` with `<defect>/000.png` inside gives
`maps/<defect>/000.tiff`, the layout that official evaluations read.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image

from .bank import host_blocks
from .detector import Detector, Prediction
from .errors import CpcFastError, Stopped, Unreachable
from .files import locked, remove_asides, write_whole
from .images import naming, quoted, read_image
from .inputs import Shard, answer_kinds, has_colour, plan, refuse_among
from .journal import entries, journal, whole
from .report import mask_outline, overlay, printable
from .segments import outline
from .version import __version__

COLUMNS = (
    "path", "name", "score", "flagged", "threshold", "segments",
    "largest_area", "largest_top", "largest_left", "largest_bottom", "largest_right", "other_light",
)  # fmt: skip
ALL = Shard()
LOST = {  # what a share that drops out says; a bad sector says EIO, and its folder can still be listed
    errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENXIO, errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """How many images of this shard were answered, flagged, skipped, in colour, of another size or light than those of
    the fit; whether the lists are written."""

    images: int
    flagged: int
    skipped: int
    in_colour: int
    other_size: int
    other_light: int
    listed: bool


def predict(
    detector: Detector,
    images: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    tiff: bool = False,
    min_area: int = 1,
    pictures: bool = True,
    shard: Shard = ALL,
    resume: bool = False,
    on_image: Callable[[int, int], None] | None = None,
    on_skip: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Answers:
    """Score images and write the answers; an image that cannot be used is skipped and named, the others go on.

    Memory does not grow with the number of answers, and each answer is on disk before the next image is read.

    Args:
        images: files and folders.
        out: the folder to write to; answers of an earlier call there are replaced, an image of `images` never is.
        min_area: regions of fewer pixels are left out, and an image with no region left is not flagged.
        tiff, pictures: whether to write maps, and overlays and masks.
        shard: which of the images; the process that ends last writes the lists of all shards.
        resume: go on after the last answer in `out`, with the same images; what was skipped is tried again at the
            end. The lists come out as without the interruption.
        on_image, on_skip: called with how many are done of how many, and with why an image was skipped.
        stop: asked after each image whether to stop there.

    Raises UsageError where nothing can be found, an input would be overwritten, pictures would lie in a folder of
    `images`, or `out` holds answers of another call, CpcFastError where `out` cannot be written or another process
    writes there, Unreachable where the folder of an image is gone, Stopped where `stop` said so. After these two, and
    on Ctrl-C, the lists of the answers so far are written, unless this is one shard of several.
    """
    out = Path(out)
    kinds = answer_kinds(tiff, pictures)
    asked = {
        "version": __version__, "detector": fingerprint(detector), "threshold": detector.threshold.value,
        "kinds": list(kinds), "min_area": min_area, "images": [os.fspath(image) for image in images],
        "folder": None if all(os.path.isabs(image) for image in images) else os.getcwd(),
    }  # fmt: skip
    refuse_among(images, out, kinds)  # before a lock makes a folder there
    with journal(out, asked, lambda: plan(images, out, kinds), shard, resume, detector.config.depth) as (inputs, kept):
        mine = inputs[shard.number - 1 :: shard.count]

        def answer(i: int, tidy: bool) -> dict[str, Any]:
            path, name = mine[i]
            pictures_of = {kind: out / kind / f"{name}{suffix}" for kind, suffix in kinds.items()}
            try:
                entry = _answer(detector, path, name, min_area, pictures_of)
            except Unreachable as why:
                done = f"{kept.done} of {kept.total} images are answered"
                raise Unreachable(f"{why} {done}; once it is back, go on with --resume.") from None
            if "reason" in entry and on_skip:
                on_skip(entry["reason"])
            for picture in pictures_of.values() if tidy and "score" in entry else ():
                remove_asides(picture)  # what a kill may have left
            return entry

        try:
            again, first = sorted(kept.skipped), kept.done
            left = kept.total - first + len(again)
            for i in chain(range(first, kept.total), again):
                kept.add(i, answer(i, tidy=i <= first))
                left -= 1
                if on_image and i >= first:
                    on_image(kept.done, kept.total)
                if left and stop and stop():
                    untried = f", {left} of them to be tried again" if kept.done == kept.total else ""
                    raise Stopped(f"Stopped after {kept.done} of {kept.total} images{untried}.")
            kept.finish()
        except (KeyboardInterrupt, Stopped, Unreachable):
            if shard.count == 1 and kept.done:
                _write_lists(detector, out, 1, min_area)
            raise
        with locked(out / "progress", "lists.lock", wait=True):
            listed = whole(out, shard.count)
            if listed:
                _write_lists(detector, out, shard.count, min_area)
        return Answers(**kept.counts, listed=listed)


def fingerprint(detector: Detector) -> str:
    """Changes with anything that changes a score."""
    digest = hashlib.sha256(json.dumps(detector.config.to_json()).encode())
    tensors = {**detector.model.state_dict(), "bank": detector.bank, **vars(detector.calibration)}
    for name in sorted(tensors):
        digest.update(name.encode())
        for part in host_blocks(tensors[name]) if name == "bank" else [tensors[name]]:
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _answer(detector: Detector, path: str, name: str, min_area: int, pictures: dict[str, Path]) -> dict[str, Any]:
    """One image in predictions.json, or why it was skipped; its pictures are written by then.

    segments[].outline: closed polygons of [y, x] (segments.py). most_surprising: of a flagged image, the patch that
    made its score, its box, the direction and step, or "place" (`worst`), that found it strange, and the mean loss of
    each of them in units of its normal spread. Raises Unreachable where the folder of the image is.
    """
    try:
        with naming(path):
            image = read_image(path, depth=detector.config.depth)
            answer = detector.inspect(image, min_area)
            if not math.isfinite(answer.score):
                raise CpcFastError(f"its score is {answer.score}; look at the image, and at the detector.")
    except CpcFastError as error:
        if isinstance(cause := error.__cause__, OSError) and cause.errno is not None:
            _need_folder(path, cause.errno)
        return {"path": _text(path), "reason": printable(str(error))}
    _write_pictures(detector, image, answer, pictures)
    return {
        "path": _text(path),
        "name": name,
        "score": answer.score,
        "flagged": answer.flagged,
        "threshold": detector.threshold.value,
        "height": answer.map.shape[0],
        "width": answer.map.shape[1],
        "files": [f"{kind}/{name}{target.suffix}" for kind, target in pictures.items()],
        "in_colour": has_colour(image),
        "other_size": detector.other_size(image.shape),
        "other_light": answer.other_light,
        "segments": [{**asdict(segment), "outline": outline(answer.mask, segment)} for segment in answer.segments],
        "most_surprising": None if answer.why is None else asdict(answer.why),
    }


def _need_folder(path: str, number: int) -> None:
    """Raises Unreachable where error `number` came of a folder, or the share that it is on, that is gone."""
    folder = os.path.dirname(path) or "."
    try:
        with os.scandir(folder) as inside:  # of a share that dropped out the mount point is left, empty
            gone = number in LOST or next(inside, None) is None
    except PermissionError:
        gone = False
    except OSError:
        gone = True
    if gone:
        raise Unreachable(f"The folder {quoted(folder)} cannot be reached any more ({os.strerror(number)}).")


def _write_pictures(detector: Detector, image: np.ndarray, answer: Prediction, paths: dict[str, Path]) -> None:
    if "overlays" in paths:
        threshold = detector.threshold.value
        low = min(0.0, threshold - 1)  # 0 is average for normal images
        heat = overlay(image, answer.map, low, low + 2.5 * (threshold - low))
        _write_png(paths["overlays"], mask_outline(heat, answer.mask))
        _write_png(paths["masks"], answer.mask.astype(np.uint8) * 255)
    if "maps" in paths:
        write_whole(paths["maps"], lambda aside: tifffile.imwrite(aside, answer.map.astype(np.float32)))


def _write_png(path: Path, pixels: np.ndarray) -> None:
    write_whole(path, lambda aside: Image.fromarray(pixels).save(aside, "PNG"))


def _write_lists(detector: Detector, out: Path, shards: int, min_area: int) -> None:
    """scores.csv and predictions.json from the journals, a line at a time."""

    def table(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            for entry in entries(out, shards):
                if "score" not in entry:
                    continue
                largest = max(entry["segments"], key=lambda segment: segment["area"], default=None)
                writer.writerow([
                    entry["path"], entry["name"], repr(entry["score"]), str(entry["flagged"]).lower(),
                    repr(entry["threshold"]), len(entry["segments"]),
                    *([largest["area"], *largest["box"]] if largest else [0, "", "", "", ""]),
                    str(entry["other_light"]).lower(),
                ])  # fmt: skip

    def record(aside: Path) -> None:
        with open(aside, "w", encoding="utf-8") as file:
            first = {"version": __version__, "threshold": detector.threshold.value, "min_area": min_area}
            head = json.dumps(first, indent=1)
            file.write(head.removesuffix("\n}"))
            for key, mark in (("images", "score"), ("skipped", "reason")):
                lines = (json.dumps(entry, allow_nan=False) for entry in entries(out, shards) if mark in entry)
                file.write(f',\n "{key}": [')
                for n, line in enumerate(lines):
                    file.write(("," if n else "") + "\n  " + line)
                file.write("\n ]")
            file.write("\n}\n")

    write_whole(out / "scores.csv", table)
    write_whole(out / "predictions.json", record)


def _text(path: str) -> str:
    """A path for a table: on one line, and nothing that a spreadsheet would take for a formula."""
    text = printable(path)
    return f"./{text}" if text[:1] in ("=", "+", "-", "@") else text
