"""Names for the stages of an op, where torch.profiler and Nsight Systems see them: cpc_kernels/<op>/<stage>.

On a CPU with nobody listening, a stage costs one question to autograd; on a GPU also the two calls that NVTX makes of
itself (it drops them when no tool is attached). Where torch listens, it has the range alone: under emit_nvtx it pushes
every range of its own to NVTX. The C++ kernels name theirs themselves.
"""

import contextlib

import torch

SILENT = contextlib.nullcontext()


class Pushed:
    """A range for NVTX."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *error):
        torch.cuda.nvtx.range_pop()


def stage(op: str, name: str, device: torch.device):
    """`with stage("info_nce", "forward", anchors.device): ...`"""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"cpc_kernels/{op}/{name}")
    return Pushed(f"cpc_kernels/{op}/{name}") if device.type == "cuda" else SILENT
