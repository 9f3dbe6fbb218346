"""`cpc-fast profile`: where the time and memory of training and scoring go."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .console import print_table, say
from .options import Device, check_device, choose_device

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..detector import Detector


def profile(
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Run folder that fit wrote.", show_default=False)
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="The demo's model on 128 px windows of brick, in place of a run.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of normal images; the one that the run was fitted on by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The trace to write.")] = Path("trace.json"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps to watch, and images to score.")] = 3,
    nsys: Annotated[
        bool,
        typer.Option("--nsys", help="On a GPU: neither table nor trace, but the steps for Nsight Systems to record."),
    ] = False,
    device: Device = "auto",
) -> int:
    """Show where time and memory go, stage by stage; write a trace."""
    check_device(device)
    if (run is None) != demo:
        raise UsageError("profile needs a RUN, or --demo, and not both.")
    if out.suffix != ".json":
        raise UsageError(f"--out {out}: a trace ends in .json; that is how viewers know it.")
    if run is not None:
        from ..runs import need_detector

        need_detector(run)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is loaded: its profiler warns about itself
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "6"
    )  # above its errors (4) and USDT, two lines that each start and stop writes
    torch_device = choose_device(device)
    if nsys and torch_device.type != "cuda":
        raise UsageError("--nsys needs a GPU; without it the command writes a trace on any device.")
    detector, images = _demo(torch_device) if run is None else _fitted(run, data, torch_device)
    from cpc_kernels.capabilities import device_name

    from ..profiling import PHASES, bracket
    from ..profiling import profile as watch

    if nsys:
        bracket(detector, images, steps)
        return 0
    found = watch(detector, images, out, steps)
    config = detector.config
    size = f"{images[0].shape[0]} x {images[0].shape[1]}"
    what = {
        PHASES[0]: f"Training step: {config.batch_size} images, mean of {steps}, {device_name(torch_device)}",
        PHASES[1]: f"Scoring an image of {size} pixels, mean of {steps}",
    }
    columns = ("stage", "ms", "share", "MB at most", "MB left")
    for phase, title in what.items():
        rows = [
            (
                "all" if row.depth < 0 else "  " * row.depth + row.name, f"{row.ms:.2f}",
                f"{row.share:.1%}", f"{row.peak_mb:.1f}", f"{row.left_mb:.1f}",
            )
            for row in found.rows
            if row.phase == phase
        ]  # fmt: skip
        print_table(title, columns, rows)
    rows = [(name, f"{ms:.1f}", f"{share:.1%}", calls) for name, ms, share, calls in found.operators]
    print_table("Operators, by the time in themselves on the CPU", ("operator", "ms", "share", "calls"), rows)
    say("MB at most, MB left: memory beyond what was held when the stage began. What forward leaves, backward frees.")
    say(f"Open next: {out} at https://ui.perfetto.dev; search for cpc_fast/")
    return 0


def _demo(device: torch.device) -> tuple[Detector, list[np.ndarray]]:
    from ..datasets import write_textures
    from ..detector import Detector
    from ..images import find_images, read_image

    with tempfile.TemporaryDirectory(prefix="cpc_fast_") as folder:
        write_textures(Path(folder) / "data", train=20, good=0, per_defect=0, textures=("brick",))
        images = [read_image(path) for path in find_images(Path(folder) / "data" / "brick" / "train" / "good")]
    return Detector.fit(images, "cpu-demo", epochs=1, device=device), images


def _fitted(run: Path, data: Path | None, device: torch.device) -> tuple[Detector, list[np.ndarray]]:
    from ..detector import Detector
    from ..images import read_image
    from ..layouts import find_train

    detector = Detector.load(run, device)
    try:
        paths = find_train(data or Path(detector.trained_on["data"]))
    except UsageError as error:
        if data is not None:
            raise
        raise UsageError(f"The images that {run} was fitted on are gone ({error}) Name others with --data.") from None
    return detector, [read_image(path, depth=detector.config.depth) for path in paths[: 2 * detector.config.batch_size]]
