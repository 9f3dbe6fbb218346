"""Names for the stages of the flow, for whoever profiles: torch.profiler, nsys, `cpc-fast profile`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def stage(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Names every call of a function `cpc_fast/<name>` in a trace; free when nobody listens.

    >>> stage("patches")(max)(1, 2)
    2
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():  # pyright: ignore
                return function(*args, **kwargs)
            with torch.profiler.record_function(f"cpc_fast/{name}"):
                return function(*args, **kwargs)

        return run

    return wrap
