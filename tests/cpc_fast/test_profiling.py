"""`cpc-fast profile` and the names in its traces."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from samples import SET_TINY, make_set, texture
from torch.profiler import record_function

from cpc_fast import cli
from cpc_fast.detector import Detector
from cpc_fast.profiling import PHASES, bracket, profile
from cpc_fast.stages import stage

TRAINING = {
    "batch",
    "shifts",
    "patches",
    "latents",
    "contexts",
    "predictions",
    "loss",
    "accuracy",
    "backward",
    "weights",
}
SCORING = {"surprise", "patches", "latents", "contexts", "predictions", "loss", "anomaly map", "segments"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    options = [*SET_TINY, "--set", "shifts=noise", "--set", "shift_copies=1"]
    assert cli.run(["fit", str(make_set(folder / "data")), "--out", str(folder / "run"), *options]) == 0
    return folder


def test_every_stage_of_the_flow_is_timed_and_the_run_is_not_changed(fitted, tmp_path):
    detector = Detector.load(fitted / "run")
    before = {name: value.clone() for name, value in detector.model.state_dict().items()}
    found = profile(detector, [texture(i) for i in range(3)], tmp_path / "trace.json", steps=2)
    for phase, stages in zip(PHASES, (TRAINING, SCORING), strict=True):
        whole, *rows = [row for row in found.rows if row.phase == phase]
        assert (whole.name, whole.depth, whole.share) == (phase, -1, 1.0)
        assert {row.name for row in rows} == stages | {"the rest"}
        own = [row for row in rows if row.depth == 0]
        assert sum(row.ms for row in own) == pytest.approx(whole.ms)
        assert sum(row.share for row in own) == pytest.approx(1)
        assert all(0 <= row.ms <= whole.ms for row in rows)
    by_name = {row.name: row for row in found.rows if row.phase == PHASES[0]}
    assert by_name["latents"].left_mb > 0  # what backward needs
    assert by_name["backward"].left_mb < 0
    assert {row.name for row in found.rows if row.depth == 1} == {
        "patches",
        "latents",
        "contexts",
        "predictions",
        "loss",
    }
    assert len(found.operators) == 8
    after = detector.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    trace = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {f"cpc_fast/{name}" for name in TRAINING | SCORING} <= names


def test_the_command_prints_the_stages_and_says_what_is_amiss(fitted, tmp_path, capsys):
    run, out = str(fitted / "run"), str(tmp_path / "t.json")
    assert cli.run(["profile", run, "--out", out, "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("Training step: 4 images", "Scoring an image of 48 x 48", "anomaly map", out))
    for arguments, word in (
        (["profile"], "needs a RUN, or --demo"),
        (["profile", run, "--demo"], "and not both"),
        (["profile", run, "--out", str(tmp_path / "t.txt")], "ends in .json"),
        (["profile", run, "--nsys", "--device", "cpu"], "--nsys needs a GPU"),
        (["profile", str(tmp_path)], "run fit first"),
    ):
        assert cli.run(arguments) in (1, 2)
        assert word in capsys.readouterr().err
    (fitted / "data").rename(fitted / "moved")
    assert cli.run(["profile", run, "--out", out]) == 2
    assert "Name others with --data" in capsys.readouterr().err
    assert cli.run(["profile", run, "--out", out, "--data", str(fitted / "moved"), "--steps", "1"]) == 0


def test_torchs_profiler_says_nothing_of_itself(fitted, tmp_path):
    command = [sys.executable, "-m", "cpc_fast.cli", "profile", str(fitted / "run"), "--steps", "1"]
    data = next(path for path in (fitted / "data", fitted / "moved") if path.exists())
    more = ["--out", str(tmp_path / "t.json"), "--data", str(data)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "USDT" not in done.stdout


def test_for_nsys_the_warm_steps_lie_between_start_and_stop(fitted, monkeypatch):
    """The calls that need a GPU are replaced: only their order shows here."""
    said, taken = [], record_function

    class Listening(contextlib.nullcontext):
        def __enter__(self):
            said.append("ranges")

    def named(name):
        said.append(name)
        return taken(name)

    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: said.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: said.append("stop"))
    monkeypatch.setattr(torch.autograd.profiler, "emit_nvtx", Listening)
    monkeypatch.setattr("cpc_fast.profiling.record_function", named)
    bracket(Detector.load(fitted / "run"), [texture(0)], steps=1)
    assert said == ["start", "ranges", *(f"cpc_fast/{phase}" for phase in PHASES), "stop"]


def test_a_stage_costs_nothing_when_nobody_listens_and_breaks_no_graph():
    class Nothing:
        def __enter__(self):
            raise AssertionError

    double = stage("double")(lambda x: 2 * x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.profiler, "record_function", lambda name: Nothing())
        assert double(torch.ones(2)).tolist() == [2, 2]
    code = "import torch; from cpc_fast.stages import stage; f = torch.compile(stage('x')(lambda x: 2 * x), "
    code += "fullgraph=True, backend='eager'); print(f(torch.ones(1)).item())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout == "2.0\n"
