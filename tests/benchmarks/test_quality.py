"""The quality harness on a tiny set: kept results are not done again, and the tables say what the results say."""

import json

import numpy as np
import pytest

from benchmarks import quality, sets, trials
from benchmarks.sets import Bed, fingerprint, halves
from cpc_fast.config import Config
from cpc_fast.datasets import write_textures
from cpc_fast.images import TestImage, find_test

SMALL = Config(width=8, stem=4, patch_size=16, patch_stride=16, steps=1, skip=0, batch_size=4, epochs=1, bank_size=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "textures"
    return write_textures(out, textures=("brick",), train=8, good=4, per_defect=2, window=64) / "brick"


@pytest.fixture
def harness(data, tmp_path, monkeypatch):
    """Everything that is written goes to tmp_path; the two beds are one tiny set."""
    for name in ("STORE", "RUNS", "SHEETS"):
        monkeypatch.setattr(trials, name, tmp_path / name.lower())
    monkeypatch.setattr(quality, "SHEETS", tmp_path / "sheets")
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    for name, told, mark in (("DOCUMENT", "results.md", "quality"), ("FRONT", "README.md", "found")):
        (tmp_path / told).write_text(f"before\n<!-- {mark}:start -->\n<!-- {mark}:end -->\nafter\n")
        monkeypatch.setattr(quality, name, tmp_path / told)
    beds = {
        "brick": Bed("brick", lambda _: data, free=True),
        "tiles": Bed("tiles", lambda _: data, {"image_size": 48}, halved=True),
        "nowhere": Bed("nowhere", lambda _: "it is not here"),
    }
    for module in (quality, sets):
        monkeypatch.setattr(module, "BEDS", beds)
        monkeypatch.setattr(module, "GROUPS", {"textures": ("brick",), "tiles": ("tiles",)})
    monkeypatch.setattr(quality, "preset", lambda _: SMALL)
    return tmp_path


def test_nothing_is_stale():
    """`python -m benchmarks.quality --tables` writes what is missing here."""
    for path, text in quality.render().items():
        assert path.read_text() == text, f"{path.name} is stale; run `python -m benchmarks.quality --tables`"


def test_a_run_is_kept_and_told(harness, capsys):
    command = ["--seeds", "2", "--methods", "cpc", "mean image", "latent neighbour"]
    assert quality.main(command) == 0
    said = capsys.readouterr().out
    assert "Skipped nowhere: it is not here." in said
    assert "0 of 10 results are there. To do: 10, how long they take shows once one is under way." in said
    assert "left: nothing" in said
    page = (harness / "results.md").read_text()
    assert page.startswith("before\n<!-- quality:start -->\n| set | image AUROC | image AP |")
    assert "| cpc (ours) |" in page
    front = (harness / "README.md").read_text()
    assert front.startswith("before\n<!-- found:start -->\n| 2 seeds | fit, one core | image AUROC |")
    assert "| painted textures, `quality` | 0 to 0 min |" in front
    assert "| mean image |" in page
    assert "| tiles, blur | 1 |" in page
    assert "| brick, stain | 2 |" in page
    assert "![brick: image, map, and outline of what was found](sheets/brick.jpg)" in page
    assert (harness / "sheets" / "brick.jpg").stat().st_size < 200_000
    assert (harness / "runs" / "quality" / "sheets" / "tiles.jpg").exists()  # beside the runs: not for publishing
    record = json.loads((harness / "store" / "quality" / "tiles" / "cpc-1.json").read_text())
    assert record["identity"]["part"] == "report"
    assert record["identity"]["settings"]["image_size"] == 48
    assert record["seconds"]["fit"] > 0

    times = {path: path.stat().st_mtime_ns for path in (harness / "store").rglob("*.json")}
    assert len(times) == 10
    assert quality.main(command) == 0
    assert "10 of 10 results are there. To do: 0." in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (harness / "store").rglob("*.json")}
    assert quality.main([*command, "--fresh", "--minutes", "0"]) == 1
    assert "would end after the 0 minutes given" in capsys.readouterr().out

    (harness / "store" / "quality" / "brick" / "mean-image-0.json").unlink()  # and only that is done again
    assert quality.main(command) == 0
    assert "To do: 1, " in capsys.readouterr().out


def test_other_settings_and_other_images_are_other_results(harness, data):
    def job(config: Config = SMALL, part: str = "report", method: str = "cpc") -> trials.Job:
        return trials.Job("quality", sets.BEDS["tiles"], data, method, config, part)

    plain, other = job().identity(), job(SMALL.replace(width=16)).identity()
    assert plain != other
    assert plain["images"] != job(part="validation").identity()["images"]
    assert job(method="patch PCA").identity() == job(SMALL.replace(width=16), method="patch PCA").identity()
    assert job(method="autoencoder, L2").identity()["settings"]["loss"] == "l2"
    assert fingerprint(data, find_test(data)) != fingerprint(data, find_test(data)[1:])


def test_halves_are_whole_and_apart(data):
    found = find_test(data)
    parts = halves(found)
    assert sorted(t.path for part in parts.values() for t in part) == sorted(t.path for t in found)
    assert {t.defect for t in parts["validation"]} == {t.defect for t in found} == {t.defect for t in parts["report"]}
    assert halves(found[::-1])["validation"] == parts["validation"][::-1]
    odd = [TestImage(t.path, t.defect, None) for t in found if t.defect == "blur"][:1]
    assert halves(odd) == {"validation": [], "report": odd}


def test_means_and_spreads():
    assert quality.mean_and_spread([0.9, 0.7]) == "0.800 ± 0.141"
    assert quality.mean_and_spread([0.9, None]) == "0.900"
    assert quality.mean_and_spread([]) == "-"
    records = [
        {"identity": {"set": name, "method": "cpc", "seed": seed}, "metrics": {"image": {"ap": 0.5 + 0.1 * seed}}}
        for seed in range(2)
        for name in (("a", "b") if seed == 0 else ("a",))
    ]
    assert quality.of_group(records, ("a", "b"), "cpc", ("image", "ap")) == [0.5]  # seed 1 lacks a set
    assert np.allclose(quality.of_group(records, ("a",), "cpc", ("image", "ap")), [0.5, 0.6])  # type: ignore[arg-type]
