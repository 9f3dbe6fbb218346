"""`cpc-fast demo`: the whole job on three photographs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import config as configs
from ..errors import Stopped
from .console import going_on_with_sets, number, print_table, say, share, terminable
from .evaluate import evaluate_run, make_section
from .fit import fit_or_go_on, set_runs_aside
from .options import Device, Settings, again_as, check_device, choose_config, choose_device

if TYPE_CHECKING:
    from ..evaluate import Evaluation
    from ..report import Section


def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report.")] = Path("runs/demo"),
    epochs: Annotated[
        int | None,
        typer.Option(help=f"Passes over the training images; {configs.PRESETS['cpu-demo'].epochs} unless told."),
    ] = None,
    device: Device = "auto",
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Fit anew; earlier runs are kept under other names.")] = False,
) -> int:
    """Do the whole job on three photographs with painted defects."""
    started = time.monotonic()
    check_device(device)
    config = choose_config("cpu-demo", {"epochs": epochs}, settings)
    torch_device = choose_device(device)

    from .. import datasets
    from ..evaluate import mean_metrics, write_metrics
    from ..progress import duration
    from ..report import write_report

    say(f"Writing {', '.join(datasets.TEXTURES)} with painted defects to {out / 'data'}")
    evaluations: dict[str, Evaluation] = {}
    sections: list[Section] = []
    again = again_as("demo", out=out, epochs=epochs, device=device, set=settings)
    if fresh:
        set_runs_aside([out / texture for texture in datasets.TEXTURES])
    with going_on_with_sets(out, again):
        datasets.write_textures(out / "data")
        with terminable() as stop:
            for texture in datasets.TEXTURES:
                detector = fit_or_go_on(texture, out / "data" / texture, out / texture, config, torch_device)
                evaluation = evaluate_run(texture, detector, out / "data" / texture, stop)
                write_metrics(out / texture / "metrics.json", evaluation.metrics)
                evaluations[texture] = evaluation
                sections.append(make_section(texture, detector, evaluation))
                if stop():
                    raise Stopped(f"Stopped after {texture}.")
        write_metrics(out / "summary.json", mean_metrics([e.metrics for e in evaluations.values()]))
        write_report(out / "report.html", sections)
        _write_contact_sheet(out / "maps.png", sections)
    _print_summary({name: evaluation.metrics for name, evaluation in evaluations.items()})

    say(f"\nThe whole job took {duration(time.monotonic() - started)}. Open next:")
    say(f"  {out / 'report.html'}    every test image with its map, and a threshold to move")
    say(f"  {out / 'maps.png'}       the first image of each defect at a glance")
    say(f"  {out / 'summary.json'}   the numbers above, all of them")
    say("Your own images: cpc-fast fit FOLDER --out runs/mine")
    return 0


def _write_contact_sheet(path: Path, sections: list[Section]) -> None:
    """The first test image of each kind, one band for each texture."""
    import numpy as np
    from PIL import Image

    from ..files import write_whole
    from ..report import contact_sheet

    bands = []
    for section in sections:
        first = {item.defect: item for item in reversed(section.scored)}
        kinds = sorted(first, key=lambda kind: (kind != "good", kind))
        bands.append(
            contact_sheet([first[kind] for kind in kinds], len(kinds), pixel_threshold=section.pixel_threshold)
        )
    width = max(band.shape[1] for band in bands)
    bands = [np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in bands]
    write_whole(path, lambda aside: Image.fromarray(np.concatenate(bands)).save(aside, "PNG"))


def _print_summary(metrics: dict[str, dict[str, Any]]) -> None:
    """Several test sets: a row for each, and one for the mean."""
    from ..evaluate import mean_metrics

    rows = []
    for name, one in (*metrics.items(), ("mean", mean_metrics(list(metrics.values())))):
        image, pixel, threshold = one["image"], one["pixel"], one["threshold"]
        rows.append((
            name, number(image["auroc"]), number(pixel["auroc"]), number(pixel["au_pro_0.30"]),
            share(threshold["fpr_on_test_normals"]), share(threshold["recall"]),
            number(one["speed"]["score_ms_per_image_p50"], 1),
        ))  # fmt: skip
    columns = ("set", "image AUROC", "pixel AUROC", "AU-PRO 0.30", "false alarms", "recall", "ms an image")
    print_table("", columns, rows)
