"""`cpc-fast export`: a detector as a program for other runtimes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .console import note_edited, say

CALLS = {  # how to load it, how to call it, and what images of another size end in
    "torch": (
        "program = torch.export.load({!r}).module()",
        "scores, maps = program(images)",
        "Guard failed: images.size()",
    ),
    "onnx": (
        "session = onnxruntime.InferenceSession({!r})",
        'scores, maps = session.run(["scores", "maps"], {"images": images})',
        "Got invalid dimensions",
    ),
}


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that fit wrote.")],
    format: Annotated[
        str | None, typer.Option(help="torch (torch.export) or onnx; as --out ends (.pt2, .onnx), else torch.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; RUN/detector.pt2 or RUN/detector.onnx by default.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="Of the images; that of the training images by default.")
    ] = None,
) -> int:
    """Write the detector as a program for torch or ONNX."""
    from ..runs import need_detector, need_writable

    ends = {".pt2": "torch", ".onnx": "onnx"}.get(out.suffix.lower()) if out else None
    if format is None:
        format = ends or "torch"
    if format not in CALLS:
        raise UsageError(f"--format is {format!r}; it must be torch or onnx.")
    if ends not in (None, format):
        raise UsageError(f"--out {out} ends as a file of {ends}, and --format is {format}; leave one of them out.")
    if out and out.is_dir():
        raise UsageError(f"--out {out} is a folder; name the file to write.")
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", size or "1x1")
    if match is None:
        raise UsageError(f"--size is {size!r}; a height of 128 and a width of 256 pixels are 128x256.")
    need_detector(run)
    need_writable(out.parent if out else run)
    import torch

    from ..detector import Detector
    from ..export import FORMATS, size_for
    from ..export import export as write
    from ..train import in_bfloat16

    out, detector = out or run / FORMATS[format], Detector.load(run)
    note_edited(run)
    height, width = size_for(detector, (int(match[1]), int(match[2])) if size else None)
    say(f"Writing {out}; with several networks, or mirror images, that takes a minute or more.")
    worst = write(detector, out, format, (height, width))
    load, call, refusal = CALLS[format]
    say(f"Wrote {out}; on random images it differs from torch here by {worst:.1e} at most.")
    depth = detector.config.depth
    deep = f", of values of {depth} bits the upper 8: v >> {depth - 8}" if depth else ""
    say(f"images: uint8 (batch, {detector.config.channels}, {height}, {width}){deep}")
    say(f"  {load.format(str(out))}")
    say(f"  {call}  # float32 (batch,), (batch, {height}, {width})")
    say(f"Other channels, heights and widths are refused ({refusal}); for another size: --size HxW.")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rounded = [name for name in devices if in_bfloat16(torch.device(name), detector.config.precision)]
    apart = []
    if rounded:
        apart.append(
            f"predict computes in bfloat16 on {' and '.join(rounded)} here and this file in float32 (a fit with --set "
            "precision=float32 knows no such difference)"
        )
    if detector.config.image_size:
        apart.append(f"predict looks for the maximum at an image's own size, this file at {height} x {width}")
    differ = "scores differ by some percent, and one near the threshold may fall on its other side."
    caveat = f" But {', and '.join(apart)}: {differ}" if apart else ""
    say(f"Scores above {detector.threshold.value:.4g} are anomalous.{caveat}")
    return 0
