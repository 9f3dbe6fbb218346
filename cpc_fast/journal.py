"""What predict has answered so far: on disk line by line, so that it can be killed at any moment and go on.

    OUT/progress/inputs.jsonl    what was asked for, then [path, NAME] of every image
    OUT/progress/2-of-8.jsonl    an answer for every eighth image from the second on, in order; among and after them
                                 {"again": N, ...}, a later answer for the N-th of these, from 0; after the last an end

A line is written by one call, and what a kill or a full disk left of one is cut off before anything is added. In memory
there is a number for each image that was skipped or tried again, and nothing that grows with the answers.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CpcFastError, NotWritten, UsageError
from .files import locked, write_whole
from .images import quoted
from .inputs import INPUTS, Inputs, Shard, left_in, need_readable, read_inputs, sources_in

SAID = {  # how a user calls what is asked for
    "version": "the version of cpc_fast", "kinds": "--tiff or --scores-only", "min_area": "--min-area",
    "images": "IMAGES", "folder": "the working directory, in which IMAGES are sought",
}  # fmt: skip
SYNC_SECONDS = 5.0  # what a power cut may cost; a killed process loses nothing that was written


def _agree_on_inputs(
    out: Path, asked: dict[str, Any], find: Callable[[], Inputs], shard: Shard, resume: bool, depth: int | None
) -> Inputs:
    """The images to answer: written down once, and refused where a shard finds others, or a run that goes on new ones.

    Only under the locks of the inputs and of this shard; raises as journal does.
    """
    folder = out / "progress"
    path = out / INPUTS
    if path.exists() and (resume or shard.count > 1):
        was, inputs = read_inputs(path)
        differ = ", ".join(SAID.get(name, name) for name in asked if was.get(name) != asked[name])
        if not differ and (found := find()) != inputs:
            before, now = ({path for path, _ in some} for some in (inputs, found))
            if not resume or now - before:
                differ = f"the images found, {len(now - before)} new and {len(before - now)} gone"
        if differ:
            raise UsageError(
                f"{quoted(out)} holds answers of another call (different: {differ}); choose another --out, or ask "
                "for the same again."
            )
        if not resume and _ended(folder / f"{shard}.jsonl"):  # the others would be mixed with answers from before
            raise UsageError(
                f"Shard {shard.number} of {shard.count} in {quoted(out)} is done; do the rest with --resume, or "
                "answer all images anew in another --out."
            )
        return inputs
    inputs = find()

    def write(aside: Path) -> None:
        with open(aside, "w", encoding="ascii") as file:
            file.write(json.dumps(asked) + "\n")
            file.writelines(json.dumps(pair) + "\n" for pair in inputs)

    with ExitStack() as stack:  # nothing is removed where a process is still writing
        names = {old.stem for kind in ("jsonl", "lock") for old in folder.glob(f"*-of-*.{kind}")}
        for name in sorted(names - {str(shard)}):
            stack.enter_context(locked(folder, f"{name}.lock"))
        if path.exists():
            need_readable(inputs, out, depth)
            _remove_answers(out, sources_in(out, inputs))
            path.unlink()  # so that whoever goes on where there was no room for the new one does not read this
        for name in names:
            (folder / f"{name}.jsonl").unlink(missing_ok=True)
        write_whole(path, write)
    return inputs


def answers_in(out: Path) -> int:
    """How many images an earlier call was about; 0 where there was none, or nobody knows."""
    try:
        return len(read_inputs(out / INPUTS)[1])
    except CpcFastError:
        return 0


def _remove_answers(out: Path, spare: set[str]) -> None:
    """What an earlier call wrote to `out`: its lists, and its pictures, which this call need not write again."""
    inside = os.path.join(os.path.realpath(out), "")
    for target in left_in(out):
        with suppress(OSError, ValueError):
            real = os.path.realpath(out / target)
            if real.startswith(inside) and real not in spare:
                os.unlink(out / target)


class Journal:
    """The answers of one shard. `done` of its images are answered, or skipped: those with indices in `skipped`."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total, self.done = path, total, 0
        self.skipped: set[int] = set()
        self.counts = dict.fromkeys(("images", "flagged", "skipped", "in_colour", "other_size", "other_light"), 0)
        self._end = 0  # bytes
        with self._told():
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                with open(self.path, "rb") as lines:
                    for line in lines:
                        entry = _parse(line) or {"end": None}
                        i = entry.get("again", self.done)
                        if "end" in entry or i >= self.total or ("again" in entry and not 0 <= i < self.done):
                            break
                        self._count(i, entry)
                        self._end += len(line)
                os.ftruncate(file, self._end)
            except BaseException:
                os.close(file)
                raise
        self._file = file
        self._synced = time.monotonic()

    def add(self, i: int, entry: dict[str, Any]) -> None:
        """The answer for the i-th image: the next one, or one that was skipped before.

        Raises CpcFastError, and leaves the file as it was, where it cannot be written.
        """
        self._write(entry if i == self.done else {"again": i, **entry})
        self._count(i, entry)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            with self._told():
                os.fsync(self._file)
            self._synced = time.monotonic()

    def finish(self) -> None:
        """Mark it as whole."""
        self._write({"end": self.total})

    def close(self) -> None:
        try:
            with self._told():
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def _count(self, i: int, entry: dict[str, Any]) -> None:
        self.done = max(self.done, i + 1)
        (self.skipped.add if "reason" in entry else self.skipped.discard)(i)
        self.counts |= {"skipped": len(self.skipped), "images": self.done - len(self.skipped)}
        for what in ("flagged", "in_colour", "other_size", "other_light"):
            self.counts[what] += bool(entry.get(what))

    def _write(self, entry: dict[str, Any]) -> None:
        line = _line(entry)
        with self._told():
            try:
                if os.pwrite(self._file, line, self._end) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                os.ftruncate(self._file, self._end)
                raise
        self._end += len(line)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the system refuses, as a sentence."""
        try:
            yield
        except OSError as error:
            raise NotWritten(
                f"Could not write {quoted(self.path)}: {error.strerror}. The {self.done} answers before are kept; free "
                "some space, or see to the folder, and go on with --resume."
            ) from None


@contextmanager
def journal(
    out: Path,
    asked: dict[str, Any],
    find: Callable[[], Inputs],
    shard: Shard,
    resume: bool,
    depth: int | None = None,
) -> Iterator[tuple[Inputs, Journal]]:
    """The images to answer, of all shards, and the journal of one, held against other processes.

    asked: what this call is about; find: finds the images. depth: with which they are read.

    Raises UsageError where `out` holds answers that this call must not mix with its own: about something else, or of
    this shard to its end; CpcFastError where it would replace what another process is writing, or answers by none.
    """
    folder = out / "progress"
    with ExitStack() as held:
        with locked(folder, "inputs.lock", wait=True):
            held.enter_context(locked(folder, f"{shard}.lock"))  # and kept: nobody comes between clearing and writing
            inputs = _agree_on_inputs(out, asked, find, shard, resume, depth)
        path = folder / f"{shard}.jsonl"
        if not resume:
            path.unlink(missing_ok=True)
        kept = Journal(path, len(range(shard.number - 1, len(inputs), shard.count)))
        try:
            yield inputs, kept
        finally:
            kept.close()


def whole(out: Path, count: int) -> bool:
    """Whether all shards have come to their end."""
    return all(_ended(out / "progress" / f"{Shard(n, count)}.jsonl") for n in range(1, count + 1))


def entries(out: Path, count: int) -> Iterator[dict[str, Any]]:
    """The answers of all shards in the order of the images, one at a time; up to the first that is missing."""
    with ExitStack() as stack:
        paths = [out / "progress" / f"{Shard(n, count)}.jsonl" for n in range(1, count + 1)]
        shards = [_latest(stack.enter_context(open(path, "rb"))) for path in paths]
        while True:
            for shard in shards:
                if (entry := next(shard, None)) is None:
                    return
                yield entry


def _latest(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The answers of one shard in the order of its images; of one that was tried again, the last."""
    again, at = {}, 0  # of each of those, where its last line lies
    for line in file:
        if line.startswith(b'{"again": ') and (entry := _parse(line)):
            again[entry["again"]] = (len(line), at)
        at += len(line)
    file.seek(0)
    i = 0
    for line in file:
        entry = _parse(line)
        if entry is None or "end" in entry:
            return
        if "again" in entry:
            continue
        if i in again:
            entry = json.loads(os.pread(file.fileno(), *again[i]))
            del entry["again"]
        yield entry
        i += 1


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, allow_nan=False).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    """None for a line that was not written to its end."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    good = isinstance(entry, dict) and ("end" in entry or {"path", "reason"} <= entry.keys() or "score" in entry)
    good = good and type(entry.get("again", 0)) is int
    return entry if good else None


def _ended(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 100))
            return b'{"end": ' in file.read().splitlines()[-1][:8]
    except (OSError, IndexError):
        return False
