"""Test results as one HTML file that needs no network, and the pictures of anomaly maps that go with them.

    sections of scored images -> numbers, curves, pictures -> report.html (with report.css and report.js inlined)

This file computes, `report.html` lays out (Jinja2, autoescaped: file names are hostile input), `report.css` dresses,
`report.js` re-decides when the threshold moves. Without JavaScript the page shows the decisions at the given threshold.

The page is locked by a Content-Security-Policy: nothing may be loaded, images are data: URIs, and the only script and
the only style sheet that run are the two whose SHA-256 the policy names. Hashes rather than 'unsafe-inline': a page
that quotes file names must not run what a file name might smuggle in. It follows that no `style=` attribute and no
`on...=` handler can exist in the template.

Longer than 250 lines because the pictures (top), the curves (middle) and the page (bottom) share one colour table and
one rule: an image is flagged when its score is above the threshold, a pixel is marked when its value is.
"""

import base64
import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours

from cpc_fast.errors import CpcFastError
from cpc_fast.files import write_text
from cpc_fast.metrics import Curve, pro_curve, roc_curve
from cpc_fast.scored import Scored
from cpc_fast.version import __version__

PREDICTED = (0, 229, 255)  # cyan: far from every colour of the heat map, for all common forms of colour blindness
TRUTH = (255, 255, 255)
CASING = (10, 12, 20)  # drawn under both, so that they show on any photograph

PHOTO_BYTES = 40_000  # JPEG bytes per gallery image: 100 images stay under 6 MB of HTML with their maps
ALL_PHOTO_BYTES = 16_000_000  # and what all images of a page share, however many there are
# longest side in pixels (_shrunk) and JPEG quality: the first that fits
PHOTO_LADDER = ((640, 85), (480, 82), (320, 80), (320, 60), (240, 55), (160, 50))
MAP_SIDE = 160  # anomaly maps are smooth: this many pixels show all there is
PATH_POINTS = 600  # corners of the outlines of one mask
BINS = 48


class ReportError(CpcFastError):
    """The report could not be made from what was given."""


@dataclass(frozen=True)
class Section:
    """One data set in the report: a tab of its own when there are several.

    Arguments:
        title: e.g. the name of the set.
        metrics: the content of its metrics.json; None and NaN are shown as not available.
        scored: its test images, at least one.
        image_threshold: images with a score above it are flagged. Not finite: none is, until the reader moves it.
        pixel_threshold: pixels with a map value above it are marked.
        trained_on: what the model learned from, as label and text.
        vouched: where good images were held out for the threshold, but too few for metrics["threshold"]["target_fpr"]:
            how many, and the share of false alarms that they can vouch for (1 for none), such as (2, 1 / 3).
        light: a sentence about the test images that are lit as none of the fit; empty where there are none.
    """

    title: str
    metrics: Mapping[str, Any]
    scored: Sequence[Scored]
    image_threshold: float
    pixel_threshold: float
    trained_on: Mapping[str, str]
    vouched: tuple[int, float] | None = None
    light: str = ""


# ---------------------------------------------------------------------------------------------------------- pictures


def _heat_table() -> np.ndarray:
    """256 colours from indigo over red to pale yellow, lightness rising evenly in OKLab: uint8 (256, 3)."""
    t = np.linspace(0, 1, 256)
    lightness = 0.34 + 0.62 * t
    stops = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    chroma = np.interp(t, stops, [0.170, 0.190, 0.205, 0.190, 0.165, 0.090])
    hue = np.radians(np.interp(t, stops, [282, 318, 373, 404, 443, 465]))
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    # OKLab to linear sRGB (Ottosson 2020, https://bottosson.github.io/posts/oklab/)
    # fmt: off
    lms = np.stack([
        lightness + 0.3963377774 * a + 0.2158037573 * b,
        lightness - 0.1055613458 * a - 0.0638541728 * b,
        lightness - 0.0894841775 * a - 1.2914855480 * b,
    ]) ** 3
    linear = np.array([
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]) @ lms
    # fmt: on
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb.T).astype(np.uint8)


HEAT = _heat_table()  # (256, 3)


def _heat(map: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map as colours that are clear at `low` and nearly opaque from `high` on: uint8 (H, W, 4)."""
    t = (np.asarray(map, np.float64) - low) / max(high - low, 1e-12)
    t = np.nan_to_num(t.clip(0, 1), nan=0.0)
    alpha = 0.86 * np.minimum(1.0, 1.5 * t)
    return np.dstack([HEAT[np.rint(255 * t).astype(np.intp)], np.rint(255 * alpha).astype(np.uint8)])


def _rgb(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, C) with C 1 or 3 -> (H, W, 3)."""
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.dtype != np.uint8:
        raise ReportError(f"report: an image must be uint8 (H, W, 1) or (H, W, 3). Got {image.dtype} {image.shape}.")
    return np.broadcast_to(image, (*image.shape[:2], 3))


def overlay(image: np.ndarray, map: np.ndarray, low: float, high: float) -> np.ndarray:
    """Lay an anomaly map over its image, from clear at `low` over indigo, red and amber to pale yellow at `high`.

    out = (1 - alpha) image + alpha colour(t), t = clip((map - low) / (high - low), 0, 1), alpha = 0.86 min(1, 1.5 t).

    Arguments:
        image: uint8 (H, W, C), C 1 or 3.
        map: float (H, W), same H and W.
        low, high: map values, the same for all pictures that are to be compared.

    Returns: uint8 (H, W, 3).
    Raises: ReportError where the shapes differ.

    Example:
        >>> overlay(np.zeros((8, 8, 1), np.uint8), np.ones((8, 8), np.float32), 0.0, 2.0).shape
        (8, 8, 3)
    """
    photo = _rgb(image)
    _same_size("overlay", image, map)
    heat = _heat(map, low, high)
    alpha = heat[..., 3:] / 255.0
    return np.rint((1 - alpha) * photo + alpha * heat[..., :3]).astype(np.uint8)


def mask_outline(image: np.ndarray, mask: np.ndarray, *, color: tuple[int, int, int] = PREDICTED) -> np.ndarray:
    """Draw the outline of a mask on its image: a coloured line inside its edge, a dark one outside.

    Arguments:
        image: uint8 (H, W, C), C 1 or 3.
        mask: bool (H, W), same H and W.
        color: of the line; cyan for what was predicted, `report.TRUTH` (white) for what is known.

    Returns: uint8 (H, W, 3). The line is one pixel wide up to 256 pixels of image side, and grows with it.
    Raises: ReportError where the shapes differ.

    Example:
        >>> mask_outline(np.zeros((8, 8, 3), np.uint8), np.eye(8, dtype=bool)).shape
        (8, 8, 3)
    """
    out = _rgb(image).copy()
    mask = np.asarray(mask, bool)
    _same_size("mask_outline", image, mask)
    if not mask.any():
        return out
    width = max(1, round(max(mask.shape) / 256))
    square = np.ones((3, 3), bool)
    grown = np.asarray(ndimage.binary_dilation(mask, square, iterations=width), bool)
    shrunk = np.asarray(ndimage.binary_erosion(mask, square, iterations=width), bool)
    out[grown & ~mask] = CASING
    out[mask & ~shrunk] = color
    return out


def contact_sheet(
    scored: Sequence[Scored],
    columns: int = 6,
    *,
    pixel_threshold: float | None = None,
    size: int = 160,
) -> np.ndarray:
    """Tile images, anomaly maps and masks: one column per image, `columns` in a row of three pictures.

    Arguments:
        scored: the images, drawn in the order given; each picture is fitted into a square.
        columns: images side by side.
        pixel_threshold: outlines the predicted mask in cyan, below the white of ground truth; None draws truth alone.
        size: side of one picture in pixels.

    Returns: uint8 (H, W, 3), about (3 size + 40) rows for every `columns` images, on white.
    Raises: ReportError without an image or a column, or where shapes differ.

    Example:
        >>> item = Scored("0.png", "good", np.zeros((8, 8, 1), np.uint8), 0.5, np.zeros((8, 8), np.float32), None)
        >>> contact_sheet([item, item], columns=2, size=64).shape[2]
        3
    """
    if not scored or columns < 1:
        raise ReportError(
            f"contact_sheet: needs at least one image and one column. Got {len(scored)} and columns={columns}."
        )
    for item in scored:
        _check(item)
    low, high = _map_limits(scored, math.inf if pixel_threshold is None else pixel_threshold)
    columns = min(columns, len(scored))
    gap, margin, caption = max(4, size // 32), max(52, size // 2), max(34, size // 5)
    bands = math.ceil(len(scored) / columns)
    band = 3 * (size + gap) + caption
    sheet = Image.new("RGB", (margin + columns * (size + gap), bands * band + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    letter = max(11, size // 12)
    font = ImageFont.load_default(size=letter)
    for n, item in enumerate(scored):
        left, top = margin + (n % columns) * (size + gap), gap + (n // columns) * band
        if n % columns == 0:
            for k, label in enumerate(("image", "surprise", "mask")):
                y = top + k * (size + gap) + size // 2
                draw.text((margin - gap - 2, y), label, (70, 75, 85), font, anchor="rm")
        small = _fit(item, size)
        outlined = _rgb(small.image)
        if pixel_threshold is not None:
            outlined = mask_outline(outlined, small.map > pixel_threshold)
        if small.truth is not None:
            outlined = mask_outline(outlined, small.truth, color=TRUTH)
        for k, picture in enumerate((_rgb(small.image), overlay(small.image, small.map, low, high), outlined)):
            h, w = picture.shape[:2]
            at = (left + (size - w) // 2, top + k * (size + gap) + (size - h) // 2)
            sheet.paste(Image.fromarray(np.ascontiguousarray(picture)), at)
        middle = left + size / 2
        y = top + 3 * (size + gap)
        draw.text((middle, y), _cut(printable(item.defect), 24), (20, 24, 32), font, anchor="ma")
        draw.text((middle, y + letter + 3), f"score {item.score:.3g}", (70, 75, 85), font, anchor="ma")
    return np.asarray(sheet)


def _fit(item: Scored, size: int) -> Scored:
    """The same item with its longest side `size` pixels."""
    h, w = item.map.shape
    wh = (max(1, round(w * size / max(h, w))), max(1, round(h * size / max(h, w))))
    image = np.asarray(_picture(item.image).resize(wh, Image.Resampling.LANCZOS))
    map = np.asarray(Image.fromarray(item.map.astype(np.float32)).resize(wh, Image.Resampling.BILINEAR))
    truth = item.truth
    if truth is not None:
        truth = np.asarray(Image.fromarray(truth.astype(np.float32)).resize(wh, Image.Resampling.BOX)) >= 0.5
    return Scored(item.name, item.defect, image.reshape(*image.shape[:2], -1), item.score, map, truth)


def _picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _same_size(who: str, image: np.ndarray, other: np.ndarray) -> None:
    if image.shape[:2] != other.shape:
        raise ReportError(
            f"{who}: image and map or mask must have the same height and width. Got {image.shape} and {other.shape}."
        )


def _check(item: Scored) -> None:
    where = f"report: {printable(item.name)}"
    _rgb(item.image)
    _same_size(where, item.image, item.map)
    if item.truth is not None:
        _same_size(where, item.image, item.truth)
    if not math.isfinite(item.score):
        raise ReportError(f"{where} has the score {item.score}; scores must be finite. Score the image again.")
    if not np.isfinite(item.map).all():
        raise ReportError(f"{where} has an anomaly map that is not finite everywhere. Score the image again.")


def _map_limits(scored: Sequence[Scored], pixel_threshold: float) -> tuple[float, float]:
    """Ends of the colours: the median of normal pixels, and the value all but 1 in 500 pixels stay below.

    The threshold lies between a sixth and two thirds of the way, so that what is marked shows, and shows how much.
    """
    normal = [s for s in scored if s.good] or scored

    def pixels(items: Sequence[Scored]) -> np.ndarray:
        step = max(1, sum(s.map.size for s in items) // 1_000_000)
        return np.concatenate([s.map.ravel()[:: min(step, s.map.size)] for s in items])

    low, high = float(np.median(pixels(normal))), float(np.quantile(pixels(scored), 0.998))
    if math.isfinite(pixel_threshold) and pixel_threshold > low:
        high = float(np.clip(high, low + 1.5 * (pixel_threshold - low), low + 6 * (pixel_threshold - low)))
    return low, high if high > low else low + 1.0


# ------------------------------------------------------------------------------------------------------------ curves


def _truth(item: Scored) -> np.ndarray | None:
    """The ground truth, where a good image without a mask has nothing on it."""
    return np.zeros(item.map.shape, bool) if item.truth is None and item.good else item.truth


def _pixel_rates(scored: Sequence[Scored], threshold: float) -> tuple[float, float]:
    """FPR and PRO (as `metrics` defines them) of the pixels above a threshold: where it lies on the PRO curve."""
    false, normal, overlaps = 0, 0, []
    for item in scored:
        truth, marked = _truth(item), item.map > threshold
        if truth is None:
            continue
        false, normal = false + int((marked & ~truth).sum()), normal + int((~truth).sum())
        labels = np.zeros(truth.shape, np.int32)
        ndimage.label(truth, np.ones((3, 3)), output=labels)
        overlaps += list(np.atleast_1d(ndimage.mean(marked, labels, np.arange(1, labels.max() + 1))))
    return false / normal, float(np.mean(overlaps))


def _points(curve: Curve, x_max: float = 1.0) -> str:
    """A curve as the points of an SVG polyline in the unit square, y downwards; empty for an empty curve."""
    return " ".join(f"{x / x_max:.4g},{1 - y:.4g}" for x, y in zip(*curve, strict=True))


def _digits(span: float) -> int:
    """Decimals that tell about a thousand values of a range apart."""
    return min(8, max(0, 3 - math.floor(math.log10(span))))


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


# -------------------------------------------------------------------------------------------------------------- page


def printable(text: str) -> str:
    """`text` with everything that does not print (control, bidirectional and undecodable characters) as an escape."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in str(text)
    )


def percent(value: float) -> str:
    """A share as a percentage with one decimal, halves upwards as in report.js."""
    return f"{math.floor(value * 1000 + 0.5) / 10:.1f}%"


def interval(hits: int, of: int) -> str:
    """The 95 % Wilson score interval of a share, in percent."""
    if not of:
        return "no images"
    z, p = 1.959964, hits / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    low, high = (max(0.0, middle - half) / (1 + z * z / of), min(1.0, (middle + half) / (1 + z * z / of)))
    return f"{math.floor(low * 100 + 0.5)} to {math.floor(high * 100 + 0.5)}%"


def _number(value: Any) -> float | None:
    """A metric as a finite float, or None."""
    return float(value) if isinstance(value, int | float | np.number) and math.isfinite(value) else None


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _shrunk(picture: Image.Image, side: int, how: Image.Resampling) -> Image.Image:
    """Its longest side is at most `side`; more where it is over twice as long as the other, so that no shape has fewer
    pixels, up to 16 `side`, as formats have their limits."""
    small, aspect = picture.copy(), max(picture.size) / min(picture.size)
    longest = round(side * min(max(1, math.sqrt(aspect / 2)), 16))
    small.thumbnail((longest, longest), how)
    return small


def _photo_uri(image: np.ndarray, budget: int) -> str:
    """The image as the best JPEG of the ladder that fits the budget (the last one if none does)."""
    picture, data = _picture(image), b""
    for side, quality in PHOTO_LADDER:
        small = _shrunk(picture, side, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= budget:
            break
    return _uri("jpeg", data)


def _map_uri(map: np.ndarray, low: float, high: float) -> str:
    picture = _shrunk(Image.fromarray(map.astype(np.float32)), MAP_SIDE, Image.Resampling.BOX)
    buffer = io.BytesIO()
    Image.fromarray(_heat(np.asarray(picture), low, high)).save(buffer, "WEBP", quality=60, alpha_quality=70, method=2)
    return _uri("webp", buffer.getvalue())


def _outline_path(mask: np.ndarray) -> str:
    """The outline of a mask as an SVG path in pixels, with the smallest regions left out beyond PATH_POINTS corners."""
    if not mask.any():
        return ""
    step = math.ceil(max(mask.shape) / 512)
    pad = [(step, step + (-n) % step) for n in mask.shape]
    coarse = np.pad(mask, pad)
    coarse = coarse.reshape(coarse.shape[0] // step, step, coarse.shape[1] // step, step).any((1, 3))
    tolerance = max(0.4, max(coarse.shape) / 640)
    contours = find_contours(coarse.astype(np.uint8), 0.5)
    contours.sort(key=lambda c: -float(np.prod(np.ptp(c, axis=0))))
    path, left = [], PATH_POINTS
    for contour in contours:
        polygon = approximate_polygon(contour, tolerance)
        left -= len(polygon)
        if left < 0 and path:
            break
        ys, xs = ((polygon - 1 + 0.5) * step).T
        path.append("M" + "L".join(f"{x:.4g} {y:.4g}" for x, y in zip(xs[:-1], ys[:-1], strict=True)) + "Z")
    return "".join(path)


OUTCOMES = {  # (defective, flagged): class, badge
    (True, True): ("caught", "Caught"),
    (True, False): ("missed", "Missed"),
    (False, True): ("alarm", "False alarm"),
    (False, False): ("passed", "Passed"),
}
ELSEWHERE = "Caught elsewhere"  # flagged, but nothing above the threshold lies on the known defect


def _section(section: Section, budget: int) -> dict[str, Any]:
    """Everything the template needs to know of one section."""
    scored = sorted(section.scored, key=lambda s: (-s.score, s.name))
    scores, good = np.array([float(s.score) for s in scored]), np.array([s.good for s in scored])
    threshold = float(section.image_threshold)
    ends = [*scores, threshold] if math.isfinite(threshold) else scores
    low, high = float(min(ends)), float(max(ends))
    pad = 0.03 * (high - low) or 0.5
    low, high = low - pad, high + pad
    undecided = not math.isfinite(threshold)
    threshold = high if undecided else threshold
    digits = _digits(high - low)
    groups = sorted({s.defect for s in scored}, key=lambda d: (d != "good", d))

    def across(value: float) -> float:
        return round(100 * (value - low) / (high - low), 3)

    rows = []
    edges = np.linspace(low, high, BINS + 1)
    for defect in groups:
        mine = scores[[s.defect == defect for s in scored]]
        counts = np.histogram(mine, edges)[0]
        share = counts / counts.max()
        bars = [(across(edges[n]), round(34 * float(share[n]), 2), int(counts[n])) for n in np.flatnonzero(counts)]
        flagged = int((mine > threshold).sum())
        rows.append({"defect": defect, "count": len(mine), "bars": bars, "flagged": flagged})

    map_low, map_high = _map_limits(scored, section.pixel_threshold)
    map_digits = max(0, _digits(map_high - map_low) - 1)
    cards = []
    for s in scored:
        kind, badge = OUTCOMES[not s.good, s.score > threshold]
        there = None if s.truth is None or not s.truth.any() else float(s.map[s.truth].max())
        badge = ELSEWHERE if kind == "caught" and there is not None and there <= threshold else badge
        marked = s.map > section.pixel_threshold
        cards.append({
            "name": s.name, "defect": s.defect, "group": groups.index(s.defect), "good": s.good,
            "score": repr(float(s.score)), "shown": f"{s.score:.{digits}f}", "kind": kind, "badge": badge,
            "other_light": s.other_light,
            "there": None if there is None else repr(there),
            "height": s.map.shape[0], "width": s.map.shape[1],
            "photo": _photo_uri(s.image, budget), "heat": _map_uri(s.map, map_low, map_high),
            "predicted": _outline_path(marked), "truth": "" if s.truth is None else _outline_path(s.truth),
            "marked": percent(float(marked.mean())),
            "known": None if s.truth is None else percent(float(s.truth.mean())),
        })  # fmt: skip

    true, false = int((scores[~good] > threshold).sum()), int((scores[good] > threshold).sum())
    pro, pro_at = _points(pro_curve([m.map for m in scored], [_truth(m) for m in scored], 0.30), 0.30), None
    if pro:
        x, y = _pixel_rates(scored, section.pixel_threshold)
        pro_at = (x / 0.30, 1 - y) if x <= 0.30 else None

    return {
        "title": section.title, "metrics": section.metrics, "trained_on": section.trained_on,
        "vouched": section.vouched, "light": section.light,
        "low": low, "high": high, "digits": digits, "threshold": threshold, "undecided": undecided,
        "shown": f"{threshold:.{digits}f}", "across": across(threshold), "bin": round(100 / BINS, 3),
        "ticks": [(across(t), f"{t:g}") for t in _ticks(low, high)],
        "rows": rows, "cards": cards, "masks": any(s.truth is not None for s in scored),
        "good": int(good.sum()), "defective": int((~good).sum()),
        "true": true, "false": false,
        "roc": _points(roc_curve(scores, ~good)),
        "roc_at": (false / max(1, good.sum()), 1 - true / max(1, (~good).sum())),
        "pro": pro, "pro_at": pro_at,
        "map_low": f"{map_low:.{map_digits}f}", "map_high": f"{map_high:.{map_digits}f}",
        "map_threshold": f"{section.pixel_threshold:.{map_digits}f}",
        "map_across": round(100 * (section.pixel_threshold - map_low) / (map_high - map_low), 2)
        if math.isfinite(section.pixel_threshold) else None,
    }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def write_report(path: str | os.PathLike[str], sections: Sequence[Section]) -> None:
    """Write one self-contained HTML page: numbers, curves, a threshold to move, and every test image with its map.

    Arguments:
        path: the file to write; an existing one is replaced only once the new one is complete.
        sections: one per data set, at least one; each needs at least one scored image.

    Raises: ReportError (CpcFastError) for an empty section, images and maps of different sizes, or scores that are not
        finite, CpcFastError where the file cannot be written.

    Example:
        >>> import tempfile
        >>> item = Scored("0.png", "good", np.zeros((8, 8, 1), np.uint8), 0.5, np.zeros((8, 8), np.float32), None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(f"{folder}/report.html", [Section("tiles", {}, [item], 1.0, 1.0, {"images": "120"})])
        ...     os.listdir(folder)
        ['report.html']
    """
    if not sections:
        raise ReportError("report: there is no section to write. Evaluate at least one data set first.")
    for section in sections:
        if not section.scored:
            raise ReportError(f"report: section {section.title!r} has no test image. Score at least one first.")
        for item in section.scored:
            _check(item)
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.finalize = lambda value: printable(value) if type(value) is str else value
    environment.filters |= {"percent": percent, "number": _number, "mean": _mean, "hex": _hex}
    environment.globals["interval"] = interval
    style, script = ((here / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    budget = min(PHOTO_BYTES, ALL_PHOTO_BYTES // sum(len(s.scored) for s in sections))
    html = environment.get_template("report.html").render(
        policy=policy, style=Markup(style), script=Markup(script), version=__version__,
        sections=[_section(s, budget) for s in sections], heat=[HEAT[n] for n in range(0, 256, 17)],
    )  # fmt: skip
    write_text(Path(path), html)


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{int(c):02x}" for c in color)


def _hash(text: str) -> str:
    """How a Content-Security-Policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
