"""The detector: the same score in any company, the same after a save, the same after an interruption."""

import copy
import re
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError
from PIL import Image
from safetensors.torch import load_file
from samples import TINY_CONFIG, holed, make_set, texture
from torch import nn

from cpc_fast import detector as detectors
from cpc_fast.config import Config
from cpc_fast.detector import Detector, Threshold, prepare, split
from cpc_fast.errors import CpcFastError, UsageError
from cpc_fast.images import ImageCache
from cpc_fast.model import CPC
from cpc_fast.patches import extract_patches, patch_starts
from cpc_fast.scoring import Scorer, calibrate, closed, held_out_scores
from cpc_fast.train import Progress

IMAGES = [texture(i) for i in range(10)]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.fit(IMAGES, TINY_CONFIG)


def test_the_shapes_of_the_signatures_are_checked_here():
    with pytest.raises((TypeCheckError, BeartypeCallHintViolation)):
        extract_patches(torch.zeros(3, 48, 48), 16, 8)  # no batch axis


def test_a_score_is_the_same_to_the_last_bit_whatever_the_company(detector):
    images = [texture(50), holed(51)[0], texture(52), texture(53, 43, 61)]
    alone = [detector.predict([image]) for image in images]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 0, 3]):
        together = detector.predict([images[i] for i in order])
        for i, score, map in zip(order, together.scores, together.maps, strict=True):
            assert score == alone[i].scores[0]
            assert map.tobytes() == alone[i].maps[0].tobytes()


def test_a_prediction_agrees_with_itself(detector):
    image, _ = holed(60)
    answer = detector.inspect(image)
    assert answer.map.shape == answer.mask.shape == (48, 48)
    assert answer.map.dtype == np.float32
    assert answer.score == answer.map.max()
    assert answer.flagged == bool(answer.mask.any()) == (answer.score > detector.threshold.value)
    assert sum(segment.area for segment in answer.segments) == answer.mask.sum()


def test_a_fit_minds_neither_the_mode_nor_the_random_numbers_of_its_caller(detector, tmp_path, monkeypatch):
    for mode in (torch.no_grad(), torch.inference_mode()):
        torch.manual_seed(7)
        before = torch.get_rng_state()
        with mode, monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs are seeded, too"))
            other = Detector.fit(IMAGES, TINY_CONFIG)
            other.save(tmp_path / "run")
            loaded = Detector.load(tmp_path / "run")
        assert torch.equal(torch.get_rng_state(), before)
        assert other.threshold == loaded.threshold == detector.threshold
        assert loaded.inspect(IMAGES[0]).map.tobytes() == detector.inspect(IMAGES[0]).map.tobytes()


def test_another_default_dtype_is_refused(detector, tmp_path):
    detector.save(tmp_path)
    calls = [
        partial(Detector.fit, IMAGES, TINY_CONFIG), partial(Detector.load, tmp_path),
        partial(detector.predict, IMAGES[:1]), partial(detector.explain, IMAGES[0]),
    ]  # fmt: skip
    torch.set_default_dtype(torch.float64)
    try:
        for call in calls:
            with pytest.raises(UsageError, match=r"dtype is torch\.float64.*call torch\.set_default_dtype\("):
                call()
    finally:
        torch.set_default_dtype(torch.float32)


def test_answers_are_compared_by_being_the_same_object(detector):
    one, other = detector.inspect(IMAGES[0]), detector.inspect(IMAGES[0])
    assert one == one
    assert one != other
    assert len({one, other, detector.predict(IMAGES[:1])}) == 3


def test_copies_are_learnt_from_or_held_out_once(tmp_path):
    letters = [str(i) for i in range(30)]
    assert split(30, TINY_CONFIG, letters) == split(30, TINY_CONFIG)
    assert len(split(30, TINY_CONFIG.replace(calibration_share=0.999))[0]) == 2  # two to learn from, whatever the share
    with pytest.raises(UsageError, match=r"^10 normal images, 2 of them different and the others copies, are"):
        split(10, TINY_CONFIG, ["a"] * 4 + ["b"] * 6)
    with pytest.raises(UsageError, match=r"^2 normal images are too few to learn from .*; give at least 3\.$"):
        split(2, TINY_CONFIG)
    learnt, held_out = split(61, TINY_CONFIG, [*letters, *letters, "0"])
    assert len({i % 30 for i in held_out}) == len(held_out) == 6
    assert not {i % 30 for i in learnt} & {i % 30 for i in held_out}
    assert len(learnt) == sum((2, 3)[i == 0] for i in range(30) if i not in {i % 30 for i in held_out})
    of_arrays = Detector.fit([*IMAGES, *IMAGES[:3]], TINY_CONFIG, epochs=1)
    assert of_arrays.threshold.count == 2
    assert of_arrays.trained_on["copies"] == "3 of 13"
    for i, image in enumerate([*IMAGES, *IMAGES[:3]]):
        Image.fromarray(image[..., 0]).save(tmp_path / f"{i:02d}.{'png' if i < 10 else 'bmp'}")
    assert Detector.fit(tmp_path, TINY_CONFIG, epochs=1).threshold == of_arrays.threshold


def test_maps_have_the_resolution_of_the_image():
    detector = Detector.fit(IMAGES, TINY_CONFIG.replace(image_size=40, epochs=1))
    for shape in ((48, 48), (50, 75), (33, 32)):
        assert detector.inspect(texture(0, *shape)).map.shape == shape


def test_arrays_paths_colours_and_two_axes_are_all_images(detector, tmp_path):
    root = make_set(tmp_path, train=1)
    path, array = root / "train" / "good" / "000.png", texture(0)
    scores = detector.predict([path, str(path), array, array[..., 0], array.repeat(3, axis=2)]).scores
    assert len(set(scores)) == 1
    with pytest.raises(UsageError, match=r"array of uint8 .* Got an array of float64 \(4, 4\)"):
        detector.inspect(np.zeros((4, 4)))


def test_what_is_no_list_and_no_image_is_told_how_to_become_one(detector):
    ones = {
        "'one.png'": "one.png",
        "'a/b.png'": Path("a") / "b.png",
        "an array of uint8 (48, 48, 1)": texture(1),
        "an array of uint8 (48, 48)": texture(1)[..., 0],
        "a tensor of torch.float32 (3, 48, 48)": torch.zeros(3, 48, 48),
        "NoneType": None,
        "Image": Image.new("L", (48, 48)),
    }
    for got, one in ones.items():
        says = f"predict takes a list of images. Got {got}; for one, write predict([image])."
        with pytest.raises(UsageError, match=f"^{re.escape(says)}$"):
            detector.predict(one)
    none = {
        "a tensor of torch.float32 (1, 8, 8). Of a tensor (c, h, w) in 0 to 1: (255 *": torch.zeros(1, 8, 8),
        "an array of float64 (8, 8, 1). Of values in 0 to 1: (255 * image).round().as": np.zeros((8, 8, 1)),
        "an array of uint8 (48, 48, 4).": texture(1).repeat(4, 2),
        "int.": 7,
        "an array of uint16 (8, 8). Of 16 bits: (image >> 8).astype": np.zeros((8, 8), np.uint16),
        "Image. Of Pillow's: numpy.asarray(image).": Image.new("L", (48, 48)),
        'Image. Of Pillow\'s: numpy.asarray(image.convert("RGB")).': Image.new("P", (48, 48)),
    }
    for got, no_image in none.items():
        with pytest.raises(UsageError, match=f"array of uint8 .* Got {re.escape(got)}"):
            detector.predict([no_image])
    with pytest.raises(UsageError, match=r"Got 'one.png'. Read it first: cpc_fast.images.read_image"):
        detector.inspect("one.png")
    with pytest.raises(UsageError, match="Got an array of float64"):
        Detector.fit([np.zeros((48, 48, 1))] * 4, TINY_CONFIG)
    assert len(detector.predict(np.stack([texture(1), texture(2)])).scores) == 2


@pytest.mark.parametrize("changes", [{}, {"image_size": 40}, {"members": 2}], ids=str)
def test_saved_and_loaded_it_says_the_same(tmp_path, changes):
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, **changes)
    detector.save(tmp_path / "run")
    loaded = Detector.load(tmp_path / "run")
    assert loaded.config == detector.config
    assert loaded.threshold == detector.threshold
    assert loaded.trained_on == detector.trained_on
    assert loaded.train_images_per_s == detector.train_images_per_s > 0
    image = texture(70)
    assert loaded.inspect(image).map.tobytes() == detector.inspect(image).map.tobytes()


def test_sizes_that_an_older_run_does_not_say_stay_unknown(detector, tmp_path):
    assert detector.other_size((480, 480))
    Detector(detector.model, detector.bank, detector.calibration, detector.threshold, {}).save(tmp_path / "older")
    older = Detector.load(tmp_path / "older")
    older.save(tmp_path / "again")
    for run in (older, Detector.load(tmp_path / "again")):
        assert run.sides is run.light is None
        assert not run.other_size((480, 480))
        assert not run.inspect(np.zeros((48, 48, 1), np.uint8)).other_light
    assert detector.inspect(np.zeros((48, 48, 1), np.uint8)).other_light
    assert detector.predict([np.zeros((48, 48, 3), np.uint8), texture(0)]).other_light == [True, False]
    detector.save(tmp_path / "now")
    assert Detector.load(tmp_path / "now").light == detector.light


def test_a_calibration_of_two_shapes_or_none_is_refused(detector, tmp_path):
    for shapes in (((1, 2, 2), (1, 1, 1)), ((1, 0, 1), (1, 0, 1))):
        tensors = [torch.ones(shape) for shape in shapes]
        places = dict(zip(("place_mean", "place_spread"), tensors, strict=True))
        changed = Detector(
            detector.model, detector.bank, replace(detector.calibration, **places), detector.threshold, {}
        )
        changed.save(tmp_path / "run")
        with pytest.raises(CpcFastError, match=r"The calibration in .*run' is damaged \(means"):
            Detector.load(tmp_path / "run")


def test_the_same_twice(detector):
    again = Detector.fit(IMAGES, TINY_CONFIG)
    assert again.threshold == detector.threshold
    weights = detector.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


class Interruption(Exception):
    pass


@pytest.mark.parametrize(
    "changes", [{}, {"negatives": "sampled"}, {"shifts": ("noise",), "flips": True, "place": True, "members": 2}]
)
def test_resumed_it_ends_where_it_would_have_ended(tmp_path, changes):
    config = TINY_CONFIG.replace(epochs=4, **changes)
    Detector.fit(IMAGES, config, out=tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (3, 1):
            raise Interruption

    with pytest.raises(Interruption):
        Detector.fit(IMAGES, config, out=tmp_path / "cut", on_step=stop)
    Detector.fit(IMAGES, config, out=tmp_path / "cut", resume=True)
    for name in ("model.safetensors", "checkpoint.safetensors"):
        whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name


def test_resuming_wants_the_same_config_and_fitting_a_free_folder(tmp_path):
    Detector.fit(IMAGES, TINY_CONFIG, out=tmp_path)
    with pytest.raises(UsageError, match=r"begun with another config \(width: 8 there, 16 now\)"):
        Detector.fit(IMAGES, TINY_CONFIG, out=tmp_path, resume=True, width=16)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="holds a run already"):
        Detector.fit(IMAGES, TINY_CONFIG, out=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_an_explanation_points_at_the_patch(detector):
    image, _ = holed(80)
    found = detector.explain(image)
    directions, offsets = ("down", "up", "right", "left"), TINY_CONFIG.offsets
    assert set(found.losses) == {f"{d} {k}" for d in directions for k in offsets}
    assert found.worst in found.losses
    top, left, bottom, right = found.box
    assert (top, left) == (found.patch[0] * 8, found.patch[1] * 8)
    assert (bottom - top, right - left) == (16, 16)
    answer = detector.inspect(image)
    assert answer.why == (found if answer.flagged else None)


def test_an_explanation_at_the_edge_of_an_image_that_the_grid_does_not_fit(detector):
    image = texture(3, 47, 59)
    image[-10:, -10:] = 255
    found = detector.explain(image)
    top, left = patch_starts(47, 16, 8)[found.patch[0]], patch_starts(59, 16, 8)[found.patch[1]]
    assert found.patch[1] == 6  # the last column
    assert found.box == (top, left, top + 16, 59)


@pytest.mark.parametrize("changes", [{}, {"closing": 3}, {"image_size": 40}, {"finer": 2}], ids=str)
def test_an_explanation_lies_where_the_map_peaks(changes):
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, **changes)
    for seed in range(30):
        image = texture(200 + seed, 52, 61)
        row, column = np.unravel_index(detector.inspect(image).map.argmax(), (52, 61))
        top, left, bottom, right = detector.explain(image).box
        assert top <= row < bottom
        assert left <= column < right


def parts(seed: int, ring: tuple[int, int] = (16, 16)) -> np.ndarray:
    """A grainy plate with one dark square, where it belongs unless told otherwise."""
    image = np.random.default_rng(seed).normal(160, 8, (64, 64, 1))
    image[ring[0] : ring[0] + 16, ring[1] : ring[1] + 16] -= 90
    return image.clip(0, 255).astype(np.uint8)


def test_what_lies_in_another_place_is_strange():
    """A square where there should be none looks like any other square; and a place that lacks its own is found."""
    config = TINY_CONFIG.replace(place=True, epochs=25, learning_rate=3e-3, directions=1, steps=1, precision="float32")
    detector = Detector.fit([parts(i) for i in range(24)], config, crop=32)
    image = parts(100, (32, 40))
    found = detector.explain(image)
    assert set(found.losses) == {"down 2", "place"}
    surprise = detector.scorer.surprise(image)
    told = dict(zip(config.predicts, surprise.values.split(surprise.counts), strict=True))
    there = told["place"].view(7, 7)
    assert there[4, 5] > there.median() + 3
    assert there[2, 2] > there.median() + 3
    assert detector.inspect(image).score > max(detector.inspect(parts(i)).score for i in range(101, 106))
    found = detector.calibration
    ahead, place = (surprise.values[own].view(-1, 7) for own in (slice(35), slice(35, None)))
    said = torch.stack([torch.cat([ahead[:2], ahead]), place])  # the first two rows are not predicted, but predict
    voices = (said - found.place_mean) / found.place_spread
    torch.testing.assert_close(surprise.voices, voices)
    torch.testing.assert_close(surprise.grid, voices.amax(0))
    map = detector.inspect(image).map
    for heard in (voices, voices.flip(0)):  # the voice that made the score is named, whatever the other's losses are
        told = detector._explanation(replace(surprise, voices=heard), map, image.shape)
        assert (told.worst == "place") == bool(heard[1][told.patch] > heard[0][told.patch])


def test_a_threshold_of_ones_own_is_cut_where_it_says(detector, tmp_path):
    image = texture(70)
    score = detector.inspect(image).score
    for value in (score - 1e-9, score, score + 1e-9, float(np.nextafter(np.float32(score), np.float32(-1e9)))):
        own = detector.with_threshold(value)
        found = own.inspect(image)
        assert found.flagged == (found.score > own.threshold.value) == bool(found.mask.any())
    assert found.flagged
    assert (own.threshold.note, own.threshold.count) == ("", 0)
    own.save(tmp_path / "run")
    assert Detector.load(tmp_path / "run").threshold == own.threshold
    for value in (float("nan"), float("inf"), 1e300):
        with pytest.raises(UsageError, match="it must be a finite float32"):
            detector.with_threshold(value)


def test_the_threshold_for_another_rate_is_that_of_another_fit(tmp_path):
    asked = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, target_fpr=0.7)
    first = Detector.fit(IMAGES, TINY_CONFIG, epochs=1)
    assert first.threshold.value > asked.threshold.value
    first.save(tmp_path / "run")
    later = Detector.load(tmp_path / "run").with_threshold(7.0).with_target_fpr(0.7)
    assert later.threshold == asked.threshold
    with pytest.raises(UsageError, match=r"target_fpr is 1\.5; it must be above 0 and below 1"):
        first.with_target_fpr(1.5)
    first.threshold = replace(first.threshold, held_out=())
    with pytest.raises(UsageError, match="older version, which kept no scores of held-out images; fit it anew"):
        first.with_target_fpr(0.7)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_voices_are_equally_loud_on_normal_images(count):
    detector = Detector.fit([parts(i) for i in range(6)], TINY_CONFIG.replace(place=True, epochs=1), crop=48)
    scorer = Scorer(detector.model, detector.bank)
    found = [scorer.losses(parts(i)) for i in range(10, 10 + count)]
    scorer.calibration = calibrate(scorer, found)
    neighbours, place = torch.stack([scorer.judge(one).voices.amax((1, 2)) for one in found]).mean(0).tolist()
    assert neighbours == pytest.approx(place, rel=1e-3)


def test_members_learn_apart_and_are_averaged():
    detector = Detector.fit(IMAGES, TINY_CONFIG.replace(epochs=1, members=2, precision="float32"))
    first, second = detector.model.members
    assert not torch.equal(first.predictor.weight, second.predictor.weight)
    images, shifted = torch.randn(4, 1, 48, 48), torch.randn(6, 1, 48, 48)
    result = detector.model(images, shifted)
    for at, member in enumerate((first, second)):
        alone = CPC(detector.config.replace(members=1))
        alone.members[0].load_state_dict(member.state_dict())
        own = alone(images[2 * at : 2 * at + 2], shifted[3 * at : 3 * at + 3])
        result.loss = result.loss - own.loss.detach() / 2
        result.accuracy = result.accuracy - own.accuracy / 2
    torch.testing.assert_close((result.loss, result.accuracy), (torch.zeros(()), torch.zeros(())), rtol=0, atol=1e-6)
    image, config = texture(81), detector.config
    losses, _, _, counts, _ = detector.scorer.losses(prepare(image, config))
    assert len(counts) == 2 * config.directions * config.steps
    for i, part in enumerate(losses.chunk(2)):
        other = copy.deepcopy(detector)
        other.model.members, other.model.config = detector.model.members[i : i + 1], config.replace(members=1)
        other.scorer.bank = detector.bank.chunk(2, 1)[i]
        torch.testing.assert_close(other.scorer.losses(prepare(image, config))[0], part)
    found = detector.explain(image)
    usual = detector.calibration
    values = [
        (part - mean) / spread
        for part, mean, spread in zip(losses.split(counts), usual.step_mean, usual.step_spread, strict=True)
    ]
    told = torch.cat(values).unflatten(0, (2, -1)).mean(0).split(counts[: len(counts) // 2])
    assert list(found.losses.values()) == pytest.approx([float(one.mean()) for one in told], rel=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
def test_images_that_were_spilt_to_disk_are_not_all_in_memory(tmp_path, monkeypatch, frozen):
    data = make_set(tmp_path, train=30)
    cache = partial(ImageCache, memory=0)
    alive, most, reads = set(), [], []
    read = ImageCache.__getitem__

    def watched(self, i):
        image = read(self, i)
        reads.append(i)
        weakref.finalize(image, alive.discard, len(reads))
        alive.add(len(reads))
        most.append(len(alive))
        return image

    monkeypatch.setattr(detectors, "ImageCache", cache)
    monkeypatch.setattr(ImageCache, "__getitem__", watched)
    encoder = Flat().requires_grad_(False) if frozen else None
    spilt = Detector.fit(data, TINY_CONFIG, encoder=encoder)
    training, held_out = split(30, TINY_CONFIG)
    assert max(most) <= TINY_CONFIG.batch_size + 2  # of 24
    assert all(reads.count(i) == 2 for i in held_out)  # for their size, and their score
    if frozen:  # size; window; pixels; latents, once; bank; and a few that the check of types takes at random
        assert sum(reads.count(i) for i in training) < 5 * 24 + 6
    monkeypatch.undo()
    torch.manual_seed(0)
    assert spilt.threshold == Detector.fit(data, TINY_CONFIG, encoder=encoder).threshold


def test_no_images_are_no_fit():
    with pytest.raises(UsageError, match=r"no images to fit on \(got an empty list\); give at least 3"):
        Detector.fit([], TINY_CONFIG)


def test_a_fit_whose_losses_are_no_numbers_has_no_threshold():
    class Contrast(nn.Module):
        def forward(self, patches):
            flat = patches.flatten(1)
            return ((flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True))[:, :12]  # 0 / 0 where it is even

    images = [image.copy() for image in IMAGES]
    for image in images:
        image[:24, :24] = 90
    with pytest.raises(CpcFastError, match=r"losses on Image \d+ are no numbers, so there is no threshold"):
        Detector.fit(images, TINY_CONFIG, epochs=1, encoder=Contrast())


def test_an_encoder_of_ones_own_is_one_member():
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, members=3, encoder=Flat())
    assert detector.config.members == 1
    mirrored = TINY_CONFIG.replace(flips=True, mirrored=True)
    for encoder, seen in ((Flat(), True), (Flat().requires_grad_(False), False)):  # a frozen one sees no mirror image
        assert Detector.fit(IMAGES, mirrored, epochs=1, encoder=encoder).config.mirrored == seen
    with pytest.raises(UsageError, match="members is 2; with an encoder of your own it must be 1"):
        CPC(TINY_CONFIG.replace(members=2), Flat())


def test_a_threshold_is_the_conformal_quantile():
    scores = list(np.random.default_rng(0).permutation(np.arange(1.0, 200.0)))  # 199 of them
    threshold = Threshold.from_scores(scores, 0.05)
    assert threshold.value == 190  # the ceil(200 * 0.95)-th smallest
    assert threshold.note == ""
    assert Threshold.from_scores(scores[:99], 0.01).note == ""


def test_a_threshold_from_too_few_images_says_so():
    threshold = Threshold.from_scores([1.0, 3.0, 2.0], 0.01)
    assert threshold.value == 3.0
    assert threshold.guaranteed_fpr == 0.25
    assert threshold.note == (
        "3 held-out normal images can vouch for a false-positive rate of 25.0%, not 1.0%: that takes 99. "
        "The threshold is their highest score."
    )


def test_one_held_out_image_vouches_for_nothing():
    threshold = Detector.fit(IMAGES[:3], TINY_CONFIG, epochs=1).threshold
    assert (threshold.count, threshold.guaranteed_fpr) == (1, 1.0)
    assert threshold.note == (
        "1 held-out normal image vouches for no false-positive rate; 1.0% takes 99. The threshold is its score."
    )
    for count, held_out in ((3, 1), (4, 2), (5, 2), (7, 2), (8, 2), (30, 6)):
        assert len(split(count, TINY_CONFIG)[1]) == held_out


def test_the_threshold_keeps_its_promise_on_average():
    """Over many draws, at most target_fpr of new normal scores exceed it."""
    random = np.random.default_rng(1)
    exceed = []
    for _ in range(2000):
        value = Threshold.from_scores(list(random.standard_normal(39)), 0.05).value
        exceed.append((random.standard_normal(50) > value).mean())
    assert abs(np.mean(exceed) - 0.05) < 0.005


class Flat(nn.Module):
    """An encoder of one's own: a linear map of the pixels."""

    def __init__(self, features: int = 12) -> None:
        super().__init__()
        self.map = nn.Linear(16 * 16, features)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return self.map(patches.flatten(1))


def test_an_encoder_of_ones_own_is_kept_and_asked_for(tmp_path):
    detector = Detector.fit(IMAGES, TINY_CONFIG, out=tmp_path, encoder=Flat())
    assert detector.bank.shape[1] == 12
    loaded = Detector.load(tmp_path, encoder=Flat())
    image = texture(90)
    assert loaded.inspect(image).score == detector.inspect(image).score
    with pytest.raises(CpcFastError, match="hand the same one to load"):
        Detector.load(tmp_path)


def test_a_frozen_encoder_stays_as_it_is():
    encoder = Flat().requires_grad_(False)
    before = encoder.map.weight.clone()
    Detector.fit(IMAGES, TINY_CONFIG, encoder=encoder)
    assert torch.equal(encoder.map.weight, before)


@pytest.mark.parametrize(
    "changes",
    [
        *({"norm": norm} for norm in ("group", "layer", "none")),
        {"context": "masked-conv"},
        *({"directions": directions} for directions in (1, 2, 4)),
        *({"negatives": negatives} for negatives in ("batch", "other-images", "sampled", "hard")),
        {"negatives": "sampled", "negatives_count": 3},
        {"negatives": "other-images", "shifts": ("noise",)},
        {"shifts": ("quarter-turn", "magnify", "noise", "blur", "intensity", "sharpen", "shuffle")},
        {"standardise": "image"},
        {"channels": 3},
        {"negatives": "hard", "negatives_count": 5000, "shifts": ("noise",)},
        {"crop": 40, "flips": True, "jitter": 0.0},
        {"gamma": 0.2, "patch_jitter": 0.1, "standardise": "image"},
        {"skip": 0, "steps": 1},
        {"stem": 1},
        {"finer": 2},
        {"members": 3},
        {"flips": True, "mirrored": True, "members": 2},
        {"ensemble": "max", "closing": 3, "members": 2},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)  # fmt: skip
def test_every_choice_fits_and_scores(changes):
    seen: list[Progress] = []
    detector = Detector.fit(IMAGES[:6], TINY_CONFIG, epochs=1, on_step=seen.append, **changes)
    assert np.isfinite(seen[-1].loss)
    assert 0 <= seen[-1].accuracy <= 1
    answer = detector.inspect(texture(99))
    assert answer.map.shape == (48, 48)
    assert np.isfinite(answer.map).all()


def test_it_learns_to_see_a_hole():
    detector = Detector.fit([texture(i) for i in range(24)], TINY_CONFIG, epochs=12, learning_rate=3e-3)
    good = [detector.inspect(texture(300 + i)).score for i in range(6)]
    bad = [detector.inspect(holed(400 + i)[0]) for i in range(6)]
    assert all((answer.why is not None) == answer.flagged for answer in bad)
    assert min(answer.score for answer in bad) > max(good)
    mask = holed(400)[1]
    assert bad[0].map[mask].mean() > bad[0].map[~mask].mean()


def test_images_of_several_sizes_are_calibrated_from_their_edges():
    images = [texture(i, 56 + 8 * (i % 3)) for i in range(12)]
    detector = Detector.fit(images, TINY_CONFIG)
    n = 2 * max(TINY_CONFIG.offsets) + 1
    assert detector.calibration.place_mean.shape == detector.calibration.place_spread.shape == (1, n, n)
    for side in (48, 64, 96):
        assert np.isfinite(detector.inspect(texture(50, side)).map).all()


@pytest.mark.parametrize("changes", [{}, {"flips": True, "mirrored": True, "members": 2}], ids=str)
def test_an_image_of_one_patch_is_neutral(changes):
    """Nothing predicts its patch."""
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, **changes)
    image = texture(3, detector.config.patch_size, detector.config.patch_size)
    found = detector.explain(image)
    assert (found.losses, found.patch, found.worst) == ({}, (0, 0), "never predicted")
    assert np.isfinite(detector.inspect(image).score)


def test_a_record_says_how_large_the_windows_were():
    for crop, side in ((40, 40), (96, 48)):
        found = Detector.fit([*IMAGES[:4], texture(9, 52, 60)], TINY_CONFIG, crop=crop, epochs=1, seed=1)
        assert found.config.crop == crop  # what was asked for, at most
        assert found.trained_on["windows"] == f"{side} x {side} pixels"


@pytest.mark.parametrize(("closing", "why"), [(2, "odd"), (0, "at least 1"), (257, "at most 255")])
def test_a_closing_is_an_odd_number_of_cells(closing, why):
    with pytest.raises(UsageError, match=f"closing is {closing}; it must be {why}"):
        Config(closing=closing)


def test_closing_fills_the_map_and_no_more():
    """What is said of each patch, and why, stays; dips between them rise, and the map with them; the highest stays."""
    plain = Detector.fit(IMAGES, TINY_CONFIG, epochs=2, precision="float32")
    filled = Detector.fit(IMAGES, TINY_CONFIG, epochs=2, precision="float32", closing=3)
    image = holed(7)[0]
    before, after = plain.inspect(image), filled.inspect(image)
    assert torch.equal(plain.scorer.surprise(image).grid, filled.scorer.surprise(image).grid)
    grid = plain.scorer.surprise(image).grid
    assert closed(grid, 3).max() == grid.max()
    assert (after.map >= before.map - 1e-6).all()
    assert (after.map > before.map + 0.01).any()
    assert plain.explain(image).patch == filled.explain(image).patch


def test_the_member_that_made_the_score_is_asked_why():
    """Where the strangest member counts, the loudest of what it says; the others would outvote it in the mean."""
    detector = Detector.fit(IMAGES, TINY_CONFIG, epochs=1, members=2, ensemble="max")
    surprise = detector.scorer.surprise(holed(3)[0])
    kinds, worst = len(detector.config.predicts), int(surprise.grid.argmax())
    counts, targets = surprise.counts[:kinds], surprise.targets[: len(surprise.targets) // 2]
    values = torch.zeros(2, len(targets))
    (quiet, loud), step = (0, 1), torch.repeat_interleave(torch.arange(kinds), torch.tensor(counts))
    here = targets == worst
    first, last = step[here].unique()[[0, -1]]
    values[quiet, here & (step == first)] = 9.0  # one cry, and not of the member whose median is the higher
    values[loud, here] = 3.0
    values[loud, here & (step == last)] = 4.0
    map = np.zeros((48, 48), np.float32)
    corner = patch_starts(48, 16, 8)
    map[corner[worst // 5] + 8, corner[worst % 5] + 8] = 1  # the middle of that patch
    told = detector._explanation(replace(surprise, values=values.flatten()), map, (48, 48, 1))
    assert told.worst == detector.config.predicts[last]


def test_a_crop_smaller_than_a_patch_is_no_config():
    with pytest.raises(UsageError, match="crop is 8; it must be at least patch_size"):
        Config(crop=8)


@pytest.mark.parametrize("folder", [False, True])
def test_the_threshold_rests_on_maps_of_the_original_size(folder, tmp_path, monkeypatch):
    sizes = []

    def noting(scorer, images, originals):
        sizes.extend(originals)
        return held_out_scores(scorer, images, originals)

    monkeypatch.setattr(detectors, "held_out_scores", noting)
    data = make_set(tmp_path, train=8) if folder else IMAGES[:8]
    Detector.fit(data, TINY_CONFIG, image_size=96, calibration_share=0.5, epochs=1)
    assert sizes == [(48, 48)] * 4


def test_going_on_and_beginning_anew_exclude_each_other(tmp_path):
    with pytest.raises(UsageError, match="resume=True and fresh=True"):
        Detector.fit(IMAGES, TINY_CONFIG, out=tmp_path / "run", resume=True, fresh=True)


def test_steps_that_no_window_of_training_holds_are_refused():
    says = r"^crop is 32, so windows of training are 32 pixels wide and hold 3 .* crop at least 40, or set steps=1\.$"
    with pytest.raises(CpcFastError, match=says):  # W_k of the second would stay as it was drawn, and vote
        Detector.fit(IMAGES, TINY_CONFIG, crop=32)
    says = r"^Image 10 is 24 x 60 pixels, so windows .* too few to look 3 patches ahead .* image_size at least 40\.$"
    with pytest.raises(CpcFastError, match=says):
        Detector.fit([*IMAGES, texture(9, 24, 60)], TINY_CONFIG)


def test_the_threshold_rests_on_images_calibrated_by_the_others(detector):
    images = [texture(i) for i in range(60, 65)]
    scorer = Scorer(detector.model, detector.bank)
    sizes = [(48, 48), (24, 24), (96, 60), (48, 48), (48, 48)]
    scores, _ = held_out_scores(scorer, images, sizes)
    for i, score in enumerate(scores):
        alone = Scorer(detector.model, detector.bank)
        alone.calibration = calibrate(alone, [alone.losses(image) for image in images[:i] + images[i + 1 :]])
        assert score == alone.map(images[i], sizes[i]).max().item()
    by_all = [scorer.map(image, size).max().item() for image, size in zip(images, sizes, strict=True)]
    assert np.mean(scores) > np.mean(by_all)
    assert held_out_scores(scorer, images[:1], sizes)[0] == [scorer.map(images[0], images[0].shape[:2]).max().item()]


def test_mirrored_arrays_and_autocast_around_change_nothing(detector):
    image = texture(7)
    turned = image[::-1, ::-1]
    plain = detector.predict([turned.copy()]).maps[0]
    assert np.array_equal(detector.predict([turned]).maps[0], plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(detector.predict([turned]).maps[0], plain)
        assert detector.explain(turned) == detector.explain(turned.copy())
    images = [texture(i)[::-1] for i in range(6)]
    outside = Detector.fit(images, TINY_CONFIG, epochs=1)
    with torch.autocast("cpu", torch.float16):
        inside = Detector.fit((image for image in images), TINY_CONFIG, epochs=1)
    assert inside.threshold == outside.threshold


def test_a_fit_says_what_it_takes():
    with pytest.raises(UsageError, match=r"fit takes a folder or a list of images. Got an array of uint8 \(48, "):
        Detector.fit(texture(0), TINY_CONFIG)
    with pytest.raises(UsageError, match="fit got resume=True and no `out`; name the run folder"):
        Detector.fit([texture(i) for i in range(6)], TINY_CONFIG, resume=True)


def test_what_a_detector_is_stands_in_its_name(detector):
    images = [texture(3), np.full((48, 48, 1), 255, np.uint8)]
    found = detector.predict(images)
    assert found.flagged == [detector.inspect(image).flagged for image in images]
    assert f"; threshold {detector.threshold.value:.4g}; on cpu)" in repr(detector)


def test_a_config_takes_lists_and_numpys_numbers():
    config = TINY_CONFIG.replace(shifts=["noise"], epochs=np.int64(3), learning_rate=np.float64(1e-3))
    assert config == TINY_CONFIG.replace(shifts=("noise",), epochs=3, learning_rate=1e-3)
    assert type(config.epochs) is int
