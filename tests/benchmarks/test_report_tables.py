"""The tables and plots in README.md and docs are those that the committed results make."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks import plots, report
from benchmarks.cases import CASES

ROOT = Path(__file__).parents[2]
ROW = {"status": "ok", "quartiles_ms": [1.0, 3.0], "rounds": 5, "errors": {"loss": 1e-7}, "extra_mb": 12.5}
ENVIRONMENT = {
    "device": "A chip, 2 threads",
    "commit": "0123abcd",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "date": "2026-01-01",
    "threads": 2,
}


def make_told(**environment):
    """The results of a device that does not exist."""
    records = {}
    for case in CASES[:3]:
        rows = [
            ROW | {"provider": "ours: chunked", "ours": True, "median_ms": 2.0, "ratio": 1.0},
            ROW | {"provider": "eager", "ours": False, "median_ms": 5.0, "ratio": 2.5, "extra_mb": 800.0},
            ROW | {"provider": "torch.compile", "ours": False, "median_ms": 1.5, "ratio": 0.75},
            {"provider": "Liger", "ours": False, "status": "wrong", "why": "dq off by 3.0e-01", "errors": {"dq": 0.3}},
            {"provider": "Inf-CL", "ours": False, "status": "unavailable", "why": "needs a GPU"},
        ]
        records[case.name] = {"case": case.to_json(), "environment": ENVIRONMENT | environment, "rows": rows}
    series = {"ms": [1.0, 2.0, 4.0], "extra_mb": [1.0, 2.0, 4.0], "time_exponent": 1.0, "memory_exponent": 1.0}
    sweep = {"axis": "N = M", "sizes": [1024, 2048, 4096], "series": {"ours: chunked": series, "eager": series}}
    return {
        "device": "A chip, 2 threads",
        "environment": ENVIRONMENT | environment,
        "ceilings": {"copy_gb_s": 20.0, "matmul_tflop_s": {"float32": 0.2}},
        "cases": records,
        "scaling": {"dense, N = M": sweep | {"scores_mb": [4.0, 16.0, 64.0]}},
    }


def test_nothing_is_stale():
    """`python -m benchmarks.report` writes what is missing here."""
    stale = [
        str(path.relative_to(ROOT))
        for path, told in report.render().items()
        if not path.exists() or path.read_text() != told
    ]
    assert not stale, f"stale: {', '.join(stale)}; run `python -m benchmarks.report`"


def test_no_plot_is_left_over():
    wanted = {path for path in report.render() if path.suffix == ".svg"}
    assert set((ROOT / "docs" / "plots").glob("*.svg")) <= wanted


def test_a_changed_result_makes_a_file_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "a-chip.json").write_text(json.dumps(make_told()))
    before = report.measured(report.load())
    changed = make_told()
    changed["cases"][CASES[0].name]["rows"][0]["median_ms"] = 1.9
    (tmp_path / "a-chip.json").write_text(json.dumps(changed))
    assert report.measured(report.load()) != before


def test_tables_tell_who_wins_and_who_is_wrong():
    told = make_told()
    short, long = report.summary([told]), report.measured([told])
    assert "Another is faster on: dense 8192, D 256 (torch.compile, 1.33x)" in short
    assert "**0.8x**" in short
    assert "GPU: not measured" in short
    assert "wrong: dq off by 3.0e-01" in long
    assert "needs a GPU" not in long  # what cannot run here is no row
    assert "commit 0123abcd" in long
    assert "not measured" in report.targets(told)
    assert "GPU: not measured" not in report.summary([make_told(cuda="13.0")])


def test_the_fastest_of_ours_is_compared_by_its_own_time():
    told = make_told()
    for record in told["cases"].values():
        seeded = ROW | {"provider": "ours: triton", "ours": True, "median_ms": 1.0, "ratio": 0.5}
        record["rows"].append(seeded)
    short = report.summary([told])
    assert "**1.5x**" in short  # 1.5 ms for 1 ms; the other of ours takes 2
    assert "Ours is the fastest in every case measured." in short
    for record in told["cases"].values():
        record["rows"][2] |= {"median_ms": 0.8, "ratio": 0.4}
    assert "(torch.compile, 1.25x)" in report.summary([told])


def test_without_ceilings_there_are_times_and_no_shares():
    told = make_told()
    del told["ceilings"]
    assert "Ceilings: not measured." in report.measured([told])
    assert "| 2 ms |" in report.measured([told])
    assert {name.split("threads-")[1] for name in report.drawn(told)} == {"speedup.svg", "memory.svg"}


def test_predictions_are_taken_over_and_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "PREDICTIONS", tmp_path / "predictions.json")
    assert report.predicted().startswith("Not predicted yet")
    kernel = {"arch": "sm_90", "name": "forward D=256 bf16", "tile": [128, 64], "warps": 8, "registers": 254,
              "stack": 0, "shared": 163_840, "matrix": {"HGMMA": 20}, "loop": 714, "blocks": 1}  # fmt: skip
    case = {"arch": "sm_90", "case": "CLIP 32k, D 256", "op": "forward", "bound": "matrix",
            "matrix": 1.1118, "exp": 0.29, "issue": 0.81, "L2": 0.78, "HBM": 0.02}  # fmt: skip
    (tmp_path / "told.json").write_text(json.dumps({"reports": [kernel], "predictions": [case]}))
    report.take_predictions(tmp_path / "told.json")
    told = report.predicted()
    assert "| CLIP 32k, D 256 | forward | 1.11 matrix (0.81) |" in told
    assert "| forward D=256 bf16 | 128x64 | 8 | 254 | 0 | 163,840 | 20 HGMMA | 714 | 1 |" in told


def test_every_tile_is_in_the_table():
    assert "| forward, 16 bits, D <= 256 | 64x32/8/3 |" in report.tile_table()


@pytest.mark.parametrize("name", ["speedup", "memory", "share-of-peak", "roofline"])
def test_plots_are_svg(name):
    picture = report.drawn(make_told())[f"a-chip-2-threads-{name}.svg"]
    root = ElementTree.fromstring(picture)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    numbers = [float(n) for n in re.findall(r'(?:x|y|cx|cy)="(-?[\d.]+)"', picture)]
    assert all(0 <= n <= 700 for n in numbers), "something is drawn outside the picture"


def test_ticks_are_few():
    assert plots.ticks(1, 1000, 10) == [1, 10, 100, 1000]
    assert len(plots.ticks(1, 1e12, 2)) <= 9


def test_markers_are_required(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match=r"page.md needs a line <!-- x:start -->"):
        report.between(page, "x", "")
