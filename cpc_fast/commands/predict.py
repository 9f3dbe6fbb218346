"""`cpc-fast predict`: score and segment images whose truth nobody knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import complain, say
from .options import Device, check_device, choose_device


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder that fit wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, predictions.json, overlays and masks.")],
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps too, as float32 TIFF.")] = False,
    device: Device = "auto",
) -> int:
    """Score and segment images whose truth nobody knows."""
    check_device(device)
    from ..inputs import plan
    from ..runs import need_detector

    need_detector(run)
    plan(images, out, tiff=tiff)
    torch_device = choose_device(device)
    from .. import answers
    from ..detector import Detector
    from ..progress import counting

    detector = Detector.load(run, torch_device)
    with counting("predict") as on_image:
        found = answers.predict(
            detector, images, out, tiff=tiff, on_image=on_image, on_skip=lambda why: complain(f"Skipped: {why}")
        )
    if found.skipped:
        complain(f"{len(found.skipped)} of {len(found.skipped) + len(found.images)} images were skipped; see above.")
    if found.images:
        say(f"{found.flagged} of {len(found.images)} images have a score above {detector.threshold.value:.4g}.")
        say(f"Open next: {out / 'scores.csv'} and {out / 'overlays'}")
    return 1 if found.skipped else 0
