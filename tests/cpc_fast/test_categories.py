"""`evaluate --all`: a run for each category, the table of papers, the tree that the server of MVTec AD 2 takes."""

import errno
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from samples import SET_TINY, make_set, save, texture
from test_layouts import make_ad2

from cpc_fast.cli import run
from cpc_fast.commands import categories, demo
from cpc_fast.commands.categories import COLUMNS, TEXTURES, markdown, summary
from cpc_fast.detector import Detector
from cpc_fast.errors import NotWritten, Stopped
from cpc_fast.files import locked

OPTIONS = [*SET_TINY, "--set", "epochs=1", "--set", "made_for=48", "--device", "cpu"]


def test_every_category_is_fitted_once_and_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nut", "bolt"):
        make_set(tmp_path / "parts" / name, train=6, good=2, holes=2)
    command = ["evaluate", "--all", "parts", *OPTIONS]
    assert run(command) == 0
    lines = (tmp_path / "runs" / "parts" / "table.md").read_text().splitlines()
    assert lines[0] == "| category, % | " + " | ".join(COLUMNS) + " |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| bolt", "| nut", "| mean"]
    told = json.loads((tmp_path / "runs/parts/nut/metrics.json").read_text())
    assert f"{100 * told['image']['auroc']:.1f}" in lines[3]
    assert (tmp_path / "runs/parts/bolt/report.html").is_file()
    assert (tmp_path / "runs/parts/summary.json").is_file()
    capsys.readouterr()
    assert run(command) == 0
    assert "nut: fitted before, so only evaluated" in capsys.readouterr().out
    save(tmp_path / "parts" / "nut" / "train" / "good" / "wide.png", texture(9, 48, 64))
    assert run([*command, "--set", "place=true", "--fresh"]) == 0
    said = capsys.readouterr().out
    assert "Earlier runs are kept: runs/parts/bolt.earlier, runs/parts/nut.earlier\n" in said
    assert "nut: of 7 images, sizes go from 48 x 48 to 48 x 64 pixels. A place is a share of height and width" in said
    assert "bolt: of" not in said
    assert run([*command, "--set", "width=16"]) == 2
    said = capsys.readouterr().err
    assert "with another config (width: 8 there, 16 now, place: True there, False now); choose the same, fit" in said
    assert run([*command, "--submission", "maps"]) == 2
    assert "bolt' has no test_private: only MVTec AD 2 takes --submission" in capsys.readouterr().err


def test_what_the_table_is_not_of_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "parts" / "bolt", train=6, good=2, holes=2)
    make_set(tmp_path / "parts" / "nut", train=6, good=2, holes=2, masks=False)
    save(tmp_path / "parts" / "bolt" / "ground_truth" / "hole" / "001_mask.png", np.zeros((48, 48), np.uint8))
    save(tmp_path / "parts" / "pin" / "train" / "good" / "000.png", texture(1))
    assert run(["evaluate", "--all", "parts", *OPTIONS]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Left out, as they are no categories: 'pin' (no test).\n")
    assert "bolt: 1 of 2 masks of defective images are black all over (the first: that of hole/001.png)" in said
    note = (
        "* Not over all categories, as the others have no such figure: pixel AUROC, pixel AP, AU-PRO 0.30, AU-PRO 0.05 "
        "of 1 of 2.\n"
    )
    assert note in said
    table = (tmp_path / "runs" / "parts" / "table.md").read_text()
    assert table.endswith(f"* |\n\n{note}")
    assert table.count("* |") == 4


def test_a_run_of_another_dataset_is_not_taken_for_this_ones(tmp_path, capsys, monkeypatch):
    """Two datasets of one name, with a category of one name, have the same runs by default."""
    monkeypatch.chdir(tmp_path)
    for root, count in (("a", 6), ("b", 7)):
        make_set(tmp_path / root / "set" / "can", train=count, good=2, holes=2)
    command, run_of_a = ["evaluate", *OPTIONS, "--all"], tmp_path / "runs" / "set" / "can"
    there, now = (tmp_path / name / "set" / "can" for name in "ab")
    says = f"runs/set/can is of other images (there '{there}', 6; now '{now}', 7); fit anew with --fresh, or"
    assert run([*command, "a/set"]) == 0
    for left in ("model.safetensors", "checkpoint.safetensors"):
        kept = (run_of_a / left).read_bytes()
        assert run([*command, "b/set"]) == 2
        assert says in capsys.readouterr().err
        assert (run_of_a / left).read_bytes() == kept
        (run_of_a / "model.safetensors").unlink(missing_ok=True)  # stopped between the last epoch and the end
    assert run([*command, "a/set"]) == 0
    capsys.readouterr()
    (tmp_path / "a").rename(tmp_path / "c")
    assert run([*command, "c/set"]) == 0
    assert "can: fitted before, so only evaluated" in capsys.readouterr().out
    assert run([*command, "b/set", "--fresh"]) == 0


def test_an_image_that_cannot_be_scored_stops_its_category_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bolt", "nut"):
        make_set(tmp_path / "parts" / name, train=6, good=2, holes=2)
    save(tmp_path / "parts" / "bolt" / "test" / "good" / "small.png", texture(1, 9, 9))
    assert run(["evaluate", "--all", "parts", *OPTIONS]) == 1
    said = capsys.readouterr().err
    assert "\nbolt: 'parts/bolt/test/good/small.png': An image of 9 x 9 pixels is smaller than one patch" in said
    assert said.splitlines()[-1].startswith("Error: 1 of 2 categories are not done (bolt), so no new table is written.")
    assert (tmp_path / "runs" / "parts" / "nut" / "metrics.json").is_file()


def test_runs_do_not_go_among_the_images(tmp_path, capsys):
    make_set(tmp_path / "parts" / "nut", train=6, good=2, holes=2)
    assert run(["evaluate", "--all", str(tmp_path / "parts"), "--runs", str(tmp_path / "parts"), "--fresh"]) == 2
    assert "parts', the folder of the images (of nut and others); choose another, such as runs/parts." in (
        capsys.readouterr().err
    )


def test_a_lock_is_let_go_of_where_it_lies(tmp_path):
    """Whoever takes the place of a folder that was renamed under its lock keeps a lock of its own."""
    run_folder = tmp_path / "run"
    with locked(run_folder):
        run_folder.rename(tmp_path / "aside")
        run_folder.mkdir()
        (run_folder / "run.lock").write_text("of another process")
    assert (run_folder / "run.lock").read_text() == "of another process"


def test_a_fresh_start_keeps_the_earlier_runs_and_is_gone_on_with_as_any_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs" / "parts"
    for name in ("bolt", "nut"):
        make_set(tmp_path / "parts" / name, train=6, good=2, holes=2)
    command = ["evaluate", "--all", "parts", *OPTIONS]
    assert run(command) == 0
    before = {name: (runs / name / "model.safetensors").read_bytes() for name in ("bolt", "nut")}
    image = tmp_path / "parts" / "bolt" / "train" / "good" / "003.png"
    whole = image.read_bytes()
    other = ["--set", "seed=1"]
    capsys.readouterr()

    with locked(runs / "nut"):
        assert run([*command, *other, "--fresh"]) == 1
    assert "nut' is being written by another process" in capsys.readouterr().err
    assert sorted(path.name for path in runs.iterdir() if path.is_dir()) == ["bolt", "nut"]  # all or none

    image.write_bytes(whole[: len(whole) // 2])
    assert run([*command, *other, "--fresh"]) == 1
    said = capsys.readouterr()
    assert "Earlier runs are kept: runs/parts/bolt.earlier, runs/parts/nut.earlier\n" in said.out
    last = said.err.splitlines()[-1]
    assert "\nbolt: 'parts/bolt/train/good/003.png' is damaged or cut short" in f"\n{said.err}"
    assert last.startswith("Error: 1 of 2 categories are not done (bolt), so no new table is written. Mend or ")
    assert " then: cpc-fast evaluate --all parts --runs runs/parts --set " in last
    assert "--fresh" not in last
    assert {name: (runs / f"{name}.earlier/model.safetensors").read_bytes() for name in before} == before
    assert not list(runs.glob("*/run.lock"))

    image.write_bytes(whole)
    assert run([*command, *other]) == 0
    said = capsys.readouterr().out
    assert "nut: fitted before" in said
    assert "bolt: fitted before" not in said
    assert all((runs / name / "model.safetensors").read_bytes() != old for name, old in before.items())
    assert run([*command, *other, "--fresh"]) == 0
    assert "Earlier runs are kept: runs/parts/bolt.earlier-2, runs/parts/nut.earlier-2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("why", "said", "code"),
    [
        (Stopped("Stopped in epoch 1."), "Stopped in epoch 1. All of it is saved in {}.", 0),
        (NotWritten("No room."), "Error: No room.", 1),
        (KeyboardInterrupt(), "Stopped; every saved epoch is in {}.", 130),
    ],
    ids=["terminated", "full disk", "Ctrl-C"],
)
def test_what_ends_it_says_how_to_go_on(tmp_path, capsys, monkeypatch, why, said, code):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "parts" / "nut", train=3, good=1, holes=1)
    monkeypatch.setattr("cpc_fast.datasets.write_textures", lambda _: None)

    def end(*_):
        raise why

    for command in (categories, demo):
        monkeypatch.setattr(command, "fit_or_go_on", end)
    assert run(["evaluate", "--all", "parts", "--set", "steps=2", "--device", "cpu"]) == code
    assert capsys.readouterr().err == (
        said.format("runs/parts") + " Go on with: cpc-fast evaluate --all parts --runs runs/parts --set steps=2 "
        "--device cpu\n"
    )
    assert run(["demo", "--out", "demo", "--epochs", "2"]) == code
    assert capsys.readouterr().err == said.format("demo") + " Go on with: cpc-fast demo --out demo --epochs 2\n"


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_before_the_first_fit_and_after_the_last(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "parts" / "nut", train=6, good=2, holes=2)
    with monkeypatch.context() as patch:
        patch.setattr("cpc_fast.datasets.secrets.token_hex", full)
        assert run(["demo", "--out", "demo"]) == 1
        assert capsys.readouterr().err.endswith("Go on with: cpc-fast demo --out demo\n")
    command, replace = ["evaluate", "--all", "parts", *OPTIONS], os.replace

    def all_but_the_table(source, target):
        (full if Path(target).name == "table.md" else replace)(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", all_but_the_table)
        assert run(command) == 1
    assert "Go on with: cpc-fast evaluate --all parts --runs runs/parts" in capsys.readouterr().err
    assert run(command) == 0
    assert "nut: fitted before, so only evaluated" in capsys.readouterr().out


def test_terminated_while_it_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_set(tmp_path / "parts" / "nut", train=6, good=2, holes=2)
    command = ["evaluate", "--all", "parts", *OPTIONS]
    inspect = Detector.inspect

    def terminated(self, image):
        os.kill(os.getpid(), signal.SIGTERM)
        return inspect(self, image)

    monkeypatch.setattr(Detector, "inspect", terminated)
    assert run(command) == 0
    said = capsys.readouterr().err
    assert "Stopped while nut was scored, after 1 of 4 images. All of it is saved in runs/parts. Go on with: " in said
    monkeypatch.setattr(Detector, "inspect", inspect)
    assert run(command) == 0
    assert "nut: fitted before, so only evaluated" in capsys.readouterr().out


def test_the_tree_for_the_server(tmp_path, capsys):
    category = make_ad2(tmp_path / "data")
    maps, runs = tmp_path / "maps", tmp_path / "runs"
    command = ["evaluate", "--all", str(category.parent), "--runs", str(runs), "--submission", str(maps), *OPTIONS]
    assert run(command) == 0
    files = sorted(str(path.relative_to(maps)) for path in maps.rglob("*") if path.is_file())
    places = ("test_private/000_regular", "test_private/001_regular", "test_private_mixed/000_mixed")
    private = [f"can/{place}" for place in (*places, "test_private_mixed/001_mixed")]
    assert files == [
        *(f"anomaly_images/{name}.tiff" for name in private),
        *(f"anomaly_images_thresholded/{name}.png" for name in private),
    ]
    threshold = json.loads((runs / "can" / "metrics.json").read_text())["threshold"]["value"]
    for name in private:
        values = tifffile.imread(maps / "anomaly_images" / f"{name}.tiff")
        mask = np.asarray(Image.open(maps / "anomaly_images_thresholded" / f"{name}.png"))
        assert (values.dtype, values.shape) == (np.float16, (48, 48))
        assert (mask.dtype, mask.shape) == (np.uint8, (48, 48))
        assert set(np.unique(mask)) <= {0, 255}
        assert ((values.astype(float) > threshold + 0.01) <= (mask == 255)).all()
    assert "to be checked and packed by its own script" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate"], "evaluate needs RUN and DATA, or --all ROOT"),
        (["evaluate", "run"], "evaluate needs RUN and DATA, or --all ROOT"),
        (["evaluate", "run", "--all", "root"], "--all ROOT takes no RUN, DATA or --out"),
        (["evaluate", "run", "data", "--fresh"], "evaluate RUN DATA fits nothing"),
        (["evaluate", "--all", "nowhere"], "There is no folder 'nowhere'"),
    ],
)
def test_what_does_not_go_together(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_means_of_mvtec_ad():
    def one(value: float) -> dict:
        keys = {"image": ("auroc", "ap", "f1_max"), "pixel": ("auroc", "ap", "au_pro_0.30", "au_pro_0.05")}
        return {part: dict.fromkeys(names, value) for part, names in keys.items()}

    rows = summary({name: one(0.9) for name in TEXTURES} | {"bottle": one(0.7), "pill": one(0.8)})
    assert [row[:2] for row in rows[-3:]] == [
        ("mean of textures", "90.0"),
        ("mean of objects", "75.0"),
        ("mean", "85.7"),
    ]
    assert "a_b" in markdown([("a|b", *["-"] * len(COLUMNS))])
