"""What runs here: devices, versions, the implementation each op would use on each device and why, what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from cpc_kernels.capabilities import capabilities, device_name
from cpc_kernels.chunked_info_nce import DENSE
from cpc_kernels.info_nce import choose as choose_info_nce
from cpc_kernels.sampled_info_nce import choose as choose_sampled_info_nce

from .train import autocast
from .version import __version__

WHY = {
    "chunked": "one chunk of rows at a time, in torch",
    "chunked in C++": "one chunk of rows at a time, in C++",
    "cpp": "C++, negatives scored while they are in cache",
    "gather": "torch, because the C++ kernels are not built",
    "triton": "fused GPU kernel",
}
PACKAGES = ("torch", "triton", "numpy", "scikit-image", "scikit-learn", "pillow", "safetensors")


@dataclass(frozen=True)
class Diagnosis:
    """versions: name and version. devices: name and description. ops: op, device, implementation, why.
    features: what can run, yes or no, and why. advice: what would make it faster, one sentence each."""

    versions: list[tuple[str, str]]
    devices: list[tuple[str, str]]
    ops: list[tuple[str, str, str, str]]
    features: list[tuple[str, bool, str]]
    advice: list[str]


def examine() -> Diagnosis:
    """Look at this machine; nothing is computed and nothing is changed."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    found = capabilities()
    triton = next(capability for capability in found if capability.name == "Triton")
    ops = []
    for device in devices:
        for op, choose in (("info_nce", choose_info_nce), ("sampled_info_nce", choose_sampled_info_nce)):
            impl = choose("auto", device)
            why = WHY["chunked in C++" if impl == "chunked" and device.type == "cpu" and DENSE else impl]
            if impl == "triton" and not triton.available:
                impl, why = "none", triton.reason
            ops.append((op, str(device), impl, why))
        with autocast(device):
            fast = torch.is_autocast_enabled(device.type)
        why = "this device multiplies it fast" if fast else "bfloat16 would not be faster here"
        ops.append(("encoder", str(device), "bfloat16" if fast else "float32", why))

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    advice = [f"{c.name}: {c.reason}. What that costs: {c.cost}." for c in found if c.cost]
    if threads < cores:
        advice.append(f"torch uses {threads} of {cores} cores; unset OMP_NUM_THREADS, or raise it, for the others.")
    if len(devices) == 1:
        advice.append("A GPU that torch supports: `--device cuda` trains and scores on it.")
    return Diagnosis(
        versions=[("cpc_fast", __version__), ("python", platform.python_version()), *_versions()],
        devices=[(str(device), device_name(device)) for device in devices],
        ops=ops,
        features=[(c.name, c.available, c.reason) for c in found],
        advice=advice,
    )


def _versions() -> list[tuple[str, str]]:
    versions = []
    for name in PACKAGES:
        try:
            versions.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            versions.append((name, "not installed"))
    return versions
