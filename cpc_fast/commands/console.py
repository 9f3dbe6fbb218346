"""What commands print: sentences, complaints, tables; and how they are asked to stop."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CpcFastError, Interrupted, NotWritten, Stopped, Unreachable

if TYPE_CHECKING:
    from ..detector import Detector


@contextmanager
def printing() -> Iterator[None]:
    """What standard output refuses, as a sentence."""
    try:
        yield
    except BrokenPipeError:  # the reader has seen enough
        raise
    except OSError as error:
        raise CpcFastError(f"Standard output cannot be written: {error.strerror}.") from None


def say(text: str = "") -> None:
    with printing():
        print(text, flush=True)


def complain(text: str) -> None:
    """One line on standard error, whatever is in it."""
    sys.stdout.flush()
    print(" ".join(str(text).split()), file=sys.stderr, flush=True)


@contextmanager
def terminable() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come, as it does before a job is preempted; inside, it stops nothing by itself."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread only
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def going_on(again: str, saved: str, so_far: str) -> Iterator[None]:
    """Adds the command `again` to what SIGTERM, a full disk, a lost folder and Ctrl-C say, and to the first what is
    `saved`.

    so_far: what Ctrl-C leaves.
    """
    again = f"Go on with: {again}"
    try:
        yield
    except Stopped as why:
        raise Stopped(f"{why} {saved} {again}") from None
    except (NotWritten, Unreachable) as why:
        raise type(why)(f"{why} {again}") from None
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped; {so_far} {again}") from None


def going_on_with_sets(out: Path, again: str) -> AbstractContextManager[None]:
    """going_on, for the runs of several sets in `out`."""
    return going_on(again, f"All of it is saved in {out}.", f"every saved epoch is in {out}.")


def stopping(on_image: Callable[[int, int], None], stop: Callable[[], bool], what: str) -> Callable[[int, int], None]:
    """on_image, which raises Stopped, saying what was going on, once `stop` says so."""

    def watched(done: int, total: int) -> None:
        on_image(done, total)
        if stop():
            raise Stopped(f"Stopped while {what}, after {done} of {total} images.")

    return watched


def note_edited(run: Path) -> None:
    """A sentence where somebody changed config.json, and hoped that it counts."""
    from ..saving import edited

    if said := edited(run):
        say(said)


def note_colour(in_colour: int, count: int, channels: int) -> None:
    """A sentence where images and model differ in colour."""
    if channels == 1 and in_colour:
        say(f"{in_colour} of {count} images are in colour; the model sees their grey values only.")
        say("For one that sees colour: cpc-fast fit ... --set channels=3")
    if channels == 3 and in_colour < count:
        say(f"{count - in_colour} of {count} images have no colour; the model learned in colour and may misjudge them.")


def note_size(others: int, count: int, detector: Detector) -> None:
    """A sentence where images are much smaller or larger than those of the fit."""
    if others and detector.sides:
        low, high = detector.sides
        size = f"{low} pixels" if low == high else f"{low} to {high} pixels"
        say(
            f"{others} of {count} images are of another size than those of the fit ({size} on the shorter side). "
            f"Patches stay {detector.config.patch_size} pixels: parts shown at another scale are misjudged."
        )
        say("To have all images scaled alike: cpc-fast fit ... --image-size N")


def light_note(others: int, count: int, detector: Detector, where: str) -> str:
    """A sentence where images are lit as none of the fit, else an empty string; where: what tells which."""
    if not (others and detector.light):
        return ""
    least, most, flattest, hardest = detector.light
    return (
        f"{others} of {count} images are much darker, brighter, or of less or more contrast than those of the fit "
        f"(mean grey {least:.0f} to {most:.0f}, contrast {flattest:.0f} to {hardest:.0f}): their scores say little. A "
        f"frame without light or without a part can pass as good; check these apart ({where})."
    )


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def print_table(title: str, columns: tuple[str, ...], rows: list[Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        numbers = (
            i > 0
            and all(str(row[i]).lstrip("-")[:1].isdigit() or row[i] == "-" for row in rows)
            and column != "version"
        )
        least = max(len(str(row[i])) for row in rows) if numbers else None  # a figure that is cut is another one
        table.add_column(column, justify="right" if numbers else "left", overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: no markup in names
    with printing():
        Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table, crop=False)
