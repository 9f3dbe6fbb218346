"""The command line: `cpc-fast demo | fit | evaluate | predict | data | doctor`.

Each command reads its options, calls one function of the package and prints what to do next. torch and all that
computes is imported by the command that needs it, so that `--help` answers at once.

What fails is one sentence on standard error: exit code 2 where the command was asked for in a way that cannot work, 1
where it failed, 130 after Ctrl-C; a traceback with --debug only. Longer than 250 lines because the options are the
manual.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import CpcFastError, UsageError
from .version import __version__

if TYPE_CHECKING:
    import torch

    from .config import Config
    from .detector import Detector
    from .evaluate import Evaluation
    from .report import Section

app = typer.Typer(
    name="cpc-fast",
    help="Learn from normal images, then score and segment anomalies, with contrastive predictive coding.",
    add_completion=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Write a dataset in MVTec layout.", rich_markup_mode=None)
app.add_typer(data_app, name="data")

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any field of the config, e.g. --set crop=96. Repeat as needed."),
]


def say(text: str = "") -> None:
    print(text, flush=True)


def _version(wanted: bool) -> None:
    if wanted:
        say(f"cpc-fast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback when something fails.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


# ---------------------------------------------------------------------------------------------------------- commands


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs and report.")] = Path("runs/demo"),
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the training images; the preset's by default.")
    ] = None,
    device: Device = "auto",
    settings: Settings = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Fit anew where a run is there already.")] = False,
) -> int:
    """Do the whole job on three real photographs with painted defects: fit, evaluate, report."""
    started = time.monotonic()
    config = _choose_config("cpu-demo", {"epochs": epochs}, settings)
    torch_device = _choose_device(device)

    from . import datasets
    from .evaluate import mean_metrics, write_metrics
    from .report import write_report

    say(f"Writing {', '.join(datasets.TEXTURES)} with painted defects to {out / 'data'}")
    datasets.write_textures(out / "data")
    evaluations: dict[str, Evaluation] = {}
    sections: list[Section] = []
    try:
        for texture in datasets.TEXTURES:
            detector = _fit_or_go_on(texture, out / "data" / texture, out / texture, config, torch_device, fresh)
            evaluation = _evaluate(detector, out / "data" / texture, texture)
            write_metrics(out / texture / "metrics.json", evaluation.metrics)
            evaluations[texture] = evaluation
            sections.append(_section(texture, detector, evaluation))
    except KeyboardInterrupt:
        again = shlex.join(["cpc-fast", "demo", "--out", str(out), *_as_options(epochs, device, settings)])
        return _stopped(f"Stopped; every finished epoch is in {out}. Go on with: {again}")
    write_metrics(out / "summary.json", mean_metrics([e.metrics for e in evaluations.values()]))
    write_report(out / "report.html", sections)
    _write_contact_sheet(out / "maps.png", sections)
    _print_summary({name: evaluation.metrics for name, evaluation in evaluations.items()})

    from .progress import duration

    say(f"\nThe whole job took {duration(time.monotonic() - started)}. Open next:")
    say(f"  {out / 'report.html'}    every test image with its map, and a threshold to move")
    say(f"  {out / 'maps.png'}       the first image of each defect at a glance")
    say(f"  {out / 'summary.json'}   the numbers above, all of them")
    say("Your own images: cpc-fast fit FOLDER --out runs/mine")
    return 0


@app.command()
def fit(
    data: Annotated[Path, typer.Argument(help="Folder with train/good inside, or a flat folder of normal images.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    preset: Annotated[
        str | None, typer.Option(help="cpu-demo (default), quality, or paper (unverified).", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Scale images so that their shorter side is this.")] = None,
    settings: Settings = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole epoch in the run folder.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write scalars to RUN/tensorboard.")] = False,
) -> int:
    """Learn what is normal."""
    options = {"epochs": epochs, "seed": seed, "image_size": image_size}
    config = _choose_config(preset, options, settings, resume=out if resume else None)
    torch_device = _choose_device(device)
    again = ["cpc-fast", "fit", str(data), "--out", str(out)]
    more = ["--device", device] if device != "auto" else []
    try:
        detector = _fit("fit", data, out, config, torch_device, resume, tensorboard)
    except KeyboardInterrupt:
        from .saving import checkpoint_config

        try:
            done = checkpoint_config(out)[1]
        except CpcFastError:
            return _stopped(
                "Stopped before the end of the first epoch, so nothing is saved. Begin again when you like."
            )
        command = shlex.join([*again, "--resume", *more])
        return _stopped(f"Stopped; {done} of {config.epochs} epochs are saved in {out}. Go on with: {command}")
    say(f"Fitted on {detector.trained_on['normal images']} normal images.")
    say(f"Scores above {detector.threshold.value:.4g} are anomalous.")
    if detector.threshold.note:
        say(detector.threshold.note)
    say(f"Next: {shlex.join(['cpc-fast', 'evaluate', str(out), str(data)])}")
    say(f"  or: {shlex.join(['cpc-fast', 'predict', str(out), 'IMAGES', '--out', 'answers'])}")
    return 0


@app.command()
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
    torch_device = _choose_device(device)
    from .detector import Detector
    from .evaluate import write_metrics
    from .report import write_report

    detector = Detector.load(run, torch_device)
    evaluation = _evaluate(detector, data, "evaluate")
    write_metrics(out / "metrics.json", evaluation.metrics)
    write_report(out / "report.html", [_section(data.resolve().name, detector, evaluation)])
    _print_metrics(evaluation.metrics)
    if detector.threshold.note:
        say(detector.threshold.note)
    say(f"Open next: {out / 'report.html'}; the numbers are in {out / 'metrics.json'}")
    return 0


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Run folder that fit wrote.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, predictions.json, overlays and masks.")],
    tiff: Annotated[bool, typer.Option("--tiff", help="Write the maps too, as float32 TIFF.")] = False,
    device: Device = "auto",
) -> int:
    """Score and segment images whose truth nobody knows."""
    torch_device = _choose_device(device)
    from . import answers
    from .detector import Detector
    from .progress import counting

    detector = Detector.load(run, torch_device)
    with counting("predict") as on_image:
        found = answers.predict(
            detector, images, out, tiff=tiff, on_image=on_image, on_skip=lambda why: _complain(f"Skipped: {why}")
        )
    if found.skipped:
        _complain(f"{len(found.skipped)} of {len(found.skipped) + len(found.images)} images were skipped; see above.")
    if found.images:
        say(f"{found.flagged} of {len(found.images)} images have a score above {detector.threshold.value:.4g}.")
        say(f"Open next: {out / 'scores.csv'} and {out / 'overlays'}")
    return 1 if found.skipped else 0


@data_app.command()
def textures(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new, empty, or of an earlier call.")],
    seed: Annotated[int, typer.Option(help="Of windows and defects.")] = 0,
) -> int:
    """Brick, grass and gravel (photographs of scikit-image) with five painted defects and their masks."""
    from .datasets import write_textures

    write_textures(out, seed)
    say(f"Wrote {out}. Next: {shlex.join(['cpc-fast', 'fit', str(out / 'brick'), '--out', 'runs/brick'])}")
    return 0


@data_app.command()
def elpv(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new, empty, or of an earlier call.")],
    seed: Annotated[int, typer.Option(help="Of the split into training and test.")] = 0,
) -> int:
    """Solar cells of the ELPV dataset, sound and defective, without masks (needs cpc_fast[elpv])."""
    from .datasets import write_elpv

    write_elpv(out, seed)
    command = ["cpc-fast", "fit", str(out), "--out", "runs/elpv", "--image-size", "128"]
    say(f"Wrote {out}. Next: {shlex.join(command)}")
    return 0


@app.command()
def doctor() -> int:
    """Say what runs here, which implementation each op would use and why, and what would make it faster."""
    from .doctor import examine

    found = examine()
    _print_table("Versions", ("what", "version"), found.versions)
    _print_table("Devices", ("device", "what it is"), found.devices)
    _print_table("What would run", ("op", "device", "implementation", "why"), found.ops)
    _print_table(
        "What is here", ("what", "", "why"), [(n, "yes" if yes else "no", why) for n, yes, why in found.features]
    )
    for advice in found.advice:
        say(f"- {advice}")
    return 0


# ------------------------------------------------------------------------------------------------------------- steps


def _choose_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: there is no such device; cpu, cuda, cuda:1 are examples.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda devices are supported.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here; `cpc-fast doctor` says more."
        )
    return device


def _choose_config(
    preset: str | None, options: dict[str, Any], settings: list[str] | None, resume: Path | None = None
) -> Config:
    """The preset (or the config of the run to resume), with what was asked for on top."""
    from . import config as configs

    base = configs.preset(preset or "cpu-demo")
    if resume is not None and preset is None:
        from .saving import checkpoint_config

        base = checkpoint_config(resume)[0]
    changes = configs.read_settings(settings or [])
    return base.replace(**{**changes, **{name: value for name, value in options.items() if value is not None}})


def _fit(
    name: str, data: Path, run: Path, config: Config, device: torch.device, resume: bool, tensorboard: bool = False
) -> Detector:
    from .detector import Detector
    from .progress import training

    writer = None
    if tensorboard:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise CpcFastError("--tensorboard needs a package: pip install 'cpc_fast[tensorboard]'.") from None
    try:
        with training(name) as show:

            def on_step(step: Any) -> None:
                nonlocal writer
                show(step)
                if tensorboard:
                    writer = writer or SummaryWriter(str(run / "tensorboard"))
                    at = (step.epoch - 1) * step.steps + step.step
                    writer.add_scalar("loss", step.loss, at)
                    writer.add_scalar("accuracy", step.accuracy, at)
                    writer.add_scalar("images per second", step.images_per_s, at)

            return Detector.fit(data, config, out=run, resume=resume, device=device, on_step=on_step)
    finally:
        if writer is not None:
            writer.close()


def _fit_or_go_on(name: str, data: Path, run: Path, config: Config, device: torch.device, fresh: bool) -> Detector:
    """A demo's run: fitted, or taken up where it was left."""
    from .detector import Detector
    from .saving import checkpoint_config

    if fresh:
        for file in ("model.safetensors", "checkpoint.safetensors", "config.json"):
            (run / file).unlink(missing_ok=True)
    elif (run / "model.safetensors").exists():
        detector = Detector.load(run, device)
        if detector.config == config:
            say(f"{name}: fitted before, so only evaluated (--fresh fits anew)")
            return detector
        raise UsageError(f"{run} was fitted with another config; fit anew with --fresh, or choose another --out.")
    resume = (run / "checkpoint.safetensors").exists()
    if resume and checkpoint_config(run)[0] != config:
        raise UsageError(f"{run} was begun with another config; fit anew with --fresh, or choose another --out.")
    return _fit(name, data, run, config, device, resume)


def _evaluate(detector: Detector, data: Path, name: str) -> Evaluation:
    from .evaluate import evaluate
    from .progress import counting

    with counting(f"{name}: scoring") as on_image:
        return evaluate(detector, data, on_image=on_image)


def _section(title: str, detector: Detector, evaluation: Evaluation) -> Section:
    from .report import Section

    threshold = detector.threshold.value
    return Section(title, evaluation.metrics, evaluation.scored, threshold, threshold, detector.trained_on)


def _write_contact_sheet(path: Path, sections: list[Section]) -> None:
    """The first test image of each kind, one band for each texture."""
    import numpy as np
    from PIL import Image

    from .report import contact_sheet
    from .saving import write_whole

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


# ------------------------------------------------------------------------------------------------------------ output


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_table(title: str, columns: tuple[str, ...], rows: list[Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD)
    for i, column in enumerate(columns):
        numbers = i > 0 and all(str(row[i])[:1].isdigit() or row[i] == "-" for row in rows) and column != "version"
        table.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # Text: no markup in names
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)


def _print_metrics(metrics: dict[str, Any]) -> None:
    """One test set: a row for each defect, and one for all."""
    from .report import printable

    rows = [
        (printable(name), one["count"], *(_number(one[key]) for key in ("image_auroc", "pixel_auroc", "au_pro_0.30")))
        for name, one in metrics["by_defect"].items()
    ]
    image, pixel = metrics["image"], metrics["pixel"]
    count = sum(one["count"] for one in metrics["by_defect"].values())
    rows.append(("all", count, _number(image["auroc"]), _number(pixel["auroc"]), _number(pixel["au_pro_0.30"])))
    _print_table("", ("defect", "images", "image AUROC", "pixel AUROC", "AU-PRO 0.30"), rows)
    threshold, speed = metrics["threshold"], metrics["speed"]
    say(
        f"At the threshold {threshold['value']:.4g} (for at most {threshold['target_fpr']:.1%} of normal images): "
        f"{_share(threshold['fpr_on_test_normals'])} of the normal test images are flagged, "
        f"{_share(threshold['recall'])} of the defective ones."
    )
    say(
        f"Scoring takes {speed['score_ms_per_image_p50']:.1f} ms an image "
        f"(95% within {speed['score_ms_per_image_p95']:.1f} ms) on {metrics['device']}."
    )


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _print_summary(metrics: dict[str, dict[str, Any]]) -> None:
    """Several test sets: a row for each, and one for the mean."""
    from .evaluate import mean_metrics

    rows = []
    for name, one in (*metrics.items(), ("mean", mean_metrics(list(metrics.values())))):
        image, pixel, threshold = one["image"], one["pixel"], one["threshold"]
        rows.append((
            name, _number(image["auroc"]), _number(pixel["auroc"]), _number(pixel["au_pro_0.30"]),
            _share(threshold["fpr_on_test_normals"]), _share(threshold["recall"]),
            _number(one["speed"]["score_ms_per_image_p50"], 1),
        ))  # fmt: skip
    columns = ("set", "image AUROC", "pixel AUROC", "AU-PRO 0.30", "false alarms", "recall", "ms an image")
    _print_table("", columns, rows)


def _complain(text: str) -> None:
    """One line on standard error, whatever is in it."""
    sys.stdout.flush()
    print(" ".join(str(text).split()), file=sys.stderr, flush=True)


def _stopped(text: str) -> int:
    _complain(text)
    return 130


def _as_options(epochs: int | None, device: str, settings: list[str] | None) -> list[str]:
    options = [] if epochs is None else ["--epochs", str(epochs)]
    options += [] if device == "auto" else ["--device", device]
    return options + [part for setting in settings or [] for part in ("--set", setting)]


# ------------------------------------------------------------------------------------------------------------- main


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; what it raises becomes one sentence on standard error."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]  # wherever it stands
    arguments = [argument for i, argument in enumerate(arguments) if argument != "--debug" or i >= end]
    try:
        code = app(arguments, prog_name="cpc-fast", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _stopped("Stopped.")
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, CpcFastError):
            _complain(f"Error: {error}")
            return error.exit_code
        if type(error).__name__ == "Abort":  # how some versions of typer report Ctrl-C
            return _stopped("Stopped.")
        if hasattr(error, "format_message"):  # typer's own: an option or argument that does not fit
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "cpc-fast"
            _complain(f"Error: {error.format_message()} Try: {where} --help")  # type: ignore[attr-defined]
            return 2
        detail = " ".join(str(error).split())[:300]
        _complain(f"Error: unexpected {type(error).__name__}{': ' if detail else ''}{detail}. --debug shows where.")
        return 1


def main() -> None:
    """The `cpc-fast` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
