"""How things are measured: the device, its two ceilings, races between providers, memory, exponents.

Times. Providers take turns within a round, so that whatever disturbs the machine disturbs all of them; what is reported
is the median over rounds, the quartiles, and the median of the ratios within rounds. Every round takes the next of
several sets of inputs, together larger than the last-level cache. On a GPU: CUDA events around the step, behind a
buffer larger than the L2 that is written and a pause in which the host runs ahead, so that Python is not what is timed;
what a caller who waits for each step would see stands beside it (wall_ms), and for short steps a captured graph.

Memory. On a GPU, the allocator's own peak. On the CPU, the high-water mark of resident memory over one step, reset by
the kernel before it, in a fresh process: that counts what torch's profiler does not see (oneDNN's packed operands, C++
temporaries), is exact where a sampling thread misses short peaks, and in a fresh process nothing freed earlier is
silently used again. Both are what a step needs beyond its inputs, its gradients included; the CPU's is good to 1 MB.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cpc_kernels.capabilities import device_name

from . import providers
from .cases import Case
from .ledger import peak
from .providers import Problem, Provider, Unavailable
from .workers import tell

ROOT = Path(__file__).parents[1]
MIN_ROUNDS, MAX_ROUNDS = 5, 25
GRAPH_BELOW_MS = 5.0
AHEAD_CYCLES = 6_000_000  # about 3 ms of a GPU that does nothing


# --- the device -----------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """What a row states about where it comes from."""

    def git(*words: str) -> str:
        try:
            return subprocess.run(
                ["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    told = {
        "device": device_name(device),
        "commit": (git("rev-parse", "--short=10", "HEAD") or "unknown")
        + ("+" if git("status", "--porcelain", "-uno", "--", "kernels", "cpc_fast") else ""),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    if device.type == "cuda":
        told["cuda"] = torch.version.cuda or torch.version.hip or ""
        told["driver"] = _driver()
    else:
        told["threads"] = torch.get_num_threads()
        told["load"] = round(os.getloadavg()[0], 1)
    return told


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def cache_bytes(device: torch.device) -> int:
    """The last-level cache, guessed large where it cannot be read."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(size[:-1]) << 10 for size in sizes if size.endswith("K")]
    return max(known, default=32 << 20)


def free_bytes(device: torch.device) -> int:
    """What can be allocated; on a GPU, once the allocator has returned the blocks that it keeps idle."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    found = (
        re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
        if Path("/proc/meminfo").exists()
        else None
    )
    return int(found[1]) << 10 if found else 4 << 30


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Milliseconds of one call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = None
        if device.type == "cuda":
            self.flush = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device)
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, run: Callable[[], Any]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        torch.cuda._sleep(AHEAD_CYCLES)
        self.events[0].record()
        run()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1])

    def wall(self, run: Callable[[], Any]) -> float:
        """Of a caller who waits for the result: Python, launches and all."""
        synchronize(self.device)
        start = time.perf_counter()
        run()
        synchronize(self.device)
        return 1e3 * (time.perf_counter() - start)


def median_ms(run: Callable[[], Any], device: torch.device, rounds: int = 7) -> tuple[float, list[float]]:
    """Median and quartiles of a warmed-up call."""
    clock = Clock(device)
    run()
    return spread([clock(run) for _ in range(rounds)])


def spread(samples: Sequence[float]) -> tuple[float, list[float]]:
    if len(samples) < 2:
        return samples[0], [samples[0], samples[0]]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, [low, high]


def ceilings(device: torch.device, small: bool = False) -> dict[str, Any]:
    """What the device does at best: GB/s of a copy (read plus written), TFLOP/s of a matrix product, on random data."""
    size = 1 << 20 if small else (1 << 30 if device.type == "cuda" else 1 << 27)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy, copy_spread = median_ms(lambda: target.copy_(source), device, 15)
    found: dict[str, Any] = {
        "copy_gb_s": 2 * size / copy / 1e6,
        "copy_spread": [2 * size / t / 1e6 for t in reversed(copy_spread)],
        "matmul_tflop_s": {},
        "matmul_spread": {},
    }
    side = 128 if small else (8192 if device.type == "cuda" else 2048)
    for dtype in ("float32", "bfloat16", "float16"):
        if device.type == "cpu" and dtype != "float32" and not (dtype == "bfloat16" and providers.FAST_BF16.available):
            continue
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        ms, quartiles = median_ms(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, 11)
        found["matmul_tflop_s"][dtype] = 2 * side**3 / ms / 1e9
        found["matmul_spread"][dtype] = [2 * side**3 / t / 1e9 for t in reversed(quartiles)]
    if device.type == "cuda":  # float32 goes to the matrix units too, as three tf32 products or one
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        a, b = (torch.randn(side, side, device=device) for _ in range(2))
        ms, quartiles = median_ms(lambda: a @ b, device, 11)
        torch.backends.cuda.matmul.fp32_precision = before
        found["matmul_tflop_s"]["tf32"] = 2 * side**3 / ms / 1e9
        found["matmul_spread"]["tf32"] = [2 * side**3 / t / 1e9 for t in reversed(quartiles)]
    return found


# --- races ----------------------------------------------------------------------------------------------------------


@dataclass
class Lane:
    """One provider in a race. status: ok, wrong, unavailable, too big, failed; why: in words."""

    provider: Provider
    loss: providers.Loss | None = None
    status: str = "ok"
    why: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    warm_ms: float = 0.0
    samples: dict[int, float] = field(default_factory=dict)  # round -> ms
    graph_samples: list[float] = field(default_factory=list)
    graph_why: str = ""  # why there is no graph, where one was tried
    wall_samples: list[float] = field(default_factory=list)
    extra_mb: float | None = None


class Race:
    """Providers on one case: each checked, then timed in turns.

    budget_s is what the timed rounds of all providers together may take; a slow one gets fewer rounds, never fewer than
    three. `base` is ours, the first that runs: ratios are against it. One that raises leaves the race and the others
    go on; if it is the base, the race ends.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        budget_s: float,
        only: Callable[[Provider], bool] = lambda provider: True,
        memory: bool = True,
    ) -> None:
        torch._dynamo.reset()  # it compiles a function for eight cases, no more; not between two lanes of one race
        self.case, self.device, self.budget_s = case, device, budget_s
        self.clock, self.round = Clock(device), -1
        largest = max(case.input_bytes, 1)
        count = min(8, max(2, math.ceil(2 * cache_bytes(device) / largest)))
        count = max(1, min(count, int(0.2 * free_bytes(device) / largest)))
        self.sets = [providers.make_problem(case, seed, device) for seed in range(count)]
        self.lanes = [self._enter(provider) for provider in providers.PROVIDERS[case.op] if only(provider)]
        self.base = next((lane for lane in self.lanes if lane.provider.ours and lane.status == "ok"), None)
        if memory:
            for lane in self.lanes:
                if lane.status == "ok":
                    self._attempt(lane, self._weigh)

    def _enter(self, provider: Provider) -> Lane:
        lane, case, first = Lane(provider), self.case, self.sets[0]
        tell(provider.name)
        room = free_bytes(self.device)
        if provider.memory(case) > 0.7 * room:
            lane.status = "too big"
            asked, free = f"{provider.memory(case) / 1e9:.1f} GB", f"{room / 1e9:.1f} GB"
            lane.why = f"needs about {asked}, over 70% of the {free} that are free"
            return lane
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lane.loss = provider.build(case, self.device)
                true = self._truth(provider.seeded)
                lane.errors = providers.judge(case, first, lane.loss, true)
                lane.warm_ms = self.clock(lambda: self._step(lane, 0))  # warm: it has been judged
        except Unavailable as reason:
            lane.status, lane.why = "unavailable", str(reason)
        except Exception as error:
            self._drop(lane, error)
        else:
            if not providers.right(case, lane.errors):
                lane.status = "wrong"
                lane.why = ", ".join(f"{name} off by {error:.1e}" for name, error in lane.errors.items())
        return lane

    def _drop(self, lane: Lane, error: Exception) -> None:
        """A peer may fail in any way; the table says so."""
        synchronize(self.device)  # raises where no call can succeed any more
        lane.status = "failed"
        lane.why = f"{type(error).__name__}: {str(error).strip().splitlines()[:1] or ''}"[:160]
        lane.wall_samples = []
        for problem in self.sets:
            problem.clear()

    def _attempt(self, lane: Lane, work: Callable[[Lane], None]) -> None:
        tell(lane.provider.name)
        try:
            work(lane)
        except Exception as error:
            if lane is self.base:
                raise
            self._drop(lane, error)

    def _weigh(self, lane: Lane) -> None:
        lane.extra_mb = extra_memory(self.case, lane.provider, self.device, self)

    def _truth(self, seeded: bool) -> dict[str, torch.Tensor]:
        known = self.__dict__.setdefault("_truths", {})
        if seeded not in known:
            known[seeded] = providers.truth(self.case, self.sets[0], seeded)
        return known[seeded]

    def _step(self, lane: Lane, index: int) -> None:
        problem = self.sets[index % len(self.sets)]
        problem.clear()
        assert lane.loss is not None
        lane.loss(problem).backward()

    def capture(self) -> bool:
        """Short steps as CUDA graphs, one per set of inputs, and their times; whether this process is fit for more.

        After everything else: a capture that fails, because somebody waits for the device, leaves torch's allocator
        unable to give memory back. No further one is tried then.
        """
        if self.device.type != "cuda":
            return True
        short = [lane for lane in self.running if lane.samples and lane.warm_ms < GRAPH_BELOW_MS]
        for lane in short:
            tell(lane.provider.name)
            graphs = []
            try:
                for i in range(min(4, len(self.sets))):
                    stream = torch.cuda.Stream()
                    with torch.cuda.stream(stream):
                        self._step(lane, i)
                    stream.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    self.sets[i].clear()
                    with torch.cuda.graph(graph, stream=stream):
                        self._step(lane, i)
                    graphs.append(graph)
                lane.graph_samples = [self.clock(graphs[i % len(graphs)].replay) for i in range(MAX_ROUNDS)]
            except Exception as error:  # of a peer, or ours: the row says it
                lane.graph_why = f"{type(error).__name__}: {error}"[:160]
                return False
        return True

    @property
    def running(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.status == "ok"]

    @property
    def share_ms(self) -> float:
        """Of each lane; half of it where every step is also timed with Python."""
        return self.budget_s * 1e3 / max(len(self.running), 1) / (2 if self.device.type == "cuda" else 1)

    @property
    def rounds(self) -> int:
        if self.base is None:
            return 0
        return max(MIN_ROUNDS, min(MAX_ROUNDS, int(self.share_ms / max(self.base.warm_ms, 1e-3))))

    def others(self) -> None:
        """One round of everybody but the base."""
        self.round += 1
        share = self.share_ms
        for lane in self.running:
            if lane is not self.base and (len(lane.samples) < 3 or sum(lane.samples.values()) < share):
                self._attempt(lane, self._time)

    def ours(self) -> None:
        """One step of the base, timed by whoever calls."""
        if self.base is not None:
            self._step(self.base, self.round)

    def _time(self, lane: Lane) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lane.samples[self.round] = self.clock(lambda: self._step(lane, self.round))
            if self.device.type == "cuda":
                lane.wall_samples.append(self.clock.wall(lambda: self._step(lane, self.round)))

    def run(self) -> None:
        for _ in range(self.rounds):
            self.others()
            assert self.base is not None
            self._attempt(self.base, self._time)

    def rows(self) -> list[dict[str, Any]]:
        """One row per provider, for the results file."""
        told = []
        base = self.base.samples if self.base is not None else {}
        for lane in self.lanes:
            row: dict[str, Any] = {"provider": lane.provider.name, "ours": lane.provider.ours, "status": lane.status}
            if lane.why:
                row["why"] = lane.why
            if lane.errors:
                row["errors"] = {name: float(f"{error:.2e}") for name, error in lane.errors.items()}
            if lane.status == "ok" and lane.samples:
                row["median_ms"], row["quartiles_ms"] = spread(list(lane.samples.values()))
                row["rounds"] = len(lane.samples)
                row["ratio"], row["ratio_quartiles"] = spread(
                    [t / base[r] for r, t in lane.samples.items() if r in base]
                )
            if lane.wall_samples:
                row["wall_ms"], row["wall_quartiles_ms"] = spread(lane.wall_samples)
            if lane.graph_samples:
                row["graph_ms"], row["graph_quartiles_ms"] = spread(lane.graph_samples)
            if lane.graph_why:
                row["graph_why"] = lane.graph_why
            if lane.extra_mb is not None:
                row["extra_mb"] = round(lane.extra_mb, 1)
            told.append(row)
        return told

    def record(self, found: dict[str, Any]) -> dict[str, Any]:
        """Everything about the case that goes into the results file; `found` are the ceilings, if they are known."""
        case, limits = self.case, (found["copy_gb_s"], peak(found, self.case.dtype)) if found else None
        return {
            "case": case.to_json(),
            "environment": environment(self.device),
            "floor_ms": case.floor_ms(*limits) if limits else None,
            "flops": case.flops,
            "rows": self.rows(),
        }


# --- memory ---------------------------------------------------------------------------------------------------------


def extra_memory(case: Case, provider: Provider, device: torch.device, race: Race | None = None) -> float | None:
    """MB that one step needs beyond its inputs, gradients included; None where it cannot be read."""
    if device.type == "cuda":
        assert race is not None
        lane = next(lane for lane in race.lanes if lane.provider is provider)
        for problem in race.sets:
            problem.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        race._step(lane, 0)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if not sys.platform.startswith("linux"):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "benchmarks.measure"])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure_memory, args=(case.to_json(), provider.name, send))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:  # killed: it needed more than there is
        return None
    finally:
        child.join()


def _measure_memory(told: dict[str, Any], name: str, send) -> None:
    warnings.simplefilter("ignore")
    case = Case.from_json(told)
    provider, device = providers.find(case.op, name), torch.device("cpu")
    tiny = case.tiny()
    # threads, libraries and (for a compiler, which compiles for a shape) code come first
    _one_step(case if provider.compiles else tiny, provider, device, 1)
    problem = providers.make_problem(case, 0)
    loss = provider.build(case, device)
    if provider.compiles:
        loss(problem).backward()
        problem.clear()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("Rss")
    peak_reset = reset_peak()
    loss(problem).backward()
    send.send(max(0.0, (resident("VmHWM") - before) / 1e6) if peak_reset else None)
    send.close()


def _one_step(case: Case, provider: Provider, device: torch.device, seed: int) -> None:
    problem: Problem = providers.make_problem(case, seed)
    provider.build(case, device)(problem).backward()


def reset_peak() -> bool:
    """Have VmHWM of this process begin anew; whether the kernel lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident(what: str) -> int:
    """Bytes of this process: Rss now (counted page by page), or VmHWM, its high-water mark."""
    file = Path("/proc/self/smaps_rollup" if what == "Rss" else "/proc/self/status")
    found = re.search(rf"^{what}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0


# --- growth ---------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size by least squares: 1 is linear, 2 is quadratic.

    >>> exponent([1, 2, 4], [3, 6, 12])
    1.0
    """
    x = [math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-12)) for value in values]
    return statistics.linear_regression(x, y).slope
