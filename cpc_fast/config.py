"""What a run is made of: one frozen record, checked once, saved beside the weights as JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .errors import CpcFastError, UsageError

NORMS = ("group", "layer", "none")
DIRECTION_NAMES = ("down", "up", "right", "left")
CONTEXTS = ("none", "masked-conv")
NEGATIVES = ("batch", "other-images", "sampled", "hard")
ACROSS_RANKS = ("auto", "local", "gathered", "ring")
PRECISIONS = ("auto", "float32")
ENSEMBLES = ("rms", "max")
WHOLE_SHIFTS = (
    "quarter-turn", "turn", "magnify", "noise", "blur", "intensity", "brightness", "exposure", "sharpen", "shuffle",
    "invert", "warp",
)  # fmt: skip
SHIFTS = (*WHOLE_SHIFTS, "spots", "curves", "lines", *(f"local-{name}" for name in WHOLE_SHIFTS))
KINDS = {
    "int": ((int,), "a whole number"), "int | None": ((int, type(None)), "a whole number, or none"),
    "float": ((float, int), "a number"), "str": ((str,), "a text"), "bool": ((bool,), "true or false"),
    "tuple[str, ...]": ((tuple,), "a list of names"),
}  # fmt: skip
# Far beyond use; a config that somebody else wrote can ask for no more memory than this.
LIMITS = {
    "image_size": 1 << 16, "patch_size": 4096, "patch_stride": 4096, "crop": 1 << 16, "made_for": 1 << 16,
    "width": 4096, "members": 64, "steps": 64, "negatives_count": 1 << 24, "shift_copies": 64, "epochs": 10**6,
    "batch_size": 1 << 20, "finer": 64, "closing": 255,
    "bank_size": 1 << 24, "depth": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """The choices of one run. Lengths are pixels of the resized image; see each field.

    Raises UsageError from the constructor when a choice is unknown or two choices exclude each other.

    >>> Config(steps=3, skip=1).offsets
    (2, 3, 4)
    """

    # image -> patches
    image_size: int | None = None  # the shorter side is resized to this; None keeps the original size
    channels: int = 1  # 1: grayscale, 3: colour
    depth: int | None = None  # bits that a value of a 16-bit grey image uses, from the lowest on; None: all
    standardise: str = "set"  # "set": mean and spread of the training images; "image": by its own; or "imagenet"
    patch_size: int = 32
    patch_stride: int = 16  # less where an image is no whole number of strides long, so that the grid ends with it
    crop: int | None = None  # side of the square windows of training; None, or too large: the smallest image's
    # Shorter side of the images that patch_size, patch_stride, crop and stem are for: fit doubles the four for larger
    # ones (fitted_to). None: they are final; one of them set by hand makes it None.
    made_for: int | None = None
    # patches -> latents
    width: int = 32  # channels of the first residual stage; latents have 4 * width features
    stem: int = 4  # stride of the first convolution
    members: int = 1  # networks that learn side by side and score together; 1 with an encoder of one's own
    norm: str = "group"
    # latents -> contexts -> predictions
    context: str = "none"
    steps: int = 3  # K: how many patches ahead
    skip: int = 1  # nearest patches left out, because overlapping neighbours share pixels
    directions: int = 4  # 1: down; 2: down, up; 4: down, up, right, left
    place: bool = False  # also predict each patch from where in its image it lies, for aligned parts
    # predictions -> loss
    negatives: str = "batch"
    negatives_count: int = 16  # per anchor; for "sampled" and "hard" only
    across_ranks: str = "auto"  # in training on several ranks, whose latents count: "local", "gathered", "ring"
    shifts: tuple[str, ...] = ()  # transformed copies of each batch whose latents are further wrong answers
    shift_copies: int = 1  # how many such copies of each image
    # training
    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # of the learning rate, after a warm-up: "cosine" down to 0, or "constant"
    weight_decay: float = 1e-4
    averaging: float = 0.98  # highest decay of the mean of the weights that the run ends with; 0: the last weights
    jitter: float = 0.1  # standard deviation of the random brightness and contrast of a training image
    patch_jitter: float = 0.0  # the same of each of its patches by itself
    gamma: float = 0.0  # standard deviation of the log of the random power that a training image's pixels are raised to
    flips: bool = False  # random mirror images in training
    seed: int = 0
    # training and scoring
    # "auto": bfloat16 where the device is fast at it; "float32": the same numbers everywhere, to rounding
    precision: str = "auto"
    # scoring
    finer: int = 1  # grid cells of scoring in one of training, each way: 2 also looks at patches halfway between
    mirrored: bool = False  # three mirror images are scored too (test-time augmentation): 4 times the work; needs flips
    ensemble: str = "rms"  # what members and views say of a patch counts as its root mean square, or as its "max"
    closing: int = 1  # odd: dips of the map narrower than so many cells of scoring are filled (morphological closing)
    bank_size: int = 1024  # normal latents that test patches are compared with
    calibration_share: float = 0.2  # share of the normal images held out of training
    target_fpr: float = 0.01  # share of normal images that may be flagged

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, must: str) -> None:
            if not ok:
                raise UsageError(f"config: {name} is {getattr(self, name)!r}; it must be {must}.")

        for field in dataclasses.fields(self):
            kinds, takes = KINDS[str(field.type)]
            value = getattr(self, field.name)
            if tuple in kinds and isinstance(value, (list, tuple)):
                value = tuple(str(name) if isinstance(name, str) else name for name in value)  # NumPy's, too
            elif getattr(value, "ndim", None) == 0:  # NumPy's numbers
                value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
            object.__setattr__(self, field.name, value)
            need(type(value) in kinds, field.name, takes)
            need(type(value) is not float or math.isfinite(value), field.name, "finite")
        need(all(type(name) is str for name in self.shifts), "shifts", f"drawn from {', '.join(SHIFTS)}")
        why = " (batch statistics would tell patches about each other)" if self.norm == "batch" else ""
        need(self.norm in NORMS, "norm", f"one of {', '.join(NORMS)}{why}")
        need(self.context in CONTEXTS, "context", f"one of {', '.join(CONTEXTS)}")
        need(self.negatives in NEGATIVES, "negatives", f"one of {', '.join(NEGATIVES)}")
        need(self.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}")
        need(self.across_ranks in ACROSS_RANKS, "across_ranks", f"one of {', '.join(ACROSS_RANKS)}")
        rings = self.across_ranks != "ring" or self.negatives != "sampled"
        need(rings, "across_ranks", "auto, local or gathered with sampled negatives, for which there is no ring")
        found = self.across_ranks in ("auto", "local") or self.negatives != "hard"
        need(found, "across_ranks", "auto or local with hard negatives, which a rank looks for among its own")
        need(self.directions in (1, 2, 4), "directions", "1, 2 or 4")
        need(self.standardise in ("set", "image", "imagenet"), "standardise", "set, image or imagenet")
        need(self.channels in (1, 3), "channels", "1 (grayscale) or 3 (colour)")
        need(self.depth is None or self.depth >= 8, "depth", "at least 8")
        need(self.stem in (1, 2, 4, 8), "stem", "1, 2, 4 or 8")
        need(set(self.shifts) <= set(SHIFTS), "shifts", f"drawn from {', '.join(SHIFTS)}")
        for name, most in LIMITS.items():
            if (value := getattr(self, name)) is not None:
                need(value >= 1, name, "at least 1")
                need(value <= most, name, f"at most {most}")
        need(self.patch_stride <= self.patch_size, "patch_stride", f"at most patch_size, {self.patch_size}")
        need(self.skip <= 4096, "skip", "at most 4096")
        need(0 <= self.seed < 1 << 32, "seed", "from 0 to 4294967295")
        need(self.skip >= 0, "skip", "0 or more")
        need(self.patch_stride % self.finer == 0, "finer", f"a divisor of patch_stride, {self.patch_stride}")
        if self.mirrored and not (self.flips and self.directions > 1):
            raise UsageError(
                f"config: mirrored is True where flips is {self.flips} and directions is {self.directions}; mirror "
                "images can be scored after training with flips, in 2 or 4 directions. Set mirrored=false, or those."
            )
        need(self.image_size is None or self.image_size >= self.patch_size, "image_size", "at least patch_size")
        need(self.crop is None or self.crop >= self.patch_size, "crop", "at least patch_size")
        need(self.made_for is None or self.made_for >= self.patch_size, "made_for", "at least patch_size")
        need(self.ensemble in ENSEMBLES, "ensemble", f"one of {', '.join(ENSEMBLES)}")
        need(self.closing % 2 == 1, "closing", "odd")
        need(0 < self.calibration_share < 1, "calibration_share", "above 0 and below 1")
        need(0 < self.target_fpr < 1, "target_fpr", "above 0 and below 1")
        need(self.schedule in ("cosine", "constant"), "schedule", "cosine or constant")
        need(0 <= self.averaging < 1, "averaging", "at least 0 and below 1")
        need(self.learning_rate > 0, "learning_rate", "positive")
        need(self.weight_decay >= 0, "weight_decay", "0 or more")
        for name in ("jitter", "patch_jitter", "gamma"):
            need(getattr(self, name) >= 0, name, "0 or more")
        need(self.gamma <= 4, "gamma", "at most 4")

    @property
    def offsets(self) -> tuple[int, ...]:
        """How many grid cells ahead each of the K steps looks."""
        return tuple(self.skip + k for k in range(1, self.steps + 1))

    @property
    def predicts(self) -> tuple[str, ...]:
        """What a patch is predicted from, a name for each W_k: direction and offset, and "place".

        >>> Config(directions=1, place=True).predicts
        ('down 2', 'down 3', 'down 4', 'place')
        """
        ahead = (f"{way} {offset}" for way in DIRECTION_NAMES[: self.directions] for offset in self.offsets)
        return (*ahead, "place") if self.place else tuple(ahead)

    @property
    def scoring_stride(self) -> int:
        """Pixels from one patch to the next in scoring."""
        return self.patch_stride // self.finer

    @property
    def unit(self) -> float:
        """1/32 of a patch, in pixels: what the sizes of blur, spots and the like are counted in."""
        return self.patch_size / 32

    def window(self, smallest: int) -> int:
        """Side in pixels of the square windows of training; `smallest` is the shorter side of the smallest image.

        It is that of one patch and whole strides. In others the grid would close up, and patches further apart than
        `skip` would share more pixels.

        >>> Config(crop=96).window(256), Config(crop=96).window(90), Config().window(256)
        (96, 80, 256)
        """
        side = min(self.crop or smallest, smallest)
        return side - (side - self.patch_size) % self.patch_stride

    @property
    def features(self) -> int:
        """D, the length of a latent of the built-in encoder."""
        return 4 * self.width

    def replace(self, **changes: Any) -> Config:
        """A copy with some fields changed; raises UsageError for a name that is not a field."""
        unknown = set(changes) - {f.name for f in dataclasses.fields(self)}
        if unknown:
            names = ", ".join(f.name for f in dataclasses.fields(self))
            raise UsageError(f"config: no field called {', '.join(sorted(unknown))}. There are: {names}.")
        if changes.keys() & {"patch_size", "patch_stride", "crop", "stem"}:
            changes.setdefault("made_for", None)  # one of the four set by hand: fit doubles none of them
        return dataclasses.replace(self, **changes)

    def fitted_to(self, sides: Sequence[int], names: Sequence[str] = ()) -> Config:
        """The config for images with these shorter sides (pixels, after image_size), its lengths final.

        patch_size, patch_stride, crop and stem are doubled together, and again while stem is less than 8: as often as
        the median side, halved as often, is at least 7/8 of made_for, and the smallest image at least as wide as
        predictions reach. Where it is narrower without any doubling, they are halved until it is not, or stem is 1. So
        in larger images a patch keeps its share, and scoring costs the same at any resolution. Where made_for is None,
        as it becomes when one of the four is set by hand, nothing changes.

        Raises CpcFastError, with the name of the first, where a few images (a tenth, or one) of less than half the
        typical side would make the patches of all the others smaller.

        >>> fitted = preset("cpu-demo").fitted_to([256, 256, 300])
        >>> fitted.patch_size, fitted.patch_stride, fitted.stem
        (64, 32, 4)
        """
        if self.made_for is None:
            return self
        typical = statistics.median(sides)
        strays = [i for i, side in enumerate(sides) if side < typical / 2]
        fitted = self._doubled(typical, min(sides))
        if 0 < len(strays) <= max(1, len(sides) // 10):
            rest = self._doubled(typical, min(side for side in sides if side >= typical / 2))
            if rest.patch_size > fitted.patch_size:
                i, others = strays[0], f" (and {len(strays) - 1} more like it)" if len(strays) > 1 else ""
                raise CpcFastError(
                    f"{names[i] if names else f'Image {i}'} has a shorter side of {sides[i]} pixels{others}, where "
                    f"{typical:g} is typical: patches would shrink from {rest.patch_size} to {fitted.patch_size} "
                    "pixels for it. Remove it, or scale all images alike with image_size."
                )
        return fitted

    def _doubled(self, typical: float, smallest: int) -> Config:
        assert self.made_for is not None
        reach = self.patch_size + self.offsets[-1] * self.patch_stride
        factor = min(max(typical / (0.875 * self.made_for), 1.0), smallest / reach)
        power = math.floor(math.log2(max(factor, 1e-9)))
        power = min(max(power, -int(math.log2(self.stem))), int(math.log2(8 // self.stem)))

        def scale(length: int) -> int:
            return max(1, int(length * 2.0**power))

        return self.replace(
            patch_size=scale(self.patch_size), patch_stride=scale(self.patch_stride), stem=scale(self.stem),
            crop=None if self.crop is None else scale(self.crop),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for config.json and metrics.json."""
        return dataclasses.asdict(self)

    def unlike(self, other: Config) -> str:
        """How another one, that is there, differs from this one, that is now.

        >>> Config(epochs=2).unlike(Config(epochs=1))
        'epochs: 1 there, 2 now'
        """
        there, now = other.to_json(), self.to_json()
        return ", ".join(f"{name}: {there[name]} there, {now[name]} now" for name in now if there[name] != now[name])

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Config:
        """The inverse of to_json."""
        return cls().replace(**fields)


# On small patches of textures: few steps, and the mean of the weights.
_TEXTURES = Config(
    crop=96, made_for=128, width=16, stem=2, context="masked-conv", shift_copies=2, batch_size=8,
    shifts=("noise", "shuffle", "sharpen", "invert", "warp", "magnify"),
    epochs=12, learning_rate=4e-3, schedule="cosine", jitter=0.03, flips=False,
)  # fmt: skip

_QUALITY = _TEXTURES.replace(
    made_for=256, members=3, epochs=16, flips=True, finer=2, ensemble="max", closing=3,
    shifts=("spots", "curves", "lines", "warp", "shuffle"), shift_copies=4,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    # The shifts are kept apart from the defects that the demo paints (stain, blur, scratch, foreign and turned pieces).
    "cpu-demo": _TEXTURES,
    # Parts vary among themselves: shifts that change little of a patch, as defects do; patches stay small.
    "quality": _QUALITY,
    # Homogeneous surfaces, where patches are hard to tell apart: more shifts, longer, mirror images in scoring.
    "texture": _QUALITY.replace(
        epochs=20, jitter=0.08, negatives="other-images", finer=1, mirrored=True, ensemble="rms", closing=1,
        shifts=(
            "spots", "curves", "warp", "turn", "magnify", "noise", "shuffle", "intensity", "local-turn", "local-noise",
        ),
    ),
    # Parts that lie alike in every image: what belongs at a place is known, and learnt from what is too dark or bright,
    # and from cracks; one network does as well as three.
    "aligned": _QUALITY.replace(
        place=True, members=1, epochs=20, finer=1, mirrored=True, ensemble="rms", closing=1,
        shifts=("brightness", "exposure", "local-brightness", "local-exposure", "curves", "lines"),
    ),
    # One network with a coarser first convolution, fewer epochs and copies, and patches only where training has them.
    "fast": _QUALITY.replace(stem=4, members=1, epochs=12, finer=1, closing=1, shift_copies=2, made_for=256),
    # Unverified: put together from the paper's abstract and the code of its second author, not from its text.
    "paper": Config(
        image_size=256, channels=1, patch_size=64, patch_stride=32, width=64, stem=2, norm="none", steps=5, skip=1,
        directions=1, negatives="sampled", negatives_count=16, epochs=150, batch_size=16, learning_rate=1.5e-4,
        weight_decay=0.0, averaging=0.0, jitter=0.0,
    ),
}  # fmt: skip


def preset(name: str) -> Config:
    """The preset of that name: `cpu-demo`, `quality`, `texture`, `aligned`, `fast` or `paper` (unverified).

    >>> preset("cpu-demo").directions
    4
    """
    if name not in PRESETS:
        raise UsageError(f"There is no preset called {name!r}. There are: {', '.join(PRESETS)}.")
    return PRESETS[name]


def read_settings(settings: list[str]) -> dict[str, Any]:
    """`name=value` texts as fields of a Config; a list is written with commas, nothing as `none`.

    Raises UsageError for a text without `=`, an unknown name, or a value of another type.

    >>> read_settings(["crop=96", "shifts=noise,warp", "image_size=none"])
    {'crop': 96, 'shifts': ('noise', 'warp'), 'image_size': None}
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Config)}
    read = {"int": int, "float": float, "str": str, "bool": {"true": True, "false": False}.__getitem__}
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name, text = name.strip().replace("-", "_"), text.strip()
        if not equals or name not in kinds:
            raise UsageError(f"{setting!r} is not NAME=VALUE with one of these names: {', '.join(kinds)}.")
        kind, _, optional = kinds[name].partition(" | ")
        try:
            if kind.startswith("tuple"):
                found[name] = tuple(part.strip() for part in text.split(",") if part.strip() and text != "none")
            elif optional and text == "none":
                found[name] = None
            else:
                found[name] = read[kind](text)
        except (ValueError, KeyError):
            takes = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
            none = " or none" if optional else ""
            raise UsageError(f"config: {name} is {text!r}; it must be {takes}{none}.") from None
    return found
