"""The GPU check runs to its end with no GPU, so that it works on the day there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    """In a fresh Python, as a user would: nothing of ours on the path, no interpreter chosen yet."""
    given = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600, check=False)


def test_dry_run_reaches_its_end(tmp_path):
    done = run("--out", str(tmp_path), "--dry", "--only", "8192", "--only", "bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of ours wrong" in done.stdout
    (file,) = tmp_path.glob("dry-*.json")
    told = json.loads(file.read_text())
    assert told["correctness"]["failed"] == 0
    assert told["correctness"]["passed"] >= 4
    (record,) = told["cases"].values()
    first = record["rows"][0]
    assert (first["provider"], first["status"]) == ("ours: triton", "ok")
    assert len(told["end_to_end"]) == 2


def test_tune_prints_a_table(tmp_path):
    done = run("tune", "forward", "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(present)" in done.stdout


def test_small_shapes_are_ready_for_the_sanitizer():
    done = run("sanitize", "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed ") == 5
    assert "dry run: clean" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--out", str(tmp_path))
    assert done.returncode == 2
    assert "--dry" in done.stderr
