"""A few training steps and scorings of the demo's model, for a profiler to look at.

    python -m benchmarks.traced --trace FILE.json    torch.profiler: a table, and a trace for Perfetto
    benchmarks/nsys.sh OUT                           Nsight Systems, which starts this with --nsys

Every phase is a named range: training step, scoring an image, and inside them the kernels' own cpc_kernels/... ranges.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

STEPS = 3


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traced", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, help="write a chrome trace there, print torch.profiler's table")
    parser.add_argument(
        "--nsys", action="store_true", help="bracket the steps for nsys --capture-range=cudaProfilerApi"
    )
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args(arguments)
    from benchmarks.gpu_work import prepare

    prepare(dry=False)
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from benchmarks import end_to_end

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = end_to_end.training(device, side=args.side, batch=args.batch)
    scored = end_to_end.scoring(device, side=args.side)
    for contest in (trained, scored):  # compiled and warm before anybody looks
        contest.ours()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    watch = profile(activities=activities, record_shapes=True) if args.trace else contextlib.nullcontext()
    if args.nsys and device.type == "cuda":
        torch.cuda.profiler.start()
    with watch, torch.autograd.profiler.emit_nvtx() if args.nsys else contextlib.nullcontext():
        for _ in range(STEPS):
            with record_function("training step"):
                trained.ours()
            with record_function("scoring an image"):
                scored.ours()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if args.nsys and device.type == "cuda":
        torch.cuda.profiler.stop()
    if isinstance(watch, profile):
        by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(watch.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))
        watch.export_chrome_trace(str(args.trace))
        print(f"{args.trace}: open it at https://ui.perfetto.dev")
    return 0


if __name__ == "__main__":
    sys.exit(main())
