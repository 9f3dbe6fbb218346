"""The gates that need no GPU: tiles compile within the chip's limits, and a tile that spills is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import aot

ROOT = Path(__file__).parents[2]

PLANTED = """
import triton
import triton.language as tl
from cpc_kernels import tiles


@triton.jit
def greedy(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)
    x = tl.load(p_x + o)
    y = tl.load(p_x + B + o)
    for i in range(0, 100):
        x, y = x * 0.5 + tl.sum(y), y * 0.5 + tl.sum(x)
    tl.store(p_y + o, x + y)


@triton.jit
def modest(p_x, p_y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(p_y + o, tl.load(p_x + o) + 1.0)


def aot_entries(arch):
    for name, kernel, size in (("greedy", greedy, 65536 if arch == "gfx942" else 16384), ("modest", modest, 128)):
        signature = {"p_x": "*fp32", "p_y": "*fp32"}
        yield tiles.Entry(name, kernel, signature, {"B": size}, {"num_warps": 4}, tuple(signature), matrix=name == "x")
"""


def run(*arguments, path=()):
    """In a process of its own: this one may have Triton's interpreter in it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "benchmarks.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_every_tile_holds_its_gates_on_every_target():
    """`make aot`: minutes the first time, then it knows what it compiled. -s shows the table."""
    done = run("--jobs", "2")
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    found = re.search(r"(\d+) entries compiled, 0 past a gate", done.stdout)
    assert found, done.stdout
    assert int(found[1]) > 250
    for target in aot.CHIPS:
        for kernel in ("forward+ids", "backward+ids", "steps_backward", "gathered_forward", "segments"):
            assert re.search(rf"^{target} +{re.escape(kernel)} ", done.stdout, re.MULTILINE), (target, kernel)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_a_tile_that_spills_is_refused(tmp_path, arch):
    (tmp_path / "planted.py").write_text(PLANTED)
    options = ("--module", "planted", "--arch", arch, "--no-cache", "--jobs", "1")
    done = run(*options, path=[tmp_path])
    assert done.returncode == 1
    assert re.search(rf"aot: {arch} greedy: spills \(stack [1-9]", done.stderr)
    assert "modest" not in done.stderr
    assert "2 entries compiled, 1 past a gate" in done.stdout


def report(**changes):
    good = {"tile": (128, 64), "registers": 255, "shared": 232_448, "tensor_memory": 512, "matrix": {"HGMMA": 4}}
    known = {"arch": "sm_90", "name": "forward", "op": "forward", "warps": 8, "needs_matrix": True}
    return aot.Report(**known | good | changes)


def test_gates():
    assert report().failures() == []
    assert report(tile=(32, 64), matrix={"HMMA": 4}).failures() == []  # fewer rows than a warpgroup's product has
    for changes, words in (
        ({"stack": 8}, "spills"),
        ({"spills": 1}, "spills"),
        ({"registers": 256}, "256 registers"),
        ({"shared": 232_449}, "232449 bytes of shared memory"),
        ({"tensor_memory": 513}, "513 columns"),
        ({"matrix": {"HMMA": 4}}, "no HGMMA"),
        ({"matrix": {}}, "no HGMMA"),
        ({"waits": 8}, "wait for each other"),
        ({"doubles": 1}, "1 float64"),
        ({"error": "no"}, "does not compile: no"),
    ):
        [failure] = report(**changes).failures()
        assert words in failure
    amd = {"arch": "gfx942", "shared": 65_536, "tensor_memory": 0, "matrix": {"v_mfma": 4}}
    assert report(**amd, registers=512).failures() == []
    for changes, words in (({"stack": 4}, "stack 4 bytes"), ({"registers": 513}, "512 allowed")):
        [failure] = report(**amd | changes).failures()
        assert words in failure


def test_the_shortest_loop_with_a_product_counts():
    code = ["MOV", "IADD", "HGMMA", "BRA 0x10", "FADD", "BRA 0x40", "BRA 0x60", "BRA `(.L_1)", "BRA 0x0"]
    lines = [(f"{16 * i:04x}", *[*line.split(" ", 1), ""][:2]) for i, line in enumerate(code)]
    assert aot._loop(lines) == 3
    assert aot._loop(lines[3:]) == 0
    stub = [*lines, ("0090", "EXIT", ""), ("00a0", "SYNCS", ""), ("00b0", "BRA", "0x20")]
    assert aot._loop(stub) == 3
    assert aot._loop([*lines[:3], *stub[-3:]]) == 0


def test_predictions_name_the_bound():
    rows = aot.predictions([aot.Report("sm_90", "forward D=256 bf16", "forward", 8, (128, 64), True, loop=714)])
    clip = next(r for r in rows if r["case"] == "CLIP 32k, D 256")
    assert clip["bound"] == "matrix"
    assert 1.0 < clip["matrix"] < 1.2  # 4 NMD at 989 TFLOP/s
    assert 0.7 < clip["issue"] < 0.9  # 131,072 tiles of 714 instructions, two warps for each of 4 x 132 schedulers
    assert "not measured" in aot.prediction_table(rows)
