"""Small made-up trees of every layout: which images are found, with which truth."""

from pathlib import Path

import numpy as np
import pytest
from samples import TINY_CONFIG, holed, make_set, save, texture

from cpc_fast.detector import Detector
from cpc_fast.errors import ImageError, UsageError
from cpc_fast.evaluate import evaluate
from cpc_fast.images import TestImage, read_mask
from cpc_fast.layouts import find_categories, find_private, find_test, find_train, left_out, passed_over

COUNT = 4  # normal images to learn from


def truth(of: int) -> np.ndarray:
    return holed(of)[1].astype(np.uint8)


def make_mvtec(root: Path) -> Path:
    make_set(root / "part", train=COUNT, good=2, holes=2)
    return root / "part"


def make_loco(root: Path) -> Path:
    """Two masks for each image; each value is a kind of defect."""
    category = make_set(root / "box", train=COUNT, good=2, holes=2, masks=False)
    for i in range(2):
        mask = truth(200 + i)
        upper, lower = mask.copy(), mask.copy()
        upper[25:], lower[:25] = 0, 0
        save(category / "ground_truth" / "hole" / f"{i:03d}" / "000.png", upper * 7)
        save(category / "ground_truth" / "hole" / f"{i:03d}" / "001.png", lower * 250)
    save(category / "validation" / "good" / "000.png", texture(300))
    return category


def make_ad2(root: Path) -> Path:
    category = root / "can"
    for i in range(COUNT):
        save(category / "train" / "good" / f"{i:03d}_regular.png", texture(i))
    save(category / "validation" / "good" / "000_regular.png", texture(300))
    for i in range(2):
        public = category / "test_public"
        save(public / "good" / f"{i:03d}_regular.png", texture(100 + i))
        save(public / "bad" / f"{i:03d}_overexposed.png", holed(200 + i)[0])
        save(public / "ground_truth" / "bad" / f"{i:03d}_overexposed_mask.png", truth(200 + i) * 255)
        save(category / "test_private" / f"{i:03d}_regular.png", texture(400 + i))
        save(category / "test_private_mixed" / f"{i:03d}_mixed.png", holed(400 + i)[0])
    return category


def make_btad(root: Path) -> Path:
    category = root / "01"
    for i in range(COUNT):
        save(category / "train" / "ok" / f"{i:04d}.bmp", texture(i))
    for i in range(2):
        save(category / "test" / "ok" / f"{i:04d}.bmp", texture(100 + i))
        save(category / "test" / "ko" / f"{i:04d}.bmp", holed(200 + i)[0])
        save(category / "ground_truth" / "ko" / f"{i:04d}.png", truth(200 + i) * 255)
    return category


def make_visa(root: Path) -> Path:
    rows = ["object,split,label,image,mask", "capsules,train,normal,capsules/Data/Images/Normal/000.JPG,"]
    for i in range(COUNT + 2):
        name = f"candle/Data/Images/Normal/{i:04d}.JPG"
        save(root / name, texture(i))
        rows.append(f"candle,{'train' if i < COUNT else 'test'},normal,{name},")
    for i in range(2):
        name, mask = f"candle/Data/Images/Anomaly/{i:03d}.JPG", f"candle/Data/Masks/Anomaly/{i:03d}.png"
        save(root / name, holed(200 + i)[0])
        save(root / mask, truth(200 + i) * (1 + i))  # labels 1 and 2
        rows.append(f"candle,test,anomaly,{name},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv" / "1cls.csv").write_text("\n".join(rows) + "\n")
    return root / "candle"


LAYOUTS = {
    "MVTec AD": (make_mvtec, "hole"), "LOCO": (make_loco, "hole"), "MVTec AD 2": (make_ad2, "bad"),
    "BTAD": (make_btad, "ko"), "VisA": (make_visa, "anomaly"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_truth_are_found(layout, tmp_path, monkeypatch):
    make, defect = LAYOUTS[layout]
    category = make(tmp_path)
    (tmp_path / "notes").mkdir()
    assert find_categories(tmp_path) == [category]
    assert len(find_train(category)) == COUNT
    found = find_test(category)
    assert sorted(test.defect for test in found) == sorted(["good"] * 2 + [defect] * 2)
    for i, test in enumerate(sorted((t for t in found if t.defect == defect), key=lambda t: t.path)):
        assert test.mask_path is not None
        assert np.array_equal(read_mask(test.mask_path, (48, 48), test.labels), truth(200 + i) > 0)
    assert all(test.mask_path is None for test in found if test.defect == "good")
    assert bool(find_private(category)) == (layout == "MVTec AD 2")
    monkeypatch.chdir(category)  # the category from within
    assert len(find_train(".")) == COUNT
    assert [test.path.resolve() for test in find_test(".")] == [test.path for test in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_detector_learns_and_is_judged_in_place(layout, tmp_path):
    category = LAYOUTS[layout][0](tmp_path)
    detector = Detector.fit(category, TINY_CONFIG, epochs=1)
    metrics = evaluate(detector, category).metrics
    assert metrics["by_defect"][LAYOUTS[layout][1]]["count"] == 2
    assert metrics["pixel"]["auroc"] is not None


def test_the_private_images_are_those_of_both_parts(tmp_path):
    names = [path.relative_to(tmp_path / "can") for path in find_private(make_ad2(tmp_path))]
    assert [str(name.parent) for name in names] == ["test_private"] * 2 + ["test_private_mixed"] * 2


def test_what_is_amiss_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"holds no category: a subfolder with train/good and test \(MVTec AD, LOCO\)"):
        find_categories(tmp_path)
    (tmp_path / "bolts" / "train" / "Good").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"\(VisA\)\. 'bolts' has no train/good, but train/Good and no test\.$"):
        find_categories(tmp_path)
    candle = make_visa(tmp_path)
    table = tmp_path / "split_csv" / "1cls.csv"
    whole = table.read_text()
    table.write_text(whole.replace("candle,", "lantern,"))
    with pytest.raises(UsageError, match=r"1cls\.csv' says nothing of 'candle'"):
        find_train(candle)
    table.write_text(whole.replace("label,", ""))
    with pytest.raises(UsageError, match=r"1cls\.csv' has no column label"):
        find_train(candle)
    table.unlink()
    with pytest.raises(UsageError, match=r"has the layout of VisA, but its split is missing: expected .*1cls\.csv"):
        find_test(candle)
    ko = make_btad(tmp_path)
    (ko / "ground_truth" / "ko" / "0001.png").unlink()
    with pytest.raises(UsageError, match=r"0001\.bmp' has no mask: expected .*0001_mask\.png"):
        find_test(ko)
    for path in (ko / "train" / "ok").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="train/ok' holds no images"):
        find_train(ko)


@pytest.mark.parametrize("end", ["_mask", "_gt", "_label"])
def test_masks_beside_their_images_are_no_parts(tmp_path, end):
    part, parts = make_mvtec(tmp_path), {}
    parts["test/hole"], parts["train/good"] = find_test, find_train
    for place, find in parts.items():
        mask = save(part / place / f"001{end}.jpg", truth(0) * 255)
        with pytest.raises(UsageError, match=rf"001{end}\.jpg' lies beside the image whose mask it seems to be; move"):
            find(part)
        mask.unlink()
        save(part / place.replace("hole", "good") / f"other{end}.png", texture(0))  # beside no such image
        assert find(part)
    ko = make_btad(tmp_path / "other")
    save(ko / "train" / "ok" / f"0001{end}.png", truth(0))
    with pytest.raises(UsageError, match="lies beside the image whose mask it seems to be"):
        find_train(ko)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_passed_over_is_said(layout, tmp_path):
    category = LAYOUTS[layout][0](tmp_path)
    assert passed_over(category, find_test(category)) == []
    if layout == "VisA":
        return
    test = category / ("test_public" if layout == "MVTec AD 2" else "test")
    masks = (test if layout == "MVTec AD 2" else category) / "ground_truth"
    for path in (test / "0.png", test / "good" / "cam1" / "0.png", masks / "Hole" / "0.png", masks / "0.png"):
        save(path, texture(0))
    read, called, loose = passed_over(category, find_test(category))
    assert read.startswith(f"2 images in '{test}' are not read: they lie beside the folders of the defects, or deeper.")
    assert f"'{masks}' has folders that '{test}' has not: 'Hole'." in called
    assert f"1 images in '{masks}' are not read" in loose


@pytest.mark.parametrize(("layout", "name"), [("MVTec AD", "Good"), ("MVTec AD", "ok"), ("BTAD", "good")])
def test_good_images_are_not_taken_for_a_defect(layout, name, tmp_path):
    category = LAYOUTS[layout][0](tmp_path)
    (category / "test" / name).mkdir(exist_ok=True)
    find_test(category)
    save(category / "test" / name / "0.png", texture(0))
    stray = "ok" if layout == "BTAD" else name  # with good there
    with pytest.raises(UsageError, match=rf"test/{stray}' would count as a defect\. .* into '.*test/good'"):
        find_test(category)


def test_images_of_one_name_have_no_masks(tmp_path):
    category = make_mvtec(tmp_path)
    defect = LAYOUTS["MVTec AD"][1]
    path = min((category / "test" / defect).iterdir())
    save(path.with_suffix(".bmp"), texture(0))
    with pytest.raises(UsageError, match=rf"{path.stem}\.bmp' and '.*{path.stem}\.png' have one name"):
        find_test(category)


def test_folders_that_are_no_categories_are_named(tmp_path):
    make_visa(tmp_path)
    make_mvtec(tmp_path)
    (tmp_path / "notes").mkdir()
    assert left_out(tmp_path) == ""
    for place in ("nut/train/Good", "nut/test/good", "pin/train/good", "loose"):
        save(tmp_path / place / "000.png", texture(0))
    assert left_out(tmp_path) == (
        "Left out, as they are no categories: 'loose' (no train/good and no test), 'nut' (no train/good, but "
        "train/Good), 'pin' (no test)."
    )


def test_labels_are_masks_only_where_they_are_expected(tmp_path):
    path = save(tmp_path / "mask.png", truth(200) * 2)
    with pytest.raises(ImageError, match="nothing reaches half of the range"):
        read_mask(path, (48, 48))
    assert read_mask(path, (48, 48), labels=True).any()
    assert not TestImage(path, "hole", path).labels
