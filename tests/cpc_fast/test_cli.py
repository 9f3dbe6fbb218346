"""The command line: what each command writes, prints and returns. What goes wrong is in test_errors."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from samples import SET_TINY, make_set, save, texture

from cpc_fast import cli, datasets
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
        assert all(command in out for command in ("demo", "fit", "evaluate", "predict", "data", "doctor"))
    for command in (["fit"], ["evaluate"], ["predict"], ["demo"], ["doctor"], ["data", "textures"], ["data", "elpv"]):
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


def test_tensorboard_scalars_or_a_word_about_the_package(data, tmp_path, capsys):
    code = cli.run(["fit", str(data), "--out", str(tmp_path), "--tensorboard", *SET_TINY])
    if code:
        assert "pip install 'cpc_fast[tensorboard]'" in capsys.readouterr().err
    else:
        assert list((tmp_path / "tensorboard").glob("events*"))


def test_evaluate_writes_metrics_table_and_report(fitted, data, tmp_path, capsys):
    assert cli.run(["evaluate", str(fitted), str(data), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "hole" in out
    assert "image AUROC" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["data"] == str(data)
    assert metrics["speed"]["train_images_per_s"] > 0
    assert "<title>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cli.run(["evaluate", str(fitted), str(data)]) == 0
    assert (fitted / "metrics.json").is_file()
    assert (fitted / "report.html").is_file()


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
            assert set(segment) == {"box", "area", "peak", "peak_at"}
    assert cli.run(["predict", str(fitted), str(folder / "hole" / "000.png"), "--out", str(tmp_path / "one")]) == 0
    assert not (tmp_path / "one" / "maps").exists()
    assert "Open next" in capsys.readouterr().out


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


def test_predict_never_overwrites_an_image_it_was_given(fitted, tmp_path, capsys):
    path = save(tmp_path / "overlays" / "x.png", texture(1))
    before = path.read_bytes()
    assert cli.run(["predict", str(fitted), str(path), "--out", str(tmp_path)]) == 2
    assert "would overwrite the image" in capsys.readouterr().err
    assert path.read_bytes() == before


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
    assert "another config; fit anew with --fresh" in capsys.readouterr().err


def test_data_textures_writes_sets_that_fit_reads(tmp_path, capsys):
    assert cli.run(["data", "textures", "--out", str(tmp_path / "t")]) == 0
    assert (tmp_path / "t" / "brick" / "train" / "good" / "000.png").is_file()
    assert "cpc-fast fit" in capsys.readouterr().out


def test_doctor_says_which_implementation_runs(capsys):
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "triton", "cpu", "info_nce", "sampled_info_nce", "chunked", "C++ CPU kernels"):
        assert word in out


def test_a_reader_that_leaves_is_no_failure():
    command = f"{sys.executable} -m cpc_fast.cli doctor | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr
