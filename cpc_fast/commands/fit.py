"""`cpc-fast fit`: learn what is normal."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import CpcFastError, ImageError, Interrupted, NotWritten, Stopped, UsageError
from ..torchrun import launched, may_restart, together
from .console import say, terminable
from .options import Device, Settings, again_as, by_preset, check_device, choose_config, choose_device

if TYPE_CHECKING:
    import torch

    from ..config import Config
    from ..detector import Detector
    from ..train import Progress

LOOKED_AT = 16  # of the images, to say whether they are in colour
LEARNT = 0.05  # how far below that of guessing the loss of the last epoch must be, or nothing was learnt


def fit(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Folder with train/good inside, or a flat folder of normal images.")
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="cpu-demo (one network), quality (parts), texture (even surfaces), aligned (parts that lie alike "
            "in every image), fast (quality at least cost) or paper (unverified); cpu-demo unless told, or what "
            "--resume finds."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the training images [{by_preset('epochs')}].")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help=f"Of everything random [{by_preset('seed')}].")] = None,
    image_size: Annotated[
        int | None, typer.Option(help=f"Scale images so that their shorter side is this [{by_preset('image_size')}].")
    ] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what is saved in the run folder.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write scalars to RUN/tensorboard.")] = False,
    across_ranks: Annotated[
        str | None, typer.Option(help="Started by torchrun: whose patches are negatives: auto, local, gathered, ring.")
    ] = None,
) -> int:
    """Learn what is normal, and from where on a score is anomalous."""
    check_device(device)
    options = {"epochs": epochs, "seed": seed, "image_size": image_size, "across_ranks": across_ranks}
    if preset or not resume:  # what is wrong with these is said before an old run is in the way
        choose_config(preset, options, settings)
    from ..images import UNREAD, quoted
    from ..inputs import walk
    from ..layouts import find_test, find_train
    from ..runs import CHECKPOINT, need_checkpoint, refuse_run

    images = find_train(data)
    if not resume and os.path.realpath(out) in map(os.path.realpath, (data, images[0].parent)):
        raise UsageError(
            f"--out is {quoted(out)}, the folder of the images; choose another, such as "
            f"{Path('runs') / data.resolve().name}."
        )
    if may_restart() and not (out / CHECKPOINT).exists():  # the command that goes on is the one that begins
        resume = False
    need_checkpoint(out) if resume else refuse_run(out)
    config = choose_config(preset, options, settings, resume=out if resume else None)
    finished = resume and _finished(out, fitted_to_files(config, images), data, images)
    if not (finished or launched()[0]):
        folder = images[0].parent
        if left := sum(path.parent != folder for path in walk(folder, strict=False)):
            say(f"Subfolders of {quoted(folder)} hold {left} images that are not read; to learn from them, move them.")
        unread = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in UNREAD]
        if unread:
            kinds = " ".join(sorted({path.suffix.lower() for path in unread}))
            say(f"{quoted(folder)} holds {len(unread)} files ({kinds}) that are not read; convert them to PNG.")
        for doubt in doubts(config, images):
            say(f"Of {doubt}")
    torch_device = choose_device(device)
    go_on = again_as("fit", data, out=out, resume=True, tensorboard=tensorboard, device=device)
    try:
        with together(torch_device) as own_device:
            detector = None
            if finished:
                from ..detector import Detector

                try:
                    detector = Detector.load(out, own_device)
                except CpcFastError as damage:  # the checkpoint is whole, or it would not be finished
                    finished = False
                    if not launched()[0]:
                        say(str(damage))
            if detector is None:
                detector = fit_run("fit", data, out, config, own_device, resume, tensorboard)
    except Stopped as why:
        if launched()[0]:
            return 0
        raise Stopped(f"{why} All of it is saved in {out}. Go on with: {go_on}") from None
    except NotWritten as error:
        if not (out / CHECKPOINT).is_file():
            raise
        raise NotWritten(f"{error} Go on with: {go_on}") from None
    except KeyboardInterrupt:
        from ..checkpoint import checkpoint_config

        try:
            done = checkpoint_config(out)[1].epoch
        except CpcFastError:
            raise Interrupted(
                "Stopped before the end of the first epoch, so nothing is saved. Begin again when you like."
            ) from None
        saved = (
            f"{done} of {config.epochs} epochs are saved" if done < config.epochs else "only the threshold is missing"
        )
        raise Interrupted(f"Stopped; {saved} in {out}. Go on with: {go_on}") from None
    if launched()[0]:  # the first process speaks for all
        return 0
    from ..report import printable

    on = f"on {detector.trained_on['normal images']} normal images."
    say(f"{out} was finished already: {config.epochs} epochs {on}" if finished else f"Fitted {on}")
    if copies := detector.trained_on.get("copies"):
        say(f"{copies} images are copies of others; each counts once for the threshold.")
    say(f"Patches of {detector.trained_on['patches']}.")
    say(f"Scores above {detector.threshold.value:.4g} are anomalous.")
    if detector.threshold.note:
        say(detector.threshold.note)
        if highest := detector.trained_on.get("highest held out"):  # earlier runs do not say
            say(f"Look at what sets it: {printable(highest)}.")
    if tensorboard:
        say(f"Curves: {shlex.join(['tensorboard', '--logdir', str(out / 'tensorboard')])}")
    commands = [["predict", str(out), "IMAGES", "--out", "answers"]]
    with contextlib.suppress(UsageError):  # a flat folder has nothing to be compared with
        find_test(data)
        commands.insert(0, ["evaluate", str(out), str(data)])
    for lead, command in zip(("Next:", "  or:"), commands, strict=False):
        say(f"{lead} {shlex.join(['cpc-fast', *command])}")
    return 0


def doubts(config: Config, paths: Sequence[Path]) -> list[str]:
    """What some of the images say against the config."""
    from ..images import highest_value, quoted, read_image
    from ..inputs import has_colour

    some, said = paths[:: -(-len(paths) // LOOKED_AT)], []
    try:
        images = (read_image(path, depth=config.depth) for path in some)
        seen = [(has_colour(pixels), pixels.shape[:2]) for pixels in images]
        tops = [] if config.depth else [(top, path) for path in some if (top := highest_value(path)) is not None]
    except ImageError:  # the fit names all that are no use
        return []
    coloured, shapes = sum(colour for colour, _ in seen), sorted({shape for _, shape in seen})
    looked_at = f"{len(some)} images{' looked at' if len(some) < len(paths) else ''}, "
    if config.channels == 1 and coloured:
        said.append(
            f"{looked_at}{coloured} are in colour; this fit sees grey values only. --set channels=3 sees colour."
        )
    if low := [(top, path) for top, path in tops if top < 1 << 14]:
        top, path = max(low)
        begin, levels = f"{looked_at}{len(tops)} are of 16 bits, ", f"{(top >> 8) + 1} grey levels are left of them. "
        if len(low) == len(tops):
            said.append(
                f"{begin}with values up to {top} of 65535: {levels}If that is all their camera gives: "
                f"--set depth={max(8, top.bit_length())}."
            )
        else:
            said.append(
                f"{begin}{len(low)} of these with values up to {top} of 65535 only, such as {quoted(path)}: {levels}If "
                "that is all their camera gives, bring all images to the same depth before the fit."
            )
    if config.place and _differ(shapes, config.image_size is not None):
        sizes = " to ".join(f"{h} x {w}" for h, w in (shapes[0], shapes[-1]))
        said.append(
            f"{looked_at}sizes go from {sizes} pixels. A place is a share of height and width; where that is not the "
            "same part in every image: --set place=false."
        )
    return said


def _differ(shapes: Sequence[tuple[int, ...]], scaled: bool) -> bool:
    """Whether sizes (h, w) or, of images that are scaled alike, proportions are more than a few pixels apart."""
    sides, tallness = [min(shape) for shape in shapes], [h / w for h, w in shapes]
    return max(tallness) > 1.1 * min(tallness) or (not scaled and max(sides) > 1.1 * min(sides))


def fitted_to_files(config: Config, paths: Sequence[Path]) -> Config:
    """The config for these images; see Config.fitted_to."""
    from ..images import quoted, shorter_sides

    if config.made_for is None:  # lengths are final, whatever the images
        return config
    return config.fitted_to(shorter_sides(paths, config.image_size), [quoted(path) for path in paths])


def _finished(run: Path, config: Config, data: Path, paths: Sequence[Path]) -> bool:
    """Whether there is nothing left to do for a fit with this config; one that was of other images is refused.

    paths: the images of `data`.
    """
    from ..checkpoint import checkpoint_config
    from ..images import quoted
    from ..runs import CHECKPOINT, DETECTOR

    if not (run / DETECTOR).is_file():
        return False
    begun, position = checkpoint_config(run)
    if begun != config or position.epoch != config.epochs:
        return False
    if others := _other_images(run / CHECKPOINT, data, paths):
        raise UsageError(f"{quoted(run)} was fitted on {others}; name its own again, or choose another run folder.")
    return True


def _other_images(file: Path, data: Path, paths: Sequence[Path]) -> str:
    """See other_images; `file` is a detector or a checkpoint, `paths` are the images of `data`."""
    from ..runs import origin, other_images
    from ..saving import read_record

    return other_images(read_record(file, "run"), origin(os.path.abspath(data), paths))


def learnt_nothing(epoch: Sequence[Progress]) -> str:
    """A sentence where the steps of the last epoch guessed, else an empty string.

    Their loss decides. Accuracy cannot: it is at chance level where a model has learnt to tell shifted copies only, as
    on the demo's grass.
    """
    losses = [step.loss for step in epoch if math.isfinite(step.loss)]
    mean, guessing = sum(losses) / max(1, len(losses)), epoch[0].guessing if epoch else 0.0
    if not losses or mean < guessing - LEARNT:
        return ""
    return (
        f"nothing was learnt: the loss of the last epoch, {mean:.2f}, is no better than that of guessing among "
        f"{math.exp(guessing):.0f} patches, {guessing:.2f}. Try another learning_rate (--set) or more --epochs, and "
        "look at the images."
    )


def fit_run(
    name: str, data: Path, run: Path, config: Config, device: torch.device, resume: bool, tensorboard: bool = False
) -> Detector:
    """Fit with a line of progress that begins with `name`, and say so where nothing was learnt."""
    from ..detector import Detector
    from ..progress import training

    writer = None
    epoch: list[Progress] = []  # the steps of the last one
    if tensorboard:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise CpcFastError("--tensorboard needs a package: pip install 'cpc_fast[tensorboard]'.") from None
    try:
        first = launched()[0] == 0
        with terminable() as stop, training(name) if first else nullcontext() as show:

            def on_step(step: Progress) -> None:
                nonlocal writer
                if show is None:
                    return
                show(step)
                if step.step == 1:
                    epoch.clear()
                epoch.append(step)
                if tensorboard:
                    writer = writer or SummaryWriter(str(run / "tensorboard"))
                    at = (step.epoch - 1) * step.steps + step.step
                    writer.add_scalar("loss", step.loss, at)
                    writer.add_scalar("accuracy", step.accuracy, at)
                    writer.add_scalar("images per second", step.images_per_s, at)

            detector = Detector.fit(data, config, out=run, resume=resume, device=device, on_step=on_step, stop=stop)
        if lack := learnt_nothing(epoch):
            say(f"{name}: {lack}")
        return detector
    finally:
        if writer is not None:
            writer.close()


def set_runs_aside(runs: Sequence[Path]) -> None:
    """Have the runs of several sets fitted anew, and what is there kept under other names."""
    from ..runs import set_aside

    if kept := set_aside(runs):
        say(f"Earlier runs are kept: {', '.join(map(str, kept))}")


def fit_or_go_on(name: str, data: Path, run: Path, config: Config, device: torch.device) -> Detector:
    """Fitted, taken up where it was left, or loaded where it was fitted before."""
    from ..checkpoint import checkpoint_config
    from ..detector import Detector
    from ..layouts import find_train
    from ..runs import CHECKPOINT, DETECTOR

    paths = find_train(data)
    config = fitted_to_files(config, paths)
    there = [file for file in (run / DETECTOR, run / CHECKPOINT) if file.exists()]
    if there and (others := _other_images(there[0], data, paths)):
        raise UsageError(f"{run} is of {others}; fit anew with --fresh, or choose another folder.")
    if there and there[0].name == DETECTOR:
        detector = Detector.load(run, device)
        if detector.config == config:
            say(f"{name}: fitted before, so only evaluated (--fresh fits anew)")
            return detector
        raise UsageError(_another("fitted", run, config.unlike(detector.config)))
    resume = bool(there)
    if resume and (begun := checkpoint_config(run)[0]) != config:
        raise UsageError(_another("begun", run, config.unlike(begun)))
    for doubt in doubts(config, paths):
        say(f"{name}: of {doubt}")
    return fit_run(name, data, run, config, device, resume)


def _another(what: str, run: Path, differ: str) -> str:
    return (
        f"{run} was {what} with another config ({differ}); choose the same, fit anew with --fresh, or choose another "
        "folder."
    )
