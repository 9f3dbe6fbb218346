"""One command for those who have a GPU: is it right there, how fast is it, and how fast are the others.

    python3 -m benchmarks.gpu_check --out DIR [--minutes 9]      from the root of a checkout, nothing installed
    python3 -m benchmarks.gpu_check --out DIR --dry              on a CPU, tiny shapes through Triton's interpreter
    python3 -m benchmarks.gpu_check tune forward --d 256         tile candidates of one op, the best to paste
    python3 -m benchmarks.gpu_check sanitize                     small shapes under NVIDIA's compute-sanitizer

Needs torch and triton (and numpy); peers are measured where they can be imported. In this order: the two ceilings (a
copy, matrix products), correctness of every op, the cases of `cases.py` by importance (compiled before, side by side),
one training step and the scoring of one image. DIR/<device>.json is written after each of them, so that a run that is
cut off keeps what it has; where it lies there already, cases that it has from the same code come last.
All of it runs in processes of their own: what crashes, hangs or runs out of memory is recorded as that, and the next
goes on; a case is tried again without the provider that broke it. Exits 1 when anything of ours is wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_work
from benchmarks.workers import Answer, Worker, spread

SHARE_CORRECTNESS, SHARE_COMPILING, SHARE_CASES = 0.35, 0.5, 0.8  # of the minutes, counted from the start
PROBE_SECONDS, LANE_SECONDS = 150.0, 100.0  # the longest that a probe (the first of a process imports, and compiles
# launchers), or a provider of a case, may take
OVER = "no minutes left"  # the only reason for a missing figure that is no fault
TUNED = ("forward", "scores", "backward", "gathered")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("verb", nargs="?", choices=("check", "tune", "sanitize"), default="check")
    parser.add_argument("op", nargs="?", choices=TUNED, help="for tune")
    parser.add_argument("--out", type=Path, help="folder of <device>.json")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU, through Triton's interpreter")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--only", action="append", default=[], help="cases whose name contains this")
    parser.add_argument("--d", type=int, default=256, help="for tune")
    parser.add_argument("--n", type=int, default=16384, help="for tune: anchors and candidates")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="for tune")
    args = parser.parse_args(arguments)
    gpu_work.prepare(args.dry)
    import torch

    if not args.dry and not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no GPU here. --dry runs tiny shapes through Triton's interpreter.", file=sys.stderr
        )
        return 2
    if not args.dry and (lacking := lacks()):
        print(f"gpu_check: Triton builds its launchers with {lacking}", file=sys.stderr)
        return 2
    if args.verb == "sanitize":
        return sanitize(args.dry)
    if args.verb == "tune":
        if not args.op:
            parser.error(f"tune needs an op: {', '.join(TUNED)}")
        return tune(args)
    if args.out is None:
        parser.error("--out DIR says where the results go")
    return check(args)


def lacks() -> str:
    """What Triton compiles its launchers with and does not find, and what helps; "" where nothing is lacking."""
    compiler = os.environ.get("CC", shutil.which("gcc") or shutil.which("clang"))
    if not (compiler and shutil.which(compiler)):
        return "a C compiler, and there is none. Install gcc, or set CC."
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton asks on Debian
    include = sysconfig.get_paths(scheme=scheme)["include"]
    command = [compiler, "-fsyntax-only", f"-I{include}", "-x", "c", "-"]
    done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    return (
        f"Python's headers, and {compiler} finds no Python.h in {include}. Install those of Python "
        f"{sys.version_info[0]}.{sys.version_info[1]} (python3-dev on Debian)."
    )


class Budget:
    """Seconds since the start against the minutes given."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes

    def left(self, share: float = 1.0) -> float:
        return share * self.seconds - (time.monotonic() - self.start)


def say(text: str) -> None:
    print(text, flush=True)


def check(args: argparse.Namespace) -> int:
    from benchmarks import cases, ledger

    budget, dry = Budget(args.minutes), args.dry
    with Worker(gpu_work.prepare, dry) as worker:
        answer = worker.ask(180, gpu_work.environment, dry)
        if answer.kind != "done":
            say(f"gpu_check: the device cannot be used: {answer.value}")
            return 1
        environment = answer.value
        name = ("dry-" if dry else "") + ledger.slug(environment["device"])
        book = ledger.Ledger(args.out / f"{name}.json", environment)
        say("{device}, torch {torch}, triton {triton}, {commit}".format(**environment))
        ceilings = find_ceilings(worker, dry, book)
        wrong = check_correctness(args, worker, book, budget)
        measured = [case for case in cases.for_gpu() if all(part in case.name for part in args.only)]
        earlier = {name: record["environment"] for name, record in book.told.get("cases", {}).items()}
        measured.sort(key=lambda case: same_code(earlier.get(case.name, {}), environment))
        compile_ahead(args, measured, budget)
        for i, case in enumerate(measured):
            if budget.left(SHARE_CASES) < 0:
                say(f"no time for {len(measured) - i} cases: {', '.join(c.name for c in measured[i:])}")
                break
            wrong += check_case(case, worker, dry, book, budget, ceilings)
        wrong += check_end_to_end(worker, dry, book, budget)

    say("\n" + book.table())
    say(f"\n{wrong} of ours wrong; {time.monotonic() - budget.start:.0f} s; written to {book.path}")
    return 1 if wrong else 0


def find_ceilings(worker: Worker, dry: bool, book) -> dict[str, Any]:
    answer = worker.ask(180, gpu_work.ceilings, dry)
    if answer.kind != "done":  # times are still worth having without them
        say(f"ceilings: not measured, {answer.value}")
        return {}
    found = answer.value
    book.add("ceilings", None, found | {"environment": book.told["environment"]})
    rates = ", ".join(f"{kind} {rate:.3g}" for kind, rate in found["matmul_tflop_s"].items())
    say(f"ceilings: copy {found['copy_gb_s']:.4g} GB/s; products in TFLOP/s: {rates}")
    return found


def check_correctness(args: argparse.Namespace, worker: Worker, book, budget: Budget) -> int:
    """The matrix, in several processes: most of the time is compilation."""
    listed = worker.ask(60, gpu_work.probes, args.dry)
    if listed.kind != "done":
        say(f"correctness: not checked, {listed.value}")
        row = {"probe": "the list of probes", "status": listed.kind, "why": listed.value}
        told = {"passed": 0, "failed": 1, "not_reached": 0, "rows": [row]}
        book.add("correctness", None, told | {"environment": book.told["environment"]})
        return 1
    probes, rows, earlier = listed.value, [], book.told.get("correctness", {})
    names = {probe.name for probe in probes}
    before = [row for row in earlier.get("rows", []) if row["probe"] in names]
    if not same_code(earlier.get("environment", {}), book.told["environment"]):
        before = []  # else of a run that may have come further than this one

    def seconds() -> float:
        return min(PROBE_SECONDS, budget.left(SHARE_CORRECTNESS))

    def write() -> dict[str, Any]:
        seen = {row["probe"] for row in rows}
        known = [row for row in before if row["probe"] not in seen] + rows
        told = counted(known, len(probes))
        if rows or not earlier:  # nothing does not replace what an earlier run found
            book.add("correctness", None, told | {"environment": book.told["environment"], "rows": known})
        return counted(rows, len(probes))

    jobs = 1 if args.dry else args.jobs
    for probe, answer in spread(jobs, probes, seconds, gpu_work.check_probe, gpu_work.prepare, args.dry):
        if answer.kind == "done":
            rows.append(answer.value)
        elif answer.value != "not begun" and budget.left(SHARE_CORRECTNESS) > 0:  # else only the minutes are over
            rows.append({"probe": probe.name, "status": answer.kind, "why": answer.value})
        write()
    summary = write()
    say("correctness: {passed} passed, {failed} failed, {not_reached} not reached".format(**summary))
    bad = [row for row in rows if row["status"] != "passed"]
    for row in bad:
        off = f" (error {row['error']:.1e}, allowed {row['allowed']:.1e})" if "error" in row else ""
        say(f"  {row['status']}: {row['probe']}: {row.get('why', '')}{off}")
    return len(bad)


def same_code(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two environments are of one commit, with nothing changed since, and of the same software below it."""
    known = here["commit"] != "unknown" and not here["commit"].endswith("+")
    keys = ("commit", "torch", "triton", "cuda", "driver")
    return known and all(there.get(key) == here.get(key) for key in keys)


def counted(rows: list[dict[str, Any]], probes: int) -> dict[str, int]:
    passed = sum(row["status"] == "passed" for row in rows)
    return {"passed": passed, "failed": len(rows) - passed, "not_reached": probes - len(rows)}


def failed(provider: str, answer: Answer) -> dict[str, Any]:
    """The row of one that gave no result; where nobody said who was at work, it counts as ours."""
    ours = not provider or provider.startswith("ours")
    return {
        "provider": provider or "ours", "ours": ours, "status": "failed", "why": f"{answer.kind}: {answer.value}"
    }  # fmt: skip


def compile_ahead(args: argparse.Namespace, measured: Sequence[Any], budget: Budget) -> None:
    """What the cases compile, into the caches on disk, in several processes: one after the other it takes longer than
    all that is measured. What fails here fails there, too, and is said there."""

    def seconds() -> float:
        return min(LANE_SECONDS, budget.left(SHARE_COMPILING))

    for case, answer in spread(args.jobs, measured, seconds, gpu_work.compile_case, gpu_work.prepare, args.dry):
        if answer.kind in ("died", "late") and answer.value != "not begun":
            say(f"compiling {case.name}: {answer.said or 'ours'} {answer.kind}")


def check_case(case, worker: Worker, dry: bool, book, budget: Budget, ceilings: dict[str, Any]) -> int:
    shown, broken = case.tiny() if dry else case, {}
    known = {"case": shown.to_json(), "environment": book.told["environment"], "floor_ms": None}
    record: dict[str, Any] = known | {"rows": []}
    for _ in range(4):
        limit = min(LANE_SECONDS, max(30.0, budget.left()))
        answer = worker.ask(limit, gpu_work.measure_case, shown, dry, ceilings, list(broken))
        if answer.kind == "done":
            record = answer.value
            if not record.pop("sound"):
                worker.stop()  # the next case begins in another
            break
        broken[answer.said] = answer  # once more without it
        say(f"{case.name}: {answer.said or 'ours'} {answer.kind}: {answer.value}")
        if not answer.said:
            break
        if budget.left() < 0:
            say(f"{case.name}: not measured, {OVER}")
            break
    else:
        broken[""] = Answer("late", f"not measured: {', '.join(broken)} broke it")
    record["rows"] += [failed(name, answer) for name, answer in broken.items()]
    book.add("cases", case.name, record)
    wrong = [row for row in record["rows"] if row["ours"] and row["status"] in ("wrong", "failed")]
    best = next((row for row in record["rows"] if "median_ms" in row), None)
    if best:
        rate = record["flops"] / best["median_ms"] / 1e9
        floor = f", floor {record['floor_ms']:.3g} ms" if record["floor_ms"] is not None else ""
        say(f"{case.name}: {best['provider']} {best['median_ms']:.3g} ms{floor}, {rate:.3g} TFLOP/s")
    for row in wrong:
        say(f"  {row['status']}: {row['provider']}: {row.get('why', '')}")
    return len(wrong)


def check_end_to_end(worker: Worker, dry: bool, book, budget: Budget) -> int:
    from benchmarks import cases

    wrong, small = 0, gpu_work.SMALL_MODEL
    asked: list[tuple[str, dict[str, Any], int]] = [
        ("training", {"batch": 2, **small} if dry else {"batch": 32}, 2 if dry else 10),
        ("scoring", dict(small) if dry else {}, 2 if dry else 100),
    ]
    if not dry:
        asked.append(("training", {"name": "paper", "batch": 16}, 10))
    for kind, options, rounds in asked:
        named = cases.contest_name(kind, **options)
        if budget.left() <= 0:
            say(f"{named}: not measured, {OVER}")
            continue
        answer = worker.ask(max(30.0, budget.left()), gpu_work.measure_model, kind, options, rounds, dry)
        if answer.kind != "done":
            say(f"{named}: not measured, {answer.kind}: {answer.value}")
            record = {"environment": book.told["environment"], "shares": {}, "rows": [failed("ours", answer)]}
            book.add("end_to_end", named, record)
            wrong += 1
            continue
        name, record = answer.value
        book.add("end_to_end", name, record)
        first = record["rows"][0]
        wrong += first["status"] != "ok"
        shares = "".join(f", {part} {share:.0%}" for part, share in record["shares"].items())
        say(f"{name}: {first['median_ms']:.3g} ms, {first['images_per_s']:.0f} images/s, "
            f"plain {record['rows'][1]['ratio']:.1f}x as long{shares}")  # fmt: skip
    return wrong


# --- tune -----------------------------------------------------------------------------------------------------------


def tune(args: argparse.Namespace) -> int:
    """Times tile candidates of one op, nearest to the present one first; wrong and spilling ones are rejected."""
    from benchmarks import cases
    from cpc_kernels import tiles

    budget, sampled = Budget(args.minutes), args.op == "gathered"
    largest = tiles.one_pass_max_d(32 if args.dtype == "float32" else 16)
    if not sampled and args.d > largest:
        print(
            f"gpu_check: {args.dtype} inputs of more than {largest} features do not pass through the tiles of "
            f"{args.op}, so there is nothing to tune. Got --d {args.d}.",
            file=sys.stderr,
        )
        return 2
    case = cases.Case("tune", args.n, args.n, args.d, dtype=args.dtype, s=64 if sampled else 0)
    case = case.tiny() if args.dry else case
    results: list[tuple[float, Any]] = []
    with Worker(gpu_work.prepare, args.dry) as worker:
        answer = worker.ask(180, gpu_work.present_tile, args.op, case, args.dry)
        if answer.kind != "done":
            say(f"tune: {answer.kind}: {answer.value}")
            return 1
        present, arch = answer.value
        say(f"present: {spell(present)}")
        for candidate in candidates(present, sampled, args.dry):
            if budget.left() < 0:
                say("no time for the rest")
                break
            answer = worker.ask(PROBE_SECONDS, gpu_work.try_tile, args.op, case, args.dry, candidate)
            ms, verdict = answer.value if answer.kind == "done" else (None, f"{answer.kind}: {answer.value}"[:150])
            if ms is not None:
                results.append((ms, candidate))
                verdict = f"{ms:.4g} ms"
            say(f"  {spell(candidate)}: {verdict}")
    results.sort(key=lambda pair: pair[0])
    say(f"\n{args.op}, D {case.d}, {args.dtype}, {arch}, N = M = {case.n} (the whole step; only this op's tile varies)")
    for ms, candidate in results[:5]:
        say(f"    {spell(candidate)},  # {ms:.4g} ms{'  (present)' if candidate == present else ''}")
    return 0 if results else 1


def candidates(present, sampled: bool, dry: bool) -> list[Any]:
    """Neighbours of a tile, nearest first, the present one leading."""
    grid = [
        present._replace(rows=rows, columns=columns, warps=warps, stages=stages, descriptors=descriptors)
        for rows in ((1,) if sampled else (64, 128, 256))
        for columns in ((4, 8, 16, 32) if sampled else (32, 64, 128))
        for warps in ((1, 2, 4, 8) if sampled else (4, 8))
        for stages in ((2,) if sampled else (2, 3, 4))
        for descriptors in ((False,) if sampled else (False, True))
    ]

    def far(tile) -> float:
        pairs = ((tile.rows, present.rows), (tile.columns, present.columns), (tile.warps, present.warps))
        return sum(max(a / b, b / a) for a, b in pairs) + abs(tile.stages - present.stages) / 2

    ordered = [present, *(tile for tile in sorted(grid, key=far) if tile != present)]
    return ordered[:2] if dry else ordered


def spell(tile) -> str:
    extra = (f", features={tile.features}" if tile.features else "") + (
        ", descriptors=True" if tile.descriptors else ""
    )
    return f"T({tile.rows}, {tile.columns}, {tile.warps}, {tile.stages}{extra})"


# --- sanitize -------------------------------------------------------------------------------------------------------


def sanitize(dry: bool) -> int:
    """Memory and race checks of every kernel on small shapes; several minutes, as everything runs many times slower."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None and not dry:
        print("gpu_check: there is no compute-sanitizer here; it comes with the CUDA toolkit.", file=sys.stderr)
        return 2
    # one allocation for each array, or what lies beyond an array is still the allocator's
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    worst = 0
    for kind in ("dry run",) if dry else ("memcheck", "racecheck"):
        prefix = [] if dry or tool is None else [tool, "--tool", kind, "--error-exitcode", "9"]
        done = subprocess.run([*prefix, sys.executable, "-m", "benchmarks.correctness"], env=environment, check=False)
        say(f"{kind}: {'clean' if done.returncode == 0 else f'exit code {done.returncode}'}")
        worst = max(worst, abs(done.returncode))
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
