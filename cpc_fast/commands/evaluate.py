"""`cpc-fast evaluate`: compare with the truth."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .console import light_note, note_colour, note_edited, note_size, number, print_table, say, stopping
from .options import Device, Settings, check_device, choose_device

if TYPE_CHECKING:
    from ..detector import Detector, Threshold
    from ..evaluate import Evaluation
    from ..images import TestImage
    from ..report import Section
    from ..scored import Scored


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Run folder that fit wrote.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            metavar="DATA", help="Folder with test and, for pixel metrics, ground_truth.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json and report.html; the run folder by default.")
    ] = None,
    device: Device = "auto",
    all: Annotated[
        Path | None,
        typer.Option("--all", metavar="ROOT", help="Every category of a dataset, fitted first where no run is."),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="With --all: folder with a run for each category; runs/NAME by default.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="With --all: what is fitted; cpu-demo by default.")] = None,
    settings: Settings = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="With --all: fit anew; earlier runs are kept under other names.")
    ] = False,
    submission: Annotated[
        Path | None, typer.Option(help="With --all: folder for the maps that the server of MVTec AD 2 takes.")
    ] = None,
) -> int:
    """Compare with the truth: metrics.json, a table, report.html. RUN DATA for one set, --all ROOT for a dataset."""
    check_device(device)
    if all is not None:
        from .categories import evaluate_all

        if run is not None or out is not None:
            raise UsageError("evaluate --all ROOT takes no RUN, DATA or --out; --runs names where its runs are.")
        return evaluate_all(
            all, runs or Path("runs") / all.resolve().name, preset=preset, settings=settings, device=device,
            fresh=fresh, submission=submission,
        )  # fmt: skip
    if run is None or data is None:
        raise UsageError("evaluate needs RUN and DATA, or --all ROOT for every category of a dataset.")
    if runs or preset or settings or fresh or submission:
        raise UsageError(
            "evaluate RUN DATA fits nothing: --runs, --preset, --set, --fresh, --submission go with --all."
        )
    out = out or run
    from ..images import find_images, quoted
    from ..inputs import has_colour
    from ..layouts import find_test, passed_over
    from ..runs import need_detector, need_writable, refuse_swapped

    refuse_swapped(run, [data], "evaluate RUN DATA")
    need_detector(run)
    try:
        tests = find_test(data)
    except UsageError:
        if not data.is_dir() or (data / "test").is_dir() or not find_images(data):
            raise
        command = shlex.join(["cpc-fast", "predict", str(run), str(data), "--out", "answers"])
        raise UsageError(
            f"{quoted(data)} is a flat folder of images: nothing says which are good, so there is nothing to compare "
            f"with. To score them: {command}"
        ) from None
    need_writable(out)
    for left in passed_over(data, tests):
        say(left)
    torch_device = choose_device(device)
    from ..detector import Detector
    from ..evaluate import write_metrics
    from ..report import write_report

    detector = Detector.load(run, torch_device)
    note_edited(run)
    evaluation = evaluate_run("evaluate", detector, data, tests=tests)
    other = _data_of(out / "metrics.json")
    write_metrics(out / "metrics.json", evaluation.metrics)
    section = make_section(data.resolve().name, detector, evaluation)
    write_report(out / "report.html", [section])
    _print_metrics(evaluation, detector.threshold)
    if other and os.path.realpath(other) != os.path.realpath(data):
        say(f"Replaced the results of {quoted(other)} in {out}; --out keeps several.")
    colours = sum(has_colour(item.image) for item in evaluation.scored)
    note_colour(colours, len(evaluation.scored), detector.config.channels)
    others = sum(detector.other_size(item.image.shape) for item in evaluation.scored)
    note_size(others, len(evaluation.scored), detector)
    if section.light:
        say(section.light)
    _note_masks(evaluation.scored, detector.threshold.value)
    say(f"Open next: {out / 'report.html'}; the numbers are in {out / 'metrics.json'}")
    return 0


def _data_of(metrics: Path) -> str:
    """What the metrics.json of before is about; "" where there is none, or nobody knows."""
    try:
        return str(json.loads(metrics.read_text(encoding="utf-8"))["data"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ""


def _note_masks(scored: Sequence[Scored], threshold: float) -> None:
    """Whether defects were found where they are, and whether the masks can be meant so."""
    masked = [(item, item.truth) for item in scored if not item.good and item.truth is not None and item.truth.any()]
    flagged = [(item, truth) for item, truth in masked if item.score > threshold]
    if flagged:
        there = sum(bool((item.map[truth] > threshold).any()) for item, truth in flagged)
        say(f"{there} of {len(flagged)} flagged defects are outlined where their mask is.")
    wide = sum(float(truth.mean()) > 0.5 for _, truth in masked)
    if 2 * wide > len(masked):
        say(f"{wide} of {len(masked)} masks call more than half of their image a defect; white must be the defect.")
    if black := black_masks(scored):
        say(black)


def black_masks(scored: Sequence[Scored]) -> str:
    """A sentence where masks of defective images show no defect, else an empty string."""
    from ..report import printable

    known = [item for item in scored if not item.good and item.truth is not None]
    black = [item for item in known if item.truth is not None and not item.truth.any()]
    if not black:
        return ""
    return (
        f"{len(black)} of {len(known)} masks of defective images are black all over (the first: that of "
        f"{printable(f'{black[0].defect}/{black[0].name}')}), so pixel metrics take these images for normal ones; "
        "mend those masks."
    )


def evaluate_run(
    name: str,
    detector: Detector,
    data: Path,
    stop: Callable[[], bool] = lambda: False,
    tests: Sequence[TestImage] | None = None,
) -> Evaluation:
    """Evaluate with a line of progress that begins with `name`; raises Stopped where `stop` said so.

    tests: the images of `data`, where they have been found.
    """
    from ..evaluate import evaluate
    from ..progress import counting

    with counting(f"{name}: scoring") as on_image:
        return evaluate(detector, data, tests=tests, on_image=stopping(on_image, stop, f"{name} was scored"))


def make_section(title: str, detector: Detector, evaluation: Evaluation) -> Section:
    from ..report import Section, printable

    scored, threshold = evaluation.scored, detector.threshold.value
    unlit = [printable(f"{item.defect}/{item.name}") for item in scored if item.other_light]
    light = light_note(len(unlit), len(scored), detector, _some(unlit))
    about = {name: said for name, said in detector.trained_on.items() if name != "digest"}
    if note := detector.threshold.note:
        about["threshold"] = note
    asked = detector.threshold
    vouched = (asked.count, asked.guaranteed_fpr) if asked.guaranteed_fpr > asked.target_fpr else None
    return Section(title, evaluation.metrics, scored, threshold, threshold, about, vouched, light)


def _print_metrics(evaluation: Evaluation, threshold: Threshold) -> None:
    """One test set: a row for each defect, and one for all; the threshold, and what it promises; the speed."""
    from ..report import printable

    metrics = evaluation.metrics
    rows = [
        (printable(name), one["count"], *(number(one[key]) for key in ("image_auroc", "pixel_auroc", "au_pro_0.30")))
        for name, one in metrics["by_defect"].items()
    ]
    image, pixel = metrics["image"], metrics["pixel"]
    count = sum(one["count"] for one in metrics["by_defect"].values())
    rows.append(("all", count, number(image["auroc"]), number(pixel["auroc"]), number(pixel["au_pro_0.30"])))
    print_table("", ("defect", "images", "image AUROC", "pixel AUROC", "AU-PRO 0.30"), rows)
    goods = [item.good for item in evaluation.scored]
    if all(goods):
        say("The test set has no defective images: there are no AUROC and AU-PRO without.")
    elif not any(goods):
        say("The test set has no normal images: there is no image AUROC without.")
    if blind := sorted({item.defect for item in evaluation.scored if item.truth is None and not item.good}):
        those = "these images" if len(blind) == len(metrics["by_defect"]) else ", ".join(map(printable, blind))
        say(f"There are no masks of {those} (a folder ground_truth would hold them): no pixel metrics without.")
    known = sum(item.truth is not None for item in evaluation.scored)
    if 0 < known < len(evaluation.scored):
        say(f"Pixel metrics are of the {known} of {len(evaluation.scored)} images whose truth is known.")
    good = [item.score > threshold.value for item in evaluation.scored if item.good]
    bad = [item.score > threshold.value for item in evaluation.scored if not item.good]
    say(f"Flagged, with a score above {threshold.value:.4g}: {_of(good)} normal images, {_of(bad)} defective ones.")
    meant = f"is meant to flag at most {threshold.target_fpr:.1%} of normal images"
    say(threshold.note or f"That threshold {meant if threshold.count else 'was set by hand'}.")
    speed = metrics["speed"]
    say(
        f"Scoring takes {speed['score_ms_per_image_p50']:.1f} ms an image "
        f"(95% within {speed['score_ms_per_image_p95']:.1f} ms) on {metrics['device']}."
    )


def _some(names: Sequence[str]) -> str:
    """
    >>> _some(["a.png", "b.png"]), _some(list("abcde"))
    ('a.png, b.png', 'a, b, c and 2 more')
    """
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _of(flags: list[bool]) -> str:
    return f"{sum(flags)} of {len(flags)}"
