"""Compiles every Triton tile with no GPU at hand, reads what came out, and refuses what would run badly.

    python -m benchmarks.aot [--arch sm_90 ...] [--only REGEX] [--module cpc_kernels.triton_info_nce ...] [--json FILE]

For each entry of the tile table: registers, stack, shared and tensor memory, matrix instructions, blocks per
multiprocessor, instructions of the loop around the products, and the seconds of processor time that it took; then, for
named cases, the time that each unit alone would need (a PREDICTION, no measurement).
Exits 1 past a gate: stack 0, no spills, registers <= 255 (gfx942: 512), shared and tensor memory within the chip's,
matrix instructions of the chip's own kind, none that waits for the one before it, no float64 arithmetic. On gfx942
stack is scratch memory, as the metadata of the code object says. A compiled entry is remembered until its source, its
constants or Triton change.

A kernel module takes part by offering `aot_entries(arch) -> Iterator[cpc_kernels.tiles.Entry]`.
"""

import argparse
import concurrent.futures
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from .cases import CASES

MODULES = ("cpc_kernels.triton_info_nce", "cpc_kernels.triton_sampled_info_nce")
PRODUCTS = r"HMMA|HGMMA|UTC\w*MMA|IMMA|QGMMA"
# the user's, not the checkout's: what is known holds for every checkout with the same source
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cpc_fast" / "aot"


class Chip(NamedTuple):
    """One target: what its compiler is called, its limits, and the rates behind the predictions (data sheets)."""

    backend: str
    arch: int | str
    warp: int
    shared: int  # bytes a block may have
    shared_total: int  # bytes a multiprocessor has
    matrix: str  # the instruction that must be there, as a regular expression
    registers: int = 255  # a thread may have
    units: int = 0  # multiprocessors
    ghz: float = 0.0
    tflops: float = 0.0  # dense bf16
    l2: float = 0.0  # TB/s
    hbm: float = 0.0  # TB/s


CHIPS = {
    "sm_80": Chip("cuda", 80, 32, 166_912, 167_936, r"HMMA", 255, 108, 1.41, 312, 4.0, 1.9),
    "sm_86": Chip("cuda", 86, 32, 101_376, 102_400, r"HMMA"),
    "sm_90": Chip("cuda", 90, 32, 232_448, 233_472, r"HGMMA", 255, 132, 1.755, 989, 5.5, 3.35),
    "sm_100": Chip("cuda", 100, 32, 232_448, 233_472, r"UTC\w*MMA", 255, 148, 1.85, 2250, 9.0, 8.0),
    "gfx942": Chip("hip", "gfx942", 64, 65_536, 65_536, r"v_mfma", 512),
}


@dataclass
class Report:
    """What one compiled entry is made of."""

    arch: str
    name: str
    op: str
    warps: int
    tile: tuple[int, int]
    needs_matrix: bool
    error: str = ""
    registers: int = 0
    stack: int = 0  # bytes of local memory (AMD: scratch) of a thread
    spills: int = 0  # loads and stores of local memory; AMD: registers spilled
    shared: int = 0
    tensor_memory: int = 0
    matrix: dict[str, int] = field(default_factory=dict)
    doubles: int = 0
    waits: int = 0  # WARPGROUP instructions: a few, or two for each product where ptxas lets them wait for each other
    instructions: int = 0
    loop: int = 0  # of these, in the innermost loop with a product; rarely taken branches count, too
    blocks: int = 0  # per multiprocessor
    seconds: float = 0.0  # of processor time, to compile and read it

    def failures(self) -> list[str]:
        """The gates this entry does not pass."""
        chip = CHIPS[self.arch]
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.stack or self.spills:
            kind = "local loads and stores" if chip.backend == "cuda" else "registers"
            found.append(f"spills (stack {self.stack} bytes, {self.spills} {kind})")
        if self.registers > chip.registers:
            found.append(f"{self.registers} registers, {chip.registers} allowed")
        if self.shared > chip.shared:
            found.append(f"{self.shared} bytes of shared memory, {chip.shared} allowed")
        if self.tensor_memory > 512:
            found.append(f"{self.tensor_memory} columns of tensor memory, 512 allowed")
        # a warpgroup's product has 64 rows; with fewer, the warp's own instruction is the right one
        kind = chip.matrix if self.tile[0] >= 64 else f"{chip.matrix}|HMMA"
        if self.needs_matrix and not any(re.fullmatch(kind, name) for name in self.matrix):
            found.append(f"no {kind} instruction, only {self.matrix or 'none'}")
        if self.waits > sum(self.matrix.values()):
            found.append(f"products that wait for each other ({self.waits} WARPGROUP instructions)")
        if self.doubles:
            found.append(f"{self.doubles} float64 instructions")
        return found


@functools.cache
def entries(module: str, arch: str) -> dict:
    found = {}
    for entry in importlib.import_module(module).aot_entries(arch):
        if entry.name in found:
            raise ValueError(f"{module}.aot_entries({arch!r}) names {entry.name!r} twice.")
        found[entry.name] = entry
    return found


def fingerprint(entry, arch: str) -> str:
    import triton

    reading = map(inspect.getsource, (Report, _compile, _read_cubin, _loop, _read_amdgcn))
    told = (triton.__version__, entry.kernel.cache_key, arch, *map(str, entry[:1] + entry[2:]), *reading)
    return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def compile_entry(module: str, arch: str, name: str) -> Report:
    """Compiles one entry and reads its machine code."""
    entry = entries(module, arch)[name]
    tile = (entry.tile.rows, entry.tile.columns) if entry.tile else (0, 0)
    report = Report(arch, name, name.split()[0], entry.options["num_warps"], tile, entry.matrix)
    began = sum(os.times()[:4])  # ptxas and cuobjdump run as children
    _compile(entry, CHIPS[arch], report)
    report.seconds = round(sum(os.times()[:4]) - began, 2)
    return report


def _compile(entry, chip: Chip, report: Report) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = entry.kernel.arg_names
    signature = {a: "constexpr" if a in entry.constexprs else entry.signature[a] for a in names}
    attributes = {(names.index(a),): [["tt.divisibility", 16]] for a in entry.divisible}
    try:
        source = ASTSource(entry.kernel, signature, dict(entry.constexprs), attributes)
        target = GPUTarget(chip.backend, chip.arch, chip.warp)
        built = compile(source, target=target, options=dict(entry.options))
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        report.error = lines[-1][:200]
        return
    report.shared = built.metadata.shared
    report.tensor_memory = getattr(built.metadata, "tmem_size", None) or 0
    if chip.backend == "hip":
        _read_amdgcn(report, built.asm["amdgcn"])
    else:
        _read_cubin(report, built.asm["cubin"])
        threads = 32 * report.warps
        per_thread = max(8, math.ceil(report.registers / 8) * 8)
        by_shared = chip.shared_total // (report.shared + 1024)
        report.blocks = min(65_536 // (per_thread * threads), by_shared, 2048 // threads)


def _read_amdgcn(report: Report, text: str) -> None:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    report.registers = number("vgpr_count")
    report.stack = number("private_segment_fixed_size")
    report.spills = number("vgpr_spill_count")
    report.matrix = _count(re.findall(r"\b(v_mfma)_", text))
    report.doubles = len(re.findall(r"\bv_\w+_f64\b", text))


def _read_cubin(report: Report, cubin: bytes) -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    report.registers = int(re.search(r"REG:(\d+)", usage)[1])
    report.stack = int(re.search(r"STACK:(\d+)", usage)[1])
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)([^;]*);", code, re.MULTILINE)
    plain = [name for _, name, _ in lines]
    report.instructions = len(plain)
    report.spills = sum(name in ("STL", "LDL") for name in plain)
    report.waits = plain.count("WARPGROUP")
    report.loop = _loop(lines)
    report.doubles = sum(name in ("DADD", "DMUL", "DFMA", "DSETP", "DMMA", "DMNMX") for name in plain)
    report.matrix = _count(name for name in plain if re.fullmatch(PRODUCTS, name))


def _loop(lines: list[tuple[str, str, str]]) -> int:
    """Instructions of the shortest loop with a product, of (address, name, operands); 0 without one."""
    at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    end = max((i for i, (_, name, _) in enumerate(lines) if name == "EXIT"), default=len(lines))
    found = []
    # behind the end lie stubs that wait, and jump back into the middle
    for i, (_, name, operands) in enumerate(lines[:end]):
        to = re.search(r"0x([0-9a-f]+)\s*$", operands) if name == "BRA" else None
        start = at.get(int(to[1], 16), i) if to else i
        if start < i and any(re.fullmatch(PRODUCTS, other) for _, other, _ in lines[start:i]):
            found.append(i + 1 - start)
    return min(found, default=0)


def _count(names) -> dict[str, int]:
    total: dict[str, int] = {}
    for name in names:
        total[name] = total.get(name, 0) + 1
    return total


def compile_all(tasks: list[tuple[str, str, str]], jobs: int, cache: Path | None) -> list[Report]:
    """Reports in the order of the tasks; what the cache knows is not compiled again."""
    known: dict[int, Report] = {}
    files: dict[int, Path] = {}
    for i, (module, arch, name) in enumerate(tasks):
        if cache is not None:
            files[i] = cache / f"{fingerprint(entries(module, arch)[name], arch)}.json"
            if files[i].exists():
                told = json.loads(files[i].read_text())
                known[i] = Report(**told | {"tile": tuple(told["tile"])})
    todo = [i for i in range(len(tasks)) if i not in known]
    # the slow ones first, so that the last seconds are shared
    todo.sort(key=lambda i: ("fp32" in tasks[i][2] or "tf32" in tasks[i][2], "512" in tasks[i][2]), reverse=True)
    if todo:
        with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(compile_entry, *tasks[i]): i for i in todo}
            for done in concurrent.futures.as_completed(futures):
                i = futures[done]
                known[i] = done.result()
                if cache is not None and not known[i].error:
                    cache.mkdir(parents=True, exist_ok=True)
                    files[i].write_text(json.dumps(asdict(known[i])))
    return [known[i] for i in range(len(tasks))]


def table(reports: list[Report]) -> str:
    built = ("regs", "stack", "shared", "tmem", "matrix", "instr", "loop", "blocks/SM", "seconds")
    head = ("target", "entry", "tile", "warps", *built, "")
    rows = [head]
    for r in reports:
        matrix = " ".join(f"{count} {name}" for name, count in r.matrix.items()) or "-"
        built = (r.registers, r.stack, r.shared, r.tensor_memory, matrix, r.instructions, r.loop or "-")
        numbers = (r.warps, *built, r.blocks or "-", r.seconds)
        verdict = "; ".join(r.failures()) or "ok"
        rows.append((r.arch, r.name, f"{r.tile[0]}x{r.tile[1]}", *map(str, numbers), verdict))  # pyright: ignore[reportArgumentType]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)


def predictions(reports: list[Report]) -> list[dict]:
    """Milliseconds that each unit alone would need for a dense case, and which of them bounds it. Data-sheet rates."""
    found = []
    for chip_name, chip in CHIPS.items():
        of_chip = {r.name: r for r in reports if r.arch == chip_name}
        for case in CASES if chip.tflops else ():
            if case.op != "dense" or case.dtype != "bfloat16" or case.learns == "clip":  # two calls of the same
                continue
            for op, products in (("scores", 1), ("forward", 2), ("backward", 2)):
                if op == "backward" and case.learns == "anchors":
                    continue
                bucket = max(64, 1 << (case.d - 1).bit_length())
                names = (f"{op}{ids} D={bucket} bf16{how}" for ids in ("", "+ids") for how in (" tma", ""))
                kernel = next((of_chip[name] for name in names if name in of_chip), None)
                if kernel is None:
                    continue
                rows, streamed = (case.m, case.n) if op == "backward" else (case.n, case.m)
                written = rows * case.d * (0 if op == "scores" else 4 if op == "forward" else 2)
                times = {
                    "matrix": 2 * products * case.scores * bucket / (chip.tflops * 1e12),
                    "exp": case.scores / (16 * chip.units * chip.ghz * 1e9),
                    "L2": math.ceil(rows / kernel.tile[0]) * streamed * case.d * 2 / (chip.l2 * 1e12),
                    "HBM": (2 * (case.n + case.m) * case.d + written) / (chip.hbm * 1e12),
                }
                bound = max(times, key=times.__getitem__)
                # no lower bound: branches count that are rarely taken
                issued = case.scores / math.prod(kernel.tile) * kernel.loop * kernel.warps / 4
                times["issue"] = issued / (chip.units * chip.ghz * 1e9)
                found.append({"arch": chip_name, "case": case.name, "op": op, "kernel": kernel.name, "bound": bound}
                             | {unit: 1e3 * t for unit, t in times.items()})  # fmt: skip
    return found


UNITS = ("matrix", "exp", "issue", "L2", "HBM")


def prediction_table(rows: list[dict]) -> str:
    width = max(len(r["case"]) for r in rows) + 2
    lines = ["PREDICTION, not measured: ms that each unit alone would need (data-sheet rates; a kernel adds up)",
             f"{'target':8}{'case':{width}}{'op':10}{''.join(f'{unit:>8}' for unit in UNITS)}  bound"]  # fmt: skip
    for r in rows:
        times = "".join(f"{r[unit]:8.3f}" for unit in UNITS)
        lines.append(f"{r['arch']:8}{r['case']:{width}}{r['op']:10}{times}  {r['bound']}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--arch", action="append", choices=[*CHIPS], help="targets, sm_90 or 90 for short (default: all)",
        type=lambda name: f"sm_{name}" if f"sm_{name}" in CHIPS else name,
    )  # fmt: skip
    parser.add_argument("--module", action="append", help="kernel modules (default: those of cpc_kernels)")
    parser.add_argument("--only", default="", metavar="REGEX", help="only entries in whose name this is found")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--no-cache", action="store_true", help="compile everything again")
    parser.add_argument("--json", type=Path, help="also write the reports and predictions there")
    args = parser.parse_args(arguments)
    # interpreted kernels cannot be compiled; Triton reads this when it is first imported
    os.environ.pop("TRITON_INTERPRET", None)
    modules = args.module or [m for m in MODULES if importlib.util.find_spec(m)]
    tasks = [
        (module, arch, name)
        for arch in args.arch or CHIPS
        for module in modules
        if hasattr(importlib.import_module(module), "aot_entries")
        for name in entries(module, arch)
        if re.search(args.only, name)
    ]
    reports = compile_all(tasks, args.jobs, None if args.no_cache else CACHE)
    print(table(reports), end="\n\n")
    predicted = predictions(reports)
    if predicted:
        print(prediction_table(predicted), end="\n\n")
    if args.json:
        told = {"reports": [asdict(r) for r in reports], "predictions": predicted}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    failed = [r for r in reports if r.failures()]
    for r in failed:
        print(f"aot: {r.arch} {r.name}: {'; '.join(r.failures())}", file=sys.stderr)
    spent = sum(r.seconds for r in reports)
    print(
        f"{len(reports)} entries compiled, {len(failed)} past a gate; compiling took {spent:.0f} s of processor time."
    )
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
