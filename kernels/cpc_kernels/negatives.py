"""Negatives drawn by seed: a counter-based generator, so that every backend draws the same ones and none is stored.

    (u_0, u_1, u_2, u_3) = Philox4x32-10(counter = (s // 4, row n, step k, 0), key = (seed low 32, seed high 32))
    u = u_{s mod 4}                                            s: draw 0..S-1; k = 0 when the steps share their draws
    positives by index:  idx = (base + 1 + u mod (M - 1)) mod M     never base itself, without rejection
    positives as vectors: idx = u mod M

base is positives[n, k] when every step draws its own, else positives[n, 0]; an ignored row has base 0. A shared draw
that hits the positive of another step is skipped for that step, by the ops.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class Negatives:
    """`count` negatives for each anchor, drawn from the pool by `seed`.

    seed: an int in [-2**63, 2**64), or a one-element int64 tensor on the anchors' device (a captured graph can change
    it between replays). per_step: each of the K steps draws its own; else the steps of an anchor share them.
    """

    count: int
    seed: int | Tensor
    per_step: bool = False

    def __post_init__(self):
        for name, kind in (("count", int), ("seed", (int, Tensor))):
            value = getattr(self, name)
            if not isinstance(value, kind):
                try:
                    object.__setattr__(self, name, operator.index(value))
                except TypeError:
                    or_one = " or a tensor" if name == "seed" else ""
                    raise TypeError(f"Negatives: {name} must be an integer{or_one}. Got {value!r}.") from None
        if self.count < 0:
            raise ValueError(f"Negatives: count must be 0 or more. Got {self.count}.")
        if isinstance(self.seed, Tensor):
            if self.seed.numel() != 1 or self.seed.dtype != torch.int64:
                raise ValueError(
                    "Negatives: a seed tensor must have one int64 element. "
                    f"Got {tuple(self.seed.shape)} {str(self.seed.dtype).removeprefix('torch.')}."
                )
        elif not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"Negatives: the seed must fit in 64 bits. Got {self.seed}.")

    def seed_number(self) -> int:
        """The seed as a signed 64-bit number; waits for the device that holds it."""
        seed = self.seed.item() if isinstance(self.seed, Tensor) else self.seed
        return seed - 2**64 if seed >= 2**63 else seed

    def seed_tensor(self, device: torch.device) -> Tensor:
        """The seed as (1,) int64."""
        if isinstance(self.seed, Tensor):
            return self.seed.reshape(1).to(device)
        return torch.full((1,), self.seed_number(), dtype=torch.int64, device=device)  # a copy would wait for it


def multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x, both below 2**32, without overflowing int64."""
    low = constant * (x & 0xFFFF)
    mid = constant * (x >> 16) + (low >> 16)
    return mid >> 16, ((mid & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit words; they broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


def draw_negatives(
    negatives: Negatives, positives: Tensor | None, pool_size: int, rows: int | Tensor, steps: int = 1
) -> Tensor:
    """The pool indices that `negatives` stands for.

    idx = (base + 1 + u mod (M - 1)) mod M with positives by index, else u mod M (see this file's header).

    positives: (N, K) or (N,) integer indices (-1: ignored row), or anything else (vectors, None) for draws from the
    whole pool; pool_size M; rows N, or (N,) integers, the number n of each row; steps K. Returns int64 (N, S), or
    (N, K, S) when `negatives.per_step`; -1 everywhere when the pool has nothing to draw.

    >>> draw_negatives(Negatives(3, seed=0), torch.tensor([0, 1]), pool_size=8, rows=2).shape
    torch.Size([2, 3])
    """
    indexed = positives is not None and not positives.is_floating_point()
    device = positives.device if positives is not None else torch.device("cpu")
    if positives is None and isinstance(negatives.seed, Tensor):
        device = negatives.seed.device
    drawn_steps = steps if negatives.per_step else 1
    choices = pool_size - 1 if indexed else pool_size
    n = rows if isinstance(rows, Tensor) else torch.arange(rows, device=device)
    rows = len(n)
    if choices <= 0:
        drawn = torch.full((rows, drawn_steps, negatives.count), -1, dtype=torch.int64, device=device)
        return drawn if negatives.per_step else drawn[:, 0]
    seed = negatives.seed_tensor(device)
    s = torch.arange((negatives.count + 3) // 4, device=device)
    k = torch.arange(drawn_steps, device=device)[:, None]
    words = philox((s, n[:, None, None], k, torch.zeros_like(s)), (seed & LOW, (seed >> 32) & LOW))
    u = torch.stack(torch.broadcast_tensors(*words), -1).flatten(2)[..., : negatives.count]  # (N, K or 1, S)
    if indexed:
        base = positives.reshape(rows, steps)[:, :drawn_steps, None].to(torch.int64).clamp(min=0)
        drawn = (base + 1 + u % choices) % pool_size
    else:
        drawn = u % choices
    return drawn if negatives.per_step else drawn[:, 0]
