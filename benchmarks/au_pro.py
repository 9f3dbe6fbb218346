"""CPU seconds and peak memory (MB on Linux, maps and masks included) of the pixel metrics on many large maps.

python -m benchmarks.au_pro 100     # maps of 1024 x 1024, half of them with four defects of 200 x 150
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from cpc_fast.metrics import pixel_metrics


def main(count: int, side: int = 1024) -> None:
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((side, side), dtype=np.float32) for _ in range(count)]
    masks = [np.zeros((side, side), bool) for _ in range(count)]
    for mask, values in zip(masks[::2], maps[::2], strict=True):
        for y, x in rng.integers(0, side - 200, (4, 2)):
            mask[y : y + 200, x : x + 150] = True
        values[mask] += 1
    start = time.process_time()
    found = pixel_metrics(maps, masks)
    seconds, status = time.process_time() - start, Path("/proc/self/status").read_text()
    megabytes = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6  # ru_maxrss would count the parent's before exec
    print(f"{seconds:.1f} s, {megabytes:.0f} MB, AU-PRO {found['au_pro_0.30']:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
