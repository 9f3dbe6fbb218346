"""Trials: what is fitted on which set and judged by which part of it, carried out once and kept.

    Job -> results/quality/<variant>/<set>/<method>-<seed>.json, written as soon as it is done
        -> runs/quality/<variant>/<set>-<seed>-<images>, the fitted detector; an interrupted fit goes on there

A stored result counts as long as its identity is that of the job: set, part, seed, settings, images. The code is not
part of it, or every commit would throw hours away: each result names its commit, and `--fresh` does it again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from cpc_fast.checkpoint import checkpoint_config
from cpc_fast.config import Config
from cpc_fast.detector import Detector, check_sizes
from cpc_fast.errors import CpcFastError
from cpc_fast.evaluate import evaluate, measure, score_all
from cpc_fast.files import write_text, write_whole
from cpc_fast.images import ImageCache, shorter_sides
from cpc_fast.layouts import find_train
from cpc_fast.progress import duration
from cpc_fast.report import contact_sheet
from cpc_fast.scored import Scored
from cpc_fast.train import Progress

from .baselines import BASELINES, Baseline
from .ledger import RESULTS, rounded, slug
from .measure import environment
from .sets import ROOT, Bed, fingerprint

Record = dict[str, Any]
OnStep = Callable[[Progress], None] | None
STORE, RUNS, SHEETS = RESULTS / "quality", ROOT / "runs" / "quality", ROOT / "docs" / "sheets"
CPC, DEFAULT = "cpc", "quality"
METHODS = (CPC, *BASELINES)


class Reading(Protocol):
    """Another way to read fitted detectors; `name` tells all of its settings."""

    @property
    def name(self) -> str: ...
    def make(self, config: Config, detectors: Sequence[Detector]) -> Baseline: ...


@dataclass(frozen=True)
class Job:
    """One result to be had: what is fitted, on what, and judged by what."""

    variant: str  # the preset, or a row of the ablations: the folder of its results
    bed: Bed
    data: Path
    method: str
    config: Config
    part: str = "report"
    reading: Reading | None = None  # what is made of the detectors fitted for `fits`, in place of one of its own
    fits: tuple[Job, ...] = ()

    @property
    def path(self) -> Path:
        part = f"-{self.part}" if self.bed.halved and self.part != "report" else ""
        return STORE / self.variant / slug(self.bed.name) / f"{slug(self.method)}-{self.config.seed}{part}.json"

    @property
    def run(self) -> Path:
        return RUNS / self.variant / f"{slug(self.bed.name)}-{self.config.seed}-{fingerprint(self.data, ())[:6]}"

    @property
    def fitted(self) -> bool:
        """Whether it fits a detector of its own."""
        return self.method == CPC and self.reading is None

    def baseline(self, detectors: Sequence[Detector] = ()) -> Baseline:
        if self.reading:
            return self.reading.make(self.config, detectors)
        return BASELINES[self.method](self.config, detectors[0] if detectors else None)

    def identity(self) -> Record:
        """What must be the same for a stored result to be this one."""
        config = json.loads(json.dumps(self.config.to_json()))
        if self.reading:
            settings = {"reading": self.reading.name, "of": [job.identity()["settings"] for job in self.fits]}
        elif self.method == CPC:
            settings = config
        elif self.method == "latent neighbour":
            settings = config | {"neighbours of": "our latents"}
        else:
            settings = {name: config[name] for name in ("image_size", "channels", "seed")} | self.baseline().settings()
        tests = self.bed.tests(self.data, self.part)
        return {
            "variant": self.variant, "set": self.bed.name, "method": self.method, "seed": self.config.seed,
            "part": self.part if self.bed.halved else "all", "settings": settings,
            "images": fingerprint(self.data, tests),
        }  # fmt: skip

    def stored(self) -> Record | None:
        if not self.path.exists():
            return None
        record = json.loads(self.path.read_text())
        told = record["identity"]
        return record if told | {"settings": completed(told["settings"])} == self.identity() else None


def completed(settings: Record) -> Record:
    """Stored settings with the fields that a Config has got since, at their defaults, which change nothing.

    >>> completed({"image_size": 128, "channels": 1, "seed": 0}), completed({"patch_size": 32})["directions"]
    ({'image_size': 128, 'channels': 1, 'seed': 0}, 4)
    """
    if "of" in settings:
        return settings | {"of": [completed(one) for one in settings["of"]]}
    if "patch_size" not in settings:
        return settings
    return json.loads(json.dumps(Config().to_json())) | settings


def detector_of(
    job: Job, device: torch.device, on_step: OnStep = None, fresh: bool = False
) -> tuple[Detector, float | None]:
    """Fitted, loaded, or (unless `fresh`) taken up where it was left; and the seconds of a whole fit."""
    config = job.config.fitted_to(shorter_sides(find_train(job.data), job.config.image_size))
    weights, checkpoint = (job.run / f"{name}.safetensors" for name in ("model", "checkpoint"))
    resume = False
    try:
        if weights.exists() and not fresh:
            detector = Detector.load(job.run, device)
            if detector.config == config:
                return detector, None
        elif checkpoint.exists() and not fresh:
            resume = checkpoint_config(job.run)[0] == config
    except CpcFastError as error:  # of another version, or damaged: it is ours to replace
        print(f"  Fitting anew: {error}", flush=True)
    started = time.perf_counter()
    detector = Detector.fit(
        job.data, config, out=job.run, resume=resume, fresh=not resume, device=device, on_step=on_step
    )
    return detector, None if resume else time.perf_counter() - started


def misfit(job: Job) -> str:
    """Why the images of a set cannot have what a fit asks for, as windows that are wider than they are; or nothing."""
    paths, config = find_train(job.data), job.config
    shapes = ImageCache(paths, size=config.image_size, channels=config.channels).shapes()
    try:
        for one in (job, *job.fits):
            check_sizes(shapes, [path.name for path in paths], one.config.fitted_to([min(s) for s in shapes]))
    except CpcFastError as error:
        return str(error)
    return ""


def carry_out(
    job: Job, device: torch.device, on_step: OnStep = None, fresh: bool = False
) -> tuple[Record, list[Scored], float]:
    """The record of a job, what it scored, and the threshold that its sheet draws (nan: none)."""
    tests = job.bed.tests(job.data, job.part)
    started = time.perf_counter()
    if job.fitted:
        detector, fitting = detector_of(job, device, on_step, fresh)
        begun = time.perf_counter()
        found = evaluate(detector, job.data, tests=tests)
        names = ("image", "pixel", "by_defect", "threshold", "speed")
        metrics, scored = {name: found.metrics[name] for name in names}, found.scored
        threshold = detector.threshold.value
    else:
        needs = job.fits or ((job,) if job.method == "latent neighbour" else ())
        method = job.baseline([detector_of(other, device, on_step)[0] for other in needs])
        images = ImageCache(find_train(job.data), size=job.config.image_size, channels=job.config.channels)
        method.fit(images)
        begun = time.perf_counter()
        fitting: float | None = begun - started
        scored = score_all(method.inspect, tests)
        metrics, threshold = measure(scored), float("nan")
    ended = time.perf_counter()
    record = {
        "identity": job.identity(), "metrics": rounded(metrics), "environment": environment(device),
        "seconds": rounded({"fit": fitting, "evaluate": ended - begun, "all": ended - started}),
    }  # fmt: skip
    return record, scored, threshold


class Clock:
    """How long what is left will take, by the pace of what is done: of the same set and method, else of the method."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        told, seconds = record["identity"], record["seconds"]
        if seconds["fit"] is not None:  # a fit taken up in its middle tells nothing
            method = "reading" if "reading" in told["settings"] else told["method"]
            self.seconds.setdefault((method, told["set"]), []).append(seconds["all"])

    def expects(self, job: Job) -> float | None:
        kind = "reading" if job.reading else job.method
        same = self.seconds.get((kind, job.bed.name))
        alike = [second for (method, _), all in self.seconds.items() if method == kind for second in all]
        known = same or alike
        return sum(known) / len(known) if known else None

    def left(self, jobs: Sequence[Job]) -> str:
        known = [self.expects(job) for job in jobs]
        unknown = sum(one is None for one in known)
        total = duration(sum(one for one in known if one is not None))
        if unknown == len(known):
            return "how long they take shows once one is under way"
        return f"about {total}" + (f" and {unknown} of unknown length" if unknown else "")


def carry_out_all(jobs: Sequence[Job], device: torch.device, *, minutes: float | None, fresh: bool = False) -> bool:
    """Every job that is not done and can be had; False when the time was up before."""
    stored = [job.stored() for job in jobs]
    clock = Clock(record for record in stored if record)
    todo = [job for job, record in zip(jobs, stored, strict=True) if fresh or record is None]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} results are there. To do: {len(todo)}", end="")
    print(f", {clock.left(todo)}." if todo else ".", flush=True)
    if commits := {r["environment"]["commit"] for r in stored if r} - {environment(device)["commit"]}:
        print(f"Some are of other commits ({', '.join(sorted(commits))}); --fresh does them again.", flush=True)
    started = time.monotonic()
    for i, job in enumerate(todo):
        title = f"[{i + 1}/{len(todo)}] {job.variant}, {job.bed.name}, {job.method}, seed {job.config.seed}"
        needs = clock.expects(job) or 0
        if minutes is not None and time.monotonic() - started + needs > 60 * minutes:
            print(f"{title}: would end after the {minutes:g} minutes given; go on with the same command.", flush=True)
            return False
        print(title, flush=True)
        told = False

        def on_step(step: Progress, waiting: int = sum(j.fitted for j in todo[i:])) -> None:
            nonlocal told
            done = (step.epoch - 1) * step.steps + step.step
            if not told and done >= max(10, step.steps * step.epochs // 50):
                told = True
                share = 1 - done / (step.steps * step.epochs)
                others = step.seconds_left / max(share, 1e-9) * (waiting - 1)
                more = f"; {duration(step.seconds_left + others)} for all {waiting} fits at this pace" if others else ""
                print(f"  {duration(step.seconds_left)} left for this fit{more}", flush=True)

        if why := misfit(job):
            print(f"  cannot be had: {why}", flush=True)
            continue
        record, scored, threshold = carry_out(job, device, on_step, fresh)
        write_text(job.path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        clock.add(record)
        if job.fitted and job.part == "report":
            write_sheet(job, scored, threshold)
        image, pixel = record["metrics"]["image"], record["metrics"]["pixel"]
        print(
            f"  image AUROC {number(image['auroc'])}, pixel AUROC {number(pixel['auroc'])}, AU-PRO "
            f"{number(pixel['au_pro_0.30'])}, {duration(record['seconds']['all'])}; left: "
            f"{clock.left(todo[i + 1:]) if todo[i + 1:] else 'nothing'}", flush=True,
        )  # fmt: skip
    return True


def sheet_path(job: Job) -> Path:
    """In docs for pictures that may be published and the default preset, else beside the runs."""
    published = job.bed.free and job.variant == DEFAULT
    return (SHEETS if published else RUNS / job.variant / "sheets") / f"{slug(job.bed.name)}.jpg"


def write_sheet(job: Job, scored: Sequence[Scored], threshold: float) -> None:
    """Of the first seed: the image of each kind whose score is the median of its kind, neither best nor worst."""
    if job.config.seed:
        return
    kinds: dict[str, list[Scored]] = {}
    for item in scored:
        kinds.setdefault(item.defect, []).append(item)
    order = sorted(kinds, key=lambda kind: (kind != "good", kind))
    shown = [sorted(kinds[kind], key=lambda item: item.score)[len(kinds[kind]) // 2] for kind in order]
    sheet = contact_sheet(shown, len(shown), pixel_threshold=threshold, size=128)
    write_whole(sheet_path(job), lambda aside: Image.fromarray(sheet).save(aside, "JPEG", quality=82))


def load(variant: str) -> list[Record]:
    """Every stored result of a variant."""
    return [json.loads(path.read_text()) for path in sorted((STORE / variant).glob("*/*.json"))]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
