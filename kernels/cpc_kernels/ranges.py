"""Names for the stages of an op, where torch.profiler and Nsight Systems see them: cpc_kernels/<op>/<stage>.

On a CPU with nobody listening, a stage costs one question to autograd; on a GPU also the two calls that NVTX makes of
itself (it drops them when no tool is attached). The C++ kernels name theirs themselves.
"""

import contextlib

import torch

SILENT = contextlib.nullcontext()


class Stage:
    """A named range for torch.profiler, if it listens, and for NVTX."""

    def __init__(self, name: str, record: bool, nvtx: bool):
        self.name, self.nvtx = name, nvtx
        self.recorded = torch.profiler.record_function(name) if record else SILENT

    def __enter__(self):
        self.recorded.__enter__()
        if self.nvtx:
            torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *error):
        if self.nvtx:
            torch.cuda.nvtx.range_pop()
        self.recorded.__exit__(*error)


def stage(op: str, name: str, device: torch.device):
    """`with stage("info_nce", "forward", anchors.device): ...`"""
    listening = torch.autograd._profiler_enabled()
    nvtx = device.type == "cuda"
    return Stage(f"cpc_kernels/{op}/{name}", listening, nvtx) if listening or nvtx else SILENT
