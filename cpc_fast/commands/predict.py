"""`cpc-fast predict`: score and segment images whose truth nobody knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import complain, note_colour, say
from .options import Device, check_device, choose_device


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that fit wrote.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Images, and folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, predictions.json, overlays and masks.")],
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps too, as float32 TIFF.")] = False,
    min_area: Annotated[
        int, typer.Option(min=1, help="Leave out regions of fewer pixels; 1 keeps all, as the threshold assumes.")
    ] = 1,
    device: Device = "auto",
) -> int:
    """Score and segment images whose truth nobody knows."""
    check_device(device)
    from ..inputs import plan
    from ..runs import need_detector, refuse_swapped

    refuse_swapped(run, images, "predict RUN IMAGES --out DIR")
    need_detector(run)
    plan(images, out, tiff=tiff)
    torch_device = choose_device(device)
    from .. import answers
    from ..detector import Detector
    from ..progress import counting

    detector = Detector.load(run, torch_device)
    with counting("predict") as on_image:
        found = answers.predict(
            detector, images, out, tiff=tiff, min_area=min_area, on_image=on_image,
            on_skip=lambda why: complain(f"Skipped: {why}"),
        )  # fmt: skip
    if found.skipped:
        complain(f"{len(found.skipped)} of {len(found.skipped) + len(found.images)} images were skipped; see above.")
    if found.images:
        above = f"a score above {detector.threshold.value:.4g}"
        above += "" if min_area == 1 else f" on at least {min_area} adjoining pixels"
        say(f"{found.flagged} of {len(found.images)} images are flagged: they have {above}.")
        note_colour(found.in_colour, len(found.images), detector.config.channels)
        say(f"Open next: {out / 'scores.csv'} and {out / 'overlays'}")
    return 1 if found.skipped else 0
