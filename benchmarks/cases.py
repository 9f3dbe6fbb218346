"""The named shapes that everything is measured on, with the least work and traffic that each one needs.

    floor = max(flops / what the matrix units do, bytes / what memory moves)

flops and bytes are those of the problem, the same for every provider: each product that cannot be avoided once, each
input read once and each result written once. Whoever does more work pays for it in time. No torch here: the table can
be read anywhere.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Case:
    """One shape of one op, forward and backward of the mean loss.

    N anchors (each with K steps when sampled), M candidates, D features, S negatives shared by the steps (0: dense, all
    candidates are negatives). learns: "both" (gradients to anchors and candidates), "anchors" (the candidates are a
    frozen bank), "clip" (the mean of the losses of rows and of columns, as CLIP trains).
    """

    name: str
    n: int
    m: int
    d: int
    k: int = 1
    s: int = 0
    dtype: str = "float32"
    learns: str = "both"
    cpu: bool = False  # small enough for two cores
    gpu: int = 0  # order of importance on a GPU, from 1; 0: not measured there

    @property
    def op(self) -> str:
        return "sampled" if self.s else "dense"

    @property
    def scores(self) -> int:
        """How many scores exist, the positives' apart for sampled negatives."""
        return self.n * self.k * (self.s + 1) if self.s else self.n * self.m

    @property
    def flops(self) -> int:
        """Products of scores, of the anchors' gradient and of the candidates': 2 flops each per score and feature."""
        return (2 if self.learns == "anchors" else 3) * 2 * self.scores * self.d

    @property
    def input_bytes(self) -> int:
        return (self.n * self.k + self.m) * self.d * BYTES[self.dtype] + 8 * self.n * (self.k + self.s)

    @property
    def gradient_bytes(self) -> int:
        return (self.n * self.k + (0 if self.learns == "anchors" else self.m)) * self.d * BYTES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.input_bytes + self.gradient_bytes + 4 * self.n * self.k

    @property
    def scores_bytes(self) -> int:
        """The N x M line: all scores in float32."""
        return 4 * self.scores

    @property
    def gathered_bytes(self) -> int:
        """What a gather of the negatives materialises."""
        return self.n * self.s * self.d * BYTES[self.dtype]

    def floor_ms(self, copy_gb_s: float, matmul_tflop_s: float) -> float:
        """The time below which nothing gets, from the two ceilings measured on the device."""
        return max(self.flops / (matmul_tflop_s * 1e9), self.bytes / (copy_gb_s * 1e6))

    def tiny(self) -> Case:
        """The same kind of problem in a few tiles, for the interpreter."""
        small = {"n": min(self.n, 24), "m": min(self.m, 24 if self.n == self.m else 40), "d": min(self.d, 16)}
        return replace(self, **small, k=min(self.k, 2), s=min(self.s, 4))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Case:
        return cls(**told)


# A 7 x 7 grid, 5 steps down from every patch: 20 rows of 7 predictions an image. 63 x 63 patches, 3 steps that skip
# one, 4 directions: 45360 predictions. CPC_audio: 8 sequences of 128 frames, 116 of which predict 12 steps.
CASES = (
    Case("dense 8192, D 256", 8192, 8192, 256, cpu=True, gpu=17),
    Case("dense 8192, D 256, bf16", 8192, 8192, 256, dtype="bfloat16", cpu=True, gpu=1),
    Case("grid 7x7, batch 16", 2240, 784, 256, cpu=True, gpu=15),
    Case("grid 7x7, batch 256", 35840, 12544, 256, dtype="bfloat16", gpu=8),
    Case("grid 63x63, one image", 45360, 3969, 128, cpu=True, gpu=16),
    Case("SimCLR 4k, D 128", 4096, 4096, 128, dtype="bfloat16", gpu=13),
    Case("CLIP 4k, D 512", 4096, 4096, 512, cpu=True),
    Case("CLIP 32k, D 256", 32768, 32768, 256, dtype="bfloat16", gpu=2),
    Case("CLIP 32k, D 512", 32768, 32768, 512, dtype="bfloat16", gpu=7),
    Case("CLIP 32k, D 1024", 32768, 32768, 1024, dtype="bfloat16", gpu=18),
    Case("CLIP 64k, D 512, rows and columns", 65536, 65536, 512, dtype="bfloat16", learns="clip", gpu=14),
    Case("CLIP 64k, D 1024", 65536, 65536, 1024, dtype="bfloat16", gpu=19),
    Case("bank of 1M patches, 4k queries", 4096, 1_000_000, 256, dtype="bfloat16", learns="anchors", gpu=10),
    Case("bank of 64k patches, 1k queries", 1024, 65536, 128, learns="anchors", cpu=True),
    Case("CPC, S 16, D 256", 2240, 784, 256, s=16, cpu=True, gpu=4),
    Case("CPC, S 16, D 256, bf16", 2240, 784, 256, s=16, dtype="bfloat16", gpu=3),
    Case("CPC v1, S 64, D 1024", 2240, 784, 1024, s=64, cpu=True, gpu=9),
    Case("CPC, 20000 anchors, S 256", 20000, 3136, 256, s=256, cpu=True, gpu=11),
    Case("CPC, 20000 anchors, S 256, bf16", 20000, 3136, 256, s=256, dtype="bfloat16", gpu=5),
    Case("CPC_audio, K 12, S 128", 928, 1024, 256, k=12, s=128, cpu=True, gpu=12),
    Case("large pool, few negatives", 4096, 65536, 128, s=4, cpu=True, gpu=6),
)


def find(name: str) -> Case:
    """The case of that name; raises KeyError with the names there are."""
    for case in CASES:
        if case.name == name:
            return case
    raise KeyError(f"There is no case called {name!r}. There are: {', '.join(case.name for case in CASES)}.")


def contest_name(kind: str, *, name: str = "cpu-demo", side: int = 256, batch: int = 8, **_: Any) -> str:
    """How an end-to-end measurement of a preset is filed; kind: training or scoring."""
    if kind == "training":
        return f"training step, {name}, {side} px, batch {batch}"
    return f"scoring one image, {name}, {side} px"


def for_cpu(op: str) -> list[Case]:
    return [case for case in CASES if case.cpu and case.op == op]


def for_gpu() -> list[Case]:
    """In order of importance."""
    return sorted((case for case in CASES if case.gpu), key=lambda case: case.gpu)
