"""The loss across ranks: peak memory and time of gloo processes on this CPU, and a simulation of the ring.

    python -m benchmarks.ranks            measure 1, 2 and 4 processes into results/ranks/<device>.json (minutes)
    python -m benchmarks.report           docs/scaling.md and its plot, from that and from the simulation

The simulation knows the products, the bytes, a rate and a link. Its tables for many GPUs are computed from assumed
rates and links; nothing in them was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plots
from .ledger import RESULTS, slug
from .report import between, table

FOLDER = RESULTS / "ranks"
N, D = 12288, 256  # anchors, and as many candidates, of the whole batch
WORLDS, EXCHANGES = (1, 2, 4), ("gathered", "ring")
ROUNDS = 5

# --- the simulation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a rank has: products in flops / s, a link to the next rank in bytes / s, and what a message waits."""

    flops: float
    link: float
    latency: float = 10e-6


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of the ring on the slowest rank, in seconds."""

    compute: float
    link: float  # time that its link is busy
    total: float

    @property
    def exposed(self) -> float:
        """Share of the step in which nothing is computed because nothing has come."""
        return max(0.0, 1 - self.compute / self.total)


def lap(rows: list[int], features: int, each: Machine, flops: float, bytes_ahead: int, bytes_behind: int) -> float:
    """When the last rank has scored every block, and gradients are home.

    Block r - t is at rank r in turn t. A rank starts a turn when it is done with the one before and the block is here;
    at that moment it sends the block on (bytes_ahead a number), and what the turn before found out about the gradient
    (bytes_behind a number), one message after the other on one link. flops a number of a block and anchor.
    """
    world = len(rows)
    ranks = 1 if len(set(rows)) == 1 else world  # equal ranks do the same at the same time
    done, here = [0.0] * ranks, [0.0] * ranks
    for turn in range(world):
        arrives, known, sent = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
        start = [max(done[r], here[r]) for r in range(ranks)]
        for r in range(ranks):
            free, after = start[r], (r + 1) % ranks
            if turn < world - 1:
                free += each.latency + rows[(r - turn) % ranks] * features * bytes_ahead / each.link
                arrives[after] = free
            if turn and bytes_behind:
                free += each.latency + rows[(r - turn + 1) % ranks] * features * bytes_behind / each.link
                known[after] = free
            sent[r] = free
        for r in range(ranks):
            products = flops * rows[(r - turn) % ranks] * rows[r] * features
            done[r] = max(start[r] + products / each.flops, known[r], sent[r])
        here = arrives
    if bytes_behind and world > 1:  # home
        last = [rows[(r + 1) % ranks] * features * bytes_behind / each.link for r in range(ranks)]
        return max(end + each.latency + home for end, home in zip(done, last, strict=True))
    return max(done)


def simulate(rows: list[int], features: int, each: Machine, width: int = 2) -> Step:
    """rows: anchors and candidates of each rank. width: bytes of a number of a candidate; its gradient has four."""
    world, most = len(rows), max(rows)
    total = lap(rows, features, each, 4, width, 0) + lap(rows, features, each, 4, width, 4)
    return Step(
        compute=8 * sum(rows) * most * features / each.flops,
        link=sent_bytes(most, features, world, width) / each.link,
        total=total,
    )


def sent_bytes(rows: int, features: int, world: int, width: int = 2) -> int:
    """What a rank sends in a forward and backward pass."""
    return rows * features * (2 * (world - 1) * width + (4 * world if world > 1 else 0))


# --- measured ---------------------------------------------------------------------------------------------------------


def work(rank: int, world: int, meet: str, exchange: str, queue: Any) -> None:
    import torch
    from torch import distributed as dist

    from cpc_kernels import info_nce_across_ranks

    from .measure import reset_peak, resident

    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=patience)
    rows = N // world

    def step(count: int) -> None:
        q, k = (torch.randn(count, D, requires_grad=True) for _ in range(2))
        positives = torch.arange(count) + rank * count
        info_nce_across_ranks(q, k, positives, scale=0.1, exchange=exchange).backward()

    step(64)  # libraries load before we look
    assert reset_peak(), "the kernel does not let a process reset its peak of memory"
    before, seconds = resident("Rss"), []
    for _ in range(ROUNDS):
        dist.barrier()
        started = time.perf_counter()
        step(rows)
        dist.barrier()
        seconds.append(time.perf_counter() - started)
    peak = resident("VmHWM") - before
    message, around = torch.ones(2**20), []  # 4 MiB to the next rank and from the one before
    for _ in range(5 if world > 1 else 0):
        coming = torch.empty_like(message)
        dist.barrier()
        started = time.perf_counter()
        ops = [dist.P2POp(dist.isend, message, (rank + 1) % world), dist.P2POp(dist.irecv, coming, (rank - 1) % world)]
        for request in dist.batch_isend_irecv(ops):
            request.wait()
        around.append(time.perf_counter() - started)
    link = message.nbytes / statistics.median(around) if around else None
    queue.put({"rank": rank, "peak": peak, "seconds": seconds, "link": link})
    dist.destroy_process_group()


def measure() -> dict[str, Any]:
    import os

    import torch

    from .measure import environment

    torch.set_num_threads(1)
    context, found = torch.multiprocessing.get_context("spawn"), []
    for world in WORLDS:
        for exchange in EXCHANGES if world > 1 else EXCHANGES[:1]:
            with tempfile.TemporaryDirectory() as folder:
                queue = context.SimpleQueue()
                ranks = [
                    context.Process(target=work, args=(rank, world, f"{folder}/meet", exchange, queue))
                    for rank in range(world)
                ]
                for process in ranks:
                    process.start()
                answers = [queue.get() for _ in ranks]
                for process in ranks:
                    process.join()
            row = {"world": world, "exchange": exchange if world > 1 else "one process"}
            row["peak"] = max(answer["peak"] for answer in answers)
            rounds = [max(times) for times in zip(*(answer["seconds"] for answer in answers), strict=True)]
            row["seconds"], row["quartiles"] = statistics.median(rounds), statistics.quantiles(rounds)[::2]
            row["link"] = min(answer["link"] for answer in answers) if world > 1 else None
            found.append(row)
            print(row, flush=True)
    return {
        "environment": environment(torch.device("cpu")), "cores": os.cpu_count(), "rows": N, "features": D,
        "rounds": ROUNDS, "measured": found,
    }  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def predicted_seconds(told: dict[str, Any], row: dict[str, Any]) -> float:
    """From one process's time and the measured link; processes share the cores."""
    rows, features, world = told["rows"], told["features"], row["world"]
    alone = next(one for one in told["measured"] if one["world"] == 1)
    rate = 6 * rows * rows * features / alone["seconds"]  # one process folds the gradients into forward: 6 N M D
    each = Machine(rate * min(1, told["cores"] / world), row["link"], 1e-4)
    if row["exchange"] == "ring":
        return simulate([rows // world] * world, features, each, width=4).total
    sent = 4 * rows * features * (world - 1) / world * 3  # the candidates once, the sum of their gradients twice
    return 6 * rows * rows // world * features / each.flops + sent / each.link


def measured_table(told: dict[str, Any]) -> str:
    rows = []
    for row in told["measured"]:
        low, high = row["quartiles"]
        simulated = predicted_seconds(told, row) if row["link"] else None
        rows.append(
            (
                f"{row['world']}",
                row["exchange"],
                f"{row['peak'] / 2**20:.0f}",
                f"{row['seconds']:.2f}",
                f"{low:.2f}-{high:.2f}",
                "" if simulated is None else f"{simulated:.2f}",
                "" if simulated is None else f"{row['seconds'] / simulated:.2f}",
                "" if simulated is None else f"{row['link'] / 1e9:.2f}",
            )
        )
    place = told["environment"]
    head = (
        "ranks", "candidates", "peak of a rank, MiB", "step, s", "quartiles", "simulated, s", "measured / simulated",
        "link, GB/s",
    )  # fmt: skip
    return (
        f"N = M = {told['rows']:,} in all, D = {told['features']}, float32, forward and backward; {place['device']} a "
        f"rank, {told['cores']} cores for all, medians of {told['rounds']} steps, torch {place['torch']}, "
        f"commit {place['commit']}, {place['date']}.\n\n{table(head, rows)}"
    )


NVLINK, NETWORK, SLOW = 360e9, 40e9, 10e9
RATE = 400e12


def many_table() -> str:
    rows = []
    for local in (4096, 16384):
        for world in (8, 64, 256, 1024):
            link = NVLINK if world <= 8 else NETWORK
            fast, slow = (simulate([local] * world, 256, Machine(RATE, speed)) for speed in (link, SLOW))
            rows.append(
                (
                    f"{world:,}",
                    f"{local:,}",
                    f"{local * world:,}",
                    f"{sent_bytes(local, 256, world) / 1e9:.2f}",
                    f"{fast.compute * 1e3:.2f}",
                    f"{fast.link * 1e3:.2f}",
                    f"{fast.total * 1e3:.2f}",
                    f"{fast.exposed:.0%}",
                    f"{slow.exposed:.0%}",
                )
            )
    head = (
        "GPUs", "anchors each", "candidates", "sent by each, GB", "products, ms", "link, ms", "step, ms",
        "waiting", "waiting at 10 GB/s",
    )  # fmt: skip
    return table(head, rows)


def free_table() -> str:
    """Rows per rank above which the link hides, and candidates above which the loss costs a tenth of the encoder."""
    links = [("NVLink, 360 GB/s", NVLINK), ("400 Gb/s network, 40 GB/s", NETWORK), ("100 Gb/s network, 10 GB/s", SLOW)]
    rows = [(name, f"{RATE * 2 / (4 * link):,.0f}", f"{RATE * 6 / (4 * link):,.0f}") for name, link in links]
    return table(("link of a rank", "anchors each, forward hidden", "backward too"), rows)


ENCODERS = (  # flops of a forward pass for one anchor; training takes three times as many
    ("a patch of 32 x 32 pixels, width 16 (this package's `quality`)", None),
    ("an image of 224 x 224 pixels, ResNet-50", 8.2e9),
    ("an image of 224 x 224 pixels, ViT-L/16", 1.23e11),
)


def encoder_flops() -> float:
    """Of one patch of the `quality` preset, counted by torch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from cpc_fast.config import preset
    from cpc_fast.latents import PatchEncoder

    config = preset("quality")
    with torch.device("meta"):
        encoder = PatchEncoder(config.channels, config.width, config.stem, config.norm)
        patch = torch.empty(1, config.channels, config.patch_size, config.patch_size)
        counter = FlopCounterMode(display=False)
        with counter:
            encoder(patch)
    return float(counter.get_total_flops())


def cost_table() -> str:
    rows = []
    for name, flops in ENCODERS:
        flops = 3 * (encoder_flops() if flops is None else flops)
        rows.append((name, f"{flops / 1e9:,.3g}", f"{0.1 * flops / (8 * 256):,.0f}", f"{flops / (8 * 256):,.0f}"))
    head = ("an anchor is", "GFLOP of its encoder", "candidates at 10%", "at 100%")
    return table(head, rows)


RING_BYTES, GATHER_BYTES = 30, (16, 8)  # a number: of a rank's rows; of a rank's rows, and of all candidates


def memory_table(memory: float = 10 * 2**30, features: int = 256) -> str:
    rows = []
    for world in (1, 8, 64, 1024):
        ring = world * memory / (RING_BYTES * features)
        gathered = memory / (features * (GATHER_BYTES[0] / world + GATHER_BYTES[1]))
        plain = (memory * world / 8) ** 0.5
        rows.append((f"{world:,}", f"{plain:,.0f}", f"{gathered:,.0f}", f"{ring:,.0f}"))
    return table(("GPUs", "matrix of scores", "gathered", "ring"), rows)


def rendered(root: Path) -> dict[Path, str]:
    """docs/scaling.md and its plot, as they should be."""
    page, made = root / "docs" / "scaling.md", {}
    if not page.exists():
        return made
    files = sorted(FOLDER.glob("*.json"))
    parts = {"many": many_table(), "free": free_table(), "cost": cost_table(), "memory": memory_table()}
    told = [json.loads(file.read_text()) for file in files]
    parts["measured"] = "\n\n".join(measured_table(each) for each in told) if told else "Not measured yet."
    text = page.read_text()
    for name, inside in parts.items():
        text = between(page, name, inside, text)
    made[page] = text
    for file, each in zip(files, told, strict=True):
        one = [(1.0, row["peak"] / 2**20) for row in each["measured"] if row["world"] == 1]
        series = {
            exchange: [*one, *((float(row["world"]), row["peak"] / 2**20) for row in each["measured"]
                               if row["exchange"] == exchange)]
            for exchange in EXCHANGES
        }  # fmt: skip
        name = f"ranks-memory-{file.stem}.svg"
        made[root / "docs" / "plots" / name] = plots.lines(
            f"Peak memory of a rank, {each['environment']['device']}", "ranks", "MiB beyond the process", series
        )
    return made


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=(__doc__ or "").splitlines()[0])
    parser.parse_args(arguments)
    told = measure()
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / f"{slug(told['environment']['device'])}.json"
    file.write_text(json.dumps(told, indent=1) + "\n")
    print(f"Wrote {file}. Next: python -m benchmarks.report")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
