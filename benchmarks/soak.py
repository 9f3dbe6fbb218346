"""Predict on and on, and fail where memory grows; or predict very many images, kill it on the way, and compare.

    python3 -m benchmarks.soak --minutes 30              the same images again and again, bounded by time
    python3 -m benchmarks.soak --images 100000           so many files, killed and resumed, against an uninterrupted run

Images are small and synthetic, every 97th is damaged, and only scores are written. Memory is the resident set of the
predicting process, sampled as it goes; the first fifth, in which caches fill, does not count. It is flat where a line
through the samples rises by less than LIMIT_MB from its first to its last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cpc_fast.answers import predict
from cpc_fast.config import Config
from cpc_fast.detector import Detector
from cpc_fast.errors import Stopped
from cpc_fast.inputs import Shard

from .measure import resident

LIMIT_MB = 8.0
SIDE = 24
CONFIG = Config(
    width=2, stem=8, patch_size=8, patch_stride=8, steps=1, directions=2, epochs=1, batch_size=4, bank_size=16
)


def write_images(folder: Path, count: int) -> None:
    """Noise, a thousand files to a folder, every 97th cut short."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i // 1000:03d}" / f"{i % 1000:03d}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(90, 160, (SIDE, SIDE), dtype=np.uint8)).save(path)
        if i % 97 == 96:
            path.write_bytes(path.read_bytes()[:100])


def rise(samples: list[float]) -> float:
    """MB from the first to the last of the samples after the first fifth, along the line that fits them best.

    >>> round(rise([9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), 3)
    7.0
    """
    kept = np.array(samples[len(samples) // 5 :])
    return float(np.polyfit(np.arange(len(kept)), kept, 1)[0] * (len(kept) - 1)) if len(kept) > 1 else 0.0


def soak(detector: Detector, folder: Path, minutes: float) -> dict[str, float]:
    """Rounds over 2,000 images until the time is over."""
    write_images(folder / "images", 2000)
    samples: list[float] = []
    until, images = time.monotonic() + 60 * minutes, 0

    def over() -> bool:
        return time.monotonic() > until

    def watch(done: int, total: int) -> None:
        nonlocal images
        images += 1
        if images % 200 == 0:
            samples.append(resident("Rss") / 2**20)

    rounds = 0
    while not over():
        with contextlib.suppress(Stopped):
            predict(detector, [folder / "images"], folder / "out", pictures=False, on_image=watch, stop=over)
            rounds += 1
    return {
        "images": images,
        "rounds": rounds,
        "first_mb": samples[0],
        "last_mb": samples[-1],
        "rise_mb": rise(samples),
    }


def scale(detector: Detector, folder: Path, count: int, kills: int) -> dict[str, float]:
    """`count` files in one go, and again with `kills` kill -9s; whether both wrote the same bytes."""
    write_images(folder / "images", count)
    started = time.monotonic()
    code = os.waitpid(_predict(detector, folder, "whole", False), 0)[1]
    seconds = time.monotonic() - started
    assert code == 0, "the uninterrupted run failed"
    log = folder / "cut" / "progress" / f"{Shard()}.jsonl"
    for n in range(kills):
        pid, least = _predict(detector, folder, "cut", n > 0), (n + 1) * count // (kills + 1)
        while not log.exists() or log.stat().st_size < least * 150:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it ended before it was killed"
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert os.waitpid(_predict(detector, folder, "cut", True), 0)[1] == 0
    same = all(
        (folder / "whole" / name).read_bytes() == (folder / "cut" / name).read_bytes()
        for name in ("scores.csv", "predictions.json")
    )
    samples = json.loads((folder / "whole.json").read_text())
    return {
        "images": count, "seconds": seconds, "kills": kills, "identical": same,
        "first_mb": samples[0], "last_mb": samples[-1], "rise_mb": rise(samples),
    }  # fmt: skip


def _predict(detector: Detector, folder: Path, name: str, resume: bool) -> int:
    """In a process of its own; returns its number. It leaves its samples of memory in NAME.json."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        samples: list[float] = []
        every = max(1, sum(1 for _ in (folder / "images").iterdir()) * 1000 // 200)
        predict(
            detector, [folder / "images"], folder / name, pictures=False, resume=resume,
            on_image=lambda done, total: samples.append(resident("Rss") / 2**20) if done % every == 0 else None,
        )  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(samples))
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--images", type=int, help="instead: this many files, killed and resumed")
    parser.add_argument("--kills", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(1)
    normal = [random.integers(90, 160, (SIDE, SIDE, 1), dtype=np.uint8) for _ in range(12)]
    detector = Detector.fit(normal, CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        if options.images:
            found = scale(detector, Path(folder), options.images, options.kills)
        else:
            found = soak(detector, Path(folder), options.minutes)
    print(
        ", ".join(
            f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in found.items()
        )
    )
    raise SystemExit(found["rise_mb"] > LIMIT_MB or not found.get("identical", True))


if __name__ == "__main__":
    main()
