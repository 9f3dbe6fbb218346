"""`cpc-fast data`: write a dataset in MVTec layout."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .console import say

app = typer.Typer(help="Write a dataset in MVTec layout.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def data(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        say(context.get_help())


@app.command()
def textures(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new, empty, or of an earlier call.")],
    seed: Annotated[int, typer.Option(help="Of windows and defects.")] = 0,
) -> int:
    """Brick, grass and gravel with painted defects and masks.

    Windows of three photographs that scikit-image carries, with five kinds of defects; no network is needed.
    """
    from ..datasets import write_textures

    write_textures(out, seed)
    say(f"Wrote {out}. Next: {shlex.join(['cpc-fast', 'fit', str(out / 'brick'), '--out', 'runs/brick'])}")
    return 0


@app.command()
def elpv(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new, empty, or of an earlier call.")],
    seed: Annotated[int, typer.Option(help="Of the split into training and test.")] = 0,
) -> int:
    """Solar cells, sound and defective (needs cpc_fast[elpv]).

    The ELPV dataset, from the package elpv-dataset; without masks.
    """
    from ..datasets import write_elpv

    write_elpv(out, seed)
    command = ["cpc-fast", "fit", str(out), "--out", "runs/elpv", "--image-size", "128"]
    say(f"Wrote {out}. Next: {shlex.join(command)}")
    return 0
