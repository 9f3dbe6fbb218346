"""What can run here: the C++ library, Triton, its interpreter, bf16 products on this CPU. `cpc-fast doctor` prints it.

Reads the package's one environment variable, TRITON_INTERPRET.
"""

import importlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch


@dataclass(frozen=True)
class Capability:
    """One thing that may be here. reason: why, or why not; cost: what its absence costs ("" when it is here)."""

    name: str
    available: bool
    reason: str
    cost: str = ""


def load_library() -> Capability:
    """Load the C++ CPU kernels, once, when the package is imported."""
    name, cost = (
        "C++ CPU kernels",
        "sampled_info_nce on the CPU gathers instead: about 50 times slower",
    )
    found = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not found:
        why = "not built: install again, without build isolation, with a C++ compiler and ninja"
        return Capability(name, False, why, cost)
    try:
        torch.ops.load_library(found[0])
        level = torch.ops.cpc_kernels_cpu.instruction_set()
    except (OSError, AttributeError, RuntimeError) as error:
        why = f"{found[0].name} does not load, probably built for another torch; install again ({error})"
        return Capability(name, False, why, cost)
    return Capability(name, True, f"{found[0].name}, using {level}")


def find_fast_bf16() -> Capability:
    if torch.cpu._is_amx_tile_supported():
        return Capability("bf16 products on this CPU", True, "AMX")
    if torch.cpu._is_avx512_bf16_supported():
        return Capability("bf16 products on this CPU", True, "AVX-512 BF16")
    why = "the CPU has neither AMX nor AVX-512 BF16"
    return Capability("bf16 products on this CPU", False, why, "bf16 inputs are computed in float32, at its speed")


def find_triton() -> Capability:
    name, cost = "Triton", 'no GPU kernels: on a GPU ask for impl="chunked" (dense) or "gather" (sampled)'
    if importlib.util.find_spec("triton") is None:
        return Capability(name, False, "triton is not installed: `pip install triton` (Linux)", cost)
    if interpreting():
        return Capability(name, True, 'TRITON_INTERPRET=1: impl="triton" runs on CPU tensors, slowly')
    if torch.cuda.is_available():
        return Capability(name, True, f"on {torch.cuda.get_device_name()}")
    return Capability(name, False, "no GPU that torch can see, and TRITON_INTERPRET=1 is not set", cost)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_module(op: str, device: torch.device) -> ModuleType:
    """The Triton launchers of `op` (a module beside this one), or an error that says why they cannot run."""
    instead = "chunked" if op == "info_nce" else "cpp" if CPP.available and device.type == "cpu" else "gather"
    if device.type not in ("cuda", "xpu") and not interpreting():
        raise RuntimeError(
            f'{op}: impl="triton" needs tensors on a GPU, or TRITON_INTERPRET=1 set before Python starts. '
            f'Got tensors on {device}; impl="{instead}" would run.'
        )
    try:
        return importlib.import_module(f"cpc_kernels.triton_{op}")
    except ImportError as error:
        raise RuntimeError(f'{op}: impl="triton" cannot be imported ({error}); impl="{instead}" would run.') from error


def capabilities() -> list[Capability]:
    """Everything that decides which implementation runs here, in the order doctor prints it."""
    return [CPP, FAST_BF16, find_triton()]


CPP = load_library()
FAST_BF16 = find_fast_bf16()
