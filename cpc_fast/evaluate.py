"""A detector and a folder of test images in, metrics.json and scored images out.

    {"version", "config", "device", "data",
     "image": {"auroc", "ap", "f1_max"}, "pixel": {"auroc", "ap", "au_pro_0.30", "au_pro_0.05"},
     "by_defect": {name: {"image_auroc", "pixel_auroc", "au_pro_0.30", "count"}},
     "threshold": {"value", "target_fpr", "fpr_on_test_normals", "recall"},
     "speed": {"train_images_per_s", "score_ms_per_image_p50", "score_ms_per_image_p95", "peak_rss_mb"}}

Others read this form: it stays as it is. What has no meaning for a set (no masks, one class only) is null.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cpc_kernels.capabilities import device_name

from .detector import Detector, Prediction
from .files import write_text
from .images import TestImage, naming, read_image, read_mask
from .layouts import find_test
from .metrics import image_metrics, pixel_metrics
from .scored import Scored
from .version import __version__


@dataclass(frozen=True)
class Evaluation:
    """What a detector is worth on a test set: `metrics` in the form of metrics.json, and every image it is made of."""

    metrics: dict[str, Any]
    scored: list[Scored]


def evaluate(
    detector: Detector,
    data: str | os.PathLike,
    *,
    tests: Sequence[TestImage] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every image of data/test and compare with the truth.

    Args:
        detector: from Detector.fit or Detector.load.
        data: a category in any layout of layouts.py, as test/{good,<defect>} and ground_truth/<defect>; its train is
            not read.
        tests: judge these alone, a part of what find_test finds in `data`.
        on_image: called with how many images are done and how many there are.

    All maps are held at the original resolution (4 bytes a pixel): AU-PRO ranks all pixels of all images at once.
    Raises UsageError for a folder of another layout, CpcFastError for an image or mask that cannot be used.

    >>> evaluate(detector, "data/textures/brick").metrics["image"]["auroc"]      # doctest: +SKIP
    0.95
    """
    seconds: list[float] = []

    def inspect(image: np.ndarray) -> Prediction:
        if not seconds:
            detector.inspect(image)  # the first call builds caches
        started = time.perf_counter()
        answer = detector.inspect(image)
        seconds.append(time.perf_counter() - started)
        return answer

    tests = find_test(data) if tests is None else tests
    scored = score_all(inspect, tests, depth=detector.config.depth, on_image=on_image)
    threshold = detector.threshold
    flagged = np.array([item.score > threshold.value for item in scored])
    good = np.array([item.good for item in scored])
    metrics = {
        "version": __version__,
        "config": detector.config.to_json(),
        "device": device_name(detector.bank.device),
        "data": os.path.abspath(data),
        **measure(scored),
        "threshold": {
            "value": threshold.value,
            "target_fpr": threshold.target_fpr if threshold.count else None,  # the user's own is meant for none
            "fpr_on_test_normals": _share(flagged[good]),
            "recall": _share(flagged[~good]),
        },
        "speed": {
            "train_images_per_s": detector.train_images_per_s,
            "score_ms_per_image_p50": 1000 * float(np.percentile(seconds, 50)),
            "score_ms_per_image_p95": 1000 * float(np.percentile(seconds, 95)),
            "peak_rss_mb": peak_rss_mb(),
        },
    }
    return Evaluation(metrics, scored)


class Judged(Protocol):
    """What must be known about an image to judge it: a score, and a map (h, w) at its original resolution."""

    @property
    def score(self) -> float: ...
    @property
    def map(self) -> np.ndarray: ...


def score_all(
    inspect: Callable[[np.ndarray], Judged],
    tests: Sequence[TestImage],
    *,
    depth: int | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Every test image with what `inspect`, of a detector or of any other method, says about it, and its truth.

    `inspect` takes an image, uint8 (h, w, c), which is read with that `depth` (read_image). Raises CpcFastError,
    naming the image, where it cannot be used.
    """
    has_masks = any(test.mask_path for test in tests)
    scored = []
    for done, test in enumerate(tests, start=1):
        image = read_image(test.path, depth=depth)
        truth = None
        if test.mask_path:
            truth = read_mask(test.mask_path, image.shape[:2], test.labels)
        elif test.defect == "good" and has_masks:
            truth = np.broadcast_to(np.False_, image.shape[:2])  # nothing is wrong with it, and it costs no memory
        with naming(test.path):
            answer = inspect(image)
        other_light = getattr(answer, "other_light", False)  # of a detector's Prediction
        scored.append(Scored(test.path.name, test.defect, image, answer.score, answer.map, truth, other_light))
        if on_image:
            on_image(done, len(tests))
    return scored


def measure(scored: Sequence[Scored]) -> dict[str, Any]:
    """The parts "image", "pixel" and "by_defect" of metrics.json: they depend on scores, maps and truth alone."""
    image, pixel = _measure(scored)
    by_defect = {name: _by_defect(scored, name) for name in sorted({item.defect for item in scored} - {"good"})}
    return {"image": image, "pixel": pixel, "by_defect": by_defect}


def _measure(scored: Sequence[Scored]) -> tuple[dict[str, float | None], dict[str, float | None]]:
    image = image_metrics([item.score for item in scored], [not item.good for item in scored])
    return image, pixel_metrics([item.map for item in scored], [item.truth for item in scored])


def _by_defect(scored: Sequence[Scored], name: str) -> dict[str, float | None]:
    """One defect against the normal images."""
    some = [item for item in scored if item.good or item.defect == name]
    image, pixel = _measure(some)
    return {
        "image_auroc": image["auroc"],
        "pixel_auroc": pixel["auroc"],
        "au_pro_0.30": pixel["au_pro_0.30"],
        "count": sum(not item.good for item in some),
    }


def _share(flags: np.ndarray) -> float | None:
    return float(flags.mean()) if flags.size else None


def write_metrics(path: str | os.PathLike, metrics: dict[str, Any]) -> None:
    """metrics.json, whole or not at all."""
    write_text(Path(path), json.dumps(metrics, indent=2, allow_nan=False) + "\n")


def mean_metrics(several: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mean of several metrics.json in the same form.

    A number is averaged over the sets that have it, and null where none has; a text or setting that is not the same in
    all is joined by commas or null. Two are no means: `count` is the sum, `peak_rss_mb` the largest.

    >>> mean_metrics([{"data": "a", "image": {"ap": 0.5}}, {"data": "b", "image": {"ap": 1.0}}])
    {'data': 'a, b', 'image': {'ap': 0.75}}
    """
    return {name: _mean(name, [m[name] for m in several if name in m]) for name in _keys(several)}


def _keys(several: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in several for name in one))


def _mean(name: str, values: list[Any]) -> Any:
    if all(isinstance(value, dict) for value in values):
        if name == "config":
            return {key: _same([value.get(key) for value in values]) for key in _keys(values)}
        return mean_metrics(values)
    known = [value for value in values if value is not None]
    if not known:
        return None
    if all(isinstance(value, str) for value in known):
        return ", ".join(dict.fromkeys(known))
    if name in ("count", "peak_rss_mb"):
        return sum(known) if name == "count" else max(known)
    return sum(known) / len(known)


def _same(values: list[Any]) -> Any:
    return values[0] if all(value == values[0] for value in values) else None


def peak_rss_mb() -> float:
    """The most memory this process has held so far, in MB (10^6 bytes)."""
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on Linux it would count the parent's before exec, too
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
