"""`cpc-fast export`: a detector as a program for other runtimes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .console import say


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that fit wrote.")],
    format: Annotated[str, typer.Option(help="torch (torch.export) or onnx.")] = "torch",
    out: Annotated[
        Path | None, typer.Option(help="File to write; RUN/detector.pt2 or RUN/detector.onnx by default.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Of the images; that of the training images by default.")
    ] = None,
) -> int:
    """Write the detector as a program for torch or ONNX."""
    from ..runs import need_detector

    if format not in ("torch", "onnx"):
        raise UsageError(f"--format is {format!r}; it must be torch or onnx.")
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size or "1x1")
    if match is None:
        raise UsageError(f"--size is {size!r}; a height of 128 and a width of 256 pixels are 128x256.")
    need_detector(run)
    from ..detector import Detector
    from ..export import FORMATS
    from ..export import export as write

    out = out or run / FORMATS[format]
    worst = write(Detector.load(run), out, format, (int(match[1]), int(match[2])) if size else None)
    say(f"Wrote {out}; on random images it differs from torch here by {worst:.1e} at most.")
    return 0
