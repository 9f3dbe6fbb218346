"""Rows of the ablations: read, carried out on a tiny set, and told with their difference from the base."""

import numpy as np
import pytest
import torch

from benchmarks import ablate, quality, sets, trials
from benchmarks.ablate import Ablations
from benchmarks.readings import CALIBRATIONS, FORMS, POOLS, Merge, Other
from benchmarks.sets import Bed
from cpc_fast.config import Config, preset
from cpc_fast.datasets import write_textures
from cpc_fast.detector import Detector
from cpc_fast.errors import UsageError
from cpc_fast.images import find_train, read_image

SMALL = Config(
    width=8, stem=4, patch_size=16, patch_stride=16, steps=1, skip=0, batch_size=4, epochs=1, bank_size=64,
    shifts=("noise", "blur"),
)  # fmt: skip
ROWS = """
preset = "small"
changes = {}
seeds = 1
[[row]]
factor = "norm"
name = "layer"
changes = { norm = "layer" }
why = "because"
[[row]]
factor = "norm"
name = "group"
changes = { norm = "group" }
why = "it is the base"
[[row]]
factor = "shifts"
name = "without noise"
shifts_without = ["noise"]
why = "leave one out"
[[row]]
factor = "score"
name = "rank"
read = { form = "rank" }
why = "bounded"
[[row]]
factor = "scales"
name = "merged"
merge = ["layer"]
why = "two are better"
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "textures"
    return write_textures(out, textures=("brick",), train=8, good=4, per_defect=2, window=64) / "brick"


@pytest.fixture(scope="module")
def detector(data) -> Detector:
    return Detector.fit(data, SMALL)


def test_nothing_is_stale():
    """`python -m benchmarks.ablate --tables` writes what is missing here."""
    for path, text in ablate.render().items():
        assert path.read_text() == text, f"{path.name} is stale; run `python -m benchmarks.ablate --tables`"


def test_the_table_of_the_repository_asks_for_what_there_is():
    found = Ablations.read()
    assert found.preset == "quality"
    factors = (
        "normalisation, skip, K, directions, patches, overlap, scales, negatives, shifted negatives, bank, "
        "calibration, score, pooling, augmentation, width, context, place, schedule, epochs, averaging"
    )
    assert set(factors.split(", ")) <= {row.factor for row in found.rows}
    left_out = {shift for row in found.rows for shift in row.shifts_without}
    assert left_out >= set(preset("quality").shifts) - {"none"}


def test_a_row_that_the_base_cannot_have_is_left_out():
    ablations = Ablations("aligned", {}, 1, Ablations.read().rows)  # scores mirror images, which takes 2 directions
    one = next(row for row in ablations.rows if row.name == "1 direction")
    assert ablations.asks_nothing(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('changes = { norm = "batch" }', "norm is 'batch'"),
        ("changes = { height = 3 }", "no field called height"),
        ('changes = { norm = "none" }\nread = { form = "rank" }', "asks for 2 things"),
        ("", "asks for 0 things"),
        ('merge = ["gone"]', r"merges \['gone'\], which no row fits"),
    ],
)
def test_a_row_that_cannot_be_carried_out(tmp_path, change, message):
    path = tmp_path / "rows.toml"
    head = 'preset = "quality"\nchanges = {}\nseeds = 1\n'
    path.write_text(f'{head}[[row]]\nfactor = "x"\nname = "y"\nwhy = "z"\n{change}\n')
    with pytest.raises(UsageError, match=message):
        Ablations.read(path)


def test_rows_are_carried_out_and_told(data, tmp_path, monkeypatch, capsys):
    for name in ("STORE", "RUNS", "SHEETS"):
        monkeypatch.setattr(trials, name, tmp_path / name.lower())
    beds = {name: Bed(name, lambda _: data, halved=name != "grass") for name in ("grass", "magnetic tiles")}
    for module in (ablate, quality, sets):
        monkeypatch.setattr(module, "BEDS", beds)
    page, rows = tmp_path / "ablations.md", tmp_path / "rows.toml"
    page.write_text("<!-- ablations:start -->\n<!-- ablations:end -->\n")
    rows.write_text(ROWS)
    monkeypatch.setattr(ablate, "DOCUMENT", page)
    monkeypatch.setattr(ablate, "preset", lambda _: SMALL)
    monkeypatch.setattr(ablate, "TABLE", rows)
    monkeypatch.setattr(quality, "DOCUMENT", page)
    assert ablate.main([]) == 0
    said = capsys.readouterr().out
    assert "0 of 10 results are there" in said
    text = page.read_text()
    for cell in (
        "| **the base** |",
        "| norm | layer | ",
        "| shifts | without noise | ",
        "| score | rank | ",
        "merged",
    ):
        assert cell in text
    assert "(+0." in text or "(-0." in text
    assert "Not tried, as the preset has it so or cannot have it: norm: group." in text
    kept = tmp_path / "store" / "small" / "magnetic-tiles" / "cpc-0-validation.json"
    assert kept.exists()  # the base is the preset's own, on the other half
    runs = sorted(path.parent.name for path in (tmp_path / "runs").rglob("*/*/model.safetensors"))
    assert len(runs) == 6  # readings and merges fit nothing
    assert ablate.main([]) == 0
    assert "10 of 10 results are there. To do: 0." in capsys.readouterr().out


def test_the_plain_reading_is_the_detector(detector, data):
    paths = find_train(data)
    method = Other().make(SMALL, [detector]).fit([read_image(path) for path in paths])
    ours, theirs = method.inspect(read_image(paths[0])), detector.inspect(read_image(paths[0]))
    assert np.allclose(ours.map, theirs.map, atol=1e-5)
    assert ours.score == pytest.approx(theirs.score, abs=1e-5)


@pytest.mark.parametrize(
    "how",
    [*({"form": form} for form in FORMS), *({"calibration": c} for c in CALIBRATIONS),
     *({"pool": pool} for pool in (*POOLS, "learned")), {"bank_size": 16},
     {"about": "mean"}, {"finer": 2}, {"closing": 3}],
    ids=str,
)  # fmt: skip
def test_every_reading_reads(how, detector, data):
    images = [read_image(path) for path in find_train(data)]
    answer = Other(**how).make(SMALL, [detector]).fit(images).inspect(images[0])
    assert answer.map.shape == images[0].shape[:2]
    assert np.isfinite(answer.map).all()
    assert np.isfinite(answer.score)


def test_margin_and_rank_are_what_they_say(detector, data):
    from benchmarks.readings import Form

    image = detector.model.standardise(read_image(find_train(data)[0]))
    found = {form: Form.of(detector.model, form).surprise(image, detector.bank)[0] for form in FORMS}
    wins = found["rank"] == 0
    assert torch.equal(wins, found["margin"] <= 0)
    assert torch.allclose(found["loss"], torch.nn.functional.softplus(found["lse"] + found["positive"]), atol=1e-4)


def test_a_merge_is_the_mean(detector, data):
    image = read_image(find_train(data)[0])
    merged = Merge(("a", "b")).make(SMALL, [detector, detector]).fit([image]).inspect(image)
    assert np.allclose(merged.map, detector.inspect(image).map)


def test_an_unknown_reading_is_refused():
    with pytest.raises(ValueError, match="form is 'loss squared'; it must be one of loss, lse"):
        Other(form="loss squared")


def test_the_solar_cells_are_kept_for_reporting(monkeypatch):
    asked = []
    monkeypatch.setattr(ablate, "find_beds", lambda names, tiles: asked.append(names) or [])
    monkeypatch.setattr(ablate, "carry_out_all", lambda jobs, *_, **options: True)
    monkeypatch.setattr(ablate, "render", dict)
    for chosen in ([], ["--sets", "solar cells"]):
        assert ablate.main(chosen) == 0
    assert asked == [["grass", "magnetic tiles"], ["solar cells"]]


def test_windows_wider_than_the_images_of_a_set_are_passed_over(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "STORE", tmp_path / "store")
    bed = Bed("grass", lambda _: data)
    wide = trials.Job("wide", bed, data, trials.CPC, SMALL.replace(skip=40))
    assert trials.carry_out_all([wide], torch.device("cpu"), minutes=None)
    assert "cannot be had: " in capsys.readouterr().out
    assert not wide.path.exists()
