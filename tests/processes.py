"""Several gloo processes for a test: each runs the same function, and a minute of silence fails.

They are forked from a server that has imported torch once, so that starting them costs little.
"""

import datetime
import io
import time
import traceback
from pathlib import Path

import torch
from torch import distributed as dist

PRELOAD = ["torch", "torch.distributed", "cpc_kernels", "cpc_fast.dropin", "cpc_fast.detector"]
SECONDS = 60


def _one(function, rank, world, meet, queue, arguments):
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=SECONDS)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world, timeout=patience)
        queue.put((rank, None, b""))
        answer = function(rank, world, *arguments)
        dist.destroy_process_group()
        file = io.BytesIO()
        torch.save(answer, file)  # tensors in a queue live only as long as the process that sent them
        queue.put((rank, True, file.getvalue()))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))


def run(world: int, function, folder: Path, *arguments) -> list:
    """[function(rank, world, *arguments) for each rank]; a failure or a hang fails the test."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    queue = context.SimpleQueue()
    meet = folder / f"meet-{world}-{time.monotonic_ns()}"
    processes = [
        context.Process(target=_one, args=(function, rank, world, meet, queue, arguments), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    answers, until = {}, time.monotonic() + SECONDS
    try:
        while len(answers) < world:
            while queue.empty():
                assert time.monotonic() < until, f"only ranks {sorted(answers)} of {world} answered in {SECONDS} s"
                dead = [rank for rank, p in enumerate(processes) if rank not in answers and p.exitcode not in (None, 0)]
                assert not dead, f"ranks {dead} died"
                time.sleep(0.02)
            rank, fine, answer = queue.get()
            until = time.monotonic() + SECONDS
            if fine is None:  # it has met the others
                continue
            assert fine, f"rank {rank}:\n{answer}"
            answers[rank] = torch.load(io.BytesIO(answer))
    finally:
        for process in processes:
            process.join(1 if len(answers) == world else 0)
            if process.is_alive():
                process.kill()
    return [answers[rank] for rank in range(world)]
