"""The sets written to disk: exact masks, honest splits, the same bytes twice, and no harm to what is there."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpc_fast import datasets
from cpc_fast.datasets import DEFECTS, TEST_PARTS, TEXTURES, write_elpv, write_textures
from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.images import find_test, find_train, read_image, read_mask

SMALL = {"train": 6, "good": 4, "per_defect": 2}
ELPV = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="the extra elpv is not installed")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def textures(tmp_path_factory) -> Path:
    return write_textures(tmp_path_factory.mktemp("data") / "textures", **SMALL)


def places(window: np.ndarray, photograph: np.ndarray, known: np.ndarray) -> list[tuple[int, int]]:
    """Where in the photograph (512, 512) the window lies, judging by its known pixels alone."""
    ys, xs = (axis[:: max(1, len(axis) // 24)] for axis in np.nonzero(known))
    top, left = np.mgrid[: 513 - len(window), : 513 - len(window)]
    candidates = np.ones(top.shape, bool)
    for y, x in zip(ys, xs, strict=True):
        candidates &= photograph[top + y, left + x] == window[y, x]
    found = [(int(t), int(l)) for t, l in zip(*np.nonzero(candidates), strict=True)]
    size = len(window)
    return [(t, l) for t, l in found if (photograph[t : t + size, l : l + size] == window)[known].all()]


def test_layout(textures):
    for name in TEXTURES:
        train, test = find_train(textures / name), find_test(textures / name)
        assert len(train) == SMALL["train"]
        assert {t.defect for t in test} == {"good", *DEFECTS}
        assert len(test) == SMALL["good"] + len(DEFECTS) * SMALL["per_defect"]
        assert all((t.mask_path is None) == (t.defect == "good") for t in test)
        assert {read_image(path).shape for path in [*train, *(t.path for t in test)]} == {(128, 128, 1)}
    assert "CC0" in (textures / "LICENSE.txt").read_text()
    marker = json.loads((textures / "dataset.json").read_text())
    assert (marker["dataset"], marker["seed"], marker["train"]) == ("textures", 0, 6)
    assert not list(textures.parent.glob(".*"))


@pytest.mark.parametrize("name", TEXTURES)
def test_windows_are_the_photograph_and_masks_are_exact(textures, name):
    """Train and test windows share no pixel; outside of its mask, a window is the photograph to the last pixel."""
    photograph, everywhere = datasets._photograph(name), np.ones((128, 128), bool)
    first, last, west, east = TEST_PARTS[name]
    for path in find_train(textures / name):
        ((top, left),) = places(read_image(path)[..., 0], photograph, everywhere)
        assert top + 128 <= first or top >= last or left + 128 <= west or left >= east
    for test in find_test(textures / name):
        window = read_image(test.path)[..., 0]
        mask = read_mask(test.mask_path, window.shape) if test.mask_path else ~everywhere
        ((top, left),) = places(window, photograph, ~mask)
        assert first <= top <= last - 128
        assert west <= left <= east - 128
        if test.mask_path:
            original = photograph[top : top + 128, left : left + 128]
            assert 0.02 <= mask.mean() <= 0.11
            assert (window != original)[mask].mean() > 0.6  # a blur leaves the plain face of a brick as it was
            assert np.abs(window.astype(int) - original)[mask].max() >= 30


def test_the_same_bytes_again_in_another_process_without_network(textures, tmp_path):
    code = (
        "import socket, sys\n"
        "def no_network(*_, **__): raise OSError('no network here')\n"
        "socket.socket.connect = socket.create_connection = no_network\n"
        "from cpc_fast.datasets import write_textures\n"
        f"write_textures(sys.argv[1], **{SMALL!r})\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "HOME": str(tmp_path / "home"), "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", code, str(tmp_path / "again")]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2])
    assert digest(tmp_path / "again") == digest(textures)


def test_more_images_keep_the_first_ones_and_another_seed_keeps_none(textures, tmp_path):
    write_textures(tmp_path / "more", textures=("grass",), train=8, good=4, per_defect=3)
    images = {k: v for k, v in digest(textures).items() if k.startswith("grass/")}
    more = digest(tmp_path / "more")
    assert images.items() < more.items()
    write_textures(tmp_path / "other", seed=1, textures=("grass",), train=2, good=0, per_defect=0)
    assert not set(digest(tmp_path / "other").values()) & set(more.values()) - {more["LICENSE.txt"]}


def test_larger_and_smaller_windows(tmp_path):
    for window in (64, 160):
        write_textures(tmp_path / "x", window=window, textures=("brick",), train=1, good=1, per_defect=2)
        for test in find_test(tmp_path / "x/brick"):
            shape = read_image(test.path).shape[:2]
            assert shape == (window, window)
            assert test.mask_path is None or 0.01 < read_mask(test.mask_path, shape).mean() < 0.15


def test_impossible_requests(tmp_path):
    for options, message in (
        ({"window": 400}, "Got 400"),
        ({"textures": ("sand",)}, "unknown texture 'sand'; choose from brick, grass, gravel"),
        ({"train": -1}, "train=-1"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(UsageError, match=message):
            write_textures(tmp_path / "x", **options)
    for share in (0, 1, 2.5):
        with pytest.raises(UsageError, match=f"Got {share}"):
            write_elpv(tmp_path / "x", train_share=share)
    assert not list(tmp_path.iterdir())


TINY = {"textures": ("brick",), "train": 1, "good": 1, "per_defect": 0}


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(CpcFastError, match="holds other files; name a new or an empty folder"):
        write_textures(tmp_path / "mine", **TINY)
    with pytest.raises(CpcFastError, match="not a folder"):
        write_textures(tmp_path / "mine/thesis.txt", **TINY)
    with pytest.raises(CpcFastError, match="a file stands where a folder is needed"):
        write_textures(tmp_path / "mine/thesis.txt/below", **TINY)
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    with pytest.raises(CpcFastError, match="not a folder"):
        write_textures(tmp_path / "link", **TINY)
    assert digest(tmp_path / "mine").keys() == {"thesis.txt"}


def test_a_folder_without_the_right_to_write(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    for name in ("mkdir", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, denied)
            with pytest.raises(CpcFastError, match="Permission denied; choose another folder"):
                write_textures(tmp_path / "x", **TINY)


def test_an_empty_folder_and_our_own_are_replaced(tmp_path):
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    assert write_textures(out, **TINY) == out
    once = digest(out)
    write_textures(out, **TINY, window=96)
    assert digest(out) != once
    write_textures(out, **TINY)
    assert digest(out) == once
    (out / "brick/notes.txt").write_text("mine")
    with pytest.raises(CpcFastError, match="holds other files"):
        write_textures(out, **TINY)
    if importlib.util.find_spec("elpv_dataset"):
        with pytest.raises(CpcFastError, match="holds other files"):
            write_elpv(out)
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, failure):
    out = write_textures(tmp_path / "out", **TINY)
    before = digest(out)

    def fail(*_):
        raise failure

    monkeypatch.setattr(datasets, "_save", fail)
    for target in (out, tmp_path / "new"):
        expected = CpcFastError if isinstance(failure, OSError) else KeyboardInterrupt
        with pytest.raises(expected, match="No space left" if expected is CpcFastError else None):
            write_textures(target, **TINY)
    assert digest(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_missing_photograph(tmp_path, monkeypatch):
    import skimage.data

    def gone():
        raise ModuleNotFoundError("pooch")

    monkeypatch.setattr(skimage.data, "brick", gone)
    with pytest.raises(CpcFastError, match="'brick' is not where its wheel puts it; reinstall"):
        write_textures(tmp_path / "x", **TINY)


def test_elpv_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CpcFastError, match=r"pip install 'cpc_fast\[elpv\]'"):
        write_elpv(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@ELPV
def test_elpv_split(tmp_path):
    out = write_elpv(tmp_path / "elpv")
    labels = Path(importlib.util.find_spec("elpv_dataset").origin).parent / "data" / "labels.csv"
    rows = [line.split() for line in labels.read_text().splitlines()]
    probability = {Path(path).name: float(p) for path, p, _ in rows}
    kind = {Path(path).name: k for path, _, k in rows}
    train = [path.name for path in find_train(out)]
    test = {defect: [t.path.name for t in find_test(out) if t.defect == defect] for defect in ("good", "defective")}
    assert {probability[name] for name in train + test["good"]} == {0}
    assert sorted(train + test["good"]) == sorted(name for name, p in probability.items() if p == 0)
    assert test["defective"] == sorted(name for name, p in probability.items() if p == 1)
    for k in ("mono", "poly"):
        assert (
            sum(kind[name] == k for name in train) == sum(p == 0 and kind[n] == k for n, p in probability.items()) // 2
        )
    assert all(t.mask_path is None for t in find_test(out))
    with Image.open(out / "train/good" / train[0]) as picture:
        assert picture.size == (300, 300)
    again = write_elpv(tmp_path / "again")
    assert digest(again) == digest(out)
    other = write_elpv(tmp_path / "other", seed=1, train_share=0.8)
    assert len(find_train(other)) == 1206
    assert "NC-SA" in (out / "LICENSE.txt").read_text()
