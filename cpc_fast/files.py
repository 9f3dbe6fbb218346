"""Files written whole or not at all, and folders held by one writing process. No torch here."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CpcFastError, NotWritten
from .images import quoted


def unwritten(error: OSError) -> type[CpcFastError]:
    """What kind of error it is: NotWritten where the disk is full."""
    full = error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return NotWritten if full else CpcFastError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside, bring it to the disk, and rename it into place, so that the old one stays until then.

    Raises NotWritten when the disk is full, CpcFastError when the folder cannot be written; what was there before is
    untouched.
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
    except BaseException as error:
        with suppress(OSError):
            aside.unlink()
        if not isinstance(error, OSError):
            raise
        kind = unwritten(error)
        advice = "Free some space or choose another folder." if kind is NotWritten else "Choose another folder."
        kept = " The file that was there before is untouched." if path.exists() else ""
        raise kind(f"Could not write {quoted(path)}: {error.strerror or error}. {advice}{kept}") from None


def remove_asides(path: Path) -> None:
    """Remove what killed processes left of their attempts to write `path`; only under the lock of its folder."""
    for aside in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    write_whole(path, lambda aside: aside.write_text(text, encoding="utf-8"))


@contextmanager
def locked(folder: Path, name: str = "run.lock", wait: bool = False) -> Iterator[None]:
    """Hold a folder for one writing process; the system lets go of it when the process ends, however it ends.

    With `wait`, wait for another process to let go. Raises CpcFastError where another process holds it (without
    `wait`), or where the folder cannot be written (NotWritten: the disk is full).
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed below, or held)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                file.seek(0)
                holder = ascii(" ".join(file.read(100).split()))[1:-1] or "of unknown number"
                file.close()
                raise CpcFastError(
                    f"{quoted(folder)} is being written by another process ({holder}); wait for its end, stop it, or "
                    "choose another folder."
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                break  # a file system without locks
            if _same(file.fileno(), path):
                break
            file.close()  # its last holder has just removed it
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
    except OSError as error:
        raise unwritten(error)(
            f"Could not write in the folder {quoted(folder)}: {error.strerror}; choose another one."
        ) from None
    try:
        yield
    finally:
        if _same(file.fileno(), path):  # not in a folder that took the place of the one held
            path.unlink(missing_ok=True)
        file.close()


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
