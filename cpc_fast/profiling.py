"""A few training steps and a few scored images, warm, for a profiler to look at: torch's, stage by stage, or nsys."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function

from .detector import Detector, prepare
from .files import write_whole
from .train import Position, make_optimizer, train

PHASES = ("training step", "scoring an image")


@dataclass(frozen=True)
class Row:
    """A stage of one phase, in the order of the flow; every figure is a mean over the steps, or the images.

    Attributes:
        phase: one of PHASES.
        name: the stage; "the rest" is what no stage holds.
        depth: 0 for a stage of its own, 1 for one inside the stage above it, and so on.
        ms: time on the thread that calls; on a GPU, the time to launch, not to run, its kernels.
        share: of the phase's time.
        peak_mb: the most memory held at once beyond what was held before, in MB (10^6 bytes).
        left_mb: what is still held at its end; negative where it frees what others left.
    """

    phase: str
    name: str
    depth: int
    ms: float
    share: float
    peak_mb: float
    left_mb: float


@dataclass(frozen=True)
class Profile:
    """rows: phase by phase, its total first. operators: (name, ms in all, share of all, calls), the longest first."""

    rows: list[Row]
    operators: list[tuple[str, float, float, int]]


def profile(detector: Detector, images: Sequence[np.ndarray], trace: Path, steps: int = 3) -> Profile:
    """Watch `steps` training steps and as many scored images, warm, and write a chrome trace; nothing is learned.

    Args:
        detector: a fitted one; it is copied before its copy is trained on.
        images: uint8 (h, w, c) at their original resolution; repeated where there are too few for a step.
        trace: a .json file for https://ui.perfetto.dev.

    Raises CpcFastError where the trace cannot be written.
    """
    device, run = detector.bank.device, _warm(detector, images, steps)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    # acc_events: of the one cycle that there is; without, torch 2.11 warns that it would forget others
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as watch:
        run()
    write_whole(trace, lambda aside: watch.export_chrome_trace(str(aside)))
    events = watch.events() or []
    rows = _rows(events, _Memory(watch, device), steps)
    busy = sum(e.self_cpu_time_total for e in events) or 1.0
    most = sorted(watch.key_averages(), key=lambda e: -e.self_cpu_time_total)
    operators = [
        (e.key, e.self_cpu_time_total / 1000, e.self_cpu_time_total / busy, e.count)
        for e in most
        if not e.key.startswith("cpc_fast/")
    ]
    return Profile(rows, operators[:8])


def bracket(detector: Detector, images: Sequence[np.ndarray], steps: int = 3) -> None:
    """The same on a GPU for Nsight Systems, which records from cudaProfilerStart to Stop (benchmarks/nsys.sh): every
    stage and operator is an NVTX range."""
    run = _warm(detector, images, steps)
    torch.cuda.profiler.start()
    with torch.autograd.profiler.emit_nvtx():
        run()
    torch.cuda.profiler.stop()


def _warm(detector: Detector, images: Sequence[np.ndarray], steps: int) -> Callable[[], None]:
    """What runs `steps` training steps of a copy of the detector and scores as many images, after one of each."""
    device, config = detector.bank.device, detector.config.replace(epochs=2)
    model = copy.deepcopy(detector.model)
    optimizer = make_optimizer(model, config)
    batches = [images[i % len(images)] for i in range(steps * config.batch_size)]
    prepared = [prepare(image, config) for image in batches]
    second = Position(epoch=1)  # the model has been told the mean and spread of the pixels

    def learn(count: int) -> None:
        train(model, prepared[: count * config.batch_size], config, optimizer=optimizer, position=second)

    def run() -> None:
        with record_function(f"cpc_fast/{PHASES[0]}"):
            learn(steps)
        with record_function(f"cpc_fast/{PHASES[1]}"):
            for image in batches[:steps]:
                detector.inspect(image)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    learn(1)
    detector.inspect(images[0])
    return run


class _Memory:
    """What is allocated on a device over time."""

    def __init__(self, watch: Any, device: torch.device) -> None:
        found = watch.profiler.kineto_results
        start, kind = found.trace_start_ns(), device.type.upper()
        changes = sorted(
            ((e.start_ns() - start) / 1000, e.nbytes())
            for e in found.events()
            if e.name() == "[memory]" and e.device_type().name == kind
        )
        self.times = [time for time, _ in changes]
        self.held = np.cumsum([0, *(size for _, size in changes)])

    def of(self, start: float, end: float) -> tuple[float, float]:
        """(peak, left) between two times, bytes beyond what was held at the first."""
        first, last = bisect.bisect_left(self.times, start), bisect.bisect_right(self.times, end)
        held = self.held[first : last + 1] - self.held[first]
        return float(held.max()), float(held[-1])


def _rows(events: Sequence[Any], memory: _Memory, count: int) -> list[Row]:
    """Stages of the same name at the same place are one row."""
    stages = sorted((e for e in events if e.name.startswith("cpc_fast/")), key=lambda e: e.time_range.start)
    found: dict[tuple[str, ...], list[tuple[float, float, float]]] = {}
    for event in stages:
        path, above = [event.name.removeprefix("cpc_fast/")], event.cpu_parent
        while above is not None:
            if above.name.startswith("cpc_fast/"):
                path.append(above.name.removeprefix("cpc_fast/"))
            above = above.cpu_parent
        start, end = event.time_range.start, event.time_range.end
        found.setdefault(tuple(reversed(path)), []).append((end - start, *memory.of(start, end)))
    rows = []
    for phase in PHASES:
        whole = found.get((phase,))
        if not whole:
            continue
        total = whole[0][0] or 1.0
        parts = {path: each for path, each in found.items() if path[0] == phase}
        for path, each in parts.items():
            times, peaks, left = zip(*each, strict=True)
            time, peak = sum(times), max(peaks) / 1e6
            name, depth = path[-1], len(path) - 2
            rows.append(Row(phase, name, depth, time / count / 1000, time / total, peak, sum(left) / count / 1e6))
        top = [row for row in rows if row.phase == phase and row.depth <= 0]
        named = [row for row in top if row.depth == 0]
        rest = next(row.ms for row in top if row.depth < 0) - sum(row.ms for row in named)
        rows.append(Row(phase, "the rest", 0, rest, 1 - sum(row.share for row in named), 0.0, 0.0))
    return rows
