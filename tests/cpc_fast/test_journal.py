"""predict over many images: killed and resumed, cut into shards, images vanish; the lists come out the same."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import SET_TINY, TINY_CONFIG, make_set, save, texture

from cpc_fast import answers, cli, journal
from cpc_fast.detector import Detector
from cpc_fast.errors import CpcFastError, NotWritten, Stopped, Unreachable, UsageError
from cpc_fast.files import locked
from cpc_fast.inputs import Shard, find_inputs
from cpc_fast.torchrun import own_gpu

LISTS = ("scores.csv", "predictions.json")


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.fit([texture(i) for i in range(8)], TINY_CONFIG, epochs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Nine images, one of them no image."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(9):
        save(folder / f"{i}.png", texture(i, 24, 24))
    (folder / "4.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def whole(detector, folder, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole")
    assert answers.predict(detector, [folder], out) == answers.Answers(
        8, 0, 1, 0, other_size=8, other_light=0, listed=True
    )
    return {name: (out / name).read_bytes() for name in LISTS}


def lists(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in LISTS if (out / name).exists()}


def test_the_lists_are_in_the_order_of_the_images(whole):
    record = json.loads(whole["predictions.json"])
    assert [entry["name"] for entry in record["images"]] == [str(i) for i in range(9) if i != 4]
    assert len(record["skipped"]) == 1
    assert list(record) == ["version", "threshold", "min_area", "images", "skipped"]
    assert whole["scores.csv"].count(b"\n") == 9


def test_stopped_after_every_image_the_lists_come_out_the_same(detector, folder, whole, tmp_path):
    for done in range(1, 9):
        with pytest.raises(Stopped, match=f"Stopped after {done} of 9 images"):
            answers.predict(detector, [folder], tmp_path, resume=done > 1, stop=lambda: True)
        assert len(json.loads(lists(tmp_path)["predictions.json"])["images"]) == done - (done > 4)
    found = answers.predict(detector, [folder], tmp_path, resume=True)
    assert found == answers.Answers(8, 0, 1, 0, other_size=8, other_light=0, listed=True)
    assert lists(tmp_path) == whole
    assert answers.predict(detector, [folder], tmp_path, resume=True) == found  # nothing is left to do
    assert lists(tmp_path) == whole


def test_ctrl_c_and_sigterm_leave_the_same_lists(detector, folder, tmp_path):
    def interrupted() -> bool:
        raise KeyboardInterrupt

    for place, stop, error in (("c", interrupted, KeyboardInterrupt), ("term", lambda: True, Stopped)):
        with pytest.raises(error):
            answers.predict(detector, [folder], tmp_path / place, stop=stop)
    assert set(lists(tmp_path / "c")) == set(LISTS)
    assert lists(tmp_path / "c") == lists(tmp_path / "term")
    with pytest.raises(Stopped):  # the lists are of all shards
        answers.predict(detector, [folder], tmp_path / "part", shard=Shard(1, 2), stop=lambda: True)
    assert lists(tmp_path / "part") == {}


AGAIN = [b'{"again": %d, "path": "x", "reason": "y"}\n' % i for i in (-1, 3)]  # of images without an answer


@pytest.mark.parametrize("tail", [b'{"path": "', b'{"path": "x", "sco\n', b"\0\0\0\0", b"[1]\n", *AGAIN])
def test_a_line_that_was_cut_is_written_again(detector, folder, whole, tmp_path, tail):
    with pytest.raises(Stopped):
        answers.predict(detector, [folder], tmp_path, stop=iter([False, False, True]).__next__)
    path = tmp_path / "progress" / "1-of-1.jsonl"
    assert path.read_bytes().count(b"\n") == 3
    path.write_bytes(path.read_bytes() + tail)
    (tmp_path / "masks" / ".3.png.4711.tmp").write_bytes(b"half a picture")
    answers.predict(detector, [folder], tmp_path, resume=True)
    assert lists(tmp_path) == whole
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_in_any_order_make_the_same_lists(detector, folder, whole, tmp_path, order):
    for n in order:
        assert lists(tmp_path) == {}
        found = answers.predict(detector, [folder], tmp_path, shard=Shard(n, 3))
        assert found.listed == (n == order[-1])
        assert found.images + found.skipped == 3
    assert lists(tmp_path) == whole


def test_more_shards_than_images(detector, folder, tmp_path):
    for n in (1, 2, 3):
        found = answers.predict(detector, [folder / "0.png"], tmp_path, shard=Shard(n, 3))
    assert found == answers.Answers(0, 0, 0, 0, 0, 0, listed=True)
    assert (tmp_path / "scores.csv").read_bytes().count(b"\n") == 2


def test_another_lot_is_not_answered_by_the_old_one(detector, folder, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    answers.predict(detector, [images], tmp_path / "out")
    before = lists(tmp_path / "out")
    (images / "7.png").unlink()
    for name in ("00.png", "01.png"):
        save(images / name, texture(0))
    with pytest.raises(UsageError, match=r"different: the images found, 2 new and 1 gone\); choose another --out"):
        answers.predict(detector, [images], tmp_path / "out", resume=True)
    assert lists(tmp_path / "out") == before


def test_images_of_a_relative_path_go_on_in_their_folder_only(detector, folder, tmp_path, monkeypatch):
    for place in ("one", "two"):
        shutil.copytree(folder, tmp_path / place / "images")
    monkeypatch.chdir(tmp_path / "one")
    answers.predict(detector, ["images"], tmp_path / "out")
    assert answers.predict(detector, ["images"], tmp_path / "out", resume=True).images == 8
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(UsageError, match="different: the working directory, in which IMAGES are sought"):
        answers.predict(detector, ["images"], tmp_path / "out", resume=True)


@pytest.mark.parametrize("shards", [1, 2])
def test_what_was_skipped_is_tried_again(detector, folder, tmp_path, shards):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    for i in (0, 6):
        (images / f"{i}.png").write_text("half copied")

    def call(out: Path, resume: bool) -> answers.Answers:
        return [
            answers.predict(detector, [images], out, shard=Shard(n, shards), resume=resume)
            for n in range(1, shards + 1)
        ][-1]

    call(tmp_path / "out", False)
    assert len(json.loads(lists(tmp_path / "out")["predictions.json"])["skipped"]) == 3
    shutil.copy(folder / "0.png", images)
    shutil.copy(folder / "6.png", images)
    kept = tmp_path / "out" / "progress" / f"1-of-{shards}.jsonl"
    before, written, seen = kept.read_bytes().splitlines(), os.pwrite, []

    def killed(file: int, data: bytes, at: int) -> int:
        seen.append(data)
        if len(seen) > 1:
            written(file, data[:20], at)
            raise KeyboardInterrupt
        return written(file, data, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwrite", killed)
        with pytest.raises(KeyboardInterrupt):
            call(tmp_path / "out", True)
    assert kept.read_bytes().splitlines() == [*before[:-1], seen[0][:-1], seen[1][:20]]  # all but its end
    call(tmp_path / "out", True)
    assert kept.read_bytes().splitlines()[: len(before)] == [*before[:-1], seen[0][:-1]]
    call(tmp_path / "whole", False)
    assert lists(tmp_path / "out") == lists(tmp_path / "whole")


def test_a_share_that_drops_out_books_nothing(detector, folder, whole, tmp_path, monkeypatch):
    share, out = tmp_path / "share", tmp_path / "out"
    images = Path(shutil.copytree(folder, share / "images"))

    def drop(done: int, total: int) -> None:
        if done == 6:
            images.rename(share / "away")

    with pytest.raises(Unreachable, match=r"images' cannot be reached any more \(No such file.*6 of 9 images are ans"):
        answers.predict(detector, [images], out, on_image=drop)
    record = json.loads(lists(out)["predictions.json"])
    assert (len(record["images"]), len(record["skipped"])) == (5, 1)
    images.mkdir()  # a mount point
    with pytest.raises(UsageError, match="holds no images"):
        answers.predict(detector, [images], out, resume=True)
    images.rmdir()
    (share / "away").rename(images)

    def stale(path: Path, **_: object) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr("cpc_fast.images._size_of_file", stale)
        with pytest.raises(Unreachable, match=r"\(Stale file handle\)"):
            answers.predict(detector, [images], out, resume=True)
    assert answers.predict(detector, [images], out, resume=True).images == 8
    assert lists(out)["scores.csv"].count(b"\n") == whole["scores.csv"].count(b"\n")


def test_one_image_that_vanishes_is_skipped(detector, folder, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    found = answers.predict(
        detector, [images], tmp_path / "out", on_image=lambda *_: (images / "7.png").unlink(missing_ok=True)
    )
    assert (found.images, found.skipped) == (7, 2)
    record = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert any("7.png" in entry["path"] and "No such file" in entry["reason"] for entry in record["skipped"])


def test_pictures_that_other_calls_left_below_a_folder_are_no_images(detector, tmp_path):
    images = tmp_path / "images"
    for where in (".", "line 2", "line 2/masks"):
        save(images / where / "a.png", texture(0))
    answers.predict(detector, [images / "line 2" / "a.png"], images / "line 2" / "answers", tiff=True)
    answers.predict(detector, [images / "a.png"], images / "line 2", pictures=False)  # its masks are no pictures of it
    assert [name for _, name in find_inputs([images])] == ["a", "line 2/a", "line 2/masks/a"]
    assert [name for _, name in find_inputs([images / "line 2" / "answers" / "masks"])] == ["a"]  # asked for by name
    with pytest.raises(
        UsageError, match=r"answers' holds nothing but answers of predict; name images, or another folder"
    ):
        find_inputs([images / "line 2" / "answers"])


def test_answers_of_another_call_are_not_mixed(detector, folder, tmp_path):
    answers.predict(detector, [folder], tmp_path, shard=Shard(1, 2))
    other = Detector.fit([texture(i) for i in range(8)], TINY_CONFIG, epochs=1, seed=1)
    with pytest.raises(UsageError, match=r"another call \(different: detector, threshold\); choose another --out"):
        answers.predict(other, [folder], tmp_path, shard=Shard(2, 2))
    with pytest.raises(UsageError, match=r"different: --tiff or --scores-only, IMAGES"):
        answers.predict(detector, [folder / "0.png"], tmp_path, pictures=False, resume=True)
    save(folder / "9.png", texture(9))
    try:
        with pytest.raises(UsageError, match=r"different: the images found"):
            answers.predict(detector, [folder], tmp_path, shard=Shard(2, 2))
    finally:
        (folder / "9.png").unlink()
    answers.predict(detector, [folder], tmp_path)  # alone and not resumed, it replaces what was there
    assert sorted(path.name for path in (tmp_path / "progress").iterdir()) == ["1-of-1.jsonl", "inputs.jsonl"]


def test_a_shard_that_is_done_is_not_begun_again(detector, folder, tmp_path):
    for n in (1, 2):
        answers.predict(detector, [folder], tmp_path, shard=Shard(n, 2))
    before = lists(tmp_path)
    with pytest.raises(UsageError, match=r"Shard 1 of 2 in .* is done; do the rest with --resume, or answer all"):
        answers.predict(detector, [folder], tmp_path, shard=Shard(1, 2))
    assert answers.predict(detector, [folder], tmp_path, shard=Shard(1, 2), resume=True).listed
    assert lists(tmp_path) == before


def test_nothing_is_removed_while_a_shard_is_written(detector, folder, tmp_path):
    for n in (1, 3):
        answers.predict(detector, [folder], tmp_path, shard=Shard(n, 3))

    def alone(done: int, total: int) -> None:
        with pytest.raises(CpcFastError, match="by another process"):
            answers.predict(detector, [folder], tmp_path)

    assert answers.predict(detector, [folder], tmp_path, shard=Shard(2, 3), on_image=alone).listed


def test_a_new_call_leaves_no_pictures_of_the_one_before(detector, folder, tmp_path):
    out = tmp_path / "out"
    answers.predict(detector, [folder], out, tiff=True)
    kept = [out / "overlays" / "mine.png", out / "notes.txt"]
    for path in kept:
        path.write_bytes(b"of the user")
    few = sorted(folder.rglob("*.png"))[:2]
    answers.predict(detector, few, out)
    assert len(list((out / "overlays").rglob("*.png"))) == len(list((out / "masks").rglob("*.png"))) + 1 == 3
    assert not list((out / "maps").rglob("*.tiff"))
    assert all(path.read_bytes() == b"of the user" for path in kept)
    answers.predict(detector, [out / "overlays"], out, pictures=False)  # its own pictures, given as images, stay
    assert len(list((out / "overlays").rglob("*.png"))) == 3
    assert not list((out / "masks").rglob("*.png"))


@pytest.mark.parametrize("name", ["scores.csv", "predictions.json", "masks/0.png", "overlays/0.png", "maps/0.tiff"])
def test_a_file_that_no_call_before_wrote_is_not_replaced(detector, folder, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("of the user")
    with pytest.raises(UsageError, match=rf"would overwrite '.*{name}', which the last predict did not leave there"):
        answers.predict(detector, [folder], tmp_path / "out", tiff=True)
    assert path.read_text() == "of the user"
    if name != "scores.csv" and name != "predictions.json":  # nor beside an earlier call that wrote no such file
        path.rename(tmp_path / "aside")
        answers.predict(detector, [folder], tmp_path / "out", pictures=False)
        (tmp_path / "aside").rename(path)
        with pytest.raises(UsageError, match=rf"would overwrite '.*{name}'"):
            answers.predict(detector, [folder], tmp_path / "out", tiff=True)
        assert path.read_text() == "of the user"
    path.unlink()
    for _ in range(2):
        answers.predict(detector, [folder], tmp_path / "out", tiff=True)


def test_answers_among_the_images_are_no_images(detector, folder, tmp_path):
    parts = Path(shutil.copytree(folder, tmp_path / "parts"))
    (tmp_path / "link").symlink_to(parts)
    for out in (parts / "answers", tmp_path / "link" / "answers"):
        assert answers.predict(detector, [parts], out).images == 8
    shutil.rmtree(parts / "answers")
    for n in (1, 2):  # the second finds the pictures of the first
        found = answers.predict(detector, [tmp_path / "link"], parts / "answers", shard=Shard(n, 2))
    assert found.listed
    assert [name for _, name in find_inputs([parts / "answers" / "masks"], out=parts / "answers")] == list("01235678")


def test_a_forged_list_of_inputs_removes_nothing_elsewhere(detector, folder, tmp_path):
    out = tmp_path / "out"
    answers.predict(detector, [folder], out)
    victim = save(tmp_path / "victim.png", texture(1))
    listed = out / "progress" / "inputs.jsonl"
    lines = listed.read_text().splitlines()
    forged = [json.dumps(["x", name]) for name in ("../../victim", str(victim.with_suffix("")), "a\0b")]
    listed.write_text("\n".join([*lines, *forged]) + "\n")
    answers.predict(detector, [folder], out)
    assert victim.exists()


def test_each_process_of_torchrun_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert own_gpu(gpu) == gpu
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert (own_gpu(cpu), own_gpu(gpu)) == (cpu, torch.device("cuda", 1))
    with pytest.raises(UsageError, match="say --device cuda"):
        own_gpu(torch.device("cuda", 0))
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UsageError, match="started 4 processes here, but there are 2 GPUs"):
        own_gpu(gpu)


def test_two_processes_do_not_write_one_shard(detector, folder, tmp_path):
    def again(done: int, total: int) -> None:
        for resume in (False, True):
            with pytest.raises(CpcFastError, match="by another process"):
                answers.predict(detector, [folder], tmp_path, resume=resume)

    answers.predict(detector, [folder], tmp_path, on_image=again)


def test_nobody_comes_between_the_list_of_images_and_the_first_answer(detector, folder, tmp_path, monkeypatch):
    locked, tried = journal.locked, []

    @contextmanager
    def watched(place: Path, name: str, wait: bool = False):
        with locked(place, name, wait=wait):
            yield
        if name == "inputs.lock" and not tried:
            tried.append(name)
            with pytest.raises(CpcFastError, match="by another process"):
                answers.predict(detector, [folder / "0.png"], tmp_path)

    monkeypatch.setattr(journal, "locked", watched)
    assert answers.predict(detector, [folder], tmp_path).images == 8
    assert tried


def test_a_lock_that_there_is_no_room_for(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(NotWritten, match="No space left on device"), locked(tmp_path / "run"):
        pass


def test_a_full_disk_keeps_the_answers_before(detector, folder, whole, tmp_path, monkeypatch):
    written = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        return written(file, data[:20], at) if b'"5"' in data else written(file, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(CpcFastError, match=r"No space left on device. The 5 answers before are kept; free some"):
            answers.predict(detector, [folder], tmp_path)
    answers.predict(detector, [folder], tmp_path, resume=True)
    assert lists(tmp_path) == whole


@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_disk_that_fails_is_told_in_a_sentence(detector, folder, tmp_path, monkeypatch, call):
    does = getattr(os, call)

    def fails(file, *more):
        name = os.readlink(f"/proc/self/fd/{file}") if call == "fsync" else os.fspath(file)
        if name.endswith("1-of-1.jsonl"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return does(file, *more)

    files = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(CpcFastError, match=r"Could not write .*1-of-1\.jsonl': Input/output error. The \d answers"):
            answers.predict(detector, [folder], tmp_path)
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "-1/4", "1/0", "a/b", "1/4/2", "٣/٤", "1/" + "9" * 99])
def test_a_shard_that_is_none(text):
    with pytest.raises(UsageError, match="the second of eight is 2/8"):
        Shard.parse(text)


def test_names_are_text_and_each_is_once(tmp_path):
    save(tmp_path / "a" / "x.png", texture(0))
    save(tmp_path / "b" / "x.jpg", texture(0))
    found = find_inputs([tmp_path / "a", tmp_path / "b"])
    assert found == [(str(tmp_path / "a" / "x.png"), "x"), (str(tmp_path / "b" / "x.jpg"), "x_2")]
    given = [tmp_path / name for name in ("c/x.png", "d/X.png", "e/x_3.png", "f/x.png", "g/x_3.png", "h/x.png")]
    names = [name for _, name in find_inputs([save(path, texture(0)) for path in given])]
    assert names == ["x", "X_2", "x_3", "x_4", "x_3_2", "x_5"]


def test_a_folder_that_is_called_as_a_picture_is_not_in_its_way(detector, tmp_path):
    for name in ("a.bmp", "a.png/x.bmp", "b.TIFF/x.bmp"):
        save(tmp_path / "images" / name, texture(0))
    assert [name for _, name in find_inputs([tmp_path / "images"])] == ["a", "a_png/x", "b_TIFF/x"]
    assert answers.predict(detector, [tmp_path / "images"], tmp_path / "out", tiff=True).images == 3


def test_naming_many_images_of_one_name_takes_no_time(monkeypatch):
    monkeypatch.setattr("cpc_fast.inputs._need", lambda path: None)
    folders = [f"{i}/image.png" for i in range(20_000)]  # a minute, where each name is sought from _2 on
    start = time.process_time()
    assert find_inputs(folders)[-1][1] == "image_20000"
    assert time.process_time() - start < 20


def test_linked_folders_are_followed_once(tmp_path):
    lot = tmp_path / "elsewhere" / "lot"
    save(lot / "deep" / "x.png", texture(0))
    images = tmp_path / "images"
    save(images / "z" / "y.png", texture(0))
    for link, to in (("a", lot), ("b", lot / "deep"), ("c", images / "z"), ("d", tmp_path / "nothing")):
        (images / link).symlink_to(to)
    (lot / "back").symlink_to(images)
    assert [name for _, name in find_inputs([images])] == ["a/deep/x", "z/y"]
    (tmp_path / "link").symlink_to(images)
    assert [name for _, name in find_inputs([tmp_path / "link"])] == ["a/deep/x", "z/y"]


def test_links_to_masks_answers_and_upwards_are_not_followed(detector, folder, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "set" / "images"))
    save(tmp_path / "set" / "secret.png", texture(0))
    save(tmp_path / "set" / "ground_truth" / "hole" / "0.png", texture(0))
    answers.predict(detector, [images], tmp_path / "out")
    ups = (("up", tmp_path / "set"), ("masks", tmp_path / "set/ground_truth/hole"), ("seen", tmp_path / "out/overlays"))
    for link, to in ups:
        (images / link).symlink_to(to)
    assert [name for _, name in find_inputs([images])] == [str(i) for i in range(9)]


def test_a_bad_sector_costs_its_image_alone(detector, folder, tmp_path, monkeypatch):
    def bad(path: Path, **_: object) -> os.stat_result:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("cpc_fast.images._size_of_file", bad)
    found = answers.predict(detector, [folder], tmp_path)
    assert (found.images, found.skipped) == (0, 9)


def test_a_circle_of_links_ends(detector, folder, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    (images / "round").symlink_to(images)
    (images / "self.png").symlink_to(images / "self.png")
    found = answers.predict(detector, [images], tmp_path / "out", pictures=False)
    assert (found.images, found.skipped) == (8, 2)
    assert "circle of links" in (tmp_path / "out" / "predictions.json").read_text()


def test_the_command_killed_terminated_and_sharded_by_torchrun(tmp_path, capsys, monkeypatch):
    data, run = make_set(tmp_path / "data", train=6, good=30), tmp_path / "run"
    assert cli.run(["fit", str(data), "--out", str(run), *SET_TINY, "--epochs", "1"]) == 0
    images = str(data / "test" / "good")
    assert cli.run(["predict", str(run), images, "--out", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-m", "cpc_fast.cli", "predict", str(run), images, "--out", str(tmp_path / "cut")]
    log = tmp_path / "cut" / "progress" / "1-of-1.jsonl"

    def lines() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    for end, options in ((signal.SIGKILL, []), (signal.SIGTERM, ["--resume"])):
        before = lines()
        with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) as cut:
            while lines() < before + 3 and cut.poll() is None:
                time.sleep(0.002)
            cut.send_signal(end)
            said = cut.communicate(timeout=120)[1]
        assert cut.returncode in (-9, 0)
    if said:  # on a slow machine it may have come to its end first
        assert "Stopped after" in said
        assert said.rstrip().endswith(f"cpc-fast predict {run} {images} --out {tmp_path / 'cut'} --resume")
    assert cli.run([*command[3:], "--resume"]) == 0
    assert lists(tmp_path / "cut") == lists(tmp_path / "whole")

    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")  # somebody else's
    assert cli.run(["predict", str(run), images, "--out", str(tmp_path / "alone"), "--scores-only"]) == 0
    assert lists(tmp_path / "alone")["scores.csv"] == lists(tmp_path / "whole")["scores.csv"]
    capsys.readouterr()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.run(["predict", str(run), images, "--out", str(tmp_path / "ranks"), "--scores-only"]) == 0
        said = capsys.readouterr().out
        assert ("Shard 1 of 2 is done; the last one to end writes" in said) == (rank == "0")
    assert lists(tmp_path / "ranks")["scores.csv"] == lists(tmp_path / "whole")["scores.csv"]
    assert sorted(path.name for path in (tmp_path / "ranks").iterdir()) == [
        "predictions.json",
        "progress",
        "scores.csv",
    ]
    command = ["predict", str(run), images, "--out", str(tmp_path / "ranks"), "--scores-only"]
    assert cli.run(command) == 2
    assert "Shard 2 of 2" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # what is refused stays so when torchrun tries again
    assert cli.run(command) == 2
    assert cli.run([*command, "--resume"]) == 0


def test_a_damaged_list_of_inputs(detector, folder, tmp_path):
    answers.predict(detector, [folder / "0.png"], tmp_path)
    (tmp_path / "progress" / "inputs.jsonl").write_text("[")
    with pytest.raises(CpcFastError, match=r"inputs\.jsonl' is damaged; predict into another --out"):
        answers.predict(detector, [folder / "0.png"], tmp_path, resume=True)


def test_masks_beside_the_images_are_no_images(tmp_path):
    for where in ("test/hole", "ground_truth/hole"):
        save(tmp_path / "parts" / where / "0.png", texture(1))
    assert [name for _, name in find_inputs([tmp_path / "parts"])] == ["test/hole/0"]
    assert [name for _, name in find_inputs([tmp_path / "parts" / "ground_truth"])] == ["hole/0"]


def test_what_is_gone_stays_answered_and_a_stop_among_the_retries_is_one(detector, folder, tmp_path):
    images = Path(shutil.copytree(folder, tmp_path / "images"))
    for name in ("0.png", "1.png"):
        (images / name).write_bytes(b"no image")
    first = answers.predict(detector, [images], tmp_path / "out")
    (images / "7.png").unlink()
    for name in ("0.png", "1.png"):
        save(images / name, texture(0))
    for left in (2, 1):
        with pytest.raises(Stopped, match=f"Stopped after 9 of 9 images, {left} of them to be tried again"):
            answers.predict(detector, [images], tmp_path / "out", resume=True, stop=lambda: True)
    found = answers.predict(detector, [images], tmp_path / "out", resume=True)
    assert (found.images, found.skipped) == (first.images + 2, first.skipped - 2)


def test_answers_stay_where_no_image_has_the_depth(detector, folder, tmp_path):
    answers.predict(detector, [folder], tmp_path / "out")
    before = lists(tmp_path / "out")
    Image.fromarray(np.full((32, 32), 60000, np.uint16)).save(tmp_path / "deep.png")
    deep = copy.copy(detector)
    deep.config = detector.config.replace(depth=12)
    with pytest.raises(CpcFastError, match="so the answers of before stay"):
        answers.predict(deep, [tmp_path / "deep.png"], tmp_path / "out")
    assert lists(tmp_path / "out") == before
