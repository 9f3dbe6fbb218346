"""Datasets that anyone can have at once, written to disk in the layout of MVTec AD.

    <out>/<category>/train/good/000.png                   normal images, to learn from
    <out>/<category>/test/{good,<defect>}/000.png         images to judge
    <out>/<category>/ground_truth/<defect>/000_mask.png   255 on the defect, 0 elsewhere

`write_textures` cuts windows out of three photographs that scikit-image carries (no network) and paints five defects;
`write_elpv` sorts the solar cells of the elpv-dataset package. Both write beside the target and rename at the end, so a
folder is whole or absent, and the same arguments give the same bytes.

The painters below take a window and a generator and return the painted window and the blend weight that they used;
the mask is where that weight is above zero, so outside of the mask not one pixel differs from the photograph. They are
half of this file, and belong beside the function that calls them: together they are the definition of the set.
"""

import csv
import importlib.util
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.files import unwritten

TEXTURES = ("brick", "grass", "gravel")
# (top, bottom, left, right) of the part of each 512 x 512 photograph that is kept for testing: on brick a band, since
# the perspective changes from left to right; on the others a part that looks like the rest, by the statistics of its
# normal patches (a band across the clover and dead leaves of the lawn would be full of natural anomalies).
TEST_PARTS = {"brick": (168, 344, 0, 512), "grass": (256, 432, 0, 256), "gravel": (256, 432, 0, 256)}
MARKER = "dataset.json"

TEXTURES_LICENSE = """\
Windows of the photographs `brick`, `grass` and `gravel` that scikit-image distributes (skimage.data), under the
Creative Commons CC0 1.0 public domain dedication: https://creativecommons.org/publicdomain/zero/1.0/
The originals: Bricks25 and Gravel04 of CC0Textures, and https://www.deviantart.com/linolafett/art/Grass-01-434853879

The defects in test/ (scratch, stain, foreign, blur, cut_paste) are painted by cpc_fast; the masks in ground_truth/ are
exact. Test windows lie in one part of a photograph (see dataset.json), train windows outside of it.
"""

ELPV_LICENSE = """\
Solar cells of the ELPV dataset, from the Python package elpv-dataset (https://github.com/zae-bayern/elpv-dataset).
The images and labels are under CC BY-NC-SA 4.0 (not for commercial use):
https://creativecommons.org/licenses/by-nc-sa/4.0/
Cite: Buerhop-Lutz et al., A Benchmark for Visual Identification of Defective Solar Cells in Electroluminescence
Imagery, EU PVSEC 2018; Deitsch et al., Segmentation of photovoltaic module cells in uncalibrated electroluminescence
images, Machine Vision and Applications 2021.

train/good: a seeded share of the cells with defect probability 0, per cell type. test/good: the rest of them.
test/defective: the cells with probability 1. Cells with 1/3 and 2/3 (the experts were unsure) are left out. No masks.
"""


def write_textures(
    out: str | os.PathLike,
    seed: int = 0,
    *,
    train: int = 300,
    good: int = 40,
    per_defect: int = 12,
    window: int = 128,
    textures: tuple[str, ...] = TEXTURES,
) -> Path:
    """Write brick, grass and gravel with painted defects to `out`; returns `out`.

    Per texture: `train` + `good` normal windows and `per_defect` of each defect in `DEFECTS`, all (window, window)
    8-bit grayscale, with masks. Train and test windows share no pixel of the photograph. The same arguments give the
    same bytes.

    Raises UsageError for an impossible size or an unknown texture, CpcFastError where `out` holds anything else.
    Source: scikit-image (CC0). Example: `write_textures("data/textures")` -> 3 x (300 + 40 + 60) images and 180 masks.
    """
    limit = 168  # what fits every part and what is left of each photograph
    if not 64 <= window <= limit:
        raise UsageError(
            f"write_textures: window must be from 64 to {limit} px, so that it fits every part. Got {window}."
        )
    if unknown := [name for name in textures if name not in TEXTURES]:
        raise UsageError(f"write_textures: unknown texture {unknown[0]!r}; choose from {', '.join(TEXTURES)}.")
    if min(train, good, per_defect, seed) < 0:
        raise UsageError(
            f"write_textures: counts and seed must be >= 0. Got {train=}, {good=}, {per_defect=}, {seed=}."
        )

    photographs = {name: _photograph(name) for name in TEXTURES}
    made_from: dict = {"seed": seed, "train": train, "good": good, "per_defect": per_defect, "window": window}
    made_from["test_parts"] = {name: TEST_PARTS[name] for name in textures}
    with _new_folder(out, "textures", made_from, TEXTURES_LICENSE) as folder:
        for name in textures:
            photograph, root = photographs[name], folder / name
            top, bottom, left, right = TEST_PARTS[name]
            band = photograph[top:bottom, left:right]  # never seen in training
            rest = [photograph[:top], photograph[bottom:], photograph[:, :left], photograph[:, right:]]
            rest = [part for part in rest if min(part.shape) >= limit]
            others = [other for key, other in photographs.items() if key != name]

            def rng(*where: int, name: str = name) -> Generator:
                """One generator per image, so that asking for more images changes none of the first ones."""
                return np.random.default_rng([seed, TEXTURES.index(name), *where])

            for i in range(train):
                _save(root / "train" / "good" / f"{i:03d}.png", _window(rest[i % len(rest)], window, rng(0, i)))
            for i in range(good):
                _save(root / "test" / "good" / f"{i:03d}.png", _window(band, window, rng(1, i)))
            for i_defect, (defect, paint) in enumerate(DEFECTS.items()):
                for i in range(per_defect):
                    generator = rng(2 + i_defect, i)
                    painted, weight = paint(_window(band, window, generator).astype(float), generator, band, others)
                    _save(root / "test" / defect / f"{i:03d}.png", np.rint(np.clip(painted, 0, 255)).astype(np.uint8))
                    _save(root / "ground_truth" / defect / f"{i:03d}_mask.png", (weight > 0).astype(np.uint8) * 255)
    return Path(out)


def write_elpv(out: str | os.PathLike, seed: int = 0, *, train_share: float = 0.5) -> Path:
    """Write the ELPV solar cells (2,624 images of 300 x 300, no masks) to `out`; returns `out`.

    train/good: floor(train_share x n) of the n cells with defect probability 0 of each type (mono, poly), by a
    permutation seeded with `seed`. test/good: the rest of them. test/defective: probability 1. The cells in between
    (1/3 and 2/3) are left out: a yes-or-no metric has no place for them.

    Raises CpcFastError without the elpv-dataset package, UsageError for a share outside (0, 1).
    Source: Deitsch et al. 2021, CC BY-NC-SA 4.0.
    Example: `write_elpv("data/elpv")` -> 754 train, 754 good, 715 defective.
    """
    if not 0 < train_share < 1:
        raise UsageError(f"write_elpv: train_share must lie between 0 and 1, exclusive. Got {train_share}.")
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise CpcFastError(
            "write_elpv: the package elpv-dataset, which carries the images, is not installed; "
            "`pip install 'cpc_fast[elpv]'` brings it."
        )
    source = Path(spec.origin).parent / "data" if spec.origin.endswith("__init__.py") else Path(spec.origin)
    with open(source / "labels.csv", encoding="ascii") as file:
        rows = [(row[0], float(row[1]), row[2]) for row in csv.reader(file, delimiter=" ", skipinitialspace=True)]

    with _new_folder(out, "elpv", {"seed": seed, "train_share": train_share}, ELPV_LICENSE) as folder:
        split = {path: "test/defective" for path, probability, _ in rows if probability == 1}
        for i_kind, kind in enumerate(sorted({kind for *_, kind in rows})):
            normal = sorted(path for path, probability, k in rows if k == kind and probability == 0)
            order = np.random.default_rng([seed, i_kind]).permutation(len(normal))
            count = int(train_share * len(normal))
            for rank, i in enumerate(order):
                split[normal[i]] = "train/good" if rank < count else "test/good"
        for path, where in sorted(split.items()):
            target = folder / where / Path(path).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, target)
    return Path(out)


# The painters: window (H, W) float64, generator, band to cut from, other photographs -> painted (H, W), weight (H, W)

Painter = Callable[[np.ndarray, Generator, np.ndarray, list[np.ndarray]], tuple[np.ndarray, np.ndarray]]


def _scratch(window: np.ndarray, rng: Generator, band: np.ndarray, others: list) -> tuple[np.ndarray, np.ndarray]:
    """A bent groove: a bright core with a dark flank where the light does not reach, thinner at its ends."""
    size = len(window)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.65, 0.95) * size
    along = np.array([np.sin(angle), np.cos(angle)])
    across = np.array([along[1], -along[0]])
    centre = size / 2 + rng.uniform(-0.12, 0.12, 2) * size
    t = np.linspace(-1, 1, 400)[:, None]
    bend, wave = rng.uniform(-0.12, 0.12) * size, rng.uniform(-0.03, 0.03) * size
    curve = centre + t * along * length / 2 + across * (bend * t**2 + wave * np.sin(2 * np.pi * t))  # (400, 2)
    curve = curve[np.all((curve > 3) & (curve < size - 4), axis=1)]
    half = rng.uniform(1.7, 2.8) * np.linspace(0, 1, len(curve)).clip(0.02, 0.98)
    taper = np.minimum(1, 0.45 + 4 * np.minimum(half, half[::-1]) / half.max())
    half = half.max() * taper * (0.9 + 0.2 * rng.random() + 0.1 * np.sin(np.linspace(0, 25, len(curve))))

    depth, side = np.empty(window.shape), np.empty(window.shape)
    x = np.arange(size)[:, None]
    for y in range(size):  # by rows: all at once is 100 MB
        dy, dx = y - curve[:, 0], x - curve[:, 1]  # (400,), (W, 400)
        distance = np.hypot(dy, dx) - half
        nearest = distance.argmin(-1)
        depth[y] = -distance[x[:, 0], nearest]  # > 0 inside of the groove
        side[y] = dy[nearest] * across[0] + dx[x[:, 0], nearest] * across[1]
    weight = np.clip(depth + 0.5, 0, 1)
    dark, bright = rng.uniform(15, 35), rng.uniform(200, 235)
    grain = ndimage.gaussian_filter(rng.standard_normal(window.shape), 1) * 40
    colour = bright + (dark - bright) * np.clip(side / 1.5 + 0.2, 0, 1) + grain
    return window + rng.uniform(0.75, 0.9) * weight * (colour - window), weight


def _stain(window: np.ndarray, rng: Generator, band: np.ndarray, others: list) -> tuple[np.ndarray, np.ndarray]:
    """Something spilt and dried: darker, the grain still showing through, uneven, with a darker rim."""
    depth = _blob(window.shape, rng, rng.uniform(0.03, 0.09))
    weight = np.clip(depth / 3, 0, 1)
    cloud = ndimage.gaussian_filter(rng.standard_normal(window.shape), 6)
    rim = np.exp(-((depth - 3) ** 2) / 6)
    shade = rng.uniform(0.36, 0.5) + 0.1 * cloud / np.abs(cloud).max() + 0.1 * rim
    return window * (1 - weight * shade), weight


def _foreign(window: np.ndarray, rng: Generator, band: np.ndarray, others: list) -> tuple[np.ndarray, np.ndarray]:
    """A piece of another texture with the mean and contrast of this one, so that brightness gives nothing away."""
    depth = _blob(window.shape, rng, rng.uniform(0.06, 0.10))
    weight = np.clip(depth / 1.5, 0, 1)
    source = others[rng.integers(len(others))]
    piece = (_window(source, len(window), rng) - source.mean()) / source.std() * window.std() + window.mean()
    return window + weight * (piece - window), weight


def _blur(window: np.ndarray, rng: Generator, band: np.ndarray, others: list) -> tuple[np.ndarray, np.ndarray]:
    """A smear: the texture out of focus in one place."""
    depth = _blob(window.shape, rng, rng.uniform(0.05, 0.10))
    weight = np.clip(depth / 3, 0, 1)
    return window + weight * (ndimage.gaussian_filter(window, rng.uniform(2.5, 4)) - window), weight


def _cut_paste(window: np.ndarray, rng: Generator, band: np.ndarray, others: list) -> tuple[np.ndarray, np.ndarray]:
    """A rectangle of the same texture from elsewhere, at less than half its size and turned by 40 to 140 degrees.

    Turned alone, a piece of gravel in gravel is a defect that nobody can see. It lies on top, so it throws a shadow.
    """
    size = len(window)
    area, ratio = rng.uniform(0.05, 0.085) * size**2, rng.uniform(1, 1.5)
    tall, wide = np.sqrt(area / ratio), np.sqrt(area * ratio)
    reach, shrink = np.hypot(tall, wide) / 2 + 2, rng.uniform(0.4, 0.5)
    centre = rng.uniform(reach, size - 1 - reach, 2)
    source = [n / 2 + rng.uniform(-1, 1) * max(0, n / 2 - 1 - reach / shrink) for n in band.shape]
    lie, turn = rng.uniform(0, np.pi), rng.choice([-1, 1]) * rng.uniform(np.radians(40), np.radians(140))

    y, x = np.mgrid[:size, :size]
    y, x = y - centre[0], x - centre[1]

    def cover(y: np.ndarray, x: np.ndarray, softness: float) -> np.ndarray:
        u, v = y * np.cos(lie) + x * np.sin(lie), x * np.cos(lie) - y * np.sin(lie)
        return np.clip(np.minimum(tall / 2 - np.abs(u), wide / 2 - np.abs(v)) / softness + 0.5, 0, 1)

    weight, shadow = cover(y, x, 1), cover(y - 2.5, x - 2.5, 2.5)
    at_y = source[0] + (y * np.cos(turn) + x * np.sin(turn)) / shrink
    at_x = source[1] + (x * np.cos(turn) - y * np.sin(turn)) / shrink
    smooth = ndimage.gaussian_filter(band.astype(float), 0.4 / shrink)
    piece = ndimage.map_coordinates(smooth, (at_y, at_x), order=3, mode="reflect")
    beneath = window * (1 - 0.5 * shadow)
    return beneath + weight * (piece - beneath), np.maximum(weight, shadow)


DEFECTS: dict[str, Painter] = {
    "scratch": _scratch,
    "stain": _stain,
    "foreign": _foreign,
    "blur": _blur,
    "cut_paste": _cut_paste,
}


def _blob(shape: tuple[int, ...], rng: Generator, share: float) -> np.ndarray:
    """A wobbly ellipse that covers about `share` of the image and stays inside: depth (H, W) in px, <= 0 outside."""
    size = min(shape)
    theta = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    k = np.arange(2, 6)[:, None]
    wobble = 1 + (rng.uniform(0, 0.22, (4, 1)) / (k - 1) * np.cos(k * theta + rng.uniform(0, 2 * np.pi, (4, 1)))).sum(0)
    radius = wobble * np.sqrt(share * size**2 / np.pi / np.mean(wobble**2))
    stretch, lie = rng.uniform(1, 1.35), rng.uniform(0, np.pi)
    reach = radius.max() * stretch + 2
    centre = rng.uniform(reach, size - 1 - reach, 2) if 2 * reach < size - 1 else np.full(2, (size - 1) / 2)
    y, x = np.mgrid[: shape[0], : shape[1]]
    y, x = y - centre[0], x - centre[1]
    u, v = (y * np.cos(lie) + x * np.sin(lie)) / stretch, (x * np.cos(lie) - y * np.sin(lie)) * stretch
    return np.interp(np.arctan2(u, v), theta, radius, period=2 * np.pi) - np.hypot(u, v)


def _photograph(name: str) -> np.ndarray:
    import skimage.data  # slow to import, and only wanted here

    try:
        image = np.asarray(getattr(skimage.data, name)())
    except (ImportError, OSError) as error:  # a distribution without its files, which it would then try to download
        image = str(error)
    if not isinstance(image, np.ndarray) or (image.shape, image.dtype) != ((512, 512), np.uint8):
        raise CpcFastError(
            f"scikit-image's photograph {name!r} is not where its wheel puts it; reinstall scikit-image with pip."
        )
    return image


def _window(image: np.ndarray, size: int, rng: Generator) -> np.ndarray:
    top, left = rng.integers(image.shape[0] - size + 1), rng.integers(image.shape[1] - size + 1)
    return image[top : top + size, left : left + size]


def _save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@contextmanager
def _new_folder(out: str | os.PathLike, dataset: str, made_from: dict, licence: str) -> Iterator[Path]:
    """A folder beside `out` to fill; on success it takes the place of `out`, on failure nothing is left of it."""
    out = Path(os.path.abspath(out))
    try:
        if out.exists() or out.is_symlink():
            _refuse_foreign(out, dataset)
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
        part.mkdir()
    except (FileExistsError, NotADirectoryError):
        raise CpcFastError(
            f"Cannot write the dataset to {str(out)!r}: a file stands where a folder is needed; choose another place."
        ) from None
    except OSError as error:
        raise unwritten(error)(
            f"Cannot write the dataset to {str(out)!r}: {error.strerror}; choose another folder."
        ) from error
    try:
        yield part
        (part / "LICENSE.txt").write_text(licence, encoding="ascii")
        # The marker goes last, and lists what is ours: a folder with anything else in it is not replaced.
        files = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
        marker = {"dataset": dataset, "version": 1, **made_from, "files": files}
        (part / MARKER).write_text(json.dumps(marker, indent=1) + "\n", encoding="ascii")
        if not out.exists():
            part.rename(out)
            return
        _refuse_foreign(out, dataset)
        old = part.with_suffix(".old")
        out.rename(old)
        try:
            part.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old)
    except OSError as error:
        raise unwritten(error)(
            f"Writing the dataset to {str(out)!r} failed: {error.strerror or error}; "
            "what was there before is unchanged."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse_foreign(out: Path, dataset: str) -> None:
    """`out` may be replaced when it is an empty folder, or holds this dataset as we wrote it and nothing else."""
    if out.is_symlink() or not out.is_dir():
        raise CpcFastError(
            f"Cannot write the dataset to {str(out)!r}: it is there and not a folder; choose another name."
        )
    present = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if not present and not any(out.iterdir()):
        return
    try:
        marker = json.loads((out / MARKER).read_text(encoding="ascii"))
        ours = marker["dataset"] == dataset and present <= {*marker["files"], MARKER}
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise CpcFastError(
            f"Cannot write the dataset to {str(out)!r}: the folder holds other files; "
            "name a new or an empty folder, or remove this one first."
        )
