"""metrics.json: its form, its numbers, and what it says where a set cannot tell."""

import json
import re

import numpy as np
import pytest
from samples import TINY_CONFIG, make_set, save, texture

from cpc_fast import metrics as metric
from cpc_fast.answers import predict
from cpc_fast.detector import Detector
from cpc_fast.errors import CpcFastError, ImageError, UsageError
from cpc_fast.evaluate import evaluate, mean_metrics, write_metrics
from cpc_fast.submission import write_submission

FORM = {
    "version": None, "config": None, "device": None, "data": None,
    "image": ["auroc", "ap", "f1_max"],
    "pixel": ["auroc", "ap", "au_pro_0.30", "au_pro_0.05"],
    "by_defect": None,
    "threshold": ["value", "target_fpr", "fpr_on_test_normals", "recall"],
    "speed": ["train_images_per_s", "score_ms_per_image_p50", "score_ms_per_image_p95", "peak_rss_mb"],
}  # fmt: skip
DEFECT = ["image_auroc", "pixel_auroc", "au_pro_0.30", "count"]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.fit([texture(i) for i in range(10)], TINY_CONFIG, epochs=1)


def check_form(metrics: dict) -> None:
    assert list(metrics) == list(FORM)
    for name, keys in FORM.items():
        if keys is not None:
            assert list(metrics[name]) == keys
    for one in metrics["by_defect"].values():
        assert list(one) == DEFECT


def test_the_form_and_the_numbers(detector, tmp_path):
    root = make_set(tmp_path / "set")
    seen = []
    found = evaluate(detector, root, on_image=lambda *at: seen.append(at))
    check_form(found.metrics)
    assert seen == [(i, 5) for i in range(1, 6)]
    assert [(s.name, s.defect) for s in found.scored] == [
        ("000.png", "good"), ("001.png", "good"), ("002.png", "good"), ("000.png", "hole"), ("001.png", "hole")
    ]  # fmt: skip
    scores, bad = [s.score for s in found.scored], [not s.good for s in found.scored]
    maps, truth = [s.map for s in found.scored], [s.truth for s in found.scored]
    assert found.metrics["image"] == metric.image_metrics(scores, bad)
    assert found.metrics["pixel"] == metric.pixel_metrics(maps, truth)
    assert found.metrics["by_defect"]["hole"] == {
        "image_auroc": found.metrics["image"]["auroc"],
        "pixel_auroc": found.metrics["pixel"]["auroc"],
        "au_pro_0.30": found.metrics["pixel"]["au_pro_0.30"],
        "count": 2,
    }
    threshold = found.metrics["threshold"]
    assert threshold["value"] == detector.threshold.value
    assert threshold["fpr_on_test_normals"] == np.mean([s > threshold["value"] for s in scores[:3]])
    assert threshold["recall"] == np.mean([s > threshold["value"] for s in scores[3:]])
    speed = found.metrics["speed"]
    assert speed["train_images_per_s"] == detector.train_images_per_s
    assert 0 < speed["score_ms_per_image_p50"] <= speed["score_ms_per_image_p95"]
    assert 50 < speed["peak_rss_mb"] < 20_000
    write_metrics(tmp_path / "metrics.json", found.metrics)
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(found.metrics))


def test_a_set_without_train_is_enough(detector, tmp_path):
    root = make_set(tmp_path, train=0)
    assert not (root / "train").exists()
    assert evaluate(detector, root).metrics["pixel"]["auroc"] is not None


def test_without_masks_pixels_are_null(detector, tmp_path):
    metrics = evaluate(detector, make_set(tmp_path, train=0, masks=False)).metrics
    check_form(metrics)
    assert set(metrics["pixel"].values()) == {None}
    assert metrics["by_defect"]["hole"]["pixel_auroc"] is None
    assert metrics["by_defect"]["hole"]["image_auroc"] is not None


def test_masks_for_one_defect_only(detector, tmp_path):
    root = make_set(tmp_path, train=0)
    save(root / "test" / "bent" / "000.png", texture(500))
    metrics = evaluate(detector, root).metrics
    assert metrics["by_defect"]["bent"]["pixel_auroc"] is None
    assert metrics["by_defect"]["hole"]["pixel_auroc"] == metrics["pixel"]["auroc"]


def test_without_defects_or_without_normals_what_cannot_be_said_is_null(detector, tmp_path):
    metrics = evaluate(detector, make_set(tmp_path / "a", train=0, holes=0)).metrics
    assert metrics["by_defect"] == {}
    assert metrics["image"]["auroc"] is None
    assert metrics["threshold"]["recall"] is None
    metrics = evaluate(detector, make_set(tmp_path / "b", train=0, good=0)).metrics
    assert metrics["image"]["auroc"] is None
    assert metrics["pixel"]["auroc"] is not None
    assert metrics["threshold"]["fpr_on_test_normals"] is None


def test_other_sizes_and_colours_keep_their_resolution(detector, tmp_path):
    root = make_set(tmp_path, train=0)
    save(root / "test" / "good" / "wide.png", texture(7, 60, 90))
    found = evaluate(detector, root)
    assert {s.map.shape for s in found.scored} == {(48, 48), (60, 90)}
    assert all(s.map.dtype == np.float32 and s.image.shape[:2] == s.map.shape for s in found.scored)


def test_what_cannot_be_scored_is_named(detector, tmp_path):
    root = make_set(tmp_path, train=0)
    save(root / "test" / "good" / "small.png", texture(7, 12, 60))
    with pytest.raises(CpcFastError, match=r"small\.png'.*12 x 60 pixels is smaller than one patch"):
        evaluate(detector, root)
    small = save(tmp_path / "can" / "test_private" / "small.png", texture(7, 12, 60))
    named = rf"^{re.escape(repr(str(small)))}: An image of 12 x 60 pixels is smaller than one patch"
    with pytest.raises(CpcFastError, match=named):
        detector.predict([small])
    with pytest.raises(CpcFastError, match=named):
        write_submission(detector, tmp_path / "can", tmp_path / "maps")
    predict(detector, [small], tmp_path / "out")
    assert re.match(named, json.loads((tmp_path / "out" / "predictions.json").read_text())["skipped"][0]["reason"])
    save(root / "test" / "good" / "small.png", texture(7))
    save(root / "ground_truth" / "hole" / "001_mask.png", np.zeros((48, 40), np.uint8))
    with pytest.raises(ImageError, match=r"001_mask\.png' is 48 x 40 px, but its image is 48 x 48"):
        evaluate(detector, root)
    with pytest.raises(UsageError, match="no folder test"):
        evaluate(detector, make_set(tmp_path / "none", good=0, holes=0))


def test_means_keep_the_form(detector, tmp_path):
    one = evaluate(detector, make_set(tmp_path / "a", train=0)).metrics
    two = evaluate(detector, make_set(tmp_path / "b", train=0, masks=False)).metrics
    two["config"] = {**two["config"], "width": 99}
    mean = mean_metrics([one, two])
    check_form(mean)
    assert mean["image"]["auroc"] == (one["image"]["auroc"] + two["image"]["auroc"]) / 2
    assert mean["pixel"]["auroc"] == one["pixel"]["auroc"]  # the other has none
    assert mean["by_defect"]["hole"]["count"] == 4
    assert mean["data"] == f"{tmp_path / 'a'}, {tmp_path / 'b'}"
    assert mean["config"]["width"] is None
    assert mean["config"]["steps"] == TINY_CONFIG.steps
    assert mean["speed"]["peak_rss_mb"] == max(one["speed"]["peak_rss_mb"], two["speed"]["peak_rss_mb"])
    json.dumps(mean, allow_nan=False)
