"""The report: its pictures, its curves, its page as markup, and its page in a browser."""

import base64
import hashlib
import html.parser
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage import data, draw
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from cpc_fast import report
from cpc_fast.errors import CpcFastError
from cpc_fast.metrics import pro_curve
from cpc_fast.report import PREDICTED, TRUTH, ReportError, Section, contact_sheet, mask_outline, overlay, write_report
from cpc_fast.scored import Scored

HOSTILE = [
    '<img src=x onerror="window.hacked=1">.png',
    "</script><script>window.hacked=1</script>.png",
    "\"><svg onload='window.hacked=1'>.png",
    "{{ 7 * 7 }}{% raw %}$title.png",
    "a\nb\u202egnp.\udcff.png",
]


def textured(texture: str, defects: tuple[str, ...], *, good: int, each: int, power: float, seed: int) -> list[Scored]:
    """Windows of a real photograph with painted defects, and the scores and maps of a detector of some power."""
    photo, random, out = getattr(data, texture)(), np.random.default_rng(seed), []
    for defect in ["good"] * good + [d for d in defects for _ in range(each)]:
        size = 224
        y, x = random.integers(0, 512 - size, 2)
        image = photo[y : y + size, x : x + size].astype(np.float64)
        truth = np.zeros((size, size), bool)
        cy, cx = random.integers(50, size - 50, 2)
        if defect == "scratch":
            angle, length = random.uniform(0, np.pi), random.integers(30, 45)
            dy, dx = int(length * np.sin(angle)), int(length * np.cos(angle))
            truth[draw.line(cy - dy, cx - dx, cy + dy, cx + dx)] = True
            truth = ndimage.binary_dilation(truth, iterations=2)
            image[truth] = 0.3 * image[truth] + 150
        elif defect != "good":
            truth[draw.ellipse(cy, cx, random.integers(14, 38), random.integers(14, 38), shape=truth.shape)] = True
            image[truth] = 0.45 * image[truth] if defect == "stain" else ndimage.gaussian_filter(image, 3)[truth]
        noise = ndimage.gaussian_filter(random.standard_normal((size, size)), 14)
        strength = power * random.uniform(0.3, 1.7)
        surprise = 2.0 + 9 * noise + strength * ndimage.gaussian_filter(truth.astype(float), 7)
        surprise = surprise.astype(np.float32)
        name = f"{defect}_{len(out):03d}.png"
        image = image.clip(0, 255).astype(np.uint8)[..., None]
        out.append(Scored(name, defect, image, float(surprise.max()), surprise, truth))
    return out


def metrics(scored: list[Scored], threshold: float) -> dict:
    """A metrics.json with real numbers where they are cheap."""
    scores, bad = np.array([s.score for s in scored]), np.array([not s.good for s in scored])
    pixels, truth = (np.stack([getattr(s, k)[::8, ::8] for s in scored]).ravel() for k in ("map", "truth"))
    return {
        "device": "2 CPU cores",
        "image": {
            "auroc": roc_auc_score(bad, scores),
            "ap": average_precision_score(bad, scores),
            "f1_max": max(f1_score(bad, scores > t) for t in scores),
        },
        "pixel": {"auroc": roc_auc_score(truth, pixels), "ap": 0.42, "au_pro_0.30": 0.84, "au_pro_0.05": 0.41},
        "by_defect": {
            d: {
                "image_auroc": roc_auc_score(
                    [not s.good for s in scored if s.defect in ("good", d)],
                    [s.score for s in scored if s.defect in ("good", d)],
                ),
                "pixel_auroc": 0.93,
                "au_pro_0.30": 0.81,
                "count": sum(s.defect == d for s in scored),
            }
            for d in {s.defect for s in scored} - {"good"}
        },
        "threshold": {"value": threshold, "target_fpr": 0.01, "fpr_on_test_normals": 0.02, "recall": 0.9},
        "speed": {"train_images_per_s": 35.0, "score_ms_per_image_p50": 18.4, "score_ms_per_image_p95": 24.9},
    }


def sections(good: int = 20, each: int = 8) -> list[Section]:
    """What the demo reports: three textures of different difficulty."""
    out = []
    for seed, (texture, power) in enumerate([("brick", 4.5), ("grass", 2.2), ("gravel", 3.5)]):
        scored = textured(texture, ("scratch", "stain", "blur"), good=good, each=each, power=power, seed=seed)
        trained_on = {
            "Images": "300 windows of 224 px, good ones only",
            "Held out": "60 good windows, for threshold and calibration",
            "Preset": "cpu-demo: width 32, 4 directions, skip 1", "Epochs": "20", "Seed": "0",
        }  # fmt: skip
        threshold = float(np.quantile([s.score for s in scored if s.good], 0.9))
        out.append(Section(texture, metrics(scored, threshold), scored, threshold, threshold - 0.3, trained_on))
    return out


def plain(name: str = "0.png", defect: str = "good", score: float = 0.5, side: int = 16, **changes) -> Scored:
    map = np.linspace(0, score, side * side, dtype=np.float32).reshape(side, side)
    fields = {"image": np.full((side, side, 1), 128, np.uint8), "map": map, "truth": None} | changes
    return Scored(name, defect, fields["image"], score, fields["map"], fields["truth"])


def written(path: Path, *given: Section) -> str:
    write_report(path, given)
    return path.read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    """Every tag of a page with its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


# ---------------------------------------------------------------------------------------------------------- pictures


def luminance(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_heat_colours_get_lighter_all_the_way():
    assert report.HEAT.shape == (256, 3)
    steps = np.diff(luminance(report.HEAT.astype(float)))
    assert (steps > -1e-3).all()
    assert luminance(report.HEAT[-1].astype(float)) > 0.75
    assert luminance(report.HEAT[0].astype(float)) < 0.06


def test_overlay_is_the_image_below_low_and_the_colour_above_high():
    image = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    map = np.full((6, 9), 1.0)
    assert (overlay(image, map, 1.0, 2.0) == image).all()
    above = overlay(image, map + 5, 1.0, 2.0)
    assert (np.abs(above - (0.14 * image + 0.86 * report.HEAT[-1])) <= 2).all()
    assert overlay(image[..., :1], map, 0.0, 0.0).shape == (6, 9, 3)
    assert (overlay(image, map * np.nan, 0.0, 1.0) == image).all()


def test_mask_outline_follows_the_edge_and_leaves_the_rest():
    image = np.full((40, 50, 1), 90, np.uint8)
    mask = np.zeros((40, 50), bool)
    mask[10:20, 15:30] = True
    out = mask_outline(image, mask)
    assert (out[10, 15:30] == PREDICTED).all()
    assert (out[9, 15:30] == report.CASING).all()
    assert (out[12:18, 18:27] == 90).all()
    assert (out[30:] == 90).all()
    assert (mask_outline(image, mask, color=TRUTH)[10, 15] == TRUTH).all()
    assert (mask_outline(image, np.zeros_like(mask)) == 90).all()
    assert (image == 90).all()
    mask[:] = False
    mask[3, 3] = True
    assert (mask_outline(image, mask)[3, 3] == PREDICTED).all()


def test_outline_path_surrounds_the_mask_and_is_bounded():
    mask = np.zeros((60, 80), bool)
    mask[20:30, 40:60] = True
    numbers = np.array(re.findall(r"[\d.]+", report._outline_path(mask)), float).reshape(-1, 2)
    assert numbers.min(0) == pytest.approx((40, 20), abs=1)
    assert numbers.max(0) == pytest.approx((60, 30), abs=1)
    assert report._outline_path(np.zeros((5, 5), bool)) == ""
    assert report._outline_path(np.ones((1, 1), bool)).startswith("M")
    lone = np.zeros((2000, 1500), bool)
    lone[1234, 321] = True
    numbers = np.array(re.findall(r"[\d.]+", report._outline_path(lone)), float).reshape(-1, 2)
    assert numbers.mean(0) == pytest.approx((321, 1234), abs=4)
    noise = np.random.default_rng(0).random((512, 512)) > 0.5
    assert len(report._outline_path(noise)) < 20 * report.PATH_POINTS


def test_contact_sheet():
    items = sections(good=2, each=1)[0].scored
    sheet = contact_sheet(items, columns=3, pixel_threshold=2.5, size=96)
    assert sheet.dtype == np.uint8
    assert sheet.ndim == 3
    assert sheet.shape[1] > 3 * 96
    assert sheet.shape[0] > 2 * 3 * 96
    assert (sheet == PREDICTED).all(-1).any()
    assert (sheet == TRUTH).all(-1).any()
    wide = plain(image=np.zeros((10, 40, 3), np.uint8), map=np.zeros((10, 40), np.float32))
    assert contact_sheet([wide], size=64).shape[2] == 3
    with pytest.raises(ReportError, match=r"at least one image and one column. Got 0 and columns=6"):
        contact_sheet([])


def test_shapes_must_agree():
    image = np.zeros((4, 5, 3), np.uint8)
    with pytest.raises(ReportError, match=r"Got \(4, 5, 3\) and \(5, 4\)"):
        overlay(image, np.zeros((5, 4)), 0, 1)
    with pytest.raises(ReportError, match=r"uint8 \(H, W, 1\) or \(H, W, 3\). Got uint8 \(4, 5, 4\)"):
        mask_outline(np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5), bool))


# ------------------------------------------------------------------------------------------------------------ curves


def test_pixel_rates_lie_on_the_pro_curve():
    items = sections(good=3, each=2)[0].scored
    items = [*items, Scored("bare", "good", items[0].image, 0.0, items[0].map, None)]
    x, y = pro_curve([s.map for s in items], [report._truth(s) for s in items], limit=1.0, points=10**9)
    for threshold in (2.2, 2.4, 2.9):
        false, overlap = report._pixel_rates(items, threshold)
        assert np.interp(false, x, y) == pytest.approx(overlap, abs=1e-3)


def test_points_of_a_curve():
    assert report._points((np.array([0.0, 0.15, 0.3]), np.array([0.0, 0.75, 1.0])), 0.3) == "0,1 0.5,0.25 1,0"
    assert report._points((np.empty(0), np.empty(0))) == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 880.0), (1e-9, 1.1e-9), (41.0, 41.3)])
def test_ticks_are_few_and_inside(low, high):
    ticks = report._ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-12 <= t <= high + 1e-12 for t in ticks)
    assert [float(f"{t:g}") for t in ticks] == pytest.approx(ticks, abs=1e-9 * (high - low))  # as they are labelled


def test_wilson_interval_and_percent():
    assert report.interval(0, 20) == "0 to 16%"
    assert report.interval(20, 20) == "84 to 100%"
    assert report.interval(0, 0) == "no images"
    assert report.percent(1 / 16) == "6.3%"
    assert report.percent(1.0) == "100.0%"


# -------------------------------------------------------------------------------------------------------------- page


def test_page_holds_everything_and_asks_for_nothing(tmp_path):
    text = written(tmp_path / "report.html", *sections(good=4, each=2))
    tags = Tags(text).found
    policy = next(a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        body = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        assert body
        digest = base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    for _, attributes in tags:
        assert not any(name.startswith("on") or name == "style" for name in attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    assert {t for t, _ in tags}.isdisjoint({"link", "iframe", "object", "base"})
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    images = [a for t, a in tags if t == "image"]
    assert len(images) == 2 * 3 * 10
    pictures = [a for t, a in tags if t == "svg" and a.get("class") == "picture"]
    assert all(a["role"] == "img" and "score" in (a["aria-label"] or "") for a in pictures)
    assert "nan" not in re.sub(r"base64,[\w+/=]+", "", text).lower().replace("nance", "")


def test_same_input_same_bytes(tmp_path):
    given = sections(good=2, each=1)
    assert written(tmp_path / "a.html", *given) == written(tmp_path / "b.html", *given)


@pytest.mark.parametrize(
    ("size", "seen", "map_seen"),
    [
        ((1000, 1000), (640, 640), (160, 160)), ((1000, 2000), (320, 640), (80, 160)),
        ((64, 4000), (57, 3578), (14, 894)), ((8, 40_000), (2, 10_240), (1, 2560)),
    ],
)  # fmt: skip
def test_pictures_have_so_many_pixels_whatever_their_shape(size, seen, map_seen):
    def shape(uri: str) -> tuple[int, int]:
        return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size[::-1]

    assert shape(report._photo_uri(np.zeros((*size, 1), np.uint8), 10**9)) == seen
    assert shape(report._map_uri(np.zeros(size, np.float32), 0, 1)) == map_seen


def test_hundred_images_stay_under_six_megabytes(tmp_path):
    [section, *_] = sections(good=40, each=20)
    big = [
        replace(
            s, image=s.image.repeat(4, 0).repeat(4, 1).repeat(3, 2), map=s.map.repeat(4, 0).repeat(4, 1), truth=None
        )
        for s in section.scored[:3]
    ]
    scored = [*section.scored[3:], *big]
    assert len(scored) == 100
    path = tmp_path / "report.html"
    write_report(path, [Section("a", section.metrics, scored, 3.0, 3.0, {})])
    assert path.stat().st_size < 6e6
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    noisy = [plain(f"{n}.png", image=noise, map=np.zeros((600, 800), np.float32)) for n in range(5)]
    write_report(path, [Section("a", {}, noisy, 3.0, 3.0, {})])
    assert path.stat().st_size < 5 * 60_000 + 100_000
    photo = re.search(r"data:image/jpeg;base64,([\w+/=]+)", path.read_text())
    assert photo
    assert max(Image.open(io.BytesIO(base64.b64decode(photo[1]))).size) <= 320


def test_hostile_names_are_text(tmp_path):
    items = [plain(name, defect=name if n % 2 else "good", score=n) for n, name in enumerate(HOSTILE)]
    section = Section(HOSTILE[1], {"device": HOSTILE[0]}, items, 1.0, 1.0, {HOSTILE[0]: HOSTILE[2]})
    text = written(tmp_path / "report.html", section, section)
    tags = Tags(text).found
    assert [t for t, _ in tags].count("script") == 1
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "{{ 7 * 7 }}" in text
    assert r"a\nb\u202egnp.\udcff.png" in text
    assert "\u202e" not in text


def test_without_masks_it_says_so(tmp_path):
    items = [plain("a.png"), plain("b.png", "crack", 0.9)]
    null = {"image": {"auroc": 1.0, "ap": float("nan"), "f1_max": None}, "pixel": {"auroc": None, "ap": None},
            "by_defect": {"crack": {"image_auroc": 1.0, "pixel_auroc": None, "au_pro_0.30": float("nan")}}}  # fmt: skip
    text = written(tmp_path / "report.html", Section("cells", null, items, 0.7, 0.5, {}))
    assert text.count("no masks") >= 5
    assert "No masks: without ground truth" in text
    assert "nan" not in re.sub(r"base64,[\w+/=]+", "", text).lower()
    assert "ground truth (dashed)" not in text


@pytest.mark.parametrize(
    ("target", "vouched", "said"),
    [
        (0.01, None, "; it was set for 1.0%, on good images kept out of training."),
        (0.01, (3, 0.25), ". 1.0% was asked for, but the 3 good images kept out of training can vouch for 25.0% only."),
        (0.05, (1, 1.0), ". 5.0% was asked for, but the one good image kept out of training can vouch for no rate."),
        (None, None, "."),
    ],
)  # fmt: skip
def test_false_alarms_are_promised_as_far_as_held_out_images_vouch(tmp_path, target, vouched, said):
    section = Section("tiles", {"threshold": {"target_fpr": target}}, [plain()], 1.0, 1.0, {}, vouched)
    text = " ".join(written(tmp_path / "report.html", section).split())
    assert f"0 of 1 good images are flagged at that threshold{said}</p>" in text


@pytest.mark.parametrize("kinds", [("good",), ("crack",), ("good", "crack")])
@pytest.mark.parametrize("threshold", [0.5, float("inf"), float("nan")])
def test_small_and_odd_sections(tmp_path, kinds, threshold):
    ones = np.ones((16, 16), bool)
    items = [plain(f"{k}.png", k, 0.5, truth=ones if k == "crack" else None) for k in kinds]
    text = written(tmp_path / "report.html", Section("s", {}, items, threshold, threshold, {}))
    assert ("No threshold could be set" in text) == (not np.isfinite(threshold))


def test_one_by_one_and_long_images(tmp_path):
    shapes = [(1, 1, 3), (3, 900, 1), (900, 3, 3)]
    items = [plain(f"{n}.png", image=np.zeros(s, np.uint8), map=np.ones(s[:2], np.float32), truth=np.ones(s[:2], bool))
             for n, s in enumerate(shapes)]  # fmt: skip
    assert "900" in written(tmp_path / "report.html", Section("s", {}, items, 0.2, 0.5, {}))


def test_errors_say_what_and_where(tmp_path):
    path = tmp_path / "report.html"
    with pytest.raises(ReportError, match="no section to write"):
        write_report(path, [])
    with pytest.raises(ReportError, match="section 'brick' has no test image"):
        write_report(path, [Section("brick", {}, [], 1, 1, {})])
    with pytest.raises(ReportError, match=r"report: x.png has the score nan; scores must be finite"):
        write_report(path, [Section("brick", {}, [replace(plain("x.png"), score=float("nan"))], 1, 1, {})])
    with pytest.raises(ReportError, match=r"x.png has an anomaly map that is not finite"):
        write_report(path, [Section("brick", {}, [plain("x.png", map=np.full((16, 16), np.nan))], 1, 1, {})])
    with pytest.raises(ReportError, match=r"x.png: image and map or mask .* Got \(16, 16, 1\) and \(4, 4\)"):
        write_report(path, [Section("brick", {}, [plain("x.png", truth=np.zeros((4, 4), bool))], 1, 1, {})])
    assert not path.exists()
    path.write_text("the old one")
    with pytest.raises(CpcFastError, match=r"Could not write .*report\.html/report\.html': "):
        write_report(path / "report.html", [Section("s", {}, [plain()], 1, 1, {})])
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ----------------------------------------------------------------------------------------------------------- browser

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra [dev])")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on the path (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as session:
        running = session.chromium.launch(executable_path=chromium, args=FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, list[Section]]:
    path, given = tmp_path_factory.mktemp("report") / "report.html", sections(good=10, each=4)
    write_report(path, given)
    return path, given


@pytest.fixture
def open_page(browser):
    """Open a file, and fail at the end if the page complained or asked for anything but itself and its own data."""
    contexts, complaints = [], []

    def opener(path: Path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith(("data:", path.as_uri())) or complaints.append(r.url[:200]))
        page.goto(path.as_uri())
        return page

    yield opener
    for context in contexts:
        context.close()
    assert complaints == []


def counts(page) -> dict[str, int]:
    return {k: int(page.locator(f".panel:not(.folded) .bar .{k}").inner_text()) for k in ("tp", "fn", "fp", "tn")}


def expected(section: Section, threshold: float) -> dict[str, int]:
    flagged = {True: 0, False: 0}
    for s in section.scored:
        flagged[s.good] += s.score > threshold
    good = sum(s.good for s in section.scored)
    return {"tp": flagged[False], "fn": len(section.scored) - good - flagged[False],
            "fp": flagged[True], "tn": good - flagged[True]}  # fmt: skip


def outcomes(page) -> dict[str, int]:
    badges = page.locator(".panel:not(.folded) .card .badge").all_text_contents()
    return {
        k: sum(badge.startswith(b) for badge in badges)
        for k, b in {"tp": "Caught", "fn": "Missed", "fp": "False alarm", "tn": "Passed"}.items()
    }


def test_script_changes_nothing_until_someone_moves_something(demo, open_page):
    path, given = demo
    text = ".panel >> nth=1 >> .counts p:not(.cut-at), .panel >> nth=1 >> .badge, .panel >> nth=1 >> .flagged-of"
    without = open_page(path, java_script_enabled=False)
    assert without.locator(".panel").nth(2).is_visible()
    assert not without.locator(".slider").first.is_visible()
    before = without.locator(text).all_text_contents()
    page = open_page(path)
    page.locator(".tab").nth(1).click()
    assert page.locator(text).all_text_contents() == before
    assert counts(page) == outcomes(page) == expected(given[1], given[1].image_threshold)


def test_slider_redecides_counts_badges_and_marks(demo, open_page):
    path, [section, *_] = demo
    page = open_page(path)
    slider = page.get_by_label("Decision threshold").first
    for value in np.quantile([s.score for s in section.scored], [0.0, 0.35, 0.8]):
        slider.evaluate(
            "(s, v) => { s.value = v; s.dispatchEvent(new Event('input', { bubbles: true })) }", value - 0.01
        )
        assert counts(page) == outcomes(page) == expected(section, value - 0.01)
        assert page.locator(".panel").first.locator(".card.missed").count() == expected(section, value - 0.01)["fn"]
    now = counts(page)
    dot = page.locator(".at-roc").first.get_attribute("d")
    x, y = (float(v) for v in re.findall(r"[\d.]+", dot or "")[:2])
    assert (x, 1 - y) == pytest.approx((now["fp"] / 10, now["tp"] / 12))
    assert "missed defect" in (slider.get_attribute("aria-valuetext") or "")
    assert page.locator(".panel .recall").first.inner_text() == report.percent(now["tp"] / 12)
    page.get_by_role("button", name="No false alarm").click()
    assert counts(page)["fp"] == 0
    page.get_by_role("button", name="No missed defect").click()
    assert counts(page)["fn"] == 0
    page.get_by_role("button", name="As set in advance").click()
    assert counts(page) == expected(section, section.image_threshold)
    exact = page.get_by_label("Threshold, exact value").first
    exact.fill("-1000")
    exact.press("Enter")
    assert counts(page)["tn"] == 0


def test_a_defect_that_was_flagged_beside_its_mask_is_caught_elsewhere(tmp_path, open_page):
    map, left, right = np.zeros((16, 16), np.float32), np.zeros((16, 16), bool), np.zeros((16, 16), bool)
    map[:, :8], map[:, 8:], left[:, :8], right[:, 8:] = 0.9, 0.4, True, True
    items = [plain(f"{n}.png", "crack", 0.9, map=map, truth=truth) for n, truth in enumerate([left, right, None])]
    text = written(tmp_path / "report.html", Section("tiles", {}, [plain(score=0.1), *items], 0.5, 0.5, {}))
    badges = ["Caught", "Caught elsewhere", "Caught", "Passed"]
    assert re.findall('<p class="badge">(.+)</p>', text) == badges
    page = open_page(tmp_path / "report.html")
    assert page.locator(".card .badge").all_text_contents() == badges
    exact = page.get_by_label("Threshold, exact value")
    exact.fill("0.3")
    exact.press("Enter")
    assert page.locator(".card .badge").all_text_contents() == ["Caught"] * 3 + ["Passed"]


def test_images_in_other_light_are_marked_whatever_the_threshold(tmp_path, open_page):
    dark = replace(plain("a.png", score=0.1), other_light=True)
    items = [dark, plain("b.png", score=0.9), plain("c.png", "crack", 0.4)]
    section = Section("tiles", {}, items, 0.5, 0.5, {}, light="1 of 3 is dark.")
    text = written(tmp_path / "report.html", section)
    assert text.index("Time per image") < text.index("1 of 3 is dark.") < text.index("By kind of defect")
    page = open_page(tmp_path / "report.html")
    exact = page.get_by_label("Threshold, exact value")
    for value, badge in (("0.5", "✓Passed"), ("0.05", "!False alarm")):
        exact.fill(value)
        exact.press("Enter")
        marked = page.locator(".card", has=page.locator(".mark:visible"))
        assert marked.locator(".name").all_text_contents() == ["a.png"]
        assert marked.locator(".badge").inner_text() == badge[1:]
    assert "of less or more contrast" in (page.locator(".mark").get_attribute("title") or "")
    page.locator(".mark").click()
    assert "Other light" in page.locator(".enlarged-text").inner_text()


def test_slider_by_keyboard_changes_one_decision_at_a_time(demo, open_page):
    path, [section, *_] = demo
    page = open_page(path)
    slider = page.get_by_label("Decision threshold").first
    slider.focus()
    page.keyboard.press("Home")
    everything = counts(page)
    assert everything["fn"] == everything["tn"] == 0
    exact = page.get_by_label("Threshold, exact value").first
    for n in range(1, 4):
        page.keyboard.press("ArrowRight")
        assert counts(page)["fn"] + counts(page)["tn"] == n
        assert counts(page) == expected(section, float(exact.input_value()))  # which predict --threshold may be given
    page.keyboard.press("ArrowLeft")
    assert counts(page)["fn"] + counts(page)["tn"] == 2
    page.keyboard.press("End")
    assert counts(page)["tp"] == counts(page)["fp"] == 0
    page.keyboard.press("ArrowLeft")
    assert counts(page)["tp"] + counts(page)["fp"] == 1
    page.keyboard.press("PageDown")
    assert float(slider.input_value()) < max(s.score for s in section.scored)


def test_filters_order_and_layers(demo, open_page):
    path, [section, *_] = demo
    page = open_page(path)
    panel = page.locator(".panel").first
    shown = panel.locator(".card:visible")
    now = expected(section, section.image_threshold)
    for label, key in {"Missed": "fn", "False alarm": "fp", "Caught": "tp", "Passed": "tn"}.items():
        panel.get_by_role("radio", name=re.compile(f"^{label} ")).check(force=True)
        assert shown.count() == now[key]
        assert {text.removesuffix(" elsewhere") for text in shown.locator(".badge").all_text_contents()} <= {label}
    panel.get_by_role("radio", name=re.compile("^All ")).check(force=True)
    panel.get_by_role("combobox", name="Kind").select_option(label="stain")
    assert set(shown.locator(".what").all_text_contents()) == {"stain"}
    assert panel.get_by_role("status").inner_text() == "4 of 22 images shown"
    panel.get_by_role("radio", name=re.compile("^Passed ")).check(force=True)
    assert panel.get_by_role("status").inner_text() == "No image matches these filters."
    panel.get_by_role("radio", name=re.compile("^All ")).check(force=True)
    panel.get_by_role("combobox", name="Kind").select_option("all")
    scores = [float(v) for v in shown.locator(".score").all_text_contents()]
    assert scores == sorted(scores, reverse=True)
    panel.get_by_role("combobox", name="Order").select_option("near")
    scores = [float(v) for v in shown.locator(".score").all_text_contents()]
    distance = np.abs(np.array(scores) - section.image_threshold)
    assert (np.diff(distance) > -0.002).all()
    assert panel.locator(".heat").first.is_visible()
    panel.get_by_role("checkbox", name="map").uncheck()
    assert not panel.locator(".heat").first.is_visible()
    panel.get_by_role("checkbox", name="predicted mask").uncheck()
    assert panel.locator(".gallery .predicted:visible").count() == 0


def test_enlarging_and_tabs_by_keyboard(demo, open_page):
    page = open_page(demo[0])
    page.locator(".tab").first.focus()
    page.keyboard.press("ArrowRight")
    assert [t.get_attribute("aria-selected") for t in page.locator(".tab").all()] == ["false", "true", "false"]
    assert [p.is_visible() for p in page.locator(".panel").all()] == [False, True, False]
    view = page.locator(".panel").nth(1).locator(".view")
    view.first.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.is_visible()
    first = page.locator("#enlarged-name").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#enlarged-name").inner_text() != first
    assert dialog.locator(".picture").count() == 2
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    sync_api = pytest.importorskip("playwright.sync_api")
    sync_api.expect(view.nth(1)).to_be_focused()  # once the dialog has told that it closed


def test_hostile_names_do_nothing_in_a_browser(tmp_path, open_page):
    items = [plain(name, defect=name if n % 2 else "good", score=n) for n, name in enumerate(HOSTILE)]
    write_report(tmp_path / "report.html", [Section(HOSTILE[1], {}, items, 1.0, 1.0, {HOSTILE[0]: HOSTILE[2]})] * 2)
    page = open_page(tmp_path / "report.html")
    page.locator(".view").first.click()
    for name in reversed(HOSTILE):
        assert page.locator("#enlarged-name").inner_text() == report.printable(name)
        page.keyboard.press("ArrowRight")
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_every_width_with_enough_contrast(demo, open_page, width, scheme):
    page = open_page(demo[0], viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    low = page.evaluate(CONTRAST)
    assert low == []


# Text whose contrast with the first opaque background below it is under WCAG AA (4.5, large or bold text 3).
CONTRAST = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, n) => sum + v * [0.2126, 0.7152, 0.0722][n], 0);
  const low = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.closest('.view, script')) continue;
    const style = getComputedStyle(e), ink = light(parse(e.closest('svg') ? style.fill : style.color));
    let back = e, rgba = [0, 0, 0, 0];
    for (; back && (rgba[3] ?? 1) === 0; back = back.parentElement)
      rgba = parse(getComputedStyle(back).backgroundColor);
    const paper = light(rgba), size = parseFloat(style.fontSize);
    const ratio = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (ratio < (size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5))
      low.push(`${e.tagName}.${e.className.baseVal ?? e.className} ${ratio.toFixed(2)}`);
  }
  return [...new Set(low)];
}"""
