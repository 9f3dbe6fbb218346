"""The images that `cpc-fast predict` is given, each with a name for its answers that cannot do harm. No torch here."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from .errors import CpcFastError, UsageError
from .images import SUFFIXES, quoted, read_image

Inputs = list[tuple[str, str]]  # (path, NAME)
INPUTS = os.path.join("progress", "inputs.jsonl")  # in a folder of answers: what they answer (journal.py)
PICTURE = re.compile(r"\.(png|tiff)$", re.I)  # a folder of that name would be in the way of a picture


@dataclass(frozen=True)
class Shard:
    """Every `count`-th image, from the `number`-th on; counted from 1."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """
        >>> Shard.parse("2/8")
        Shard(number=2, count=8)
        """
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UsageError(f"--shard is {text!r}; the second of eight is 2/8, and the last of them 8/8.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"


def answer_kinds(tiff: bool, pictures: bool = True) -> dict[str, str]:
    """What is written for each image, as {folder: suffix}."""
    return ({"overlays": ".png", "masks": ".png"} if pictures else {}) | ({"maps": ".tiff"} if tiff else {})


def plan(
    images: Sequence[str | os.PathLike],
    out: Path,
    kinds: dict[str, str],
    on_repeat: Callable[[str], None] | None = None,
) -> list[tuple[str, str]]:
    """What to read, as (path, NAME); on_repeat is called with each path that was given before.

    Raises UsageError where an answer would overwrite an image that was given, or a file that the last call did not
    leave, and as find_inputs and refuse_among do.
    """
    inputs = find_inputs(images, on_repeat, out)
    refuse_among(images, out, kinds)
    sources = sources_in(out, inputs, *kinds)
    targets = files_of(inputs, kinds)
    for target in targets if sources else ():
        if os.path.realpath(out / target) in sources:
            raise UsageError(
                f"Writing to {quoted(out)} would overwrite the image {quoted(out / target)}; choose another --out."
            )
    left = left_in(out)
    for target in targets if os.path.isdir(out) else ():
        # asked once more, as another process may have begun: its list is there before its first answer
        if target not in left and os.path.lexists(out / target) and target not in left_in(out):
            raise UsageError(
                f"Writing to {quoted(out)} would overwrite {quoted(out / target)}, which the last predict did not "
                "leave there; choose another --out."
            )
    return inputs


def files_of(inputs: Inputs, kinds: dict[str, str]) -> list[str]:
    """What the answers are written to, below OUT."""
    pictures = [f"{kind}/{name}{suffix}" for _, name in inputs for kind, suffix in kinds.items()]
    return ["scores.csv", "predictions.json", *pictures]


def left_in(out: Path) -> set[str]:
    """What an earlier call wrote, or may have written, to `out`; nothing where none did or its list is damaged."""
    try:
        asked, inputs = read_inputs(out / INPUTS)
        return set(files_of(inputs, _kinds(asked)))
    except CpcFastError:
        return set()


def read_inputs(path: Path) -> tuple[dict[str, Any], Inputs]:
    """What a call was about: what was asked for, and its images."""
    try:
        with open(path, encoding="ascii") as file:
            asked = json.loads(file.readline())
            inputs = [(str(p), str(name)) for p, name in map(json.loads, file)]
        if not isinstance(asked, dict):
            raise ValueError("no record")
        return asked, inputs
    except (OSError, ValueError, TypeError, RecursionError):
        raise CpcFastError(f"{quoted(path)} is damaged; predict into another --out.") from None


def _kinds(asked: dict[str, Any]) -> dict[str, str]:
    """The kinds of pictures that a call asked for."""
    kinds = asked.get("kinds")
    return {
        kind: suffix for kind, suffix in answer_kinds(tiff=True).items() if isinstance(kinds, list) and kind in kinds
    }


def refuse_among(images: Sequence[str | os.PathLike], out: Path, kinds: dict[str, str]) -> None:
    """Raises UsageError where pictures would be written into a folder that is to be scored: the next call would take
    them for images."""
    there = os.path.realpath(out)
    if kinds and any(os.path.isdir(given) and os.path.realpath(given) == there for given in images):
        raise UsageError(
            f"--out is {quoted(out)}, a folder to be scored: overlays and masks would lie among its images. Choose "
            "another --out, such as answers."
        )


def sources_in(out: Path, inputs: Sequence[tuple[str, str]], *kinds: str) -> set[str]:
    """Those of the images that lie in `out`, or where its folders of these `kinds` may be links to, by real paths:
    nothing may write or remove them."""
    inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in (out, *(out / kind for kind in kinds)))
    return {real for path, _ in inputs if (real := os.path.realpath(path)).startswith(inside)}


def find_inputs(
    images: Sequence[str | os.PathLike], on_repeat: Callable[[str], None] | None = None, out: Path | None = None
) -> list[tuple[str, str]]:
    """Files and folders (searched to the bottom, without ground_truth, `out` and the pictures of other answers) as
    (path, NAME) in the order given, each path and each NAME once.

    Raises UsageError for a path that does not exist, and for a folder without images.
    """
    found: list[tuple[Path, PurePath]] = []
    for given in map(Path, images):
        if not os.path.isdir(given):
            _need(given)
            found.append((given, PurePath(given.name)))
            continue
        inside = sorted(walk(given, out))
        if not inside:
            answers = os.path.isfile(given / INPUTS)
            what = "nothing but answers of predict" if answers else f"no images ({' '.join(SUFFIXES)})"
            raise UsageError(f"{quoted(given)} holds {what}; name images, or another folder.")
        found += [(path, path.relative_to(given)) for path in inside]
    taken: set[str] = set()
    counts: dict[str, int] = defaultdict(lambda: 1)  # the last number that each name was given
    seen: set[str] = set()
    inputs = []
    for path, below in found:
        if (place := os.path.abspath(path)) in seen:
            if on_repeat:
                on_repeat(os.fspath(path))
            continue
        seen.add(place)
        folders = [PICTURE.sub(r"_\1", _harmless(part)) for part in below.parent.parts]
        name = first = "/".join([*folders, _harmless(below.stem)])
        while name.casefold() in taken:
            counts[first.casefold()] += 1
            name = f"{first}_{counts[first.casefold()]}"
        taken.add(name.casefold())
        inputs.append((os.fspath(path), name))
    return inputs


def need_readable(inputs: Sequence[tuple[str, str]], out: Path, depth: int | None = None) -> None:
    """Raises CpcFastError where none of the images can be read, before the answers in `out` are given up for theirs.

    depth: as of read_image.
    """
    why: CpcFastError | None = None
    for path, _ in inputs:
        try:
            read_image(path, depth=depth)
            return
        except CpcFastError as error:
            why = why or error
    raise CpcFastError(f"No image can be read, so the answers of before stay in {quoted(out)}. The first: {why}")


def has_colour(image: np.ndarray) -> bool:
    """Whether uint8 (h, w, c) shows any colour: one saved as RGB may be grey all over."""
    return image.shape[2] == 3 and bool((image[..., :1] != image[..., 1:]).any())


def _need(path: Path) -> None:
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        if any(c in "*?[" for c in os.fspath(path)):  # a shell hands on what matches nothing
            raise UsageError(f"No file matches {quoted(path)}; check the pattern.") from None
        if os.path.islink(path):
            raise UsageError(f"{quoted(path)} is a link to something that is gone; mend it, or leave it out.") from None
        raise UsageError(f"There is no file or folder {quoted(path)}; check the path.") from None
    except (OSError, ValueError):  # said when it is read
        pass


def walk(folder: Path, out: Path | None = None, strict: bool = True) -> list[Path]:
    """The image files of a folder, to the bottom: without ground_truth, `out` and the pictures of answers. Links to
    folders are followed, each folder once.

    Raises UsageError for a folder that cannot be listed, or leaves it out (strict=False).
    """
    answers = None if out is None else os.path.realpath(out)

    def refuse(error: OSError) -> None:
        raise UsageError(f"Cannot list the folder {quoted(error.filename)}: {error.strerror}.")

    found: list[Path] = []
    starts, seen = [os.fspath(folder)], set()
    for here, folders, files in chain.from_iterable(  # links last, so that a folder goes by its own name
        os.walk(start, onerror=refuse if strict else None) for start in starts
    ):
        if (real := os.path.realpath(here)) in seen:
            folders.clear()
            continue
        seen.add(real)
        # masks are no parts, nor are the answers of earlier calls
        folders[:] = [name for name in folders if not name.startswith(".") and name != "ground_truth"]
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(here, name)) != answers]
        if os.path.isfile(list_of := os.path.join(here, INPUTS)):
            kinds = _first_kinds(list_of)
            folders[:] = [name for name in folders if name not in kinds]
        links = [name for name in sorted(folders) if os.path.islink(os.path.join(here, name))]
        starts += [os.path.join(here, name) for name in links if not _astray(os.path.join(here, name), folder, answers)]
        folders[:] = [name for name in sorted(folders) if name not in links]
        found += [
            Path(here, name) for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    return found


def _astray(link: str, root: Path, answers: str | None) -> bool:
    """Whether a link leads to masks, to answers, or to a folder that `root` lies in."""
    real, above = os.path.realpath(link), os.path.realpath(root)
    parent, name = os.path.split(real)
    pictures = os.path.isfile(list_of := os.path.join(parent, INPUTS)) and name in _first_kinds(list_of)
    inside = answers is not None and os.path.commonpath([real, answers]) == answers
    return "ground_truth" in Path(real).parts or pictures or inside or os.path.commonpath([real, above]) == real


def _first_kinds(path: str) -> dict[str, str]:
    """The kinds of pictures of the call that left this list; all kinds where nobody can tell."""
    try:
        with open(path, encoding="ascii") as file:
            return _kinds(json.loads(file.readline()))
    except (OSError, ValueError, AttributeError, RecursionError):
        return answer_kinds(tiff=True)


def _harmless(part: str) -> str:
    """A file name for any system: what does not print, and what some file system or shell minds, becomes `_`."""
    clean = (
        "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "_" for c in part).lstrip(".-~ =+@").rstrip(". ")
    )
    return clean.encode()[:150].decode(errors="ignore") or "image"
