"""The soak: memory that grows is seen, and a killed run ends in the same lists."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.soak import rise

ROOT = Path(__file__).parents[2]


def test_a_leak_is_told_from_noise():
    noise = np.random.default_rng(0).normal(300, 0.5, 200)
    assert abs(rise(list(noise))) < 1
    assert 7 < rise(list(noise + np.linspace(0, 10, 200))) < 9
    filling = np.concatenate([np.linspace(200, 300, 40), noise[:160]])  # the first fifth does not count
    assert abs(rise(list(filling))) < 1


def test_killed_and_resumed_it_writes_the_same_bytes():
    command = [sys.executable, "-m", "benchmarks.soak", "--images", "120", "--kills", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "images 120" in done.stdout
    assert "kills 1, identical True" in done.stdout
