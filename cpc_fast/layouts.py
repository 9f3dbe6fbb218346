"""The folders that datasets come in, each read where it is: no copy, no conversion.

    MVTec AD      C/train/good   C/test/{good,<defect>}                C/ground_truth/<defect>/<name>_mask.png
    MVTec LOCO    the same, with a folder of masks for each image:     C/ground_truth/<defect>/<name>/*.png
    MVTec AD 2    C/train/good   C/test_public/{good,bad}              C/test_public/ground_truth/bad/<name>_mask.png
                                 C/test_private, C/test_private_mixed  no truth: see submission.py
    BTAD          C/train/ok     C/test/{ok,ko}                        C/ground_truth/ko/<name>.{png,bmp}
    VisA          C/Data/Images/{Normal,Anomaly}                       C/Data/Masks/Anomaly/<name>.png
                  and beside all categories split_csv/1cls.csv with the columns object, split, label, image, mask

C is the folder of a category; which layout it has is seen from what is in it. Masks of LOCO and VisA hold labels: any
value but 0 is defective. The validation images of LOCO and AD 2 are not read: what is held out comes from train/good.
LOCO's own metric, which forgives a region once enough of it is found (sPRO), is not computed: AU-PRO is.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from . import images
from .errors import UsageError
from .images import TestImage, find_images, quoted
from .inputs import walk

VISA_SPLIT = Path("split_csv") / "1cls.csv"
PRIVATE = ("test_private", "test_private_mixed")


def find_train(root: str | os.PathLike) -> list[Path]:
    """The normal images of a category to learn from, sorted; a flat folder of images is one, too.

    Raises UsageError, saying what was expected and what is there instead.
    Example: `find_train("data/visa/candle")[0].name` -> `"0000.JPG"`.
    """
    root = Path(root)
    if _is_visa(root):
        return [path for path, _, part, label in _visa(root) if (part, label) == ("train", "normal")]
    if os.path.isdir(root / "train" / "ok") and not os.path.isdir(root / "train" / "good"):
        return _filled(root / "train" / "ok")
    return images.find_train(root)


def find_test(root: str | os.PathLike) -> list[TestImage]:
    """The images of a category to judge, sorted, those whose truth is known: "good", or the name of a defect.

    Raises UsageError, as for an image without the mask that others of its kind have.
    Example: `{test.defect for test in find_test("data/btad/01")}` -> `{"good", "ko"}`.
    """
    root = Path(root)
    if _is_visa(root):
        return [
            TestImage(path, "good" if label == "normal" else label, mask, labels=True)
            for path, mask, part, label in _visa(root)
            if part == "test"
        ]
    if os.path.isdir(root / "test_public"):
        return images.find_test(root, test="test_public", truth="test_public/ground_truth")
    ok, good = root / "test" / "ok", root / "test" / "good"
    if os.path.isdir(ok) and not (os.path.isdir(good) and find_images(good)):
        return images.find_test(root, good="ok")
    return images.find_test(root)


def passed_over(root: str | os.PathLike, tests: Sequence[TestImage]) -> list[str]:
    """Sentences about what a category holds to judge by, and is not among its `tests`, which find_test found.

    Those of VisA are in a table; there are none about it.
    """
    root, said = Path(root), []
    public = os.path.isdir(root / "test_public")
    test = root / ("test_public" if public else "test")
    truth = (test if public else root) / "ground_truth"
    if _is_visa(root) or not os.path.isdir(test):
        return []
    if left := len(set(walk(test, strict=False)) - {one.path for one in tests}):
        said.append(
            f"{left} images in {quoted(test)} are not read: they lie beside the folders of the defects, or deeper. "
            "Move them into these."
        )
    if os.path.isdir(truth):
        folders = sorted(entry.name for entry in truth.iterdir() if os.path.isdir(entry) and entry.name[0] != ".")
        if strays := [name for name in folders if not os.path.isdir(test / name)]:
            said.append(
                f"{quoted(truth)} has folders that {quoted(test)} has not: {', '.join(map(repr, strays))}. A folder of "
                "masks goes by the name of its defect."
            )
        if loose := len(find_images(truth)):
            said.append(f"{loose} images in {quoted(truth)} are not read: masks belong into a folder for each defect.")
    return said


def find_private(root: str | os.PathLike) -> list[Path]:
    """The images of MVTec AD 2 whose truth only its server knows, sorted; none in another layout."""
    folders = [Path(root) / name for name in PRIVATE]
    return [path for folder in folders if os.path.isdir(folder) for path in find_images(folder)]


def find_categories(root: str | os.PathLike) -> list[Path]:
    """The categories of a dataset: the subfolders with something to learn from and something to judge, sorted.

    Raises UsageError where there is none. Example: `find_categories("data/btad")[0].name` -> `"01"`.
    """
    root = Path(root)
    lacking = {folder: _lacks(folder) for folder in _subfolders(root)}
    found = [folder for folder, lacks in lacking.items() if not lacks]
    if not found:
        near = [f" {folder.name!r} has {lacks}." for folder, lacks in lacking.items() if ", but " in lacks]
        raise UsageError(
            f"{quoted(root)} holds no category: a subfolder with train/good and test (MVTec AD, LOCO), test_public "
            "(MVTec AD 2), train/ok and test (BTAD), or Data/Images and split_csv/1cls.csv beside it (VisA)."
            + "".join(near[:3])
        )
    return found


def left_out(root: str | os.PathLike) -> str:
    """A sentence about the subfolders with images that are no categories, and what they lack; empty without any."""
    others = [
        f"{folder.name!r} ({lacks})"
        for folder in _subfolders(Path(root))
        if (lacks := _lacks(folder)) and _has_images(folder)
    ]
    more = f" and {len(others) - 9} more" if len(others) > 9 else ""
    return f"Left out, as they are no categories: {', '.join(others[:9])}{more}." if others else ""


def _subfolders(root: Path) -> list[Path]:
    find_images(root)  # refuses what is no folder
    return [entry for entry in sorted(root.iterdir()) if os.path.isdir(entry) and not entry.name.startswith(".")]


def _has_images(folder: Path) -> bool:
    """Whether it holds one, however deep; what cannot be listed holds none."""
    return any(Path(name).suffix.lower() in images.SUFFIXES for _, _, files in os.walk(folder) for name in files)


def _lacks(folder: Path) -> str:
    """What makes a folder no category; empty for one that is."""
    if _is_visa(folder):
        return ""
    ways = ("train/good", "train/ok"), ("test", "test_public")
    missing = [names for names in ways if not any(os.path.isdir(folder / name) for name in names)]
    return " and ".join(f"no {names[0]}{_called(folder, names)}" for names in missing)


def _called(folder: Path, names: Sequence[str]) -> str:
    """What comes near to one of these names, but for small and capital letters."""
    entries = sorted(path for pattern in ("*", "*/*") for path in folder.glob(pattern) if os.path.isdir(path))
    near = [said for path in entries if (said := path.relative_to(folder).as_posix()).lower() in names]
    return f", but {near[0]}" if near else ""


def _filled(folder: Path) -> list[Path]:
    if not (found := find_images(folder)):
        raise UsageError(f"{quoted(folder)} holds no images ({' '.join(images.SUFFIXES)}); put normal images there.")
    images.refuse_masks(found)
    return found


def _is_visa(root: Path) -> bool:
    return os.path.isdir(root / "Data" / "Images")


def _visa(root: Path) -> list[tuple[Path, Path | None, str, str]]:
    """image, mask, "train" or "test", "normal" or "anomaly": the rows of the split that speak of this category."""
    table = root.resolve().parent / VISA_SPLIT
    if not table.is_file():
        raise UsageError(
            f"{quoted(root)} has the layout of VisA, but its split is missing: expected {quoted(table)}; copy it there."
        )
    with open(table, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := {"object", "split", "label", "image", "mask"} - set(reader.fieldnames or ()):
            raise UsageError(f"{quoted(table)} has no column {', '.join(sorted(missing))}; fetch it again.")
        rows = [row for row in reader if row["object"] == root.resolve().name]
    if not rows:
        raise UsageError(f"{quoted(table)} says nothing of {root.resolve().name!r}; is the folder renamed?")
    top = root.parent if root.name == root.resolve().name else root.resolve().parent
    return sorted(
        (top / row["image"], top / row["mask"] if row["mask"] else None, row["split"], row["label"]) for row in rows
    )
