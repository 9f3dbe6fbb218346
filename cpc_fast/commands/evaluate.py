"""`cpc-fast evaluate`: compare with the truth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import number, print_table, say, share
from .options import Device, check_device, choose_device

if TYPE_CHECKING:
    from ..detector import Detector
    from ..evaluate import Evaluation
    from ..report import Section


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder that fit wrote.")],
    data: Annotated[Path, typer.Argument(help="Folder with test and, for pixel metrics, ground_truth inside.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json and report.html; the run folder by default.")
    ] = None,
    device: Device = "auto",
) -> int:
    """Compare with the truth: metrics.json, a table, report.html."""
    out = out or run
    check_device(device)
    from ..layouts import find_test
    from ..runs import need_detector

    need_detector(run)
    find_test(data)
    torch_device = choose_device(device)
    from ..detector import Detector
    from ..evaluate import write_metrics
    from ..report import write_report

    detector = Detector.load(run, torch_device)
    evaluation = evaluate_run("evaluate", detector, data)
    write_metrics(out / "metrics.json", evaluation.metrics)
    write_report(out / "report.html", [make_section(data.resolve().name, detector, evaluation)])
    _print_metrics(evaluation.metrics)
    if detector.threshold.note:
        say(detector.threshold.note)
    say(f"Open next: {out / 'report.html'}; the numbers are in {out / 'metrics.json'}")
    return 0


def evaluate_run(name: str, detector: Detector, data: Path) -> Evaluation:
    """Evaluate with a line of progress that begins with `name`."""
    from ..evaluate import evaluate
    from ..progress import counting

    with counting(f"{name}: scoring") as on_image:
        return evaluate(detector, data, on_image=on_image)


def make_section(title: str, detector: Detector, evaluation: Evaluation) -> Section:
    from ..report import Section

    threshold = detector.threshold.value
    return Section(title, evaluation.metrics, evaluation.scored, threshold, threshold, detector.trained_on)


def _print_metrics(metrics: dict[str, Any]) -> None:
    """One test set: a row for each defect, and one for all."""
    from ..report import printable

    rows = [
        (printable(name), one["count"], *(number(one[key]) for key in ("image_auroc", "pixel_auroc", "au_pro_0.30")))
        for name, one in metrics["by_defect"].items()
    ]
    image, pixel = metrics["image"], metrics["pixel"]
    count = sum(one["count"] for one in metrics["by_defect"].values())
    rows.append(("all", count, number(image["auroc"]), number(pixel["auroc"]), number(pixel["au_pro_0.30"])))
    print_table("", ("defect", "images", "image AUROC", "pixel AUROC", "AU-PRO 0.30"), rows)
    threshold, speed = metrics["threshold"], metrics["speed"]
    say(
        f"At the threshold {threshold['value']:.4g} (for at most {threshold['target_fpr']:.1%} of normal images): "
        f"{share(threshold['fpr_on_test_normals'])} of the normal test images are flagged, "
        f"{share(threshold['recall'])} of the defective ones."
    )
    say(
        f"Scoring takes {speed['score_ms_per_image_p50']:.1f} ms an image "
        f"(95% within {speed['score_ms_per_image_p95']:.1f} ms) on {metrics['device']}."
    )
