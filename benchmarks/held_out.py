"""False alarms on brick: is it that held-out windows overlap those of training? Hold out another place, and see.

    python -m benchmarks.held_out middle --seed 0      drawn | left | middle | right; minutes

`drawn`: as `fit` does it, 60 of 300 windows by the seed. The others: 240 windows from the rest of both strips of the
photograph that are there to learn from, and 60 from 160 columns that no training window touches. The test windows are
those of `cpc-fast data textures`, from a third strip.
"""

from __future__ import annotations

import argparse
import json
from unittest import mock

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from cpc_fast import datasets, detector
from cpc_fast.config import preset

WINDOW, LEARN, HOLD, GOOD, BAD = 128, 240, 60, 40, 12
PLACES = {"left": (0, 160), "middle": (176, 336), "right": (352, 512)}  # columns held out


def random(*where: int) -> np.random.Generator:
    return np.random.default_rng([0, 0, *where])


def learn_and_hold(photograph: np.ndarray, place: str, seed: int) -> list[np.ndarray]:
    """240 windows to learn from, then 60 to hold out."""
    top, bottom, *_ = datasets.TEST_PARTS["brick"]
    strips = [photograph[:top], photograph[bottom:]]

    def windows(parts: list[np.ndarray], numbers: range) -> list[np.ndarray]:
        return [datasets._window(parts[i % len(parts)], WINDOW, random(0, i)) for i in numbers]

    if place == "drawn":
        both = windows(strips, range(LEARN + HOLD))
        learn, hold = detector.split(len(both), preset("cpu-demo").replace(seed=seed))
        return [both[i] for i in (*learn, *hold)]
    left, right = PLACES[place]
    rest = [part for strip in strips for part in (strip[:, :left], strip[:, right:]) if part.shape[1] >= WINDOW]
    return windows(rest, range(LEARN)) + windows([s[:, left:right] for s in strips], range(LEARN, LEARN + HOLD))


def judge(place: str, seed: int) -> dict[str, object]:
    photograph, *others = (datasets._photograph(name) for name in datasets.TEXTURES)
    top, bottom, left, right = datasets.TEST_PARTS["brick"]
    band = photograph[top:bottom, left:right]
    images = [window[..., None] for window in learn_and_hold(photograph, place, seed)]
    indices = list(range(LEARN)), list(range(LEARN, LEARN + HOLD))
    with mock.patch.object(detector, "split", return_value=indices):
        made = detector.Detector.fit(images, "cpu-demo", seed=seed)
    tests = [datasets._window(band, WINDOW, random(1, i)) for i in range(GOOD)]
    for kind, paint in enumerate(datasets.DEFECTS.values()):
        for i in range(BAD):
            chance = random(2 + kind, i)
            painted, _ = paint(datasets._window(band, WINDOW, chance).astype(float), chance, band, others)
            tests.append(np.rint(np.clip(painted, 0, 255)).astype(np.uint8))
    scores = np.array([made.inspect(np.ascontiguousarray(test)).score for test in tests])
    good, bad, cut = scores[:GOOD], scores[GOOD:], made.threshold.value
    hold = [made.inspect(image).score for image in images[LEARN:]]
    return {
        "held out": place, "seed": seed, "threshold": round(cut, 2), "good flagged": float((good > cut).mean()),
        "defects flagged": float((bad > cut).mean()),
        "image AUROC": round(float(roc_auc_score([0] * GOOD + [1] * len(bad), scores)), 3),
        "median, held out": round(float(np.median(hold)), 2), "median, good tests": round(float(np.median(good)), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", choices=("drawn", *PLACES))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(judge(options.place, options.seed)))


if __name__ == "__main__":
    main()
