"""`cpc-fast evaluate --all`: every category of a dataset, and the table of them as papers print it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .console import complain, going_on_with_sets, print_table, say, stopping, terminable
from .evaluate import black_masks, evaluate_run, make_section
from .fit import fit_or_go_on, set_runs_aside
from .options import again_as, choose_config, choose_device

COLUMNS = {
    "image AUROC": ("image", "auroc"), "AP": ("image", "ap"), "F1-max": ("image", "f1_max"),
    "pixel AUROC": ("pixel", "auroc"), "pixel AP": ("pixel", "ap"),
    "AU-PRO 0.30": ("pixel", "au_pro_0.30"), "AU-PRO 0.05": ("pixel", "au_pro_0.05"),
}  # fmt: skip
TEXTURES = {"carpet", "grid", "leather", "tile", "wood"}  # MVTec AD is reported as textures, objects and all


def evaluate_all(
    root: Path, runs: Path, *, preset: str | None, settings: list[str] | None, device: str, fresh: bool,
    submission: Path | None,
) -> int:  # fmt: skip
    """A run for each category, fitted where none is; its metrics and report in it; the table in `runs`.

    A category with images that are no use is left out, and with it the table.
    """
    from ..errors import CpcFastError, ImageError, Stopped, UsageError
    from ..images import quoted
    from ..layouts import find_categories, find_private, find_test, find_train, left_out, passed_over
    from ..runs import need_writable

    config = choose_config(preset, {}, settings)
    categories = find_categories(root)
    if others := left_out(root):
        say(others)
    for category in categories:  # a folder that is amiss is found before hours are spent on the others
        find_train(category)
        for left in passed_over(category, find_test(category)):
            say(f"{category.name}: {left}")
        if submission and not find_private(category):
            raise UsageError(
                f"{quoted(category)} has no test_private: only MVTec AD 2 takes --submission; leave it out."
            )
    if taken := [c for c in categories if os.path.realpath(runs / c.name) == os.path.realpath(c)]:
        raise UsageError(
            f"--runs is {quoted(runs)}, the folder of the images (of {taken[0].name} and others); choose another, such "
            f"as {Path('runs') / root.resolve().name}."
        )
    for folder in (runs, submission):
        if folder:
            need_writable(folder)
    torch_device = choose_device(device)
    from ..evaluate import mean_metrics, write_metrics
    from ..files import write_text
    from ..progress import counting
    from ..report import write_report
    from ..submission import write_submission

    again = again_as(
        "evaluate", "--all", root, runs=runs, preset=preset, set=settings, device=device, submission=submission
    )
    metrics: dict[str, dict[str, Any]] = {}
    notes, amiss = [], []
    if fresh:
        set_runs_aside([runs / category.name for category in categories])
    with going_on_with_sets(runs, again), terminable() as stop:
        for category in categories:
            name, run = category.name, runs / category.name
            try:
                detector = fit_or_go_on(name, category, run, config, torch_device)
                evaluation = evaluate_run(name, detector, category, stop)
                write_metrics(run / "metrics.json", evaluation.metrics)
                write_report(run / "report.html", [make_section(name, detector, evaluation)])
                if submission:
                    with counting(f"{name}: private images") as show:
                        on_image = stopping(show, stop, f"the private images of {name} were scored")
                        write_submission(detector, category, submission, on_image=on_image)
            except ImageError as why:
                complain(f"{name}: {why}")
                amiss.append(name)
                continue
            metrics[name] = evaluation.metrics
            notes += [f"{name}: {said}" for said in (detector.threshold.note, black_masks(evaluation.scored)) if said]
            if stop():
                raise Stopped(f"Stopped after {name}.")
        if amiss:
            raise CpcFastError(
                f"{len(amiss)} of {len(categories)} categories are not done ({', '.join(amiss)}), so no new table "
                f"is written. Mend or remove the images named above, then: {again}"
            )
        rows = summary(metrics)
        write_metrics(runs / "summary.json", mean_metrics(list(metrics.values())))
        some = of_some(metrics)
        write_text(runs / "table.md", markdown(rows) + (f"\n{some}\n" if some else ""))
    print_table("Percent", ("category", *COLUMNS), rows)
    if some:
        say(some)
    for note in notes:
        say(note)
    say(f"Open next: {runs / 'table.md'}; each category has its metrics.json and report.html beside it.")
    if submission:
        say(f"For the server: {submission}, to be checked and packed by its own script.")
    return 0


def summary(metrics: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each category and for the means, in percent with one digit; "-" where a set has no such figure, and "*"
    after a mean that lacks one.

    >>> one = {"image": {"auroc": 0.5, "ap": 1, "f1_max": None}, "pixel": dict.fromkeys(
    ...     ("auroc", "ap", "au_pro_0.30", "au_pro_0.05"))}
    >>> summary({"can": one})[-1][:4]
    ('mean', '50.0', '100.0', '-')
    """
    groups = {name: [name] for name in metrics}
    textures = [name for name in metrics if name in TEXTURES]
    if len(textures) == len(TEXTURES) and len(metrics) > len(textures):
        groups["mean of textures"] = textures
        groups["mean of objects"] = [name for name in metrics if name not in TEXTURES]
    groups["mean"] = list(metrics)
    rows = []
    for title, names in groups.items():
        cells = []
        for part, key in COLUMNS.values():
            known = [metrics[name][part][key] for name in names if metrics[name][part][key] is not None]
            star = "*" if len(known) < len(names) else ""
            cells.append(f"{100 * sum(known) / len(known):.1f}{star}" if known else "-")
        rows.append((title, *cells))
    return rows


def of_some(metrics: dict[str, dict[str, Any]]) -> str:
    """A sentence about the means that are not over all categories, else an empty string."""
    counts = {
        title: sum(one[part][key] is not None for one in metrics.values()) for title, (part, key) in COLUMNS.items()
    }
    fewer: dict[int, list[str]] = {}
    for title, count in counts.items():
        if 0 < count < len(metrics):
            fewer.setdefault(count, []).append(title)
    said = "; ".join(f"{', '.join(titles)} of {count} of {len(metrics)}" for count, titles in fewer.items())
    return f"* Not over all categories, as the others have no such figure: {said}." if said else ""


def markdown(rows: list[tuple[str, ...]]) -> str:
    head = ("category, %", *COLUMNS)
    lines = [head, ("---", *["--:"] * len(COLUMNS)), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '_') for cell in line)} |\n" for line in lines)
