"""What `gpu_check` does on the device, each in a worker process: ceilings, a probe, a case, a model, a tile.

Each function takes and returns what a pickle can hold. A race tells which provider is at work, so that the one that
crashed is known, and left out when the case is tried again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

from .workers import tell

ROOT = Path(__file__).parents[1]
CASE_SECONDS = 6.0  # of timed rounds
SMALL_MODEL = {"side": 96, "width": 8, "image_size": None, "patch_size": 32, "patch_stride": 16, "stem": 4}


def prepare(dry: bool) -> None:
    """Import from the checkout itself; the interpreter must be chosen before Triton is imported."""
    sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "kernels")) if path not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [*sys.path[:2], os.environ.get("PYTHONPATH")]))
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("jaxtyping") is None:  # shapes in signatures cost nothing, and mean nothing here
        stand_in = types.ModuleType("jaxtyping")
        anything = type("Anything", (), {"__class_getitem__": classmethod(lambda cls, item: Any)})
        vars(stand_in).update(dict.fromkeys(("Bool", "Float", "Int", "UInt8"), anything))
        sys.modules["jaxtyping"] = stand_in


def device(dry: bool):
    import torch

    return torch.device("cpu" if dry else "cuda")


def environment(dry: bool) -> dict[str, Any]:
    from benchmarks import measure

    return measure.environment(device(dry))


def ceilings(dry: bool) -> dict[str, Any]:
    from benchmarks import measure

    return measure.ceilings(device(dry), small=dry)


def probes(dry: bool) -> list[Any]:
    from benchmarks import correctness

    return list(correctness.probes(small=dry))


def check_probe(probe) -> dict[str, Any]:
    import torch

    from benchmarks import correctness

    torch.set_num_threads(2)  # several of these run at once, each with a float64 truth to compute
    return correctness.check(probe, device(os.environ.get("TRITON_INTERPRET") == "1"))


def wanted(provider, case, dry: bool) -> bool:
    """chunked and gather run on a GPU too, and are there to be beaten; compilers take longer than a dry run has, and
    FlexAttention's heads are not made for more features."""
    wide = provider.name == "FlexAttention" and case.d > 256
    return not (provider.compiles and (dry or wide))


def compile_case(case) -> None:
    """One step of each provider that compiles, ours first: what it made is on disk then, for whoever measures it."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # there are enough processes
    import torch

    from benchmarks import measure, providers

    torch._dynamo.reset()
    dry = os.environ.get("TRITON_INTERPRET") == "1"
    problem = providers.make_problem(case.tiny() if dry else case, 0, device(dry))
    for provider in providers.PROVIDERS[case.op]:
        small = provider.memory(case) < measure.free_bytes(device(dry)) / 16  # others are at it, too
        if (provider.compiles or provider.name == "ours: triton") and small and wanted(provider, case, dry):
            tell(provider.name)
            with contextlib.suppress(Exception):
                problem.clear()
                provider.build(case, device(dry))(problem).backward()


def measure_case(case, dry: bool, ceilings: dict[str, Any], left_out: list[str]) -> dict[str, Any]:
    """The record of one case, and whether the process is sound; `left_out` providers are not tried."""
    import torch

    from benchmarks import measure

    def asked(provider) -> bool:
        return provider.name not in left_out and wanted(provider, case, dry)

    race = measure.Race(case, device(dry), 0.2 if dry else CASE_SECONDS, only=asked, memory=not dry)
    if race.base is not None:
        race.run()
    sound = race.capture()
    tell("")
    record = race.record(ceilings) | {"sound": sound}
    del race
    if sound and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def measure_model(kind: str, options: dict[str, Any], rounds: int, dry: bool) -> tuple[str, dict[str, Any]]:
    """Name and record of a contest of end_to_end.py; kind: training or scoring."""
    from benchmarks import end_to_end

    contest = getattr(end_to_end, kind)(device(dry), **options)
    contest.run(rounds)
    return contest.name, contest.record()


# --- tune -----------------------------------------------------------------------------------------------------------


class Bench:
    """One problem, its truth, and the op whose tiles are tried on it."""

    def __init__(self, op: str, case, dry: bool) -> None:
        from benchmarks import providers
        from cpc_kernels import launching, sampled_tiles, tiles

        self.op, self.case, self.device = op, case, device(dry)
        self.sampled = op == "gathered"
        self.problem = providers.make_problem(case, 0, self.device)
        self.problem.anchors.requires_grad_(op != "scores")
        self.problem.candidates.requires_grad_(op == "backward")
        self.width = 16 if case.dtype != "float32" else 32
        self.arch = launching._arch(self.device)
        # as the launcher asks: how float32 multiplies is part of the key
        self.precision = "ieee" if self.width == 16 else launching.default_precision(self.device)
        name = "triton_sampled_info_nce" if self.sampled else "triton_info_nce"
        self.module = importlib.import_module(f"cpc_kernels.{name}")
        self.loss = providers.find(case.op, "ours: triton").build(case, self.device)
        found = providers.truth(case, providers.make_problem(case, 0, self.device))
        self.true = {"loss": found["loss"], "anchors": found["dq"], "candidates": found["dk"]}
        self.holder, self.attribute = (sampled_tiles, "gathered") if self.sampled else (tiles, "tile")
        self.original = getattr(self.holder, self.attribute)

    def present(self):
        if self.sampled:
            return self.original(self.case.d, self.case.s, self.arch)
        return self.original(self.op, self.case.d, self.width, self.arch, self.precision)

    def put(self, tile) -> None:
        """The launchers find this tile from now on."""

        def found(op, *rest):
            return tile if self.sampled or op.split("+")[0] == self.op else self.original(op, *rest)

        setattr(self.holder, self.attribute, found)
        for kernel in vars(self.module).values():  # compiled forms of the tile before
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()

    def step(self) -> dict[str, Any]:
        self.problem.clear()
        value = self.loss(self.problem)
        if value.requires_grad:
            value.backward()
        grads = {name: getattr(self.problem, name).grad for name in ("anchors", "candidates")}
        return {"loss": value.detach(), **grads}

    def spills(self) -> int:
        """Of every compiled form of the module's kernels (none under the interpreter)."""
        kernels = [kernel for kernel in vars(self.module).values() if hasattr(kernel, "device_caches")]
        caches = [cache[0] for kernel in kernels for cache in kernel.device_caches.values()]
        return sum(getattr(compiled, "n_spills", 0) or 0 for cache in caches for compiled in cache.values())


@functools.cache
def bench(op: str, case, dry: bool) -> Bench:
    return Bench(op, case, dry)


def present_tile(op: str, case, dry: bool) -> tuple[Any, str]:
    """The tile of the table, and the architecture whose column it is in."""
    on = bench(op, case, dry)
    return on.present(), on.arch


def try_tile(op: str, case, dry: bool, tile) -> tuple[float | None, str]:
    """Milliseconds of a whole step with this tile, or None and what is wrong with it."""
    from benchmarks import measure, providers

    on = bench(op, case, dry)
    on.put(tile)
    try:
        out = on.step()
    except Exception as problem:  # it does not compile, or there is not enough shared memory
        measure.synchronize(on.device)  # raises where no call can succeed any more
        return None, f"{type(problem).__name__}: {problem}"[:150]
    errors = {
        name: float((out[name].double() - true).norm() / true.norm())
        for name, true in on.true.items() if out[name] is not None
    }  # fmt: skip
    if not all(error <= providers.TOLERANCE[case.dtype] for error in errors.values()):
        return None, f"wrong: {errors}"
    if on.spills():
        return None, f"spills {on.spills()}"
    return measure.median_ms(on.step, on.device, 3 if dry else 15)[0], ""
