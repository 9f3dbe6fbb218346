"""Whatever is handed in: one sentence (what, where, what to do), the right exit code, and nothing good is lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import SET_TINY, make_set, save, texture

from cpc_fast import cli, saving
from cpc_fast.checkpoint import checkpoint_config
from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.files import write_text
from cpc_fast.images import find_train, read_image
from cpc_fast.saving import write_tensors

CLI = [sys.executable, "-m", "cpc_fast.cli"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    assert cli.run(["fit", str(make_set(folder / "data")), "--out", str(folder / "run"), *SET_TINY]) == 0
    return folder


def fails(capsys, arguments: list, code: int, *words: str) -> str:
    """The command fails with this code, and says these words in one line on standard error."""
    capsys.readouterr()
    assert cli.run([str(argument) for argument in arguments]) == code
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("fit: ")]
    assert len(said) == 1, said
    assert said[0].startswith("Error: ")
    assert "Traceback" not in said[0]
    for word in words:
        assert word in said[0], said[0]
    return said[0]


# Data that cannot serve


def test_no_folder_an_empty_one_and_one_without_train_good(tmp_path, capsys):
    fit = ["fit", tmp_path / "data", "--out", tmp_path / "run"]
    fails(capsys, fit, 2, "There is no folder", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    fails(capsys, fit, 2, "holds no images", "no train/good", "name a folder")
    (tmp_path / "data" / "train").mkdir()
    fails(capsys, fit, 2, "has no folder good", "put the normal images into")
    (tmp_path / "data" / "train" / "good").mkdir()
    fails(capsys, fit, 2, "train/good", "holds no images", "put normal images there")
    assert not (tmp_path / "run").exists()


def spoil(path: Path, kind: str) -> None:
    """Put something that is no good image at `path`."""
    if kind == "corrupt":
        data = bytearray(path.read_bytes())
        data[60:90] = bytes(30)
        path.write_bytes(data)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("I am not an image.\n")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "1x1":
        save(path, np.zeros((1, 1), np.uint8))
    elif kind == "smaller than a patch":
        save(path, texture(0, 12, 60))


BAD = {
    "corrupt": "damaged or cut short", "truncated": "damaged or cut short", "text": "not an image",
    "empty": "is empty (0 bytes)", "1x1": "is 1 x 1 px", "smaller than a patch": "12 x 60 pixels",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_training_image_is_named(tmp_path, capsys, kind):
    data = make_set(tmp_path / "data")
    spoil(data / "train" / "good" / "004.png", kind)
    said = fails(capsys, ["fit", data, "--out", tmp_path / "run", *SET_TINY], 1, "004.png", BAD[kind])
    assert any(word in said for word in ("remove it", "Remove it", "remove it.", "convert"))


def test_a_small_image_among_large_ones_is_named(tmp_path, capsys):
    for i in range(11):
        save(tmp_path / "data" / f"{i}.png", texture(i, *((40, 44) if i == 3 else (160, 170))))
    fit = ["fit", tmp_path / "data", "--out", tmp_path / "run"]
    fails(capsys, fit, 1, "3.png' has a shorter side of 40 pixels, where 160 is typical", "Remove it", "image_size")


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_test_image_is_named(fitted, tmp_path, capsys, kind):
    data = make_set(tmp_path / "data", train=0)
    spoil(data / "test" / "hole" / "001.png", kind)
    if kind in ("1x1", "smaller than a patch"):
        shutil.rmtree(data / "ground_truth")
    fails(capsys, ["evaluate", fitted / "run", data, "--out", tmp_path], 1, "001.png", BAD[kind])
    assert not (tmp_path / "metrics.json").exists()


def test_predict_skips_bad_images_and_goes_on(fitted, tmp_path, capsys):
    for i, kind in enumerate(BAD):
        spoil(save(tmp_path / "in" / f"{i}.png", texture(i)), kind)
    save(tmp_path / "in" / "z.png", texture(9))
    assert cli.run(["predict", str(fitted / "run"), str(tmp_path / "in"), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    for i, words in enumerate(BAD.values()):
        assert any(f"{i}.png" in line and words in line for line in said.splitlines()), (i, words, said)
    record = json.loads((tmp_path / "predictions.json").read_text())
    assert [entry["name"] for entry in record["images"]] == ["z"]
    assert len(record["skipped"]) == len(BAD)
    predict = ["predict", str(fitted / "run"), str(tmp_path / "in"), "--out", str(tmp_path)]
    assert said.splitlines()[-1].endswith("were skipped; see above.")
    assert cli.run([*predict, "--resume"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"were skipped; see {tmp_path / 'predictions.json'}.")


def test_predict_keeps_earlier_answers_where_it_has_none(fitted, tmp_path, capsys):
    out, bad = tmp_path / "out", tmp_path / "bad.png"
    predict = ["predict", fitted / "run", "--out", out]
    assert cli.run([*map(str, predict), str(fitted / "data" / "test" / "good")]) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    fails(capsys, [*predict, tmp_path / "new.png"], 2, "There is no file or folder", "new.png'; check the path.")
    (tmp_path / "link.png").symlink_to("gone")
    fails(capsys, [*predict, tmp_path / "link.png"], 2, "link.png' is a link to something that is gone; mend it, or")
    fails(capsys, [*predict, tmp_path / "new" / "*.png"], 2, "No file matches", "/new/*.png'; check the pattern.")
    bad.write_text("not an image")
    fails(capsys, [*predict, bad], 1, "No image can be read, so the answers of before stay in", "bad.png' is not an")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_predict_wants_images(fitted, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    fails(capsys, ["predict", fitted / "run", tmp_path / "in", "--out", tmp_path], 2, "holds no images")


def test_a_mask_of_another_size(fitted, tmp_path, capsys):
    data = make_set(tmp_path / "data", train=0)
    save(data / "ground_truth" / "hole" / "000_mask.png", np.zeros((24, 24), np.uint8))
    fails(
        capsys, ["evaluate", fitted / "run", data], 1, "000_mask.png", "24 x 24 px, but its image is 48 x 48 px", "save"
    )


def test_what_was_meant_is_said(fitted, tmp_path, capsys):
    """Arguments in the other order, and images that nobody has sorted."""
    run, data, flat = fitted / "run", fitted / "data", fitted / "data" / "train" / "good"
    fails(capsys, ["evaluate", data, run], 2, "The run folder comes first", str(run), "cpc-fast evaluate RUN DATA")
    fails(capsys, ["predict", data, run, "--out", tmp_path], 2, "The run folder comes first", "predict RUN IMAGES")
    fails(capsys, ["evaluate", run, flat], 2, "a flat folder of images", f"cpc-fast predict {run} {flat} --out answers")


def test_a_link_to_nothing_is_told_from_a_name_that_is_none(tmp_path):
    (tmp_path / "link.png").symlink_to("gone")
    with pytest.raises(CpcFastError, match=r"link\.png': No such .*; it is a link to something that is gone, so mend"):
        read_image(tmp_path / "link.png")
    with pytest.raises(CpcFastError, match=r"gone\.png': No such file or directory; check the path\.$"):
        read_image(tmp_path / "gone.png")


def test_a_test_set_is_not_to_be_learnt_from(fitted, tmp_path, capsys, monkeypatch):
    test = fitted / "data" / "test"
    monkeypatch.chdir(test)
    for name in (test, "."):
        words = f"holds no images itself; to learn from train/good beside it: '{fitted / 'data'}'."
        fails(capsys, ["fit", name, "--out", tmp_path / "run"], 2, words)
    save(tmp_path / "test" / "good" / "0.png", texture(0))
    words = f"is for judging, not to learn from; name '{tmp_path}', with normal images in train/good."
    fails(capsys, ["fit", tmp_path / "test", "--out", tmp_path / "run"], 2, words)


def test_images_in_subfolders_are_not_passed_over_in_silence(tmp_path, capsys):
    for name in ("s0/a.png", "s0/deep/b.png", "s1/c.png", ".hidden/d.png", "s0/.e.png"):
        save(tmp_path / "in" / name, texture(0))
    fit = ["fit", tmp_path / "in", "--out", tmp_path / "run", *SET_TINY, "--epochs", "1"]
    fails(capsys, fit, 2, "holds no images", "Its subfolders hold 3 images: name one of them, or move the images into")
    for i in range(3):
        save(tmp_path / "in" / f"{i}.png", texture(i))
    assert cli.run([*map(str, fit)]) == 0
    assert f"Subfolders of '{tmp_path / 'in'}' hold 3 images that are not read;" in capsys.readouterr().out
    assert (
        cli.run(["predict", str(tmp_path / "run"), str(tmp_path / "in" / "0.png"), "--out", str(tmp_path / "in/x")])
        == 0
    )
    assert cli.run([*map(str, fit[:3]), str(tmp_path / "again"), *map(str, fit[4:])]) == 0
    assert "hold 3 images that are not read;" in capsys.readouterr().out  # answers are none
    fails(capsys, [*fit, "--preset", "qualty"], 2, "There is no preset called 'qualty'")


def test_predict_gives_advice_that_predict_can_take(fitted, tmp_path, capsys):
    save(tmp_path / "small.png", texture(0, 12, 60))
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    images = [str(tmp_path / "small.png"), str(tmp_path / "table.csv")]
    assert cli.run(["predict", str(fitted / "run"), *images, "--out", str(tmp_path)]) == 1
    small, table, _ = capsys.readouterr().err.splitlines()
    assert "at the scale of the images that are fitted on" in small
    assert "patch_size" not in small
    assert "is not an image in a known format" in table
    assert "whatever its name says" not in table


# Options that cannot work


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "norm=batch"], "batch statistics would tell"),
        (["--set", "epochs=many"], "epochs is 'many'; it must be a whole number"),
        (["--set", "colour=3"], "NAME=VALUE with one of these names"),
        (["--set", "image_size=4"], "image_size is 4; it must be at least patch_size"),
        (["--preset", "fastest"], "There are: cpu-demo, quality, texture, aligned, fast, paper"),
        (["--epochs", "0"], "epochs is 0; it must be at least 1"),
        (["--epochs", "x"], "integer. Try: cpc-fast fit --help"),
        (["--device", "abacus"], "no such device"),
        (["--device", "cuda:99"], "torch sees"),
        (["--resume"], "no checkpoint"),
        (["--nonsense"], "--help"),
    ],
    ids=str,
)
def test_options_that_cannot_work(fitted, tmp_path, capsys, options, words):
    fails(capsys, ["fit", fitted / "data", "--out", tmp_path / "run", *options], 2, words)


def test_a_run_is_not_fitted_over(fitted, capsys):
    before = (fitted / "run" / "model.safetensors").read_bytes()
    fails(capsys, ["fit", fitted / "data", "--out", fitted / "run", *SET_TINY], 2, "holds a run already", "resume it")
    assert (fitted / "run" / "model.safetensors").read_bytes() == before


# Runs that cannot be read


def rewrite(run: Path, change) -> None:
    """Change the tensors or the record of a detector's file."""
    path = run / "model.safetensors"
    tensors, about = saving.read_tensors(path, "detector")
    change(tensors, about)
    save_file(tensors, path, {"about": json.dumps(about)})


def copy_of(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted / "run", tmp_path / "run"))


def test_weights_that_are_not_finite(fitted, tmp_path, capsys):
    run = copy_of(fitted, tmp_path)
    rewrite(run, lambda tensors, about: tensors["model.members.0.predictor.weight"].view(-1)[7].fill_(float("nan")))
    words = ("model.safetensors", "not finite", "model.members.0.predictor.weight", "fit ... --resume makes it anew")
    fails(capsys, ["evaluate", run, fitted / "data"], 1, *words)
    fails(capsys, ["predict", run, fitted / "data", "--out", tmp_path], 1, *words)


def test_a_checkpoint_that_is_not_finite(fitted, tmp_path, capsys):
    run = copy_of(fitted, tmp_path)
    path = run / "checkpoint.safetensors"
    tensors, about = saving.read_tensors(path, "checkpoint")
    tensors["model.members.0.predictor.weight"][:] = float("inf")
    save_file(tensors, path, {"about": json.dumps(about)})
    (run / "model.safetensors").unlink()  # there is something left to do
    fails(capsys, ["fit", fitted / "data", "--out", run, "--resume"], 1, "checkpoint.safetensors", "not finite")


def test_a_run_of_another_version(fitted, tmp_path, capsys):
    run = copy_of(fitted, tmp_path)
    rewrite(run, lambda tensors, about: about.update(format=99, versions={"cpc_fast": "7.0"}))
    fails(capsys, ["evaluate", run, fitted / "data"], 1, "another version of cpc_fast (7.0, format 99", "or fit again")


def test_a_damaged_run_and_one_that_is_none(fitted, tmp_path, capsys):
    fails(capsys, ["evaluate", tmp_path / "none", fitted / "data"], 2, "no run folder", "fit makes one")
    (tmp_path / "none").mkdir()
    fails(capsys, ["evaluate", tmp_path / "none", fitted / "data"], 2, "model.safetensors is missing", "run fit first")
    run = copy_of(fitted, tmp_path)
    data = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(data[: len(data) // 2])
    words = ("is damaged", "cpc-fast fit ... --resume makes it anew from the checkpoint.")
    fails(capsys, ["evaluate", run, fitted / "data"], 1, *words)
    assert cli.run(["fit", str(fitted / "data"), "--out", str(run), "--resume"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in (*words, "Fitted on 10"))
    again, first = load_file(run / "model.safetensors"), load_file(fitted / "run" / "model.safetensors")
    assert all(torch.equal(again[name], first[name]) for name in first)
    rewrite(run, lambda tensors, about: about.pop("threshold"))
    fails(capsys, ["evaluate", run, fitted / "data"], 1, "cannot be read ('threshold' is missing); cpc-fast fit")
    (run / "model.safetensors").unlink()
    said = "was not finished (model.safetensors is missing); go on with cpc-fast fit ... --resume."
    fails(capsys, ["evaluate", run, fitted / "data"], 2, said)
    (run / "model.safetensors").write_bytes(data[: len(data) // 2])
    (run / "checkpoint.safetensors").unlink()
    fails(capsys, ["evaluate", run, fitted / "data"], 1, "is damaged", "or fit again")


def test_a_damaged_checkpoint_has_another_state_beside_it(fitted, tmp_path, capsys):
    run = copy_of(fitted, tmp_path)
    path = run / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    resume = ["fit", fitted / "data", "--out", run, "--resume"]
    fails(capsys, resume, 1, "is damaged", f"best.safetensors' is another state of it: copy it to '{path}'.")


def test_a_config_that_was_edited_is_not_passed_over(fitted, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(fitted / "run", run)
    beside = run / "config.json"
    record = json.loads(beside.read_text())
    predict = ["predict", str(run), str(fitted / "data" / "test"), "--out", str(tmp_path / "answers")]

    def said() -> str:
        assert cli.run(predict) == 0
        return "".join(line for line in capsys.readouterr().out.splitlines() if "config.json" in line)

    assert not said()
    for part, name, value in (("config", "target_fpr", 0.2), ("threshold", "value", 3.5)):
        kept, record[part][name] = record[part][name], value
        beside.write_text(json.dumps(record), encoding="utf-8-sig")  # as some editors save it
        assert f"({name} {value} for {kept}), which changes nothing" in said()
        record[part][name] = kept
    beside.write_text(json.dumps(record)[:-1])
    assert "cannot be read, which changes nothing" in said()
    beside.unlink()
    assert not said()


# A disk that is full


def command(fitted: Path, run: Path, *options: str) -> list[str]:
    return [*CLI, "fit", str(fitted / "data"), "--out", str(run), *SET_TINY, *options]


def start(arguments: list[str]) -> subprocess.Popen:
    """A process that hears SIGINT, also where a script started the tests in the background, which would not."""

    def hear() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, preexec_fn=hear)


def test_a_file_that_cannot_grow_leaves_the_good_one(fitted, tmp_path):
    """Every write above half a checkpoint fails, as on a full disk: the checkpoint of before stays whole."""
    run = tmp_path / "run"
    run.mkdir()
    good = run / "checkpoint.safetensors"
    first = start(command(fitted, run, "--epochs", "400"))
    assert first.stderr is not None
    for line in first.stderr:
        if "epoch 2 of 400" in line:
            break
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    before = good.read_bytes()
    limited = ["bash", "-c", f'ulimit -f {len(before) // 2048}; exec "$@"', "bash"]  # in KiB
    go_on = command(fitted, run, "--epochs", "400", "--resume")
    done = subprocess.run([*limited, *go_on], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: Could not write")
    assert "The file that was there before is untouched." in error
    assert "Free some space or choose another folder" in error
    assert error.endswith(f"Go on with: cpc-fast fit {fitted / 'data'} --out {run} --resume")
    assert "Traceback" not in done.stderr
    assert good.read_bytes() == before
    assert sorted(path.name for path in run.iterdir()) == ["best.safetensors", "checkpoint.safetensors"]
    saving.read_tensors(good, "checkpoint")


def test_a_disk_that_is_really_full(fitted, tmp_path):
    """A file system with room for one checkpoint and a half."""
    size = (fitted / "run" / "checkpoint.safetensors").stat().st_size * 3 // 2
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        done = subprocess.run(command(fitted, disk / "run"), capture_output=True, text=True, timeout=120)
        assert done.returncode == 1, done.stderr
        assert "No space left on device" in done.stderr
        assert "untouched" in done.stderr
        assert "Traceback" not in done.stderr
        _, position = checkpoint_config(disk / "run")
        assert (position.epoch, position.step) == (1, 0)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_weights_have_the_rights_of_other_new_files(tmp_path):
    write_text(tmp_path / "text", "")
    write_tensors(tmp_path / "weights", {"w": torch.ones(2)}, {})
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "text").stat().st_mode


def test_images_in_a_folder_good_are_pointed_at(tmp_path):
    (tmp_path / "good").mkdir()
    Image.new("L", (40, 40)).save(tmp_path / "good" / "a.png")
    with pytest.raises(UsageError, match="its folder good does: name"):
        find_train(tmp_path)


def test_a_write_that_fails_anywhere_leaves_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_text(path, "good")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(CpcFastError, match=r"x\.json.*No space left on device.*untouched"):
                write_text(path, "bad")
        assert path.read_text() == "good"
        assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_that_is_read_only(fitted, tmp_path, monkeypatch, capsys):
    """Told before the work where it can be seen, and as a sentence where not."""
    run = copy_of(fitted, tmp_path)
    evaluate, export = ["evaluate", run, fitted / "data", "--device", "cpu"], ["export", run]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)
        patch.setattr("cpc_fast.detector.Detector.load", lambda *_: pytest.fail("it begins to work"))
        words = ("Could not write in the folder", str(run), "you have no right to; choose another one.")
        for command in (evaluate, export, ["evaluate", "--all", tmp_path, "--runs", run]):
            if "--all" in command:
                shutil.copytree(fitted / "data", tmp_path / "all" / "parts")
                command[2] = tmp_path / "all"
            fails(capsys, command, 1, *words)
        fails(capsys, [*evaluate, "--out", run / "config.json" / "x"], 1, "config.json' is none; choose another one.")

    def refuse(path: Path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for step in ("write_text", "unlink"):
        monkeypatch.setattr(Path, step, refuse)
    with pytest.raises(CpcFastError, match=r"x\.json': Read-only file system\. Choose another folder\.$"):
        write_text(tmp_path / "x.json", "x")


def test_a_run_folder_that_cannot_be_made(fitted, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    fails(
        capsys,
        ["fit", fitted / "data", "--out", tmp_path / "file" / "run", *SET_TINY],
        1,
        "Could not write in the folder",
    )


# Ctrl-C


def test_stopped_anywhere_it_says_so_once(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("cpc_fast.doctor.examine", interrupted)
    assert cli.run(["doctor"]) == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_stopped_while_it_seeks_the_threshold_it_says_what_is_missing(fitted, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("cpc_fast.detector.held_out_scores", interrupted)
    arguments = command(fitted, tmp_path / "cut", "--epochs", "1")[len(CLI) :]
    assert cli.run(arguments) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"Stopped; only the threshold is missing in {tmp_path / 'cut'}. Go on with: cpc-fast fit")


def test_stopped_in_mid_epoch_it_says_how_to_go_on_and_ends_at_the_same_weights(fitted, tmp_path):
    options = ("--epochs", "60")
    stopped = start(command(fitted, tmp_path / "cut", *options))
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if "epoch 3 of 60" in line:
            break
    stopped.send_signal(signal.SIGINT)
    said = stopped.stderr.read()
    stopped.stderr.close()
    assert stopped.wait(timeout=120) == 130
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("Stopped; ")
    assert "of 60 epochs are saved" in last
    assert f"cpc-fast fit {fitted / 'data'} --out {tmp_path / 'cut'} --resume" in last

    again = [*CLI, "fit", str(fitted / "data"), "--out", str(tmp_path / "cut"), "--resume"]
    for arguments in (again, command(fitted, tmp_path / "whole", *options)):
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    whole, cut = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_stopped_before_the_first_epoch(fitted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cpc_fast.detector.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.run(["fit", str(fitted / "data"), "--out", str(tmp_path / "run"), *SET_TINY]) == 130
    assert "nothing is saved" in capsys.readouterr().err


# What nobody thought of


@pytest.mark.parametrize(
    ("closed", "what", "code"), [(">&-", ["--version"], 0), ("2>&-", ["export", "no-such-run"], 2)], ids=str
)
def test_a_stream_that_the_caller_closed(closed, what, code):
    """Nothing is said there, and nothing of it elsewhere."""
    done = subprocess.run(["bash", "-c", f'"$@" {closed}', "bash", *CLI, *what], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("what", [["--version"], ["doctor"], ["predict", "--help"]], ids=" ".join)
def test_standard_output_that_cannot_be_written(what):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*CLI, *what], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "Error: Standard output cannot be written: No space left on device.\n")


def test_the_unexpected_is_one_sentence_and_a_traceback_on_request(fitted, monkeypatch, capsys):
    monkeypatch.setattr("cpc_fast.doctor.examine", lambda: 1 / 0)
    fails(capsys, ["doctor"], 1, "unexpected ZeroDivisionError: division by zero", "--debug shows where")
    for arguments in (["--debug", "doctor"], ["doctor", "--debug"]):
        with pytest.raises(ZeroDivisionError):
            cli.run(arguments)
