"""The GPU check runs to its end with no GPU, so that it works on the day there is one."""

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import cases, gpu_check, gpu_work, providers, report
from benchmarks.ledger import Ledger
from benchmarks.workers import Answer

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# What cpc_fast asks for beside torch, triton and numpy, and what comes with that.
BEYOND = (
    "PIL", "click", "imageio", "jaxtyping", "joblib", "rich", "safetensors", "scipy", "skimage", "sklearn", "tifffile",
    "typer",
)  # fmt: skip


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """In a fresh Python, as where only torch, triton and numpy are installed: nothing of ours on the path, no
    interpreter chosen yet."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({BEYOND}))\n")
    given = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    given["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600, check=False)


def test_dry_run_reaches_its_end(tmp_path):
    done = run(tmp_path, "--out", str(tmp_path), "--dry", "--only", "8192", "--only", "bf16")
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
    done = run(tmp_path, "tune", "forward", "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(present)" in done.stdout


@pytest.mark.parametrize(("d", "dtype", "largest"), [(256, "float32", 64), (640, "bfloat16", 512)])
def test_tiles_that_nothing_passes_through_are_not_tuned(capsys, d, dtype, largest):
    given = argparse.Namespace(op="backward", d=d, dtype=dtype, n=64, minutes=0.0, dry=True)
    assert gpu_check.tune(given) == 2
    assert f"{dtype} inputs of more than {largest} features" in capsys.readouterr().err


def test_a_tile_that_does_not_compile_leaves_the_bench_standing(monkeypatch):
    from triton.runtime.errors import OutOfResources

    given = ("forward", cases.Case("tune", 24, 24, 16), not torch.cuda.is_available())
    present, _ = gpu_work.present_tile(*given)
    bench = gpu_work.bench(*given)

    def step():
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr(bench, "step", step)
    try:
        ms, why = gpu_work.try_tile(*given, present)
        assert ms is None
        assert why.startswith("OutOfResources: out of resource: shared memory")
        monkeypatch.undo()
        assert gpu_work.try_tile(*given, present)[0] is not None
    finally:
        setattr(bench.holder, bench.attribute, bench.original)


def test_small_shapes_are_ready_for_the_sanitizer(tmp_path):
    done = run(tmp_path, "sanitize", "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed ") == 5
    assert "dry run: clean" in done.stdout


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(tmp_path, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "--dry" in done.stderr


def test_what_launchers_are_built_with_is_looked_for_first(monkeypatch):
    monkeypatch.setenv("CC", "true")  # a compiler that finds everything
    assert gpu_check.lacks() == ""
    monkeypatch.setenv("CC", "false")  # a compiler that finds nothing
    assert "false finds no Python.h" in gpu_check.lacks()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "a C compiler, and there is none" in gpu_check.lacks()


class Silent:
    """A worker that answers everything in the same way."""

    def __init__(self, answer):
        self.answer = answer

    def ask(self, seconds, function, *given):
        return self.answer


@pytest.fixture
def book(tmp_path):
    environment = {"device": "a chip", "commit": "0123abcd", "torch": "2.13.0", "triton": "3.9.0", "date": "2026-01-01"}
    return Ledger(tmp_path / "a-chip.json", environment)


@pytest.mark.parametrize("kind", ["late", "died", "raised"])
def test_a_step_without_an_answer_is_a_recorded_fault(book, kind):
    worker, case = Silent(Answer(kind, "nothing heard for 30 s")), cases.find("dense 8192, D 256")
    assert gpu_check.check_end_to_end(worker, True, book, gpu_check.Budget(1.0)) == 2
    assert gpu_check.check_case(case, worker, True, book, gpu_check.Budget(1.0), {}) == 1
    told = json.loads(book.path.read_text())
    assert len(told["end_to_end"]) == 2
    for record in (*told["end_to_end"].values(), told["cases"][case.name]):
        (row,) = record["rows"]
        assert (row["ours"], row["status"], row["why"]) == (True, "failed", f"{kind}: nothing heard for 30 s")
    assert "nothing heard" in book.table()
    assert "nothing heard" in report.of_device(told)
    assert report.summary([told])
    assert report.targets(told)


def test_whoever_breaks_a_case_is_recorded_and_ours_is_missed(book):
    worker, case = Silent(Answer("died", "exit code 7", "Liger")), cases.find("dense 8192, D 256")
    assert gpu_check.check_case(case, worker, True, book, gpu_check.Budget(1.0), {}) == 1
    rows = book.told["cases"][case.name]["rows"]
    assert [(row["provider"], row["ours"]) for row in rows] == [("Liger", False), ("ours", True)]


def test_cases_come_first_that_no_run_of_the_same_code_has(tmp_path, book, monkeypatch):
    a, b, c = cases.for_gpu()[:3]
    for case, commit in ((a, "0123abcd"), (b, "4567cdef")):
        book.add("cases", case.name, {"environment": book.told["environment"] | {"commit": commit}, "rows": []})
    order = []
    monkeypatch.setattr(cases, "for_gpu", lambda: [a, b, c])
    monkeypatch.setattr(gpu_check, "Worker", lambda *_: contextlib.nullcontext(Silent(Answer("done", told))))
    monkeypatch.setattr(gpu_check, "compile_ahead", lambda _, measured, budget: order.extend(measured))
    monkeypatch.setattr(gpu_check, "check_case", lambda case, *_: order.append(case) or 0)
    for name in ("find_ceilings", "check_correctness", "check_end_to_end"):
        monkeypatch.setattr(gpu_check, name, lambda *_: 0)
    monkeypatch.setattr(Ledger, "table", lambda _: "")
    told = book.told["environment"]
    given = argparse.Namespace(minutes=1.0, dry=False, out=tmp_path, only=[], jobs=1)
    assert gpu_check.check(given) == 0
    assert order == [b, c, a, b, c, a]


def test_compiling_ahead_names_what_broke_and_goes_on(monkeypatch, capsys):
    a, b, c = cases.for_gpu()[:3]
    answers = [(a, Answer("died", "exit code 7", "Liger")), (b, Answer("late", "not begun")), (c, Answer("raised", ""))]
    monkeypatch.setattr(gpu_check, "spread", lambda *_: answers)
    gpu_check.compile_ahead(argparse.Namespace(jobs=2, dry=False), [a, b, c], gpu_check.Budget(1.0))
    assert capsys.readouterr().out == f"compiling {a.name}: Liger died\n"


def test_a_run_that_reaches_no_probe_keeps_what_another_found(book):
    worker, args = Silent(Answer("done", probes("a"))), argparse.Namespace(dry=True, jobs=1)
    book.add("correctness", None, {"passed": 7, "failed": 0, "not_reached": 0, "rows": []})
    assert gpu_check.check_correctness(args, worker, book, gpu_check.Budget(0.0)) == 0
    assert json.loads(book.path.read_text())["correctness"]["passed"] == 7


def probes(names):
    return [argparse.Namespace(name=name) for name in names]


@pytest.mark.parametrize(
    ("there", "here", "kept"),
    [
        ("0123abcd", "0123abcd", 3),
        ("4567cdef", "0123abcd", 1),
        ("0123abcd+", "0123abcd+", 1),
        ("unknown", "unknown", 1),
    ],
)
def test_a_shorter_run_adds_to_what_one_of_the_same_code_found(book, there, here, kept, monkeypatch):
    book.told["environment"]["commit"] = here
    environment = {"commit": there, "torch": "2.13.0", "triton": "3.9.0"}
    names, statuses = ("a", "b", "c", "the list of probes"), ("passed", "failed", "passed", "late")
    earlier = [{"probe": name, "status": status} for name, status in zip(names, statuses, strict=True)]
    book.add("correctness", None, {"passed": 2, "failed": 2, "rows": earlier, "environment": environment})
    found = [(probes("b")[0], Answer("done", {"probe": "b", "status": "passed"}))]
    monkeypatch.setattr(gpu_check, "spread", lambda *_: found)
    worker, args = Silent(Answer("done", probes("abcd"))), argparse.Namespace(dry=True, jobs=1)
    assert gpu_check.check_correctness(args, worker, book, gpu_check.Budget(1.0)) == 0
    told = json.loads(book.path.read_text())["correctness"]
    assert (told["passed"], told["failed"], told["not_reached"]) == (kept, 0, 4 - kept)
    assert len(told["rows"]) == kept


def test_no_minutes_left_is_no_fault(book):
    worker = Silent(Answer("done", None))
    assert gpu_check.check_end_to_end(worker, True, book, gpu_check.Budget(0.0)) == 0
    assert "end_to_end" not in book.told


def test_who_does_not_compile_ahead_keeps_nobody_else_from_it(monkeypatch):
    built = []

    def build(name, case, device):
        built.append(name)
        raise RuntimeError("no such compiler")

    case = cases.find("dense 8192, D 256")
    chunked, ours, peer = (
        providers.Provider(name, functools.partial(build, name), compiles=compiles)
        for name, compiles in (("ours: chunked", False), ("ours: triton", False), ("a peer", True))
    )
    monkeypatch.setitem(providers.PROVIDERS, case.op, (chunked, ours, peer))
    monkeypatch.setattr(gpu_work, "device", lambda dry: torch.device("cpu"))
    for interpreted, tried in (("0", ["ours: triton", "a peer"]), ("1", ["ours: triton"])):
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        built.clear()
        gpu_work.compile_case(case)
        assert built == tried
    assert gpu_work.wanted(peer, case, dry=False)
    assert not gpu_work.wanted(peer, case, dry=True)
