"""Sizes of the sampled kernels, in `tiles`' terms: a tile is one anchor's negatives (columns) by all features.

ESTIMATES all, from the registers a gathered tile takes and from L2 bandwidth against matrix units; no GPU was at hand.
"""

from .tiles import Tile

ELEMENTS = 4096
"""Gathered elements that the program of one row holds at a time: 1,024 per warp, 32 registers per thread and array."""

STEPS = 4
"""From so many steps that share their negatives on, scores go through matrix products, padded to 16 rows: a gathered
pool row is then read once for all steps, and 16 rows of products cost less than reading it from the L2."""

STEPS_MAX_D = 512
"""Above, the two tiles of [steps, D] no longer fit the registers, and every step gathers for itself."""

STEPS_MAX_D_FP32 = 64
"""The same for float32 (and float64): three tf32 products keep both halves of every operand, and at D = 128 the forward
tile of 16 steps already spills on sm_90."""

DENSE = 128
"""The whole pool is scored, masked by how often each row drew each candidate, when M K <= DENSE S (K = 1 when every
step draws its own): a gathered row costs as much L2 traffic as about so many candidates cost matrix products."""

DENSE_FP32 = 16
"""The same for float32 and float64 where torch multiplies them as such, without TF32: products at an eighth of the rate
(50 TFLOP/s on an H100) against the same traffic."""

INTERPRETER_COLUMNS = 4  # small tests see several tiles


def steps_max_d(width: int) -> int:
    """`width`: bits of an element (64 counts as 32)."""
    return STEPS_MAX_D if width == 16 else STEPS_MAX_D_FP32


def gathered(d: int, count: int, arch: str) -> Tile:
    """One row per program: `columns` gathered pool rows by all features, and as many warps as they fill."""
    features = _features(d)
    most = INTERPRETER_COLUMNS if arch == "interpreter" else max(4, ELEMENTS // features)
    columns = max(4, min(most, _power_of_two(count)))
    return Tile(1, columns, min(max(columns * features // 1024, 1), 8), 2, features)


def segments(d: int, arch: str) -> Tile:
    """One candidate per program: rows and their sum are both held, so half as many rows for as many warps."""
    tile = gathered(d, 64, arch)
    return tile._replace(columns=max(4, tile.columns // 2))


def steps(op: str, d: int, width: int, arch: str) -> Tile:
    """16 steps, the rows of a matrix instruction (CPC has 3 to 12), by `columns` gathered pool rows."""
    # backward's [columns, D] product is added to memory; with more, float32 spills on sm_90 with Triton 3.6, and gfx942
    # uses scratch memory at D = 512
    few = arch == "interpreter" or (d > 256 and arch == "gfx942")
    few |= op == "backward" and (d > 128 or (width == 32 and arch == "sm_90"))
    columns = 16 if few else 32
    warps = 8 if d > 256 and arch != "gfx942" else 4  # gfx942 has the registers: with 8 it uses scratch memory
    if op == "backward" and arch == "sm_100":  # with fewer, one of Triton 3.6 and 3.9 spills 8 or 16 bytes
        warps = 8 if width == 32 or d > 256 else 16 if d > 128 else 4
    # with two, Triton 3.6 spills 16 bytes
    stages = 1 if op == "backward" and arch == "sm_86" and width == 32 and d <= 64 else 2
    return Tile(16, columns, warps, stages, _features(d))


def resolve(arch: str) -> Tile:
    return Tile(1, 8 if arch == "interpreter" else 128, 1, 2)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _features(d: int) -> int:
    return max(16, _power_of_two(d))
