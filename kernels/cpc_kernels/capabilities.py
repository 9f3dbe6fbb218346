"""What is here: the device by name, the C++ library, Triton, bf16 products on the CPU; `cpc-fast doctor` prints it.

Reads the package's one environment variable, TRITON_INTERPRET.
"""

import importlib
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

INTERFACE = 1  # of the C++ library's ops (kernels/csrc/sampled_info_nce.cpp)


@dataclass(frozen=True)
class Capability:
    """One thing that may be here. reason: why, or why not; cost: what that costs ("" where it is whole, or where this
    machine could not use it)."""

    name: str
    available: bool
    reason: str
    cost: str = ""


def load_library() -> Capability:
    """Load the C++ CPU kernels, once, when the package is imported."""
    name, cost = (
        "C++ CPU kernels",
        "on the CPU both losses run in torch instead, sampled_info_nce up to 20 times slower, info_nce two to four",
    )
    library = Path(__file__).with_name("_cpu" + sysconfig.get_config_var("EXT_SUFFIX"))  # of this Python
    if not library.exists():
        why = "not built: install again, without build isolation, with a C++ compiler"
        why += "" if shutil.which("c++") else " (here is no c++)"
        return Capability(name, False, why, cost)
    try:
        torch.ops.load_library(library)
        ops = torch.ops.cpc_kernels_cpu
        interface = ops.interface() if hasattr(ops, "interface") else 0
    except (OSError, AttributeError, RuntimeError) as error:
        why = f"{library.name} does not load, probably built for another torch; install again ({error})"
        return Capability(name, False, why, cost)
    if interface != INTERFACE:
        why = f"{library.name} was built from other sources than these (interface {interface}, not {INTERFACE}); "
        return Capability(name, False, why + "install again", cost)
    level = ops.instruction_set()
    if not ops.threaded():
        why = f"{library.name}, using {level}, on one thread: built without OpenMP; install again"
        return Capability(name, True, why, "the losses on the CPU use one core, however many there are")
    return Capability(name, True, f"{library.name}, using {level}")


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
    return Capability(name, False, "no GPU that torch can see, and TRITON_INTERPRET=1 is not set")


def device_name(device: torch.device) -> str:
    """What computes, in words that no other kind of device shares: results are filed under it.

    A virtual CPU may hide its number: "AMD EPYC (family 26 model 2, AVX-512, bf16), 2 threads".
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    told = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.+)$", told, re.MULTILINE))
    name = fields.get("model name") or platform.processor() or platform.machine()
    marks = []
    if not re.search(r"\d", name) and {"cpu family", "model"} <= fields.keys():
        marks.append(f"family {fields['cpu family']} model {fields['model']}")
    marks.append(torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512"))
    marks += ["bf16"] if FAST_BF16.available else []
    threads = torch.get_num_threads()
    return f"{name} ({', '.join(marks)}), {threads} thread" + ("s" if threads > 1 else "")


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_module(op: str, device: torch.device) -> ModuleType:
    """The Triton launchers of `op` (a module beside this one), or an error that says why they cannot run."""
    instead = "chunked" if op == "info_nce" else "cpp" if CPP.available and device.type == "cpu" else "gather"
    if device.type != "cuda" and not interpreting():
        raise RuntimeError(
            f'{op}: impl="triton" needs tensors on a CUDA or ROCm GPU, or TRITON_INTERPRET=1 set before Python starts. '
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
