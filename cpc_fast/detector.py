"""The detector: a trained CPC model, a bank of normal latents, and what is normal on images held out of training.

An image's score is the maximum of its anomaly map, and its mask is the map above the threshold: one threshold serves
both, so an image is flagged if and only if its mask is not empty.

Longer than 250 lines because fit, save, load and predict are one public class, which most users read alone.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parameter import is_lazy

from cpc_kernels.exchange import rank_and_world

from .anomaly_map import pixel_weights
from .bank import Bank, StreamedBank, host_rows, place_bank, reservoir
from .checkpoint import Checkpoint
from .config import Config, preset
from .errors import CpcFastError, ImageError, Stopped, UsageError
from .files import locked
from .images import (
    Chosen,
    ImageCache,
    check_pixels,
    described,
    digest,
    is_one_image,
    naming,
    quoted,
    read_image,
    resize,
    to_channels,
)
from .layouts import find_train
from .model import CPC
from .patches import grid_shape, patch_starts
from .runs import DETECTOR, origin, own_threshold
from .saving import in_short, load_run, remedy, save_run
from .scoring import Calibration, Scorer, Surprise, held_out_scores
from .segments import Segment, find_segments
from .train import Position, Progress, autocast, make_optimizer, train


@dataclass(frozen=True)
class Threshold:
    """Where to cut, and how much the held-out normal images can promise.

    Attributes:
        value: scores above it are anomalous.
        target_fpr: the share of normal images that may be flagged, as asked.
        guaranteed_fpr: the share that `count` images can vouch for (split conformal: 1 / (count + 1) at best; one image
            is calibrated by itself and vouches for nothing, 1).
        count: number of held-out normal images; 0 where the user set the value (with_threshold).
        held_out: their scores, sorted; empty where an older run does not know them.
    """

    value: float
    target_fpr: float
    guaranteed_fpr: float
    count: int
    held_out: tuple[float, ...] = ()

    @classmethod
    def from_scores(cls, scores: Sequence[float], target_fpr: float) -> Threshold:
        """The smallest held-out score that at most target_fpr of new normal images exceed, in expectation.

        >>> Threshold.from_scores(list(range(1, 100)), 0.05).value
        95.0
        """
        n = len(scores)
        rank = math.ceil((n + 1) * (1 - target_fpr) - 1e-9)
        held_out = tuple(sorted(map(float, scores)))
        guaranteed = max(target_fpr, 1 / (n + 1)) if n > 1 else 1.0
        return cls(held_out[min(rank, n) - 1], target_fpr, guaranteed, n, held_out)

    @property
    def note(self) -> str:
        """A sentence when there are too few images for the rate that was asked for, else an empty string."""
        if self.guaranteed_fpr <= self.target_fpr:
            return ""
        need = math.ceil(1 / self.target_fpr) - 1
        if self.count == 1:
            return (
                f"1 held-out normal image vouches for no false-positive rate; {self.target_fpr:.1%} takes {need}. The "
                "threshold is its score."
            )
        return (
            f"{self.count} held-out normal images can vouch for a false-positive rate of {self.guaranteed_fpr:.1%}, "
            f"not {self.target_fpr:.1%}: that takes {need}. The threshold is their highest score."
        )


class Light(NamedTuple):
    """The range of the mean grey value and of the contrast (standard deviation) of images, 0 to 255.

    CPC asks how well a patch fits its neighbours; a black frame fits perfectly.
    """

    darkest: float
    brightest: float
    flattest: float
    hardest: float

    @classmethod
    def of(cls, seen: Sequence[tuple[float, float]]) -> Light:
        """From the mean and the contrast of each image."""
        means, contrasts = zip(*seen, strict=True)
        return cls(min(means), max(means), min(contrasts), max(contrasts))

    @staticmethod
    def seen(image: np.ndarray) -> tuple[float, float]:
        """Mean and contrast of an image (h, w, c), of a large one by some of its pixels."""
        step = max(1, min(image.shape[:2]) // 256)
        some = image[::step, ::step]
        return float(some.mean()), float(some.std())

    def other(self, image: np.ndarray) -> bool:
        """Whether an image lies far outside: 20 grey values and more, half the contrast and less, twice and more.

        >>> Light(100, 140, 30, 40).other(np.zeros((32, 32, 1), np.uint8))
        True
        """
        mean, contrast = self.seen(image)
        lit = self.darkest - 20 <= mean <= self.brightest + 20
        return not (lit and 0.5 * self.flattest <= contrast <= 2 * self.hardest)


@dataclass(frozen=True)
class Explanation:
    """Why an image scored as it did.

    Attributes:
        losses: for each direction and step, and the place, the mean loss over the image in units of its normal spread.
        patch: (row, column) in the grid of the patch that adds most to the peak of the map, which is the score.
        box: (top, left, bottom, right) of that patch in pixels of the original image.
        worst: the direction and step, or "place", that found it most surprising.
    """

    losses: dict[str, float]
    patch: tuple[int, int]
    box: tuple[int, int, int, int]
    worst: str


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the detector says about one image.

    Attributes:
        score: the maximum of the map; higher is stranger, and about 0 is average for the normal images of the fit.
        map: float32 (h, w), a score for each pixel of the original image.
        mask: bool (h, w), the pixels above the threshold.
        segments: the connected regions of the mask, highest peak first.
        flagged: whether the score is above the threshold, and a region of min_area pixels, too.
        why: of a flagged image, what made its score; None for others (Detector.explain tells of any).
        other_light: whether the image is much darker, brighter, or of less or more contrast than all of the fit, so
            that its score says little; False where an older run does not know.
    """

    score: float
    map: np.ndarray
    mask: np.ndarray
    segments: list[Segment]
    flagged: bool
    why: Explanation | None = None
    other_light: bool = False


@dataclass(frozen=True, eq=False)
class Predictions:
    """predict's answer for several images: the same fields as lists, one entry for each image."""

    scores: list[float]
    maps: list[np.ndarray]
    masks: list[np.ndarray]
    flagged: list[bool]
    other_light: list[bool]


class Detector:
    """Scores and segments anomalies with the contrastive loss of a CPC model that has seen normal images only.

    >>> detector = Detector.fit("data/textures/brick", epochs=1)      # doctest: +SKIP
    >>> detector.predict(["part.png"]).masks[0].shape                 # doctest: +SKIP
    (128, 128)
    """

    def __init__(
        self,
        model: CPC,
        bank: Bank,
        calibration: Calibration,
        threshold: Threshold,
        trained_on: dict[str, str],
        train_images_per_s: float | None = None,
        sides: tuple[int, int] | None = None,
        light: Light | None = None,
    ) -> None:
        self.model, self.config, self.bank = model.eval(), model.config, bank
        self.calibration, self.threshold, self.trained_on = calibration, threshold, trained_on
        self.train_images_per_s = train_images_per_s
        self.light = light  # of the images of the fit; None: unknown
        self.sides = sides  # pixels: the least and the most that a shorter side had in training; None: unknown
        self.scorer = Scorer(model, bank, calibration)

    # ------------------------------------------------------------------------------------------------ fit

    @classmethod
    def fit(
        cls,
        data: str | os.PathLike | Iterable[np.ndarray],
        config: Config | str = "cpu-demo",
        *,
        out: str | os.PathLike | None = None,
        resume: bool = False,
        fresh: bool = False,
        device: str | torch.device = "cpu",
        encoder: nn.Module | None = None,
        on_step: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
        **changes: object,
    ) -> Detector:
        """Learn what is normal.

        Where torch.distributed has several ranks, all of them call this and train together on batches of the same
        size; each returns the detector, and the first writes to `out`.

        Args:
            data: a folder in MVTec layout (its train/good is used) or a flat folder of normal images; or the images
                themselves, uint8 (h, w, c).
            config: a Config or the name of a preset; `changes` replace some of its fields.
            out: a run folder: a checkpoint after every epoch, and at the end the detector. One process at a time.
            resume: go on from the checkpoint in `out`, to the same weights as without the interruption.
            fresh: replace the run in `out`, if there is one, by this one's first checkpoint; until then it is kept.
            device: where to compute, "cpu" or "cuda".
            encoder: a module that maps patches (n, c, p, p) to vectors (n, d), in place of the built-in ResNet; the
                detector then has one member.
            on_step: called with a Progress after each training step.
            stop: asked after each step and each image whether to stop there.

        The caller's random numbers are left as they were.

        Raises UsageError for a folder without images or a `resume` that does not fit, CpcFastError for images that
        cannot be used, a run folder that another process writes, or a loss that is not finite, Stopped where `stop`
        said so, with everything saved in `out`.
        """
        need_float32()
        if fresh and resume:
            raise UsageError("fit got resume=True and fresh=True; go on with the run in `out`, or replace it.")
        if out is None and (fresh or resume):
            raise UsageError(f"fit got {'resume' if resume else 'fresh'}=True and no `out`; name the run folder.")
        config = (preset(config) if isinstance(config, str) else config).replace(**changes)
        if encoder is not None:  # a frozen one is run once for each image, not on mirror images
            learns = any(weight.requires_grad for weight in encoder.parameters())
            if any(
                weight.requires_grad and not is_lazy(weight) and weight.is_inference()
                for weight in encoder.parameters()
            ):
                raise UsageError(
                    "The encoder was made under torch.inference_mode, so it cannot learn; make it outside, or freeze "
                    "it: encoder.requires_grad_(False)."
                )
            config = config.replace(members=1, mirrored=config.mirrored and learns)
        device = torch.device(device)
        if isinstance(data, (str, os.PathLike)):
            paths = find_train(data)
            given = origin(os.path.abspath(data), paths)
            cache = ImageCache(paths, size=config.image_size, channels=config.channels, depth=config.depth)
            images: Sequence[np.ndarray] = cache
            shapes, originals = cache.shapes(), cache.originals
            digests = [cache.digests[i] for i in range(len(paths))]
            names, short = [quoted(path) for path in paths], [path.name for path in paths]
        else:
            if is_one_image(data) or not isinstance(data, Iterable):
                raise UsageError(f"fit takes a folder or a list of images. Got {described(data)}.")
            data = list(data)
            images = [prepare(image, config) for image in data]
            shapes = [(image.shape[0], image.shape[1]) for image in images]
            digests = [digest([image]) for image in images]
            given = origin(f"{len(data)} arrays", data)
            originals = {i: image.shape[:2] for i, image in enumerate(data)}
            names = short = [f"Image {i}" for i in range(len(images))]
        if not images:
            raise UsageError("There are no images to fit on (got an empty list); give at least 3 normal ones.")
        sides = [min(shape) for shape in shapes]
        config = config.fitted_to(sides, names)
        check_sizes(shapes, names, config)
        training, held_out = split(len(images), config, digests)
        copies = len(images) - len(set(digests))
        rank, world = rank_and_world()
        lock = contextlib.nullcontext() if out is None or rank else locked(Path(out))
        with lock, _by_itself(device):
            torch.default_generator.manual_seed(config.seed)  # torch.manual_seed would seed all GPUs, too
            if device.type == "cuda":  # as an encoder with dropout draws there
                torch.cuda.manual_seed_all(config.seed)
            model = CPC(config, encoder).to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            optimizer = make_optimizer(model, config)
            checkpoint = None if out is None else Checkpoint(Path(out), model, optimizer, config, given)
            position = Position()
            for turn in range(min(world, 2)):  # the first rank may tidy the folder before the others read it
                if checkpoint and turn == min(rank, 1):
                    position = checkpoint.begin(resume, fresh)
                if world > 1:
                    dist.barrier()
            pace: float | None = None

            def watch(progress: Progress) -> None:
                nonlocal pace
                pace = progress.images_per_s
                if on_step:
                    on_step(progress)

            loss, guessing = train(
                model, Chosen(images, training), config, optimizer=optimizer, position=position,
                on_step=watch, save=checkpoint.save if checkpoint and rank == 0 else None, stop=stop,
            )  # fmt: skip

            seen: list[tuple[float, float]] = []

            def read(which: list[int]) -> Iterator[np.ndarray]:
                for i in which:
                    if stop and stop():
                        raise Stopped("Stopped after the last epoch, before the threshold was found.")
                    image = images[i]
                    seen.append(Light.seen(image))
                    yield image

            scorer = Scorer(model, place_bank(_make_bank(model, read(training), config), device))
            scores, calibration = held_out_scores(scorer, read(held_out), [originals[i] for i in held_out])
            if not np.isfinite(scores).all():
                odd = names[held_out[int(np.flatnonzero(~np.isfinite(scores))[0])]]
                raise CpcFastError(
                    f"The model's losses on {odd} are no numbers, so there is no threshold; look at that image, and at "
                    "what an encoder of your own makes of patches of one value."
                )
            threshold = Threshold.from_scores(scores, config.target_fpr)
            window = config.window(min(sides[i] for i in training))  # crop may ask for more than there is
            sizes = sorted(set(shapes))
            trained_on = {
                **given,
                "normal images": f"{len(images)} ({len(training)} to learn from, {len(held_out)} for the threshold)",
                **({"copies": f"{copies} of {len(images)}"} if copies else {}),
                "image size": " and ".join(f"{h} x {w}" for h, w in sizes) if len(sizes) < 4 else "varying",
                "patches": f"{config.patch_size} x {config.patch_size} pixels, at most {config.patch_stride} apart",
                "windows": f"{window} x {window} pixels",
                "epochs": str(config.epochs),
                "highest held out": _highest(scores, [short[i] for i in held_out]),
            }
            if loss is not None:
                trained_on["loss of the last epoch"] = f"{loss:.2f} (guessing: {guessing:.2f})"
            spread, light = (min(sides), max(sides)), Light.of(seen)
            detector = cls(model, scorer.bank, calibration, threshold, trained_on, pace, spread, light)
            if out is not None and rank == 0:
                detector._write(Path(out))
            return detector

    # ------------------------------------------------------------------------------------------------ keep

    def save(self, run: str | os.PathLike) -> None:
        """Write the detector into a run folder (config.json, model.safetensors), whole or not at all.

        Raises CpcFastError where another process writes there, or where it cannot be written.
        """
        with locked(Path(run)):
            self._write(Path(run))

    def _write(self, run: Path) -> None:
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors["bank"] = host_rows(self.bank)
        for name in Calibration.__dataclass_fields__:
            tensors[f"calibration.{name}"] = getattr(self.calibration, name)
        about = {
            "threshold": vars(self.threshold),
            "trained_on": self.trained_on,
            "train_images_per_s": self.train_images_per_s,
            "sides": self.sides,
            "light": self.light,
        }
        save_run(run, tensors, self.config, about)

    @classmethod
    def load(
        cls,
        run: str | os.PathLike,
        device: str | torch.device = "cpu",
        encoder: nn.Module | None = None,
        *,
        stream_bank: bool = False,
    ) -> Detector:
        """Read a detector that save wrote; `encoder` must be given again when fit was given one.

        stream_bank: leave the bank in the file, and read it block by block for every image, for one that is larger than
        memory. (One that is larger than a GPU is streamed from memory without being asked.) The scores are the same to
        the bit. Its numbers are not looked through for what is not finite.

        Raises CpcFastError when the folder holds no detector, one of another version, or weights that are not finite.
        """
        need_float32()
        tensors, config, about = load_run(Path(run), encoder, "bank" if stream_bank else "")
        device = torch.device(device)
        try:
            threshold = Threshold(**about["threshold"])
            threshold = replace(threshold, held_out=tuple(map(float, threshold.held_out)))
            trained_on = {str(name): str(value) for name, value in about["trained_on"].items()}
            pace = about.get("train_images_per_s")
            sides = about.get("sides")  # older runs do not say
            if sides is not None:
                low, high = sides
                if not (type(low) is type(high) is int and 0 < low <= high):
                    raise ValueError("sides that are none")
                sides = (low, high)
            light = about.get("light")
            light = None if light is None else Light(*map(float, light))
            promised = [threshold.value, threshold.target_fpr, threshold.guaranteed_fpr, threshold.count]
            numbers = [*promised, *threshold.held_out, pace or 0.0, *(light or ())]
            if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
                raise ValueError("a number that is none")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CpcFastError(
                f"The record in {quoted(run)} cannot be read ({in_short(error)}); {remedy(Path(run) / DETECTOR)}."
            ) from None
        with _by_itself(device):
            model = CPC(config, encoder).to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        with torch.inference_mode():  # as an encoder may have been made
            model.load_state_dict({n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")})
        calibration = Calibration(
            **{name: tensors[f"calibration.{name}"].to(device) for name in Calibration.__dataclass_fields__}
        )
        streamed = StreamedBank.open(Path(run) / DETECTOR, device=device) if stream_bank else None
        bank = place_bank(tensors["bank"], device) if streamed is None else streamed
        return cls(model, bank, calibration, threshold, trained_on, pace, sides, light)

    # ------------------------------------------------------------------------------------------------ use

    def __repr__(self) -> str:
        images = self.trained_on.get("normal images", "unknown")
        return f"Detector(normal images: {images}; threshold {self.threshold.value:.4g}; on {self.bank.device})"

    def with_threshold(self, value: float) -> Detector:
        """The same detector with a threshold of your own, as read off the report's slider; nothing is copied.

        It is rounded to float32, as scores are, and promises no rate of false positives: its `threshold` rests on 0
        images and is meant for any rate. Raises UsageError for a value that is not finite in float32.
        """
        other = copy.copy(self)
        other.threshold = replace(
            self.threshold, value=own_threshold(value), target_fpr=1.0, guaranteed_fpr=1.0, count=0
        )
        return other

    def with_target_fpr(self, rate: float) -> Detector:
        """The same detector with the threshold for another share of false alarms, from the same held-out images.

        Raises UsageError for a rate that is not between 0 and 1, and for a run of an older version, whose record lacks
        their scores.
        """
        rate = self.config.replace(target_fpr=rate).target_fpr
        if not self.threshold.held_out:
            raise UsageError(
                "This detector was fitted by an older version, which kept no scores of held-out images; fit it anew, "
                "or give the threshold itself."
            )
        other = copy.copy(self)
        other.threshold = Threshold.from_scores(self.threshold.held_out, rate)
        return other

    def inspect(self, image: np.ndarray, min_area: int = 1) -> Prediction:
        """One image, uint8 (h, w, c) or (h, w), at its original resolution.

        Regions of fewer than `min_area` pixels are left out of mask and segments; the score is not changed. Colour is
        turned into grey for a model of one channel, and grey is repeated for one of three.
        The answer depends on this image alone: to the last bit the same in any company and order. One loss that is no
        number makes the score and the whole map so. Raises UsageError for anything but such an image, ImageError for
        one that is smaller than a patch.
        """
        need_float32()
        prepared = prepare(image, self.config)
        with torch.autocast(self.bank.device.type, enabled=False):
            surprise, spread = self.scorer.look(prepared, image.shape[:2])
        map = spread.cpu().numpy()
        mask, segments = find_segments(map, self.threshold.value, min_area)
        score = float(map.max())
        flagged = score > self.threshold.value and bool(segments)
        why = self._explanation(surprise, map, prepared.shape) if flagged else None
        other_light = self.light is not None and self.light.other(prepared)
        return Prediction(score, map, mask, segments, flagged, why, other_light)

    def other_size(self, shape: Sequence[int]) -> bool:
        """Whether an image (h, w, ...) is much smaller or larger than those of the fit, and nothing scales it alike."""
        if self.sides is None or self.config.image_size is not None:
            return False
        return not 0.8 * self.sides[0] <= min(shape[:2]) <= 1.25 * self.sides[1]

    def predict(self, images: Sequence[str | os.PathLike | np.ndarray]) -> Predictions:
        """Score several images, paths or uint8 arrays: scores, maps and masks at the original resolution.

        Raises UsageError for one image that is not in a list, and for what is no image, CpcFastError for a file that
        cannot be used.
        """
        if is_one_image(images) or (not hasattr(images, "__iter__") and not hasattr(images, "__getitem__")):
            raise UsageError(
                f"predict takes a list of images. Got {described(images)}; for one, write predict([image])."
            )
        answers = []
        for image in images:
            if isinstance(image, (str, os.PathLike)):
                with naming(image):
                    answers.append(self.inspect(read_image(image, depth=self.config.depth)))
            else:
                answers.append(self.inspect(image))
        return Predictions(
            [a.score for a in answers], [a.map for a in answers], [a.mask for a in answers],
            [a.flagged for a in answers], [a.other_light for a in answers],
        )  # fmt: skip

    def explain(self, image: str | os.PathLike | np.ndarray) -> Explanation:
        """Which patch, and which direction and step or its place, made the score of an image, a path or such as inspect
        takes; raises what inspect raises, and ImageError for a file that cannot be used."""
        if isinstance(image, (str, os.PathLike)):
            with naming(image):
                return self.explain(read_image(image, depth=self.config.depth))
        need_float32()
        prepared = prepare(image, self.config)
        with torch.autocast(self.bank.device.type, enabled=False):
            surprise, spread = self.scorer.look(prepared, image.shape[:2])
        return self._explanation(surprise, spread.cpu().numpy(), prepared.shape)

    def _explanation(self, surprise: Surprise, map: np.ndarray, prepared: Sequence[int]) -> Explanation:
        """map: at the original (h, w); prepared: the shape of the resized image."""
        config, kinds = self.config, len(self.config.predicts)
        counts = surprise.counts[:kinds]
        ways = surprise.values.unflatten(0, (len(surprise.counts) // kinds, -1)).cpu()  # (views * members, n)
        mean, targets = ways.mean(0), surprise.targets[: ways.shape[1]].cpu()
        peak = np.unravel_index(map.argmax(), map.shape)
        lengths = config.patch_size, config.scoring_stride
        rows, columns = (
            pixel_weights(length, *lengths, surprise.grid.device)[(2 * int(at) + 1) * length // (2 * size)]
            for at, length, size in zip(peak, prepared, map.shape, strict=False)
        )
        strange = (surprise.grid - surprise.grid.min()).clamp_min(1e-6)
        worst = int((strange * rows[:, None] * columns).argmax())  # adds most to the peak
        row, column = divmod(worst, surprise.grid.shape[1])
        by_place = bool(surprise.voices[:, row, column].argmax())
        speaks = targets == worst
        if config.place:
            speaks &= (torch.arange(len(targets)) >= sum(counts[:-1])) == by_place
        values = mean
        if config.ensemble == "max" and speaks.any():  # one member in one view made the score
            values = ways[int(ways[:, speaks].quantile(0.5, 1).argmax())]
        losses = mean.split(counts)
        about = {
            name: float(loss[target == worst].max())
            for name, loss, target in zip(config.predicts, values.split(counts), targets.split(counts), strict=True)
            if (target == worst).any()
        }
        heard = {name: loss for name, loss in about.items() if (name == "place") == by_place} or about
        zoom = map.shape[0] / prepared[0]
        starts = (patch_starts(length, *lengths) for length in prepared[:2])
        corner = [begins[at] for begins, at in zip(starts, (row, column), strict=True)]
        box = [*corner, *(edge + config.patch_size for edge in corner)]
        limits = (*map.shape, *map.shape)
        top, left, bottom, right = (min(round(edge * zoom), limit) for edge, limit in zip(box, limits, strict=True))
        return Explanation(
            losses={name: float(loss.mean()) for name, loss in zip(config.predicts, losses, strict=True) if len(loss)},
            patch=(row, column),
            box=(top, left, bottom, right),
            worst=max(heard, key=lambda name: heard[name]) if heard else "never predicted",
        )


def need_float32() -> None:
    """Raises UsageError where torch makes tensors of another type than what a detector computes in."""
    if torch.get_default_dtype() != torch.float32:
        raise UsageError(
            f"torch's default dtype is {torch.get_default_dtype()}, and a detector computes in float32; call "
            "torch.set_default_dtype(torch.float32) before."
        )


@contextlib.contextmanager
def _by_itself(device: torch.device) -> Iterator[None]:
    """To make a model whatever mode the caller is in: with gradients, without autocast (precision of the config says
    what is rounded), and with the caller's random numbers as before at its end."""
    seeded = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with (
        torch.random.fork_rng(seeded), torch.autocast(device.type, enabled=False),
        torch.inference_mode(False), torch.enable_grad(),
    ):  # fmt: skip
        yield


def split(count: int, config: Config, digests: Sequence[str] = ()) -> tuple[list[int], list[int]]:
    """Which normal images to learn from and which to hold out for calibration and threshold, drawn by the seed.

    digests: what tells the images apart. The copies of one are all learnt from, or one is held out and the others are
    left out: they would be calibrated by each other, and vouch for more than there is.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    told = list(digests) or [str(i) for i in range(count)]
    firsts: dict[str, int] = {}
    for i in order:
        firsts.setdefault(told[i], i)
    different = len(firsts)
    share = round(different * config.calibration_share)
    least = 2 if different >= 4 else 1  # one would be judged by itself
    held_out = set(list(firsts)[: max(least, min(share, different - 2))])
    if different - len(held_out) < 2:
        copies = f", {different} of them different and the others copies," if different < count else ""
        raise UsageError(
            f"{count} normal images{copies} are too few to learn from and to calibrate with; give at least 3"
            f"{' different ones' if copies else ''}."
        )
    return [i for i in range(count) if told[i] not in held_out], sorted(firsts[one] for one in held_out)


def _highest(scores: Sequence[float], names: Sequence[str]) -> str:
    """The held-out images that are least like the others: the threshold rests on them where they are few.

    >>> _highest([1.0, 7.5, 2.0], ["a.png", "b.png", "c.png"])
    'b.png scores 7.5, then c.png 2'
    """
    first, *rest = sorted(zip(scores, names, strict=True), reverse=True)[:2]
    return f"{first[1]} scores {first[0]:.4g}" + "".join(f", then {name} {score:.4g}" for score, name in rest)


def check_sizes(shapes: Sequence[tuple[int, ...]], names: Sequence[str], config: Config) -> None:
    """Every image can be cut into patches, and windows of training hold every step, or none is trained on."""
    for name, (h, w) in zip(names, shapes, strict=True):
        if min(h, w) < config.patch_size:
            raise ImageError(
                f"{name} is {h} x {w} pixels, smaller than one patch of {config.patch_size} pixels; "
                "remove it, set image_size to enlarge all images, or make patch_size smaller."
            )
    smallest = min(range(len(shapes)), key=lambda i: min(shapes[i]))
    h, w = shapes[smallest]
    side = config.window(min(h, w))
    across, far = grid_shape(side, side, config.patch_size, config.patch_stride)[0], config.offsets[-1]
    if far >= across:  # what such a step predicts with would stay as it was drawn, and vote
        cropped = config.crop is not None and config.crop <= min(h, w)
        cause = f"crop is {config.crop}" if cropped else f"{names[smallest]} is {h} x {w} pixels"
        fewer = f", or set steps={across - 1 - config.skip}" if across - 1 > config.skip else ""
        raise CpcFastError(
            f"{cause}, so windows of training are {side} pixels wide and hold {across} patches side by side: too few "
            f"to look {far} patches ahead (skip {config.skip}, steps {config.steps}). Make patches smaller, or "
            f"{'crop' if cropped else 'image_size'} at least {config.patch_size + far * config.patch_stride}{fewer}."
        )


def prepare(image: np.ndarray, config: Config) -> np.ndarray:
    """An image of any kind as the model expects it: (h, w, c) with its channels and size."""
    check_pixels(image)
    image = to_channels(image[..., None] if image.ndim == 2 else image, config.channels)
    return image if config.image_size is None else resize(image, config.image_size)


def _make_bank(model: CPC, images: Iterator[np.ndarray], config: Config) -> Tensor:
    """config.bank_size latents, drawn evenly from the patches of normal images, (m, d), on the CPU."""
    device = next(model.parameters()).device

    def rows() -> Iterator[Tensor]:
        for image in images:
            with torch.inference_mode(), autocast(device, config.precision):
                yield model.latents(model.standardise(image)[None]).flatten(0, 2).float().cpu()

    return reservoir(rows(), config.bank_size, config.seed)
