"""One command for those who have a GPU: is it right there, how fast is it, and how fast are the others.

    python3 -m benchmarks.gpu_check --out DIR [--minutes 9]      from the root of a checkout, nothing installed
    python3 -m benchmarks.gpu_check --out DIR --dry              on a CPU, tiny shapes through Triton's interpreter
    python3 -m benchmarks.gpu_check tune forward --d 256         tile candidates of one op, the best to paste

Needs torch and triton (and numpy); peers are measured where they can be imported. In this order: the two ceilings (a
copy, matrix products), correctness of every op, the cases of `cases.py` by importance, one training step and the
scoring of one image. DIR/<device>.json is written after each, so that a run that is cut off keeps what it has. Exits 1
when anything of ours is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARE_CORRECTNESS, SHARE_CASES = 0.35, 0.85  # of the minutes, counted from the start
CASE_SECONDS = 6.0
TUNED = ("forward", "scores", "backward", "gathered")


def prepare(dry: bool) -> None:
    """Import from the checkout itself; the interpreter must be chosen before Triton is imported."""
    sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path[:2], os.environ.get("PYTHONPATH")]))
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("jaxtyping") is None:  # shapes in signatures cost nothing, and mean nothing here
        stand_in = types.ModuleType("jaxtyping")
        anything = type("Anything", (), {"__class_getitem__": classmethod(lambda cls, item: Any)})
        vars(stand_in).update(dict.fromkeys(("Bool", "Float", "Int", "UInt8"), anything))
        sys.modules["jaxtyping"] = stand_in


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m benchmarks.gpu_check", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("verb", nargs="?", choices=("check", "tune"), default="check")
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
    prepare(args.dry)
    import torch

    if not args.dry and not torch.cuda.is_available():
        print(
            "gpu_check: torch sees no GPU here. --dry runs tiny shapes through Triton's interpreter.", file=sys.stderr
        )
        return 2
    device = torch.device("cpu" if args.dry else "cuda")
    if args.verb == "tune":
        if not args.op:
            parser.error(f"tune needs an op: {', '.join(TUNED)}")
        return tune(args, device)
    if args.out is None:
        parser.error("--out DIR says where the results go")
    return check(args, device)


class Budget:
    """Seconds since the start against the minutes given."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.monotonic(), 60 * minutes

    def left(self, share: float = 1.0) -> float:
        return share * self.seconds - (time.monotonic() - self.start)


def check(args: argparse.Namespace, device) -> int:
    from benchmarks import cases, ledger, measure

    budget = Budget(args.minutes)
    environment = measure.environment(device)
    name = ("dry-" if args.dry else "") + ledger.slug(environment["device"])
    book = ledger.Ledger(args.out / f"{name}.json", environment)
    say("{device}, torch {torch}, triton {triton}, {commit}".format(**environment))

    ceilings = measure.ceilings(device, small=args.dry)
    book.add("ceilings", None, ceilings | {"environment": environment})
    rates = ", ".join(f"{kind} {rate:.3g}" for kind, rate in ceilings["matmul_tflop_s"].items())
    say(f"ceilings: copy {ceilings['copy_gb_s']:.4g} GB/s; products in TFLOP/s: {rates}")

    wrong = check_correctness(args, device, book, budget)

    measured = [case for case in cases.for_gpu() if all(part in case.name for part in args.only)]
    for i, case in enumerate(measured):
        if budget.left(SHARE_CASES) < 0:
            say(f"no time for {len(measured) - i} cases: {', '.join(c.name for c in measured[i:])}")
            break
        wrong += check_case(case, args.dry, device, book, ceilings)
    wrong += check_end_to_end(args.dry, device, book, budget)

    say("\n" + book.table())
    say(f"\n{wrong} of ours wrong; {time.monotonic() - budget.start:.0f} s; written to {book.path}")
    return 1 if wrong else 0


def say(text: str) -> None:
    print(text, flush=True)


def check_correctness(args: argparse.Namespace, device, book, budget: Budget) -> int:
    """The matrix, in several processes on a GPU: most of the time is compilation."""
    import concurrent.futures
    import multiprocessing

    from benchmarks import correctness

    listed = list(correctness.probes(small=args.dry))
    rows: list[dict[str, Any]] = []
    if args.dry:
        rows = [correctness.check(probe, device) for probe in listed]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, context) as pool:
            waiting = [pool.submit(correctness.check, probe, device) for probe in listed]
            try:
                for done in concurrent.futures.as_completed(waiting, timeout=max(1.0, budget.left(SHARE_CORRECTNESS))):
                    rows.append(done.result())
            except concurrent.futures.TimeoutError:
                pool.shutdown(wait=False, cancel_futures=True)
            except concurrent.futures.BrokenExecutor as problem:
                rows.append({"probe": "the process pool", "status": "raised", "why": str(problem)})
    bad = [row for row in rows if row["status"] in ("failed", "raised")]
    passed = sum(row["status"] == "passed" for row in rows)
    summary = {"passed": passed, "failed": len(bad), "not_reached": len(listed) - len(rows)}
    book.add("correctness", None, summary | {"environment": book.told["environment"], "rows": rows})
    say(f"correctness: {passed} passed, {len(bad)} failed, {summary['not_reached']} not reached")
    for row in bad:
        off = f" (error {row['error']:.1e}, allowed {row['allowed']:.1e})" if "error" in row else ""
        say(f"  {row['status']}: {row['probe']}: {row.get('why', '')}{off}")
    return len(bad)


def check_case(case, dry: bool, device, book, ceilings: dict[str, Any]) -> int:
    from benchmarks import measure

    shown = case.tiny() if dry else case
    try:
        race = measure.Race(
            shown, device, 0.2 if dry else CASE_SECONDS, memory=not dry,
            # chunked and gather run on a GPU too, and are there to be beaten; compilers take longer than a dry run has
            only=lambda provider: not dry or not provider.compiles,
        )  # fmt: skip
        if race.base is not None:
            race.run()
        record = race.record(ceilings)
    except Exception as problem:  # the next case may do better
        say(f"{case.name}: not measured, {type(problem).__name__}: {str(problem)[:200]}")
        return 1
    book.add("cases", case.name, record)
    del race
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()
    ours = [row for row in record["rows"] if row["ours"] and row["status"] in ("wrong", "failed")]
    best = next((row for row in record["rows"] if "median_ms" in row), None)
    if best:
        rate = record["flops"] / best["median_ms"] / 1e9
        say(f"{case.name}: {best['provider']} {best['median_ms']:.3g} ms, floor {record['floor_ms']:.3g} ms, "
            f"{rate:.3g} TFLOP/s")  # fmt: skip
    for row in ours:
        say(f"  {row['status']}: {row['provider']}: {row.get('why', '')}")
    return len(ours)


def check_end_to_end(dry: bool, device, book, budget: Budget) -> int:
    wrong = 0
    try:
        from benchmarks import end_to_end
    except ImportError as problem:
        say(f"end to end: not measured ({problem})")
        return 0
    small = {"side": 96, "width": 8, "image_size": None, "patch_size": 32, "patch_stride": 16, "stem": 4}
    makers: list[tuple[Callable[..., Any], dict[str, Any], int]] = [
        (end_to_end.training, {"batch": 2, **small} if dry else {"batch": 32}, 2 if dry else 10),
        (end_to_end.scoring, small if dry else {}, 2 if dry else 100),
    ]
    if not dry:
        makers.append((end_to_end.training, {"name": "paper", "batch": 16}, 10))
    for make, options, rounds in makers:
        if budget.left() < 0:
            say("no time for the rest of end to end")
            break
        try:
            contest = make(device, **options)
            contest.run(rounds)
            record = contest.record()
        except Exception as problem:
            say(f"end to end, {make.__name__}: not measured, {type(problem).__name__}: {str(problem)[:300]}")
            wrong += 1
            continue
        book.add("end_to_end", contest.name, record)
        first = record["rows"][0]
        wrong += first["status"] != "ok"
        shares = "".join(f", {part} {share:.0%}" for part, share in record["shares"].items())
        say(f"{contest.name}: {first['median_ms']:.3g} ms, {first['images_per_s']:.0f} images/s, "
            f"plain {record['rows'][1]['ratio']:.1f}x as long{shares}")  # fmt: skip
    return wrong


# --- tune -----------------------------------------------------------------------------------------------------------


def tune(args: argparse.Namespace, device) -> int:
    """Times tile candidates of one op, nearest to the present one first; wrong and spilling ones are rejected."""
    from benchmarks import cases, measure, providers
    from cpc_kernels import launching, sampled_tiles, tiles

    budget = Budget(args.minutes)
    sampled = args.op == "gathered"
    case = cases.Case("tune", args.n, args.n, args.d, dtype=args.dtype, s=64 if sampled else 0)
    case = case.tiny() if args.dry else case
    problem = providers.make_problem(case, 0, device)
    problem.anchors.requires_grad_(args.op != "scores")
    problem.candidates.requires_grad_(args.op == "backward")
    width = 16 if args.dtype != "float32" else 32
    arch = launching._arch(device)
    # as the launcher asks: how float32 multiplies is part of the key
    precision = "ieee" if width == 16 else launching.default_precision(device)
    module = importlib.import_module(
        "cpc_kernels.triton_sampled_info_nce" if sampled else "cpc_kernels.triton_info_nce"
    )
    loss = providers.find(case.op, "ours: triton").build(case, device)
    names = ("anchors", "candidates")

    def step() -> dict[str, Any]:
        problem.clear()
        value = loss(problem)
        if value.requires_grad:
            value.backward()
        return {"loss": value.detach(), **{name: getattr(problem, name).grad for name in names}}

    true = {"loss": None, "anchors": None, "candidates": None}
    full = providers.make_problem(case, 0, device)
    found = providers.truth(case, full)
    true |= {"loss": found["loss"], "anchors": found["dq"], "candidates": found["dk"]}
    holder, attribute = (sampled_tiles, "gathered") if sampled else (tiles, "tile")
    original = getattr(holder, attribute)
    present = original(case.d, case.s, arch) if sampled else original(args.op, case.d, width, arch, precision)
    results: list[tuple[float, Any]] = []
    say(f"present: {spell(present)}")
    for candidate in candidates(present, sampled, args.dry):
        if budget.left() < 0:
            say("no time for the rest")
            break
        if sampled:
            setattr(holder, attribute, lambda *_, candidate=candidate: candidate)
        else:
            setattr(holder, attribute, lambda op, *a, candidate=candidate: (
                candidate if op.split("+")[0] == args.op else original(op, *a)))  # fmt: skip
        forget(module)
        try:
            out = step()
            errors = {
                key: float((out[key].double() - expected).norm() / expected.norm())
                for key, expected in true.items() if out[key] is not None and expected is not None
            }  # fmt: skip
            verdict = "" if all(e <= providers.TOLERANCE[case.dtype] for e in errors.values()) else f"wrong: {errors}"
            spilled = spills(module)
            verdict = verdict or (f"spills {spilled}" if spilled else "")
            if not verdict:
                ms, _ = measure.median_ms(step, device, 3 if args.dry else 15)
                results.append((ms, candidate))
                verdict = f"{ms:.4g} ms"
        except Exception as problem_found:
            verdict = (
                f"{type(problem_found).__name__}: {str(problem_found).splitlines()[0] if str(problem_found) else ''}"[
                    :110
                ]
            )
        finally:
            setattr(holder, attribute, original)
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


def compiled_kernels(module) -> list[Any]:
    """Every compiled form of the module's kernels on any device (none under the interpreter)."""
    caches = [cache for kernel in vars(module).values() for cache in getattr(kernel, "device_caches", {}).values()]
    return [compiled for cache in caches for compiled in cache[0].values()]


def forget(module) -> None:
    for kernel in vars(module).values():
        if hasattr(kernel, "device_caches"):
            kernel.device_caches.clear()


def spills(module) -> int:
    return sum(getattr(compiled, "n_spills", 0) or 0 for compiled in compiled_kernels(module))


if __name__ == "__main__":
    sys.exit(main())
