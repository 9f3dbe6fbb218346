"""`cpc-fast predict`: score and segment images whose truth nobody knows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..torchrun import launched, own_gpu
from .console import complain, going_on, light_note, note_colour, note_edited, note_size, say, terminable
from .options import Device, again_as, check_device, choose_device


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder that fit wrote.")],
    images: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGES...", help="Images, and folders of them (without ground_truth and answers)."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for scores.csv, predictions.json, overlays and masks, none of IMAGES; earlier answers there "
            "are replaced."
        ),
    ],
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps too, as float32 TIFF.")] = False,
    min_area: Annotated[
        int, typer.Option(min=1, help="Leave out regions of fewer pixels; 1 keeps all, as the threshold assumes.")
    ] = 1,
    threshold: Annotated[
        float | None,
        typer.Option(help="Flag what scores above this; the detector's own threshold by default.", show_default=False),
    ] = None,
    target_fpr: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="The threshold for this share of false alarms, from the good images that fit held out; that of the "
            "fit by default.",
            show_default=False,
        ),
    ] = None,
    scores_only: Annotated[bool, typer.Option("--scores-only", help="Write no overlays and masks.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Only every N-th image from the I-th on: 1/8 to 8/8. Under torchrun: its rank."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last answer in OUT, and try again what was skipped.")
    ] = False,
    device: Device = "auto",
) -> int:
    """Score and segment images whose truth nobody knows."""
    check_device(device)
    from ..images import quoted
    from ..inputs import INPUTS, Shard, answer_kinds, plan
    from ..runs import need_detector, own_threshold, refuse_swapped

    refuse_swapped(run, images, "predict RUN IMAGES --out DIR")
    rank, world = launched()
    part = Shard.parse(shard) if shard else Shard(rank + 1, world)
    if threshold is not None:
        own_threshold(threshold)
        if target_fpr is not None:
            raise UsageError("--threshold and --target-fpr both say where to cut; leave one.")
    if target_fpr is not None and not 0 < target_fpr < 1:
        raise UsageError(f"--target-fpr is {target_fpr}; it must be above 0 and below 1, such as 0.05.")
    need_detector(run)
    if not (resume and (out / INPUTS).exists()):
        repeats: list[str] = []
        plan(images, out, answer_kinds(tiff, not scores_only), repeats.append)
        if repeats and part.number == 1:
            more = f" and {len(repeats) - 1} more" if len(repeats) > 1 else ""
            say(f"Given more than once, answered once: {quoted(repeats[0])}{more}.")
    torch_device = own_gpu(choose_device(device))
    from .. import answers
    from ..detector import Detector
    from ..journal import answers_in
    from ..progress import counting

    detector = Detector.load(run, torch_device)
    note_edited(run)
    if threshold is not None:
        detector = detector.with_threshold(threshold)
    if target_fpr is not None:
        detector = detector.with_target_fpr(target_fpr)
    earlier = 0 if resume or part.count > 1 else answers_in(out)
    again = again_as(
        "predict", run, *images, out=out, tiff=tiff, scores_only=scores_only,
        min_area=min_area if min_area > 1 else None, threshold=threshold, target_fpr=target_fpr, shard=shard,
        device=device, resume=True,
    )  # fmt: skip
    saved, so_far = f"Their answers are in {out}.", f"what was answered is in {out}."
    with going_on(again, saved, so_far), terminable() as stop, counting("predict") as on_image:
        found = answers.predict(
            detector, images, out, tiff=tiff, min_area=min_area, pictures=not scores_only, shard=part,
            resume=resume, stop=stop, on_image=on_image, on_skip=lambda why: complain(f"Skipped: {why}"),
        )  # fmt: skip
    if earlier:
        say(f"Replaced the answers that an earlier call left in {out} (images: {earlier}).")
    if found.skipped:
        where = out / "predictions.json" if resume and found.listed else "above"
        complain(f"{found.skipped} of {found.skipped + found.images} images were skipped; see {where}.")
    if found.images:
        above = f"a score above {detector.threshold.value:.4g}"
        above += "" if min_area == 1 else f" on at least {min_area} adjoining pixels"
        say(f"{found.flagged} of {found.images} images are flagged: they have {above}.")
        if detector.threshold.note:
            say(detector.threshold.note)
        note_colour(found.in_colour, found.images, detector.config.channels)
        note_size(found.other_size, found.images, detector)
        if light := light_note(found.other_light, found.images, detector, "other_light in scores.csv"):
            say(light)
    if not found.listed:
        say(f"Shard {part.number} of {part.count} is done; the last one to end writes {out / 'scores.csv'}.")
    elif found.images:
        where = "" if scores_only else f" and {out / 'overlays'}"
        say(f"Open next: {out / 'scores.csv'}{where}")
    return 1 if found.skipped else 0
