"""A detector as one program for other runtimes: images in, scores and maps out, in batches of one or more.

    uint8 (b, c, h, w) -> scores float32 (b,), maps float32 (b, h, w)

Height and width are fixed, and images come at the size the model works at: the resizing that Detector does is Pillow's,
and stays outside. Everything is plain torch in float32, so that neither format needs this package to run. What is
written is run on random images, and compared, before it takes its name.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anomaly_map import pixel_weights
from .bank import host_rows
from .contexts import DIRECTIONS
from .detector import Detector
from .errors import CpcFastError, UsageError
from .files import write_whole
from .images import quoted
from .latents import encode
from .model import IMAGENET, mirrors
from .patches import extract_patches, grid_shape, patch_places, places_turned_over, turned_over
from .predictions import seen_turned
from .scoring import at_places, closed, combined
from .shapes import Patches
from .version import __version__

NEVER = 1e30  # above any calibrated loss
TOLERANCE = 1e-4  # of scores and maps, relative where they exceed 1
FORMATS = {"torch": "detector.pt2", "onnx": "detector.onnx"}


class Program(nn.Module):
    """All of a detector as one function of a batch; `size` is (h, w) of the images.

    >>> # Program(detector, (128, 128))(torch.zeros(5, 1, 128, 128, dtype=torch.uint8))  ->  (5,), (5, 128, 128)
    """

    bank: Tensor
    step_mean: Tensor
    step_spread: Tensor
    place_mean: Tensor
    place_spread: Tensor
    rows: Tensor
    columns: Tensor
    places: Tensor

    def __init__(self, detector: Detector, size: tuple[int, int]) -> None:
        super().__init__()
        config, found = detector.config, detector.calibration
        self.model = copy.deepcopy(detector.model).float().cpu().eval().requires_grad_(False)
        self.config = config
        self.lengths = config.patch_size, config.scoring_stride
        self.gy, self.gx = grid_shape(*size, *self.lengths)
        for name, value in {
            "bank": host_rows(detector.bank),
            "step_mean": found.step_mean,
            "step_spread": found.step_spread,
            "place_mean": at_places(found.place_mean, self.gy, self.gx),
            "place_spread": at_places(found.place_spread, self.gy, self.gx),
            "rows": pixel_weights(size[0], *self.lengths, torch.device("cpu")),
            "columns": pixel_weights(size[1], *self.lengths, torch.device("cpu")),
            "places": patch_places(torch.tensor([[0.0, 0.0, *size]]), size, *self.lengths),
        }.items():
            self.register_buffer(name, value.detach().float().cpu().clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        config, model = self.config, self.model
        pixels = images.float()
        if config.standardise == "set":
            pixels = (pixels - model.pixel_mean) / model.pixel_spread
        elif config.standardise == "imagenet":
            mean, spread = (pixels.new_tensor(value)[:, None, None] for value in IMAGENET[config.channels])
            pixels = (pixels / 255 - mean) / spread
        else:
            centred = pixels - pixels.mean((1, 2, 3), keepdim=True)
            pixels = centred / centred.square().mean((1, 2, 3), keepdim=True).sqrt().clamp_min(1.0)
        grid = ((self._voices(pixels) - self.place_mean) / self.place_spread).amax(1)
        grid = closed(grid, config.closing)
        maps = self.rows @ grid @ self.columns.T
        return maps.amax((1, 2)), maps

    def _voices(self, pixels: Tensor) -> Tensor:
        """Of an image and its mirror images, seen by each member, (b, voices, gy, gx)."""
        views = mirrors(self.config)
        usual = (t.chunk(len(views)) for t in (self.step_mean, self.step_spread))
        patches = extract_patches(pixels, *self.lengths)
        seen = [self._view(turned_over(patches, axes), axes, *own) for axes, *own in zip(views, *usual, strict=True)]
        return combined(torch.stack([way for ways in seen for way in ways]), self.config.ensemble)

    def _view(self, patches: Patches, axes: tuple[int, ...], step_mean: Tensor, step_spread: Tensor) -> list[Tensor]:
        """What the neighbours say of each patch, and its place where the model knows of places, with these axes of (c,
        h, w) turned over: of each member (b, voices, gy, gx), in the image as it was before."""
        gy, gx, config = self.gy, self.gx, self.config
        members = []
        for member, bank, means, spreads in zip(
            self.model.members,
            self.bank.chunk(config.members, -1),
            *(t.chunk(config.members) for t in (step_mean, step_spread)),
            strict=True,
        ):

            def loss(predicted: Tensor, target: Tensor, i: int, bank=bank, means=means, spreads=spreads) -> Tensor:
                """Calibrated, (..., d) -> (...)."""
                others = torch.logsumexp(predicted @ bank.T, -1)
                return (F.softplus(others - (predicted * target).sum(-1)) - means[i]) / spreads[i]

            abouts, mades, placed = [], [], []
            part = encode(member.encoder, patches)  # (b, gy, gx, d)
            contexts, weight = member.context(part, config.finer), member.predictor.weight
            contexts = contexts.flip([axis + 1 for axis in axes])
            part = part.flip(axes)
            for i in range(config.directions * config.steps):
                direction, step = divmod(i, config.steps)
                own = seen_turned(direction, axes)  # what is up here is down there
                y, x = (config.offsets[step] * config.finer * towards for towards in DIRECTIONS[direction])
                if abs(y) >= gy or abs(x) >= gx:
                    continue
                top, left, bottom, right = max(0, -y), max(0, -x), gy - max(0, y), gx - max(0, x)
                source = contexts[own if len(contexts) > 1 else 0][:, top:bottom, left:right]
                target = part[:, top + y : bottom + y, left + x : right + x]
                found = loss(F.linear(source, weight[own * config.steps + step]), target, i)  # (b, h', w')
                abouts.append((found, (left + x, gx - right - x, top + y, gy - bottom - y)))
                mades.append((found, (left, gx - right, top, gy - bottom)))
            if member.place is not None:
                places = places_turned_over(self.places, axes)
                placed.append(loss(F.linear(member.place(places), weight[-1]), part, -1))
            grid = patches.new_zeros(patches.shape[0], gy, gx)  # len would fix the batch
            if abouts:
                about, made = _median(abouts), _median(mades)
                grid = torch.where(about >= NEVER, made.where(made < NEVER, 0.0), about)
            members.append(torch.stack([grid, *placed], 1))
        return members


def size_for(detector: Detector, size: tuple[int, int] | None) -> tuple[int, int]:
    """(h, w) of the images to export for: as asked, or that of the training images. Raises UsageError for none."""
    least = detector.config.patch_size
    works = max(least + 3 * detector.config.patch_stride, *(detector.sides or (0, 0)))  # four patches at least
    if size is None:
        match = re.fullmatch(r"(\d+) x (\d+)", detector.trained_on.get("image size", ""))
        if match is None:
            raise UsageError(
                f"The training images had several sizes, and an exported program takes one: name it, height x width "
                f"from {least} pixels (one patch) each way, and cut or scale what you give to it, as --size "
                f"{works}x{works}."
            )
        size = (int(match[1]), int(match[2]))
    if not all(least <= side <= 8192 for side in size):
        raise UsageError(
            f"size is {size[0]} x {size[1]}; both sides must be from one patch ({least}) to 8192 pixels: "
            f"--size {works}x{works}."
        )
    return size


def _median(parts: list[tuple[Tensor, tuple[int, int, int, int]]]) -> Tensor:
    """At each place of the grid the median of the parts that are there, (b, gy, gx), NEVER where none is.

    Args:
        parts: values (b, h, w), and how far they are from the edges of the grid, as torch's pad counts.
    """
    rising = torch.stack([F.pad(values, edges, value=NEVER) for values, edges in parts]).sort(0).values
    here = [F.pad(torch.ones_like(values[:1], dtype=torch.long), edges) for values, edges in parts]
    count = torch.stack(here).sum(0)
    middle = [((count - more).clamp_min(0) // 2)[None].expand(1, *rising.shape[1:]) for more in (1, 0)]
    median = (rising.gather(0, middle[0]) + rising.gather(0, middle[1]))[0] / 2
    return rising[-1].where(rising[-1].isnan(), median)  # where one is none, it sorts last and is the answer


def export(
    detector: Detector, path: str | os.PathLike, format: str = "torch", size: tuple[int, int] | None = None
) -> float:
    """Write a detector as a program, and return how far its results on random images are from those of torch here.

    Where predict computes in bfloat16, its scores differ from the program's: docs/reliability.md, "Serving".

    Args:
        path: the file to write, whole or not at all.
        format: "torch" (torch.export; to load it takes torch alone) or "onnx" (needs cpc_fast[onnx]).
        size: (h, w) of the images; by default that of the training images, where they had one.

    Raises UsageError for another format or size, CpcFastError where a package is missing, or where the difference
    exceeds TOLERANCE.

    >>> # export(Detector.load("runs/parts"), "parts.onnx", "onnx")  ->  2e-06
    """
    if format not in FORMATS:
        raise UsageError(f"There is no format {format!r}; there are {' and '.join(FORMATS)}.")
    config, size = detector.config, size_for(detector, size)
    program = Program(detector, size)
    about = {
        "cpc_fast": __version__, "input": "uint8 images (batch, channels, height, width)", "channels": config.channels,
        "depth": config.depth or 16,  # grey of 16 bits, v, becomes uint8 as v >> (depth - 8)
        "height": size[0], "width": size[1], "outputs": ["scores", "maps"], "threshold": detector.threshold.value,
    }  # fmt: skip
    write, load = (_as_torch, _torch_runner) if format == "torch" else (_as_onnx, _onnx_runner)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, config.channels, *size), dtype=np.uint8)
    images[1:3] //= np.array([2, 8], np.uint8)[:, None, None, None]  # darker, with less contrast
    worst = 0.0

    def compared(aside: Path) -> None:
        nonlocal worst
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            write(program, torch.from_numpy(images[:2].copy()), aside, json.dumps(about))
            run = load(aside)
        for batch in (images, images[3:]):
            with torch.inference_mode():
                expected = [value.numpy() for value in program(torch.from_numpy(batch))]
            for mine, theirs in zip(expected, run(batch), strict=True):
                worst = max(worst, float((abs(mine - theirs) / np.maximum(1, abs(mine))).max()))
        if not worst <= TOLERANCE:
            raise CpcFastError(
                f"The {format} program differs from torch by {worst:.2g} on random images, more than {TOLERANCE}, so "
                f"{quoted(path)} was not written. Another version of the exporting packages may do better."
            )

    write_whole(Path(path), compared)
    return worst


Runner = Callable[[np.ndarray], list[np.ndarray]]


def _batch() -> dict[str, dict[int, object]]:
    return {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}


def _as_torch(program: Program, example: Tensor, path: Path, about: str) -> None:
    exported = torch.export.export(program, (example,), dynamic_shapes=_batch())
    file = io.BytesIO()  # torch's writer ends the process where a disk is full
    torch.export.save(exported, file, extra_files={"about.json": about})
    path.write_bytes(file.getbuffer())


def _torch_runner(path: Path) -> Runner:
    with open(path, "rb") as file:
        module = torch.export.load(file).module()
    return lambda images: [value.detach().numpy() for value in module(torch.from_numpy(images))]


def _as_onnx(program: Program, example: Tensor, path: Path, about: str) -> None:
    try:
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    except ImportError:
        raise CpcFastError("ONNX needs packages: pip install 'cpc_fast[onnx]'.") from None
    # one warns that torchvision, which is not used, is missing, the other that it keeps a node as it is
    with _errors_only("torch.onnx"), _errors_only("onnxscript.optimizer"):
        exported = torch.onnx.export(
            program, (example,), dynamo=True, dynamic_shapes=_batch(), verbose=False, input_names=["images"],
            output_names=["scores", "maps"],
        )  # fmt: skip
    assert exported is not None
    exported.model.metadata_props["cpc_fast"] = about
    exported.save(path)


@contextlib.contextmanager
def _errors_only(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _onnx_runner(path: Path) -> Runner:
    try:
        import onnxruntime
    except ImportError:
        raise CpcFastError("Checking ONNX needs packages: pip install 'cpc_fast[onnx]'.") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda images: [np.asarray(value) for value in session.run(["scores", "maps"], {"images": images})]
