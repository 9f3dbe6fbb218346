"""The command line, `cpc-fast VERB`: each verb is listed here and has its own file in commands/.

What fails is one sentence on standard error: exit code 2 where the command was asked for in a way that cannot work, 1
where it failed, 130 after Ctrl-C, 0 after SIGTERM with everything saved; a traceback with --debug only.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import nullcontext
from typing import Annotated

import typer

from .commands import data
from .commands.console import complain, printing, say
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.fit import fit
from .commands.predict import predict
from .commands.profiling import profile
from .errors import CpcFastError, Stopped
from .version import __version__

app = typer.Typer(
    name="cpc-fast",
    help="Learn from normal images, then score and segment anomalies, with contrastive predictive coding.",
    add_completion=False,
    rich_markup_mode=None,
)
for command in (demo, fit, evaluate, predict, export, doctor, profile):
    app.command()(command)
app.add_typer(data.app, name="data")


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


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; what it raises becomes one sentence on standard error."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end]  # wherever it stands
    arguments = [argument for i, argument in enumerate(arguments) if argument != "--debug" or i >= end]
    try:
        with printing() if "--help" in arguments[:end] else nullcontext():  # else commands print, by say
            code = app(arguments, prog_name="cpc-fast", standalone_mode=False)
        with printing():
            sys.stdout.flush()
        if code == 130:  # what typer makes of Ctrl-C where the command had nothing to say about it
            complain("Stopped.")
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        complain("Stopped.")
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if isinstance(error, Stopped):
            complain(str(error))
            return error.exit_code
        if debug:
            raise
        if isinstance(error, CpcFastError):
            complain(f"Error: {error}")
            return error.exit_code
        if type(error).__name__ == "Abort":  # how some versions of typer report Ctrl-C
            complain("Stopped.")
            return 130
        if hasattr(error, "format_message"):  # typer's own: an option or argument that does not fit
            context = getattr(error, "ctx", None)
            where = context.command_path if context else "cpc-fast"
            said = error.format_message().rstrip(".")  # type: ignore[attr-defined]
            complain(f"Error: {said}{'' if said.endswith('?') else '.'} Try: {where} --help")
            return 2
        detail = " ".join(str(error).split())[:300]
        complain(f"Error: unexpected {type(error).__name__}{': ' if detail else ''}{detail}. --debug shows where.")
        return 1


def main() -> None:
    """The `cpc-fast` command."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who called
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (it is the stream from here on)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold anything
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
