"""Every block size, warp count and stage count of the Triton kernels, in one static table. Nothing else holds any.

There is no autotuner: the table is read, and `benchmarks.aot` compiles and gates every entry. An entry is keyed by

    op        which kernel, with "+ids" where ids take the registers of a smaller tile
    D         the smallest bucket that holds it: 64, 128, 256, 512 (float32 has tiles up to 64 only)
    element   "16" (bf16, fp16), or how float32 multiplies: "tf32", "tf32x3", "ieee" (float64 too)
    arch      sm_80 (A100: 163 KB of shared memory), sm_86 (99 KB: sm_89, sm_120), sm_90, sm_100, gfx942, interpreter

All but the interpreter's hold the gates of `make aot`; all but that is an estimate.

This module imports neither torch nor triton, so that reading the table costs nothing.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

ONE_PASS_MAX_D = 512
"""Up to here forward and backward are one pass each; above, chunks of rows go through matrix products. An ESTIMATE: at
D = 512 the one-pass tile has 64 rows, which the L2 caps near 350 TFLOP/s on an H100, while the chunked schedule pays
about 12 bytes of traffic per score. Also the largest D whose [rows, D] accumulator fits the registers."""

ONE_PASS_MAX_D_FP32 = 64
"""The same for float32 (and float64) inputs. An ESTIMATE of where the chunks win, and nearly the limit of the chip:
three tf32 products keep both halves of every operand, so that at D = 128 only 16 columns fit the registers of an sm_90
without spilling; at D = 256 64 x 32 spills 800 bytes. Chunks multiply as torch does (`torch.backends.cuda.matmul`)."""

PROJECTED_MAX_D = 128
"""Up to here predictions may be made inside the kernel that scores them. An ESTIMATE, never timed on a GPU: what W_k
and the predictions of a tile take of the shared memory beside the scores."""

CHUNK_ELEMENTS = 1 << 24
"""Scores that the chunked schedule holds at once (64 MB in fp32). An ESTIMATE: 50 MB of L2 against the matrix product's
wish for many rows."""

BUCKETS = (64, 128, 256, 512)
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")


def one_pass_max_d(width: int) -> int:
    """Features up to which forward and backward are one pass each; `width`: bits of an element (64 counts as 32)."""
    return ONE_PASS_MAX_D if width == 16 else ONE_PASS_MAX_D_FP32


def projected_max_d(width: int) -> int:
    """Features up to which the projection may happen inside the kernel."""
    return min(PROJECTED_MAX_D, one_pass_max_d(width))


def chunk(rows: int, columns: int) -> int:
    """Rows of scores, of so many columns, that the chunked schedule holds at once: 16 or a multiple where they fit, as
    Triton compiles once more for slices that are not aligned alike."""
    fit = CHUNK_ELEMENTS // max(columns, 1)
    return max(1, min(rows, fit // 16 * 16 or fit))


class Tile(NamedTuple):
    """Block sizes of one kernel and how to compile it."""

    rows: int  # resident
    columns: int  # streamed past them
    warps: int
    stages: int
    features: int = 0  # per step; 0: all D at once, padded to a power of two
    descriptors: bool = False  # rows are loaded by TMA

    def options(self) -> dict[str, int]:
        """Keyword arguments of a Triton launch."""
        # fused multiply-add stated: its default changes with Triton 3.10
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


class Entry(NamedTuple):
    """One compiled form of a kernel, for `benchmarks.aot`: what `triton.compile` needs, and which gates apply."""

    name: str
    kernel: Any  # the @triton.jit function
    signature: Mapping[str, str]  # run-time arguments
    constexprs: Mapping[str, Any]
    options: Mapping[str, int]
    divisible: tuple[str, ...]  # run-time arguments that are multiples of 16
    matrix: bool = True  # must contain matrix instructions
    tile: Tile | None = None


def architecture(capability: tuple[int, int] | str) -> str:
    """The column of the table for a CUDA compute capability (9, 0) or an AMD name "gfx942:..."."""
    if isinstance(capability, str):
        return "gfx942"  # the only AMD column; its tiles are small enough for the others
    if capability < (8, 0):
        raise RuntimeError(f"cpc_kernels: Triton kernels need compute capability 8.0 or newer. Got {capability}.")
    if capability[0] == 9:
        return "sm_90"
    if capability[0] in (10, 11):
        return "sm_100"
    return "sm_80" if capability in ((8, 0), (8, 7)) else "sm_86"


def compiles(arch: str, precision: str) -> bool:
    """Whether float32 tiles can multiply that way there."""
    return precision == "ieee" or arch.startswith("sm_")


@functools.cache
def splits(row_tiles: int, steps: int, units: int) -> int:
    """Into how many pieces the streamed side is cut, so that `row_tiles` fill `units` multiprocessors.

    Minimises waves * (steps per piece + 2 for prologue and epilogue) + what combining the pieces costs, in steps; the
    two constants are ESTIMATES. One piece when the device is full anyway.
    """

    def cost(count: int) -> float:
        waves = math.ceil(row_tiles * count / units)
        return waves * (math.ceil(steps / count) + 2) + (0 if count == 1 else 4 + count / 8)

    most = min(MAX_SPLITS, steps, max(1, 4 * units // max(row_tiles, 1)))
    return min(range(1, most + 1), key=cost, default=1)


MAX_SPLITS = 256


def tile(op: str, d: int, width: int, arch: str, precision: str = "ieee") -> Tile:
    """The tile for one launch; `op` may end in "+ids", which the plain entry serves where none is listed."""
    element = "16" if width == 16 else precision
    bucket = next((b for b in BUCKETS if d <= b), BUCKETS[-1])
    for name in (op, op.split("+")[0]):
        for column in (arch, "any"):
            for kind in (element, "any"):
                for size in (bucket, 0):
                    found = _TABLE.get((name, column, kind, size))
                    if found is not None:
                        return found
    raise KeyError(f"tiles: no tile for op {op}, D = {d}, {element}, {arch}; add one and run benchmarks.aot.")


T = Tile


def _tma(*rows: Tile) -> tuple[Tile, ...]:
    return tuple(t._replace(descriptors=True) for t in rows)


def _as_the_negatives(t: Tile) -> tuple[Tile, ...]:
    """Of float32: features added in the steps of the scores' kernels, all 64 at once or 32, so that ties stay ties."""
    return tuple(t._replace(features=64 if bucket == 64 else 32) for bucket in BUCKETS)


# Forward at D = 256 reads through pointers: with descriptors it spills, plain on Triton 3.9, with ids on 3.6. With two
# stages the candidates' gradient at D = 512 would wait for each product before the next (benchmarks.aot says so).
_POINTERS_256 = T(128, 64, 8, 3)
# fmt: off
# buckets:                   64                 128                256                512
_HOPPER = {
    "forward": (*_tma(       T(128, 128, 8, 3), T(128, 128, 8, 2)), _POINTERS_256, *_tma(T(64, 32, 8, 2))),
    "forward+ids": (*_tma(   T(128, 128, 8, 3), T(128, 64, 8, 3)), _POINTERS_256, *_tma(T(64, 32, 8, 2))),
    "scores": _tma(          T(128, 128, 8, 3), T(256, 64, 8, 3),  T(256, 64, 8, 3),  T(128, 32, 8, 3)),
    "backward": _tma(        T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(128, 32, 8, 3),  T(64, 32, 8, 1)),
    "streamed": (            T(128, 64, 8, 3, features=64),),
    "positive": (            T(64, 64, 4, 2, features=64),),
    "projected": (           T(128, 64, 8, 2, features=64),),
}
_BLACKWELL = {  # products end in tensor memory, and pass through registers to be scaled
    "forward": _tma(         T(128, 128, 8, 3), T(128, 128, 8, 2), T(128, 32, 8, 2),  T(64, 32, 8, 2)),
    "forward+ids": _tma(     T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(64, 64, 8, 2) ,  T(64, 32, 8, 2)),
    "scores": _tma(          T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(128, 16, 8, 3)),
    "scores+ids": _tma(      T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(128, 16, 8, 2)),
    "backward": _tma(        T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(128, 32, 8, 3),  T(64, 32, 8, 2)),
    "streamed": (            T(128, 64, 8, 3, features=64),),
    "positive": (            T(64, 64, 4, 2, features=64),),
    "projected": (           T(128, 64, 8, 2, features=64),),
}
_HOPPER_FP32 = {
    "forward": (             T(64, 32, 4, 2),),
    "scores": (              T(64, 64, 4, 2),),
    "backward": (            T(64, 32, 4, 2),),
    "streamed": (            T(64, 64, 4, 2, features=32),),
    "positive": _as_the_negatives(T(64, 64, 4, 2)),
    "projected": (           T(64, 32, 4, 2, features=32),),
}
_BLACKWELL_FP32 = {
    "forward": (             T(64, 32, 8, 2),),
    "scores": (              T(64, 64, 8, 2),),
    "backward": (            T(64, 32, 8, 2),),
    "streamed": (            T(64, 32, 8, 2, features=32),),
    "positive": _as_the_negatives(T(64, 64, 4, 2)),
    "projected": (           T(64, 32, 8, 2, features=32),),
}
_AMPERE = {
    "forward": (             T(128, 64, 8, 3),  T(128, 32, 8, 3),  T(64, 32, 8, 3),   T(32, 32, 8, 2)),
    "scores": (              T(128, 64, 8, 3),  T(128, 64, 8, 3),  T(128, 32, 8, 3),  T(64, 32, 8, 2)),
    "backward": (            T(128, 32, 8, 3),  T(128, 32, 8, 3),  T(64, 32, 8, 3),   T(32, 32, 8, 2)),
    "streamed": (            T(128, 64, 8, 3, features=64),),
    "projected": (           T(128, 64, 8, 2, features=64),),
}
_SMALL = {  # 99 KB of shared memory; and AMD's 64 KB, with one stage
    "forward": (             T(64, 64, 4, 2),   T(64, 32, 4, 2),   T(64, 32, 8, 2),   T(32, 16, 8, 2)),
    "forward+ids": (         T(64, 64, 4, 2),   T(64, 32, 8, 2),   T(64, 32, 8, 2),   T(32, 16, 8, 2)),
    "scores": (              T(64, 64, 4, 2),   T(64, 64, 4, 2),   T(64, 32, 8, 2),   T(32, 32, 8, 2)),
    "backward": (            T(64, 32, 4, 2),   T(64, 32, 4, 2),   T(64, 32, 8, 2),   T(32, 16, 8, 2)),
    "streamed": (            T(64, 64, 8, 2, features=64),),
    "projected": (           T(64, 32, 4, 2, features=64),),
}
_AMD = _SMALL | {  # what of that used scratch memory, with half the columns
    "forward+ids": (         T(64, 64, 4, 2),   T(64, 32, 4, 2),   T(64, 16, 8, 2),   T(32, 16, 8, 2)),
    "scores": (              T(64, 64, 4, 2),   T(64, 64, 4, 2),   T(64, 32, 8, 2),   T(32, 16, 8, 2)),
    "backward": (            T(64, 32, 4, 2),   T(64, 32, 4, 2),   T(64, 16, 8, 2),   T(32, 16, 8, 2)),
    "streamed": (            T(64, 64, 4, 2, features=64),),
}
_FP32 = {
    "forward": (             T(32, 32, 4, 2),),
    "scores": (              T(64, 32, 8, 2),),
    "backward": (            T(32, 32, 4, 2),),
    "streamed": (            T(64, 32, 8, 2, features=32),),
    "positive": _as_the_negatives(T(32, 32, 4, 2)),
    "projected": (           T(32, 32, 4, 2, features=32),),
}
_SMALL_FP32 = {
    "forward": (             T(32, 32, 4, 2),),
    "scores": (              T(32, 32, 4, 2),),
    "backward": (            T(32, 32, 4, 2),),
    "streamed": (            T(32, 32, 4, 2, features=32),),
    "positive": _as_the_negatives(T(32, 32, 4, 2)),
    "projected": (           T(32, 32, 4, 2, features=32),),
}
# fmt: on
# small enough that small tests see several tiles; with ids they see pointers
_INTERPRETER = {
    **dict.fromkeys(("forward", "scores", "backward"), (T(32, 16, 4, 2, descriptors=True),)),
    **dict.fromkeys(("forward+ids", "scores+ids", "backward+ids"), (T(32, 16, 4, 2),)),
    "streamed": (T(32, 16, 4, 2, features=64),),
    "projected": (T(32, 16, 4, 2, features=16),),
    "positive": (T(16, 16, 4, 2, features=64),),
}
_ANY = {
    "combine": (T(16, 64, 4, 2),),
    "weigh": (T(1, 0, 1, 1),),  # as many columns as the tile has that it prepares
    "exponentials": (T(1, 1024, 8, 2),),
    "coefficients": (T(1, 1024, 4, 2),),
}

_TABLE: dict[tuple[str, str, str, int], Tile] = {
    (op, arch, element, size): t
    for arch, element, ops in (
        ("sm_80", "16", _AMPERE), ("sm_80", "any", _FP32),
        ("sm_86", "16", _SMALL), ("sm_86", "any", _SMALL_FP32),
        ("sm_90", "16", _HOPPER), ("sm_90", "any", _HOPPER_FP32),
        ("sm_100", "16", _BLACKWELL), ("sm_100", "any", _BLACKWELL_FP32),
        ("gfx942", "16", _AMD), ("gfx942", "any", _SMALL_FP32),
        ("interpreter", "any", _INTERPRETER), ("any", "any", _ANY),
    )
    for op, row in ops.items()
    for size, t in zip(BUCKETS if len(row) > 1 else (0,), row, strict=True)
}  # fmt: skip
