"""The command line: what each command writes, prints and returns. What goes wrong is in test_errors."""

import csv
import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from samples import SET_TINY, TINY_CONFIG, make_set, save, texture

from cpc_fast import answers, cli, datasets
from cpc_fast.commands import console
from cpc_fast.commands.fit import doubts
from cpc_fast.detector import Detector
from cpc_fast.doctor import examine
from cpc_fast.errors import CpcFastError, Stopped, UsageError
from cpc_fast.images import read_image
from cpc_fast.version import __version__


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_set(tmp_path_factory.mktemp("data") / "tiles")


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiles"
    assert cli.run(["fit", str(data), "--out", str(run), *SET_TINY]) == 0
    return run


def test_help_and_version(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"cpc-fast {__version__}\n"
    for arguments in ([], ["--help"]):
        assert cli.run(arguments) == 0
        out = capsys.readouterr().out
        assert all(
            command in out for command in ("demo", "fit", "evaluate", "predict", "export", "data", "doctor", "profile")
        )
    for command in (
        ["fit"],
        ["evaluate"],
        ["predict"],
        ["demo"],
        ["doctor"],
        ["profile"],
        ["data", "textures"],
        ["data", "elpv"],
    ):
        assert cli.run([*command, "--help"]) == 0
        assert "Usage: cpc-fast" in capsys.readouterr().out


def test_fit_shows_progress_and_says_what_is_next(data, tmp_path, capsys):
    options = ["--epochs", "3", "--seed", "4", "--image-size", "40", "--device", "cpu", *SET_TINY]
    assert cli.run(["fit", str(data), "--out", str(tmp_path / "run"), *options]) == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("fit: epoch")]
    assert len(lines) == 3
    assert all(word in lines[0] for word in ("loss", "accuracy", "images/s"))
    assert f"cpc-fast evaluate {tmp_path / 'run'} {data}" in said.out
    assert "can vouch for a false-positive rate of" in said.out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["config"]["epochs"], config["config"]["seed"], config["config"]["image_size"]) == (3, 4, 40)
    assert {"cpc_fast", "torch", "python"} <= set(config["versions"])
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]


def test_a_fit_that_only_guesses_says_so(data, tmp_path, capsys):
    fit = ["fit", str(data), *SET_TINY, "--epochs", "6", "--out"]
    assert cli.run([*fit, str(tmp_path / "a"), "--set", "learning_rate=1e-9"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"^fit: nothing was learnt: the loss of the last epoch, 4\.\d\d, is no better than that of guessing", said
    )
    assert " among 100 patches, 4.61. Try another learning_rate (--set) or more --epochs" in said
    assert cli.run([*fit, str(tmp_path / "b"), "--set", "learning_rate=0.01"]) == 0
    assert "nothing was learnt" not in capsys.readouterr().out


def test_a_finished_run_is_not_fitted_again(fitted, data, tmp_path, capsys, monkeypatch):
    run = Path(shutil.copytree(fitted, tmp_path / "run"))
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    for options in ([], SET_TINY):
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", lambda *_, **__: pytest.fail("an image is opened"))
            assert cli.run(["fit", str(data), "--out", str(run), "--resume", *options]) == 0
        said = capsys.readouterr()
        assert f"{run} was finished already: 2 epochs on 10 (8 to learn from, 2 for the threshold)" in said.out
        assert "Fitted" not in said.out
        assert "Next: cpc-fast evaluate" in said.out
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before
    (run / "model.safetensors").unlink()  # stopped between the last epoch and the end
    assert cli.run(["fit", str(data), "--out", str(run), "--resume"]) == 0
    assert "Fitted on 10 (" in capsys.readouterr().out


def test_settings_of_a_run_to_resume_are_those_of_its_config(data, tmp_path, capsys):
    """Not of cpu-demo, whose patches are larger than this crop."""
    fit = ["fit", str(data), "--out", str(tmp_path / "run"), "--set", "crop=24"]
    assert cli.run([*fit, *SET_TINY, "--epochs", "1", "--set", "skip=0", "--set", "steps=1"]) == 0
    assert cli.run([*fit, "--resume"]) == 0
    assert "was finished already" in capsys.readouterr().out


def test_a_flat_folder_is_not_sent_to_evaluate(data, tmp_path, capsys):
    flat = str(data / "train" / "good")
    assert cli.run(["fit", flat, "--out", str(tmp_path), *SET_TINY]) == 0
    said = capsys.readouterr().out
    assert "Next: cpc-fast predict" in said
    assert "evaluate" not in said


def test_tensorboard_scalars(data, tmp_path, capsys):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    assert cli.run(["fit", str(data), "--out", str(tmp_path / "run"), "--tensorboard", *SET_TINY]) == 0
    assert "Curves: tensorboard --logdir" in capsys.readouterr().out
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "accuracy", "images per second"}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]  # two epochs of two steps


def test_a_fit_that_writes_curves_goes_on_with_them(data, tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise Stopped("Stopped in epoch 1.")

    monkeypatch.setattr("cpc_fast.commands.fit.fit_run", stopped)
    fit = ["fit", str(data), "--out", str(tmp_path / "run"), "--tensorboard", "--device", "cpu"]
    assert cli.run([*fit, *SET_TINY]) == 0
    said = capsys.readouterr().err
    assert said.endswith(f"Go on with: {shlex.join(['cpc-fast', *fit[:4], '--resume', *fit[4:]])}\n")


def test_tensorboard_is_asked_for_by_name(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.run(["fit", str(data), "--out", str(tmp_path / "run"), "--tensorboard", *SET_TINY]) == 1
    assert "pip install 'cpc_fast[tensorboard]'" in capsys.readouterr().err


def test_evaluate_writes_metrics_table_and_report(fitted, data, tmp_path, capsys):
    assert cli.run(["evaluate", str(fitted), str(data), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "of 3 normal images, " in out
    assert "of 2 defective ones" in out
    assert "at most" not in out  # beside what two held-out images can vouch for
    assert out.count("can vouch for") == 1
    assert "hole" in out
    assert "image AUROC" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["data"] == str(data)
    assert metrics["speed"]["train_images_per_s"] > 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1.0% was asked for, but the 2 good images kept out of training can vouch for 33.3% only.</p>" in page
    assert cli.run(["evaluate", str(fitted), str(data)]) == 0
    assert (fitted / "metrics.json").is_file()
    report = (fitted / "report.html").read_text(encoding="utf-8")
    assert "<dt>data</dt>" in report
    assert "digest" not in report  # of the images: nothing that a reader of the page could use


def test_a_threshold_that_was_set_by_hand_is_meant_for_no_rate(fitted, data, tmp_path, capsys):
    Detector.load(fitted).with_threshold(1.5).save(tmp_path / "run")
    assert cli.run(["evaluate", str(tmp_path / "run"), str(data)]) == 0
    said = capsys.readouterr().out
    assert "That threshold was set by hand." in said
    assert "is meant to flag" not in said
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["threshold"]["target_fpr"] is None
    assert "it was set for" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_predict_writes_scores_overlays_masks_and_maps(fitted, data, tmp_path, capsys):
    folder = data / "test"
    assert cli.run(["predict", str(fitted), str(folder), "--out", str(tmp_path), "--tiff"]) == 0
    with open(tmp_path / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    record = json.loads((tmp_path / "predictions.json").read_text())
    assert len(rows) == len(record["images"]) == 5
    for row, entry in zip(rows, record["images"], strict=True):
        assert row["name"] == entry["name"]
        assert row["name"].split("/")[0] in ("good", "hole")
        assert float(row["score"]) == entry["score"]
        assert (row["flagged"] == "true") == entry["flagged"] == (entry["score"] > record["threshold"])
        assert int(row["segments"]) == len(entry["segments"])
        mask = read_image(tmp_path / "masks" / f"{row['name']}.png")[..., 0]
        scores = tifffile.imread(tmp_path / "maps" / f"{row['name']}.tiff")
        assert scores.dtype == np.float32
        assert scores.shape == mask.shape == (48, 48)
        assert set(np.unique(mask)) <= {0, 255}
        assert np.array_equal(mask > 0, scores > record["threshold"])
        assert float(scores.max()) == pytest.approx(entry["score"])
        assert read_image(tmp_path / "overlays" / f"{row['name']}.png").shape[:2] == (48, 48)
        for segment in entry["segments"]:
            assert set(segment) == {"box", "area", "peak", "peak_at", "outline"}
            outer = np.array(segment["outline"][0])
            assert outer.shape[1] == 2
            assert (outer[0] == outer[-1]).all()
            top, left, bottom, right = segment["box"]
            assert np.allclose(outer.min(0), (top - 0.5, left - 0.5))
            assert np.allclose(outer.max(0), (bottom - 0.5, right - 0.5))
        why = entry["most_surprising"]
        assert (why is not None) == entry["flagged"]
        if why:
            assert why["worst"] in why["losses"]
            assert why["worst"].split()[0] in ("down", "up", "right", "left")
    assert cli.run(["predict", str(fitted), str(folder / "hole" / "000.png"), "--out", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "maps").exists()
    assert "Open next" in capsys.readouterr().out


def test_small_regions_are_left_out_when_asked(fitted, data, tmp_path, capsys):
    holes = str(data / "test" / "hole")
    areas = {}
    for least in (1, 200, 48 * 48 + 1):
        out = tmp_path / str(least)
        assert cli.run(["predict", str(fitted), holes, "--out", str(out), "--min-area", str(least)]) == 0
        said = capsys.readouterr().out
        assert ("adjoining pixels" in said) == (least > 1)
        record = json.loads((out / "predictions.json").read_text())
        assert record["min_area"] == least
        areas[least] = [segment["area"] for entry in record["images"] for segment in entry["segments"]]
        assert all(entry["flagged"] == bool(entry["segments"]) for entry in record["images"])
        assert all(area >= least for area in areas[least])
    assert areas[200] == [area for area in areas[1] if area >= 200]
    assert not areas[48 * 48 + 1]
    assert cli.run(["predict", str(fitted), holes, "--out", str(tmp_path), "--min-area", "0"]) == 2


def test_a_threshold_of_ones_own(fitted, data, tmp_path, capsys):
    holes, out = str(data / "test" / "hole"), tmp_path / "answers"
    ask = ["predict", str(fitted), holes, "--out", str(out), "--threshold"]
    for threshold, flagged in (("-1e9", True), ("1e9", False)):
        assert cli.run([*ask, threshold]) == 0
        said = capsys.readouterr().out
        assert f"a score above {float(threshold):.4g}" in said
        assert "can vouch for" not in said  # that is of the threshold which the fit found
        record = json.loads((out / "predictions.json").read_text())
        assert record["threshold"] == float(threshold)
        assert {entry["flagged"] for entry in record["images"]} == {flagged}
    assert cli.run([*ask, "1", "--resume"]) == 2
    assert "different: threshold" in capsys.readouterr().err
    before = (out / "predictions.json").read_bytes()
    assert cli.run([*ask, "1e9", "--resume"]) == 0
    assert (out / "predictions.json").read_bytes() == before
    capsys.readouterr()
    assert cli.run([*ask, "nan"]) == 2
    assert "The threshold is nan; it must be a finite float32" in capsys.readouterr().err


def test_another_rate_of_false_alarms(fitted, data, tmp_path, capsys):
    out = tmp_path / "answers"
    ask = ["predict", str(fitted), str(data / "test" / "hole"), "--out", str(out), "--scores-only", "--target-fpr"]
    assert cli.run([*ask, "0.7"]) == 0
    assert "can vouch for" not in capsys.readouterr().out  # two held-out images vouch for a third
    threshold = json.loads((out / "predictions.json").read_text())["threshold"]
    assert threshold == Detector.load(fitted).with_target_fpr(0.7).threshold.value
    assert threshold < Detector.load(fitted).threshold.value
    for wrong, says in (
        (["2"], "--target-fpr is 2.0; it must be above 0"),
        (["0.7", "--threshold", "1"], "leave one."),
    ):
        assert cli.run([*ask, *wrong]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("file", ["inputs.jsonl", "scores.csv"])
def test_after_a_full_disk_the_command_that_is_printed_goes_on(fitted, data, tmp_path, capsys, monkeypatch, file):
    """Over answers of a call with another threshold, which are gone by then."""
    out, replace = tmp_path / "out", os.replace
    ask = ["predict", str(fitted), str(data / "test"), "--out", str(out), "--threshold"]
    assert cli.run([*ask, "1.5", "--scores-only"]) == 0

    def full(source, target):
        if Path(target).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert cli.run([*ask, "2.5", "--scores-only"]) == 1
    monkeypatch.undo()
    said = capsys.readouterr().err.splitlines()[-1]
    go_on = shlex.split(said.split("Go on with: cpc-fast ")[1])
    assert go_on[-1] == "--resume"
    assert cli.run(go_on) == 0
    assert json.loads((out / "predictions.json").read_text())["threshold"] == 2.5
    assert cli.run(["predict", str(fitted), str(data / "test"), "--out", str(tmp_path / "whole"), *ask[-1:], "2.5",
                    "--scores-only"]) == 0  # fmt: skip
    assert (out / "scores.csv").read_bytes() == (tmp_path / "whole" / "scores.csv").read_bytes()


def test_colour_that_a_model_cannot_see_is_said(fitted, data, tmp_path, capsys):
    colour = np.repeat(texture(1), 3, axis=2)
    Image.fromarray(colour).save(tmp_path / "grey.png")  # saved as RGB, and grey all over
    colour[..., 0] //= 2
    Image.fromarray(colour).save(tmp_path / "colour.png")
    images = [str(tmp_path / "grey.png"), str(tmp_path / "colour.png")]
    assert cli.run(["predict", str(fitted), *images, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 of 2 images are in colour; the model sees their grey values only." in said
    assert "--set channels=3" in said
    assert cli.run(["predict", str(fitted), images[0], "--out", str(tmp_path / "out")]) == 0
    assert "in colour" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_files_of_12_bits_are_pointed_at_and_read(tmp_path, capsys, suffix):
    def deep(place: str, i: int) -> Path:
        values, path = texture(i).astype(np.uint16) << 4, tmp_path / place / f"{i}.{suffix}"
        if suffix == "png":
            return save(path, values)
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, 4095 - values, photometric="miniswhite")
        return path

    for i in range(6):
        deep("data/train/good", i)
        deep("data/test/good", i)
    fit = ["fit", str(tmp_path / "data"), *SET_TINY, "--epochs", "1", "--out"]
    assert cli.run([*fit, str(tmp_path / "dark")]) == 0
    said = capsys.readouterr().out
    stored = [texture(i).astype(np.uint16) << 4 for i in range(6)]
    top = max((values if suffix == "png" else 4095 - values).max() for values in stored)
    assert f"Of 6 images, 6 are of 16 bits, with values up to {top} of 65535: {(top >> 8) + 1} grey levels are" in said
    assert "--set depth=12." in said
    assert cli.run([*fit, str(tmp_path / "run"), "--set", "depth=12"]) == 0
    assert "grey levels" not in capsys.readouterr().out
    detector = Detector.load(tmp_path / "run")
    wanted = [detector.inspect(texture(i)).score for i in range(6)]
    tests = [tmp_path / "data" / "test" / "good" / f"{i}.{suffix}" for i in range(6)]
    assert detector.explain(tests[0]) == detector.explain(texture(0))
    assert detector.predict(tests).scores == wanted
    with pytest.raises(CpcFastError, match=r"small\.png"):
        detector.explain(save(tmp_path / "small.png", texture(0)[:8, :8]))
    command = ["predict", str(tmp_path / "run"), str(tmp_path / "data" / "test"), "--out", str(tmp_path / "out")]
    assert cli.run(command) == 0
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [one["score"] for one in told] == wanted
    assert cli.run(["evaluate", str(tmp_path / "run"), str(tmp_path / "data")]) == 0
    save(tmp_path / "data" / "test" / "good" / "7.png", texture(7).astype(np.uint16) << 8)
    capsys.readouterr()
    assert cli.run([*command[:2], str(tmp_path / "data" / "test" / "good" / "7.png"), *command[3:]]) == 1
    assert "holds values above 4095, the most of 12 bits; choose the depth" in capsys.readouterr().err


def test_12_bits_are_pointed_at_beside_files_of_16(tmp_path):
    paths = [save(tmp_path / f"{i}.png", texture(i).astype(np.uint16) << (8 if i in (1, 4) else 4)) for i in range(6)]
    top, lowest = max((int(texture(i).max()) << 4, paths[i]) for i in (0, 2, 3, 5))
    [said] = doubts(TINY_CONFIG, paths)
    assert said == (
        f"6 images, 6 are of 16 bits, 4 of these with values up to {top} of 65535 only, such as '{lowest}': "
        f"{(top >> 8) + 1} grey levels are left of them. If that is all their camera gives, bring all images to the "
        "same depth before the fit."
    )
    assert doubts(TINY_CONFIG, [paths[1], paths[4], save(tmp_path / "grey.png", texture(6))]) == []


def test_fit_looks_for_colour_beyond_the_first_image(data, tmp_path, capsys):
    folder = tmp_path / "images"
    for i in range(5):
        save(folder / f"{i}.png", texture(i))
    Image.fromarray(np.repeat(texture(6), 3, axis=2) // np.array([1, 2, 1], np.uint8)).save(folder / "5.png")
    assert cli.run(["fit", str(folder), "--out", str(tmp_path / "run"), *SET_TINY]) == 0
    assert "Of 6 images, 1 are in colour; this fit sees grey values only." in capsys.readouterr().out


def test_places_in_images_of_several_sizes_are_pointed_at(tmp_path, capsys):
    fit = ["fit", str(tmp_path / "images"), *SET_TINY, "--epochs", "1", "--out"]
    for i in range(6):
        save(tmp_path / "images" / f"{i}.png", texture(i, *((48, 48) if i < 4 else (48, 50))))
    assert cli.run([*fit, str(tmp_path / "alike"), "--set", "place=true"]) == 0
    assert "--set place=false" not in capsys.readouterr().out
    save(tmp_path / "images" / "5.png", texture(5, 96, 100))
    assert cli.run([*fit, str(tmp_path / "zoomed"), "--set", "place=true"]) == 0
    assert (
        capsys.readouterr().out.count("Of 6 images, sizes go from 48 x 48 to 96 x 100 pixels. A place is a share") == 1
    )
    assert cli.run([*fit, str(tmp_path / "scaled"), "--set", "place=true", "--image-size", "48"]) == 0
    assert cli.run([*fit, str(tmp_path / "without")]) == 0
    assert "sizes go" not in capsys.readouterr().out
    save(tmp_path / "images" / "5.png", texture(5, 96, 60))
    assert cli.run([*fit, str(tmp_path / "wide"), "--set", "place=true", "--image-size", "48"]) == 0
    assert "sizes go from 48 x 48 to 96 x 60 pixels" in capsys.readouterr().out


def test_images_of_another_size_are_pointed_at(fitted, data, tmp_path, capsys):
    save(tmp_path / "large.png", texture(1, 96, 80))
    images = [str(tmp_path / "large.png"), str(data / "test" / "good")]
    assert cli.run(["predict", str(fitted), *images, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 of 4 images are of another size than those of the fit (48 pixels on the shorter side)." in said
    assert cli.run(["predict", str(fitted), images[1], "--out", str(tmp_path / "out")]) == 0
    assert "another size" not in capsys.readouterr().out


def test_evaluate_says_what_it_passes_over(fitted, tmp_path, capsys):
    data = make_set(tmp_path / "data")
    assert cli.run(["evaluate", str(fitted), str(data), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "not read" not in said
    assert "whose truth is known" not in said
    save(data / "test" / "hole" / "cam1" / "0.png", texture(0))
    save(data / "test" / "dent" / "0.png", texture(0))
    assert cli.run(["evaluate", str(fitted), str(data), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"1 images in '{data / 'test'}' are not read" in said
    assert "Pixel metrics are of the 5 of 6 images whose truth is known." in said


def test_evaluate_says_whose_results_it_replaces(fitted, data, tmp_path, capsys, monkeypatch):
    other = make_set(tmp_path / "other")
    (tmp_path / "link").symlink_to(other)
    monkeypatch.chdir(tmp_path)
    calls = ((data, None), (data, None), (other, data), (other, None), ("link", None), ("other", None))
    for judged, before in calls:
        assert cli.run(["evaluate", str(fitted), str(judged), "--out", str(tmp_path / "out")]) == 0
        said = capsys.readouterr().out
        assert ("Replaced the results of" in said) == bool(before)
        assert f"Replaced the results of '{before}' in {tmp_path / 'out'}; --out keeps several." in said or not before
    monkeypatch.chdir(data)
    assert cli.run(["evaluate", str(fitted), str(other), "--out", str(tmp_path / "out")]) == 0
    assert "Replaced the results of" not in capsys.readouterr().out
    (tmp_path / "out" / "metrics.json").write_text("[")
    assert cli.run(["evaluate", str(fitted), str(data), "--out", str(tmp_path / "out")]) == 0


def test_a_name_with_a_newline_is_one_line_of_what_fit_says(tmp_path, capsys):
    for i in range(4):
        save(tmp_path / "data" / f"{i}\n\x1b[31m.png", texture(i))
    assert cli.run(["fit", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *SET_TINY, "--epochs", "1"]) == 0
    said = capsys.readouterr().out
    assert "Look at what sets it: " in said
    assert "\\n\\x1b[31m.png scores" in said
    assert "\x1b" not in said


def test_fit_says_what_it_does_not_read_and_what_is_there_twice(tmp_path, capsys):
    for i in range(5):
        save(tmp_path / "data" / f"{i}.png", texture(i))
    save(tmp_path / "data" / "5.jfif", texture(5)).rename(tmp_path / "data" / "5.JPE")
    shutil.copy(tmp_path / "data" / "0.png", tmp_path / "data" / "6.png")
    (tmp_path / "data" / "notes.txt").touch()
    fit = ["fit", str(tmp_path / "data"), *SET_TINY, "--epochs", "1", "--out"]
    assert cli.run([*fit, str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "Fitted on 7 (" in said
    assert "1 of 7 images are copies of others; each counts once for the threshold." in said
    assert "not read" not in said
    for name in ("7.DNG", "8.heic"):
        (tmp_path / "data" / name).touch()
    assert cli.run([*fit, str(tmp_path / "other")]) == 0
    assert f"'{tmp_path / 'data'}' holds 2 files (.dng .heic) that are not read; convert" in capsys.readouterr().out


def test_evaluate_points_at_images_without_light(fitted, tmp_path, capsys):
    dark = make_set(tmp_path / "data")
    assert cli.run(["evaluate", str(fitted), str(dark), "--out", str(tmp_path / "out")]) == 0
    assert "darker" not in capsys.readouterr().out
    for name in ("1.png", "2.png"):
        save(dark / "test" / "good" / name, np.zeros((48, 48), np.uint8))
    assert cli.run(["evaluate", str(fitted), str(dark), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 of 7 images are much darker, brighter" in said
    assert "check these apart (good/1.png, good/2.png)." in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<dt>light</dt>" not in page
    assert '<p class="card-box remark"><bdi>2 of 7 images are much darker, brighter' in page
    cards = re.findall(r'<li class="card.*?</li>', page, re.DOTALL)
    marked = [card for card in cards if ">other light<" in card]
    assert len(cards) == 7
    assert len(marked) == 2
    assert all('title="1.png"' in card or 'title="2.png"' in card for card in marked)


def test_a_share_that_drops_out_is_told_with_the_command_that_goes_on(fitted, data, tmp_path, capsys, monkeypatch):
    images = Path(shutil.copytree(data / "test" / "good", tmp_path / "share"))

    def drops_out(path: str, **_: object) -> np.ndarray:
        images.rename(tmp_path / "away")
        return read_image(path)

    command = ["predict", str(fitted), str(images), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(answers, "read_image", drops_out)
        assert cli.run(command) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Error: The folder '{images}' cannot be reached any more (No such file or directory). 0 ")
    (tmp_path / "away").rename(images)
    assert cli.run(shlex.split(said.split("Go on with: cpc-fast ")[1])) == 0


def test_images_without_light_are_pointed_at(fitted, data, tmp_path, capsys):
    """Whose patches fit each other: they score as more normal than good ones."""
    save(tmp_path / "black.png", np.zeros((48, 48), np.uint8))
    save(tmp_path / "flat.png", (texture(1) // 16 + 120))
    images = [str(tmp_path / "black.png"), str(tmp_path / "flat.png"), str(data / "test")]
    assert cli.run(["predict", str(fitted), *images, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 of 7 images are much darker, brighter, or of less or more contrast than those of the fit (mean" in said
    told = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [Path(one["path"]).name for one in told if one["other_light"]] == ["black.png", "flat.png"]
    with open(tmp_path / "out" / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["other_light"] for row in rows] == ["true", "true", *["false"] * 5]
    assert list(rows[0])[-1] == "other_light"
    assert cli.run(["predict", str(fitted), images[2], "--out", str(tmp_path / "out")]) == 0
    assert "darker" not in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--set", "target_fpr=2"], ["--across-ranks", "foo"]])
def test_what_is_wrong_is_said_before_what_is_in_the_way(fitted, data, capsys, wrong):
    assert cli.run(["fit", str(data), "--out", str(fitted), *wrong]) == 2
    assert "holds a run already" not in capsys.readouterr().err


def test_a_run_does_not_go_among_the_images(tmp_path, capsys):
    save(tmp_path / "parts" / "0.png", texture(0))
    (tmp_path / "link").symlink_to(tmp_path / "parts")
    assert cli.run(["fit", str(tmp_path / "parts"), "--out", str(tmp_path / "link")]) == 2
    assert "link', the folder of the images; choose another, such as runs/parts." in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["0.png"]


def test_masks_that_are_missing_are_missed(fitted, tmp_path, capsys):
    bare = make_set(tmp_path / "bare", train=0, masks=False)
    assert cli.run(["evaluate", str(fitted), str(bare), "--out", str(tmp_path / "out")]) == 0
    assert "There are no masks of these images (a folder ground_truth would hold them)" in capsys.readouterr().out
    image = Image.open(bare / "test" / "hole" / "000.png")
    (bare / "test" / "dent").mkdir()
    image.save(bare / "test" / "dent" / "000.png")
    save(bare / "ground_truth" / "dent" / "000_mask.png", np.eye(48, dtype=np.uint8) * 255)
    assert cli.run(["evaluate", str(fitted), str(bare), "--out", str(tmp_path / "out")]) == 0
    assert "There are no masks of hole (" in capsys.readouterr().out


def test_masks_that_call_the_part_a_defect_are_doubted(fitted, tmp_path, capsys):
    tests = make_set(tmp_path / "tests", train=0)
    told = cli.run(["evaluate", str(fitted), str(tests), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert told == 0
    assert re.search(r"\d of \d flagged defects are outlined where their mask is\.", said)
    assert "white must be the defect" not in said
    for path in (tests / "ground_truth" / "hole").iterdir():
        save(path, 255 - np.asarray(Image.open(path)))
    assert cli.run(["evaluate", str(fitted), str(tests), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 of 2 masks call more than half of their image a defect; white must be the" in said
    assert "black all over" not in said
    save(tests / "ground_truth" / "hole" / "001_mask.png", np.zeros((48, 48), np.uint8))
    assert cli.run(["evaluate", str(fitted), str(tests), "--out", str(tmp_path / "out")]) == 0
    assert "1 of 2 masks of defective images are black all over (the first: that of hole/001.png), so" in (
        capsys.readouterr().out
    )


def test_what_a_test_set_lacks_is_said(fitted, data, tmp_path, capsys):
    lacks = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.rmtree(lacks / "test" / "good")
    assert cli.run(["evaluate", str(fitted), str(lacks), "--out", str(tmp_path)]) == 0
    assert "The test set has no normal images: there is no image AUROC without." in capsys.readouterr().out
    shutil.copytree(data / "test" / "good", lacks / "test" / "good")
    shutil.rmtree(lacks / "test" / "hole")
    assert cli.run(["evaluate", str(fitted), str(lacks), "--out", str(tmp_path)]) == 0
    assert "The test set has no defective images: there are no AUROC and AU-PRO without." in capsys.readouterr().out


@pytest.mark.parametrize("width", [24, 40])
def test_a_narrow_terminal_cuts_no_figure(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    figures = ("0.612", "100.0%", "-0.25", "1234.5", "12.0%", "-")
    console.print_table("", ("set", *(f"image AUROC {i}" for i in range(6))), [("a rather long name", *figures)])
    said = capsys.readouterr().out
    assert "…" not in said
    assert all(figure in said.split() for figure in figures)


def test_every_line_of_help_is_whole(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], ["data"]):
        assert cli.run([*command, "--help"]) == 0
        assert "..." not in capsys.readouterr().out.replace("[ARGS]...", "")
    assert cli.run(["fit", "--help"]) == 0
    said = capsys.readouterr().out
    assert "[cpu-demo, fast 12; quality" in " ".join(said.split())
    assert "quality (parts), texture (even surfaces)" in " ".join(said.split())
    assert cli.run(["predict", "--help"]) == 0
    assert "earlier answers there are replaced" in " ".join(capsys.readouterr().out.split())


HOSTILE = ["a\nb.png", "$(touch pwned).png", "=1+1.png", "-rf.png", "[red]x.png", "\udcff.png", "ü" * 90 + ".png"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_do_no_harm(fitted, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    try:
        save(Path("in") / name, texture(1))
    except OSError:
        pytest.skip("this file system refuses the name")
    shutil.copy(Path("in") / name, name)
    assert cli.run(["predict", str(fitted), "in", "--out", "out", "--", name]) == 0
    text = (tmp_path / "out" / "scores.csv").read_bytes().decode("utf-8")
    rows = list(csv.reader(text.splitlines()))
    assert len(rows) == 3
    assert all(row[0][0] not in "=+-@" for row in rows[1:])
    written = list((tmp_path / "out").rglob("*.png"))
    assert len(written) == 4  # overlay and mask of both, under two names
    assert all(path.name.isprintable() and path.name[0] not in ".-=+@" for path in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in", "out", name])


def test_images_of_the_same_name_get_answers_of_their_own(fitted, data, tmp_path):
    images = [data / "test" / kind / "000.png" for kind in ("good", "hole")]
    assert cli.run(["predict", str(fitted), *map(str, images), "--out", str(tmp_path)]) == 0
    names = [entry["name"] for entry in json.loads((tmp_path / "predictions.json").read_text())["images"]]
    assert names == ["000", "000_2"]


def test_an_image_given_twice_is_answered_once(fitted, data, tmp_path, capsys):
    folder = data / "test" / "good"
    twice = [str(folder), str(folder / "001.png"), str(folder / ".." / "good" / "002.png")]
    assert cli.run(["predict", str(fitted), *twice, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"Given more than once, answered once: '{folder / '001.png'}' and 1 more." in said
    assert "of 3 images are flagged" in said
    names = [entry["name"] for entry in json.loads((tmp_path / "predictions.json").read_text())["images"]]
    assert names == ["000", "001", "002"]


def test_predict_says_what_it_replaces(fitted, data, tmp_path, capsys):
    command = ["predict", str(fitted), str(data / "test" / "good"), "--out", str(tmp_path), "--scores-only"]
    replaces = f"Replaced the answers that an earlier call left in {tmp_path} (images: 3)."
    for more, said in [([], False), ([], True), (["--resume"], False)]:
        assert cli.run([*command, *more]) == 0
        assert (replaces in capsys.readouterr().out) == said


def test_predict_never_overwrites_an_image_it_was_given(fitted, tmp_path, capsys):
    path = save(tmp_path / "overlays" / "x.png", texture(1))
    before = path.read_bytes()
    assert cli.run(["predict", str(fitted), str(path), "--out", str(tmp_path)]) == 2
    assert "would overwrite the image" in capsys.readouterr().err
    assert path.read_bytes() == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "masks").symlink_to(path.parent)  # that is where they would be written
    assert cli.run(["predict", str(fitted), str(path), "--out", str(tmp_path / "out")]) == 2
    assert "would overwrite the image" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_predict_leaves_no_pictures_among_the_images(fitted, tmp_path, capsys):
    folder = save(tmp_path / "parts" / "x.png", texture(1)).parent
    (tmp_path / "link").symlink_to(folder)
    for out in (folder, tmp_path / "link", folder / ".." / "parts"):
        assert cli.run(["predict", str(fitted), str(folder), "--out", str(out)]) == 2
        assert "a folder to be scored: overlays and masks would lie among its images" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a folder to be scored"):
        answers.predict(Detector.load(fitted), [folder], folder)
    assert [path.name for path in folder.iterdir()] == ["x.png"]
    assert cli.run(["predict", str(fitted), str(tmp_path / "gone"), "--out", str(tmp_path / "gone")]) == 2
    assert "There is no file or folder" in capsys.readouterr().err
    for more in (["--out", str(folder), "--scores-only"], ["--out", str(folder / "answers")]):
        assert cli.run(["predict", str(fitted), str(folder), *more]) == 0


def small_textures(out, seed=0):
    return REAL_TEXTURES(out, seed, train=8, good=2, per_defect=1, window=64)


REAL_TEXTURES = datasets.write_textures


def test_demo_does_the_whole_job(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets, "write_textures", small_textures)
    out = tmp_path / "demo"
    command = ["demo", "--out", str(out), "--epochs", "1", *SET_TINY]
    assert cli.run(command) == 0
    said = capsys.readouterr().out
    assert "report.html" in said
    assert "The whole job took" in said
    means = json.loads((out / "summary.json").read_text())
    each = [json.loads((out / name / "metrics.json").read_text()) for name in ("brick", "grass", "gravel")]
    assert list(means) == list(each[0])
    assert means["image"]["auroc"] == pytest.approx(sum(m["image"]["auroc"] for m in each) / 3)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("brick", "grass", "gravel"))
    assert read_image(out / "maps.png").shape[1] > 600
    weights = (out / "brick" / "model.safetensors").read_bytes()

    (out / "gravel" / "model.safetensors").unlink()  # as if it had been stopped there
    assert cli.run(command) == 0
    assert "brick: fitted before" in capsys.readouterr().out
    assert (out / "gravel" / "model.safetensors").is_file()
    assert (out / "brick" / "model.safetensors").read_bytes() == weights
    assert cli.run([*command, "--set", "width=4"]) == 2
    assert "another config (width: 8 there, 4 now); choose the same, fit anew with --fresh" in capsys.readouterr().err


def test_data_textures_writes_sets_that_fit_reads(tmp_path, capsys):
    assert cli.run(["data", "textures", "--out", str(tmp_path / "t")]) == 0
    assert (tmp_path / "t" / "brick" / "train" / "good" / "000.png").is_file()
    assert "cpc-fast fit" in capsys.readouterr().out


def test_doctor_says_which_implementation_runs(capsys):
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "cpu", "info_nce", "sampled_info_nce", "chunked", "C++ CPU kernels"):
        assert word in out


def test_doctor_says_what_runs_here_and_what_lacks(monkeypatch):
    capabilities = sys.modules["cpc_kernels.capabilities"]
    built = capabilities.CPP.available
    (dense,) = [row for row in examine().ops if row[:2] == ("info_nce", "cpu")]
    assert dense[3].endswith("in C++" if built else "in torch")
    one = capabilities.Capability("C++ CPU kernels", True, "built without OpenMP", "one core")
    monkeypatch.setattr(capabilities, "CPP", one)
    assert "C++ CPU kernels: built without OpenMP. What that costs: one core." in examine().advice


def test_a_reader_that_leaves_is_no_failure():
    command = f"{sys.executable} -m cpc_fast.cli doctor | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
