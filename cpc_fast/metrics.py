"""How well scores separate defective images, and anomaly maps defective pixels. Larger scores are more anomalous.

    image: AUROC, average precision (AP), the best F1 over all thresholds
    pixel: AUROC, AP, and AU-PRO: the area under the per-region overlap over the false-positive rate, up to a limit

All from raw scores. Each metric is None where it has no meaning: only one class, or no mask.

    PRO(t) = mean over the 8-connected regions R of all masks of |{p in R : map(p) >= t}| / |R|      per-region overlap
    FPR(t) = |{normal p : map(p) >= t}| / |{normal p}|, over the normal pixels of all images         false-positive rate

The curve of PRO over FPR joins (0, 0), one point per distinct value of the maps, and (1, 1) by straight lines; the area
up to FPR = limit, the point there interpolated, is divided by the limit (Bergmann et al., The MVTec Anomaly Detection
Dataset, IJCV 2021).

The curves turn only at values that some defective pixel takes: between two such values TPR and PRO stand still. So the
normal pixels are sorted as bare values, without an index, and the defective ones, far fewer, look their rank up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage
from sklearn import metrics as sk

from cpc_fast.errors import UsageError

Curve = tuple[np.ndarray, np.ndarray]  # x (P,), y (P,), both rising from 0


def image_metrics(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray) -> dict[str, float | None]:
    """AUROC, AP and F1-max of image scores (N,) against labels (N,), true for defective: `{"auroc", "ap", "f1_max"}`.

    F1-max = max over t of 2 TP / (2 TP + FP + FN), with "defective" where score >= t. Raises UsageError for scores that
    are not finite or not as many as the labels. Example: `image_metrics([1, 2, 3], [0, 0, 1])["auroc"]` -> `1.0`.
    """
    scores, labels = _checked(scores, labels)
    if labels.all() or not labels.any():  # true of no images at all, too
        return {"auroc": None, "ap": None, "f1_max": None}
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return {
        "auroc": float(sk.roc_auc_score(labels, scores)),
        "ap": float(sk.average_precision_score(labels, scores)),
        "f1_max": float(f1.max()),
    }


def pixel_metrics(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> dict[str, float | None]:
    """AUROC, AP and AU-PRO of anomaly maps, each (H, W), against masks, each (H, W): see `au_pro` for what they hold.

    `{"auroc", "ap", "au_pro_0.30", "au_pro_0.05"}`. All of them None without a defective and a normal pixel.
    Example: `pixel_metrics([np.eye(4)], [np.eye(4, dtype=bool)])["auroc"]` -> `1.0`.
    """
    if (sweep := _sweep(maps, masks)) is None:
        return {"auroc": None, "ap": None, "au_pro_0.30": None, "au_pro_0.05": None}
    defective = sweep.true[-1]
    found = np.diff(sweep.true, prepend=0)  # defective pixels at each of their values
    return {
        "auroc": _area(*_curve(sweep, sweep.true / defective), 1.0),
        "ap": float(np.sum(found / defective * (sweep.true / (sweep.true + sweep.false_at)))),
        "au_pro_0.30": _area(*_curve(sweep, sweep.overlap), 0.30),
        "au_pro_0.05": _area(*_curve(sweep, sweep.overlap), 0.05),
    }


def au_pro(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], limit: float = 0.30) -> float | None:
    """Area under the per-region overlap up to FPR = `limit`, divided by `limit`.

    maps: anomaly maps (H, W) of any float type, sizes may differ. masks: bool (H, W), all false for a normal image, or
    None for an image whose truth is not known, which is left out. None without a defective and a normal pixel. Raises
    UsageError for shapes that do not match, values that are not finite, a limit outside (0, 1].
    Example: `au_pro([np.eye(4)], [np.eye(4, dtype=bool)], 0.3)` -> `1.0`.
    """
    _check_limit("au_pro", limit)
    sweep = _sweep(maps, masks)
    return None if sweep is None else _area(*_curve(sweep, sweep.overlap), limit)


def roc_curve(scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray, points: int = 200) -> Curve:
    """FPR (P,) and TPR (P,) of image scores, to draw: at most `points` points; both empty with one class only."""
    scores, labels = _checked(scores, labels)
    if labels.all() or not labels.any():
        return np.empty(0), np.empty(0)
    fpr, tpr, _ = sk.roc_curve(labels, scores)
    return _thin(fpr, tpr, points)


def pro_curve(
    maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None], limit: float = 0.30, points: int = 200
) -> Curve:
    """FPR (P,) up to `limit` and PRO (P,), to draw: at most `points` points; both empty where `au_pro` is None."""
    _check_limit("pro_curve", limit)
    if (sweep := _sweep(maps, masks)) is None:
        return np.empty(0), np.empty(0)
    return _thin(*_cut(*_curve(sweep, sweep.overlap), limit), points)


class _Sweep(NamedTuple):
    """The threshold going down through the values v that defective pixels take, U distinct ones."""

    false_above: np.ndarray  # (U,) normal pixels > v
    false_at: np.ndarray  # (U,) normal pixels >= v
    true: np.ndarray  # (U,) defective pixels >= v
    overlap: np.ndarray  # (U,) PRO(v)
    normal: int  # all normal pixels


def _sweep(maps: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]) -> _Sweep | None:
    if len(maps) != len(masks):
        raise UsageError(f"Pixel metrics need one mask (or None) per map. Got {len(maps)} maps and {len(masks)} masks.")
    pairs = []
    for i, (values, mask) in enumerate(zip(maps, masks, strict=True)):
        if mask is None:
            continue
        values, mask = np.asarray(values), np.asarray(mask)
        if values.ndim != 2 or values.shape != mask.shape:
            raise UsageError(f"Map {i} is {values.shape}, its mask {mask.shape}; both must be the same (H, W).")
        if not np.isfinite(values).all():
            raise UsageError(f"Map {i} holds values that are not finite; no metric can rank them.")
        pairs.append((values, mask.astype(bool, copy=False)))

    total = sum(mask.size for _, mask in pairs)
    defective = sum(int(mask.sum()) for _, mask in pairs)
    if not defective or defective == total:
        return None
    dtype = np.result_type(np.float32, *{values.dtype for values, _ in pairs})  # float64 only if some map is
    false, true, weight = np.empty(total - defective, dtype), np.empty(defective, dtype), np.empty(defective)
    i_false = i_true = regions = 0
    for values, mask in pairs:
        n_true = int(mask.sum())
        n_false = mask.size - n_true
        false[i_false : i_false + n_false] = values[~mask]
        i_false += n_false
        if not n_true:
            continue
        labelled = np.empty(mask.shape, np.int32)
        ndimage.label(mask, structure=np.ones((3, 3)), output=labelled)  # 8-connected, from 1 up
        region = labelled[mask]
        true[i_true : i_true + n_true] = values[mask]
        weight[i_true : i_true + n_true] = 1 / np.bincount(region)[region]
        i_true += n_true
        regions += int(region.max())

    false.sort()
    order = np.argsort(true)[::-1]
    true, weight = true[order], weight[order]
    del order
    last = np.append(true[1:] != true[:-1], True)  # of each run of equal values
    at = true[last]
    return _Sweep(
        false_above=len(false) - np.searchsorted(false, at, side="right"),
        false_at=len(false) - np.searchsorted(false, at, side="left"),
        true=np.flatnonzero(last) + 1,
        overlap=np.cumsum(weight)[last] / regions,
        normal=len(false),
    )


def _curve(sweep: _Sweep, height: np.ndarray) -> Curve:
    """The corners of height over FPR: for each value, level to the normal pixels above it, straight to those at it."""
    x, y = np.zeros(2 * len(height) + 2), np.zeros(2 * len(height) + 2)
    x[1:-1:2], x[2:-1:2], x[-1] = sweep.false_above, sweep.false_at, sweep.normal
    y[3:-1:2], y[2:-1:2], y[-1] = height[:-1], height, height[-1]
    return x / sweep.normal, y


def _cut(x: np.ndarray, y: np.ndarray, limit: float) -> Curve:
    """The curve up to x = limit, with the point there interpolated."""
    n = int(np.searchsorted(x, limit, side="right"))
    if n == len(x):
        return x, y
    end = y[n - 1] + (y[n] - y[n - 1]) * (limit - x[n - 1]) / (x[n] - x[n - 1])
    return np.append(x[:n], limit), np.append(y[:n], end)


def _area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    x, y = _cut(x, y, limit)
    return float(np.trapezoid(y, x)) / limit


def _thin(x: np.ndarray, y: np.ndarray, points: int) -> Curve:
    """At most `points` of the points, evenly along the curve, both ends among them."""
    if len(x) <= points:
        return x, y
    way = x / (x[-1] or 1) + y / (y[-1] or 1)
    keep = np.unique(np.searchsorted(way, np.linspace(0, way[-1], points)).clip(0, len(x) - 1))
    return x[keep], y[keep]


def _checked(
    scores: Sequence[float] | np.ndarray, labels: Sequence[bool] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores, dtype=float), np.asarray(labels, dtype=bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise UsageError(f"Image metrics need one label per score. Got scores {scores.shape}, labels {labels.shape}.")
    if not np.isfinite(scores).all():
        raise UsageError(f"The score of image {np.flatnonzero(~np.isfinite(scores))[0]} is not finite; it has no rank.")
    return scores, labels


def _check_limit(name: str, limit: float) -> None:
    if not 0 < limit <= 1:
        raise UsageError(f"{name}: the limit of the false-positive rate must be above 0 and at most 1. Got {limit}.")
