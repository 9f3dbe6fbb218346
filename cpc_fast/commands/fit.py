"""`cpc-fast fit`: learn what is normal."""

from __future__ import annotations

import contextlib
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CpcFastError, Stopped, UsageError
from ..torchrun import launched, may_restart, together
from .console import say, stopped, terminable
from .options import Device, Settings, by_preset, check_device, choose_config, choose_device

if TYPE_CHECKING:
    import torch

    from ..config import Config
    from ..detector import Detector

LOOKED_AT = 16  # of the images, to say whether they are in colour


def fit(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Folder with train/good inside, or a flat folder of normal images."),
    ],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="cpu-demo, quality, texture, fast or paper (unverified); cpu-demo unless told, or what --resume finds."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help=f"Passes over the training images [{by_preset('epochs')}].")
    ] = None,
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help=f"Of everything random [{by_preset('seed')}].")] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help=f"Scale images so that their shorter side is this [{by_preset('image_size')}]."),
    ] = None,
    settings: Settings = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what is saved in the run folder.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write scalars to RUN/tensorboard.")] = False,
    across_ranks: Annotated[
        str | None, typer.Option(help="Started by torchrun: whose patches are negatives: auto, local, gathered, ring.")
    ] = None,
) -> int:
    """Learn what is normal."""
    check_device(device)
    from ..images import read_image
    from ..inputs import has_colour
    from ..layouts import find_test, find_train
    from ..runs import CHECKPOINT, need_checkpoint, refuse_run

    images = find_train(data)
    if may_restart() and not (out / CHECKPOINT).exists():  # the command that goes on is the one that begins
        resume = False
    need_checkpoint(out) if resume else refuse_run(out)
    options = {"epochs": epochs, "seed": seed, "image_size": image_size, "across_ranks": across_ranks}
    config = choose_config(preset, options, settings, resume=out if resume else None)
    some = images[:: -(-len(images) // LOOKED_AT)]
    coloured = sum(has_colour(read_image(image)) for image in some)
    if config.channels == 1 and coloured and not launched()[0]:
        looked_at = f"Of {len(some)} images looked at, " if len(some) < len(images) else f"Of {len(some)} images, "
        say(f"{looked_at}{coloured} are in colour; this fit sees grey values only. --set channels=3 sees colour.")
    torch_device = choose_device(device)
    again = ["cpc-fast", "fit", str(data), "--out", str(out)]
    more = ["--device", device] if device != "auto" else []
    try:
        with together(torch_device) as own_device:
            detector = fit_run("fit", data, out, config, own_device, resume, tensorboard)
    except Stopped as why:
        if launched()[0]:
            return 0
        raise Stopped(
            f"{why} All of it is saved in {out}. Go on with: {shlex.join([*again, '--resume', *more])}"
        ) from None
    except KeyboardInterrupt:
        from ..checkpoint import checkpoint_config

        try:
            done = checkpoint_config(out)[1].epoch
        except CpcFastError:
            return stopped("Stopped before the end of the first epoch, so nothing is saved. Begin again when you like.")
        command = shlex.join([*again, "--resume", *more])
        return stopped(f"Stopped; {done} of {config.epochs} epochs are saved in {out}. Go on with: {command}")
    if launched()[0]:  # the first process speaks for all
        return 0
    say(f"Fitted on {detector.trained_on['normal images']} normal images.")
    say(f"Patches of {detector.trained_on['patches']}.")
    say(f"Scores above {detector.threshold.value:.4g} are anomalous.")
    if detector.threshold.note:
        say(detector.threshold.note)
    if tensorboard:
        say(f"Curves: {shlex.join(['tensorboard', '--logdir', str(out / 'tensorboard')])}")
    commands = [["predict", str(out), "IMAGES", "--out", "answers"]]
    with contextlib.suppress(UsageError):  # a flat folder has nothing to be compared with
        find_test(data)
        commands.insert(0, ["evaluate", str(out), str(data)])
    for lead, command in zip(("Next:", "  or:"), commands, strict=False):
        say(f"{lead} {shlex.join(['cpc-fast', *command])}")
    return 0


def fit_run(
    name: str, data: Path, run: Path, config: Config, device: torch.device, resume: bool, tensorboard: bool = False
) -> Detector:
    """Fit with a line of progress that begins with `name`."""
    from ..detector import Detector
    from ..progress import training

    writer = None
    if tensorboard:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            raise CpcFastError("--tensorboard needs a package: pip install 'cpc_fast[tensorboard]'.") from None
    try:
        first = launched()[0] == 0
        with terminable() as stop, training(name) if first else nullcontext() as show:

            def on_step(step: Any) -> None:
                nonlocal writer
                if show is None:
                    return
                show(step)
                if tensorboard:
                    writer = writer or SummaryWriter(str(run / "tensorboard"))
                    at = (step.epoch - 1) * step.steps + step.step
                    writer.add_scalar("loss", step.loss, at)
                    writer.add_scalar("accuracy", step.accuracy, at)
                    writer.add_scalar("images per second", step.images_per_s, at)

            return Detector.fit(data, config, out=run, resume=resume, device=device, on_step=on_step, stop=stop)
    finally:
        if writer is not None:
            writer.close()


def fit_or_go_on(name: str, data: Path, run: Path, config: Config, device: torch.device, fresh: bool) -> Detector:
    """Fitted, taken up where it was left, or loaded where it was fitted before."""
    from ..checkpoint import checkpoint_config
    from ..detector import Detector
    from ..images import quoted, shorter_sides
    from ..layouts import find_train
    from ..runs import CHECKPOINT, DETECTOR
    from ..saving import clear_run

    paths = find_train(data)
    config = config.fitted_to(shorter_sides(paths, config.image_size), [quoted(path) for path in paths])
    if fresh:
        clear_run(run)
    elif (run / DETECTOR).exists():
        detector = Detector.load(run, device)
        if detector.config == config:
            say(f"{name}: fitted before, so only evaluated (--fresh fits anew)")
            return detector
        raise UsageError(f"{run} was fitted with another config; fit anew with --fresh, or choose another folder.")
    resume = (run / CHECKPOINT).exists()
    if resume and checkpoint_config(run)[0] != config:
        raise UsageError(f"{run} was begun with another config; fit anew with --fresh, or choose another folder.")
    return fit_run(name, data, run, config, device, resume)
