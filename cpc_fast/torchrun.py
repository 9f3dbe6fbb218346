"""Several processes that torchrun started: which one this is, and how they find each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    import torch


def launched() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) where torchrun did not start this. Reads the environment, not torch."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def may_restart() -> bool:
    """Whether torchrun runs this very command again after a failure (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def own_gpu(device: torch.device) -> torch.device:
    """Where torchrun started several processes, "cuda" is a GPU for each; any other device stays what it is.

    Raises UsageError where a node has fewer GPUs than processes, or one GPU was asked for by number.
    """
    if launched()[1] == 1 or device.type != "cuda":
        return device
    import torch

    local = int(os.environ["LOCAL_RANK"])
    if device.index is not None:
        raise UsageError(f"--device {device}: torchrun gives every process a GPU of its own; say --device cuda.")
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, but there are "
            f"{torch.cuda.device_count()} GPUs; start as many with --nproc-per-node."
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


@contextmanager
def together(device: torch.device) -> Iterator[torch.device]:
    """Inside, torch.distributed connects the processes: NCCL on GPUs, gloo on CPUs. Gives this process's device.

    Raises UsageError as own_gpu does.
    """
    if launched()[1] == 1:
        yield device
        return
    from torch import distributed as dist

    device = own_gpu(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.destroy_process_group()  # not after a failure: the others may be waiting, and torchrun ends them
