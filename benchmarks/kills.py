"""Kill -9 a training at random moments, resume it, and compare its tensors with an uninterrupted run's, bit for bit.

    python3 -m benchmarks.kills --kills 50

Every life is a forked process (so that it starts at once) which is killed after a random share of the time that the
whole run takes; every third one then lives on until it is writing a file. After each death the checkpoint must be
readable. Exits with 1 where a tensor differs; the records beside them, which hold the speed, are not compared.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from cpc_fast.checkpoint import checkpoint_config
from cpc_fast.config import Config
from cpc_fast.detector import Detector
from cpc_fast.errors import UsageError

CONFIG = Config(
    width=4, patch_size=16, patch_stride=8, steps=2, batch_size=4, epochs=12, bank_size=64, shifts=("noise",)
)
FILES = ("model.safetensors", "checkpoint.safetensors", "best.safetensors")


def _live(images: list[np.ndarray], run: Path) -> int:
    """Fit in a process of its own; returns its number."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        Detector.fit(images, CONFIG, out=run, resume=(run / FILES[1]).exists())
        code = 0
    finally:
        os._exit(code)


def _writing(run: Path, pid: int) -> bool:
    """Whether this process has begun a file and not yet given it its name."""
    return run.exists() and any(name.endswith(f".{pid}.tmp") for name in os.listdir(run))


def survive(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """How often it was killed, in how many runs, at what moments, and how many files had other tensors at the end."""
    torch.set_num_threads(1)
    chance, noise = random.Random(seed), np.random.default_rng(seed)
    images = [noise.integers(0, 256, (40, 40, 1), dtype=np.uint8) for _ in range(12)]
    begun = time.monotonic()
    assert os.waitpid(_live(images, folder / "whole"), 0)[1] == 0
    length = time.monotonic() - begun
    count = {"kills": 0, "runs": 0, "with a checkpoint": 0, "half written": 0, "different": 0}
    while count["kills"] < kills:
        run = folder / f"run{count['runs']}"
        while True:
            pid, writing = _live(images, run), chance.random() < 1 / 3
            until = time.monotonic() + chance.uniform(0, 1) * length
            while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
                if time.monotonic() > until and (not writing or _writing(run, pid)):
                    break
                time.sleep(0 if writing else 0.001)
            if ended == (0, 0) and count["kills"] < kills:
                os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
            elif ended == (0, 0):
                ended = os.waitpid(pid, 0)
            if ended[1] == 0:
                break
            assert os.WIFSIGNALED(ended[1]), "it failed by itself"
            count["kills"] += 1
            count["half written"] += _writing(run, pid)
            count["with a checkpoint"] += (run / FILES[1]).exists()
            try:
                checkpoint_config(run)  # raises where it cannot be read
            except UsageError:  # no epoch had ended
                assert not (run / FILES[1]).exists()
        count["runs"] += 1
        for name in FILES:
            one, other = load_file(folder / "whole" / name), load_file(run / name)
            count["different"] += one.keys() != other.keys() or not all(
                torch.equal(one[key], other[key]) for key in one
            )
        shutil.rmtree(run)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        count = survive(options.folder or Path(temporary), options.kills, options.seed)
    print(", ".join(f"{number} {what}" for what, number in count.items()))
    raise SystemExit(bool(count["different"]))


if __name__ == "__main__":
    main()
