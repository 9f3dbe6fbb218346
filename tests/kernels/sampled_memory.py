"""Prints, in MB, what a step of sampled_info_nce needed beyond its inputs, its gradients' size, and N (S + 1) floats.

Run in a process of its own: memory that was freed before would be used again unseen.
"""

import ctypes
import re
from pathlib import Path

import torch

from cpc_kernels import sampled_info_nce


def inputs(n, m, d, s):
    anchors, pool = torch.randn(n, d).requires_grad_(), torch.randn(m, d).requires_grad_()
    return anchors, pool, torch.arange(n) % m, torch.randint(0, m, (n, s))


def resident(what: str) -> float:
    """MB: Rss now, page by page, or VmHWM, its high-water mark."""
    file = Path("/proc/self/smaps_rollup" if what == "Rss" else "/proc/self/status").read_text()
    return int(re.search(rf"^{what}:\s*(\d+) kB", file, re.MULTILINE)[1]) / 1e3


sampled_info_nce(*inputs(64, 64, 8, 4)).backward()  # threads and libraries come first
n, m, d, s = 16_384, 4_096, 256, 128
given = inputs(n, m, d, s)
ctypes.CDLL(None).malloc_trim(0)
before = resident("Rss")
Path("/proc/self/clear_refs").write_text("5")
sampled_info_nce(*given).backward()
print(resident("VmHWM") - before, (n + m) * d * 4 / 1e6, n * (s + 1) * 4 / 1e6)
