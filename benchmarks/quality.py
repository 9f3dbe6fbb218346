"""How well defects are found: a preset and the baselines on every set, with several seeds.

    python -m benchmarks.quality              the preset `quality`, three seeds, everything that is not done yet
    python -m benchmarks.quality --sets grass --seeds 1 --methods cpc --minutes 30
    python -m benchmarks.quality --tables     only write the tables anew, from what is there

Each (set, method, seed) becomes one file of benchmarks/results/quality/<preset> as soon as it is done, and is not done
again unless its settings or its images have changed (or --fresh is given): see trials.py. The tables of docs/results.md
and the README's are made of these files alone, and a test fails when they are not; docs/sheets holds the pictures that
may be published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cpc_fast.config import preset, read_settings
from cpc_fast.progress import duration

from .baselines import BASELINES
from .ledger import slug
from .report import between, table, write_stale
from .sets import BEDS, GROUPS, ROOT, Bed
from .trials import CPC, DEFAULT, METHODS, SHEETS, Job, Record, carry_out_all, load

SEEDS = 3
DOCUMENT, FRONT = ROOT / "docs" / "results.md", ROOT / "README.md"
COLUMNS = {
    "image AUROC": ("image", "auroc"), "image AP": ("image", "ap"),
    "pixel AUROC": ("pixel", "auroc"), "AU-PRO 0.30": ("pixel", "au_pro_0.30"),
}  # fmt: skip
SHORT = ("image AUROC", "pixel AUROC", "AU-PRO 0.30")
RECALL, ALARMS = ("threshold", "recall"), ("threshold", "fpr_on_test_normals")


# --- tables ----------------------------------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float | None]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 and np.ptp(known) > 0 else ""
    return f"{np.mean(known):.3f}{spread}"


def of_group(records: Sequence[Record], group: Sequence[str], method: str, path: tuple[str, str]) -> list[float | None]:
    """One value for each seed: the mean over the sets of a group, of the seeds for which all of them are there."""
    by_seed: dict[int, list[float | None]] = {}
    for record in records:
        told = record["identity"]
        if told["method"] == method and told["set"] in group:
            by_seed.setdefault(told["seed"], []).append(record["metrics"][path[0]][path[1]])
    whole = [values for _, values in sorted(by_seed.items()) if len(values) == len(group)]
    return [None if None in values else float(np.mean(np.array(values, float))) for values in whole]


def tables(records: Sequence[Record], variant: str = DEFAULT) -> str:
    """All of what stands between the markers."""
    if not records:
        return f"Not measured yet: `python -m benchmarks.quality --preset {variant}` measures it."
    parts = [_summary(records), _side_by_side(records), _by_defect(records)]
    sheets = [name for name in BEDS if BEDS[name].free and (SHEETS / f"{slug(name)}.jpg").exists()]
    if variant == DEFAULT and sheets:
        pictures = "\n\n".join(
            f"![{name}: image, map, and outline of what was found](sheets/{slug(name)}.jpg)" for name in sheets
        )
        parts.append(
            "For each defect the image whose score is the median of its kind (cyan: found, white: truth):\n\n"
            + pictures
        )
    return "\n\n".join([*(part for part in parts if part), _origin(records, variant)])


def _summary(records: Sequence[Record]) -> str:
    names = dict(GROUPS) | {name: (name,) for name in GROUPS["textures"]}
    order = ("textures", *GROUPS["textures"], *(group for group in GROUPS if group != "textures"))
    rows = []
    for name in order:
        cells = [mean_and_spread(of_group(records, names[name], CPC, path)) for path in COLUMNS.values()]
        alarms, recall = (mean_and_spread(of_group(records, names[name], CPC, path)) for path in (ALARMS, RECALL))
        if set(cells) != {"-"}:
            rows.append((f"**{name}**" if name in GROUPS else name, *cells, alarms, recall))
    return table(("set", *COLUMNS, "good ones flagged", "defects flagged"), rows) if rows else ""


def _side_by_side(records: Sequence[Record]) -> str:
    """Every method on every group; the best mean of a column in bold."""
    columns = [(group, name) for group in GROUPS for name in SHORT]
    found = {
        (method, column): [v for v in of_group(records, GROUPS[column[0]], method, COLUMNS[column[1]]) if v is not None]
        for method in METHODS
        for column in columns
    }
    columns = [column for column in columns if any(found[method, column] for method in METHODS)]
    best = {c: max(np.mean(found[method, c]) for method in METHODS if found[method, c]) for c in columns}
    rows = []
    for method in METHODS:
        cells = []
        for column in columns:
            values, text = found[method, column], mean_and_spread(found[method, column])
            cells.append(f"**{text}**" if values and np.mean(values) == best[column] else text)
        if set(cells) - {"-"}:
            rows.append((f"{method} (ours)" if method == CPC else method, *cells))
    return table(("method", *(f"{group}, {name}" for group, name in columns)), rows) if rows else ""


def _by_defect(records: Sequence[Record]) -> str:
    rows = []
    for name in BEDS:
        own = [r for r in records if r["identity"]["method"] == CPC and r["identity"]["set"] == name]
        defects = sorted({defect for record in own for defect in record["metrics"]["by_defect"]})
        for defect in defects:
            several = [record["metrics"]["by_defect"][defect] for record in own]
            keys = ("image_auroc", "pixel_auroc", "au_pro_0.30")
            cells = [mean_and_spread([one[key] for one in several]) for key in keys]
            rows.append((f"{name}, {defect}", str(several[0]["count"]), *cells))
    return table(("defect", "images", *SHORT), rows) if rows else ""


def front(records: Sequence[Record], variant: str = DEFAULT) -> str:
    """The README's table: a group in a row, and no more digits than seeds leave standing."""
    rows, seeds = [], set()
    for title, group in (("magnetic tiles",) * 2, ("painted textures", "textures"), ("solar cells",) * 2):
        names = GROUPS.get(group, ())
        image, pixel, regions, recall, alarms = (
            [value for value in of_group(records, names, CPC, path) if value is not None]
            for path in (*(COLUMNS[name] for name in SHORT), RECALL, ALARMS)
        )
        if not image:  # no seed has all sets
            continue
        ours, presets, fits = _fitted(records, names, variant)
        seeds |= {record["identity"]["seed"] for record in ours}
        took = f"{min(fits) / 60:.0f} to {max(fits) / 60:.0f} min" if fits else "not recorded"
        areas = [f"{np.mean(values):.2f}" if values else "no masks" for values in (image, pixel, regions)]
        rows.append((f"{title}, {presets}", took, *areas, f"{np.mean(recall):.0%}, {np.mean(alarms):.0%}"))
    return table((f"{len(seeds)} seeds", "fit, one core", *SHORT, "flagged: defects, good ones"), rows)


def _fitted(records: Sequence[Record], names: Sequence[str], variant: str) -> tuple[list[Record], str, list[float]]:
    """Our records of some sets, the presets they are of, and the seconds of the fits whose time was kept."""
    ours = [r for r in records if r["identity"]["set"] in names and r["identity"]["method"] == CPC]
    presets = ", ".join(dict.fromkeys(f"`{BEDS[name].sibling(variant)}`" for name in names))
    return ours, presets, [r["seconds"]["fit"] for r in ours if r["seconds"]["fit"]]


def _origin(records: Sequence[Record], variant: str) -> str:
    """What was fitted where, a group at a time, and the baselines."""

    def told(some: Sequence[Record]) -> str:
        each = {name: sorted({str(r["environment"][name]) for r in some}) for name in ("device", "torch", "commit")}
        days = sorted(r["environment"]["date"] for r in some)
        when = days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}"
        device, torch_version, commit = (", ".join(values) for values in each.values())
        return f"{device}; torch {torch_version}, commit {commit}, {when}"

    lines = ["After ± the standard deviation over seeds; `textures` is the mean of its three sets."]
    for group, names in GROUPS.items():
        ours, presets, fits = _fitted(records, names, variant)
        if not ours:
            continue
        seeds = len({r["identity"]["seed"] for r in ours})
        took = f", a fit {' to '.join(dict.fromkeys(map(duration, (min(fits), max(fits)))))}" if fits else ""
        lines.append(f"- {group}: {presets}, {seeds} {'seed' if seeds == 1 else 'seeds'}{took}; {told(ours)}.")
    if others := [r for r in records if r["identity"]["method"] != CPC]:
        days = sorted(r["environment"]["date"] for r in others)
        where = f"{len({r['environment']['device'] for r in others})} CPUs, {days[0]} to {days[-1]}"
        lines.append(f"- the other methods: {where}; their records name machines and commits.")
    return "\n".join([lines[0], "", *lines[1:]])


def reported(variant: str) -> list[Record]:
    """Stored results on images to report."""
    return [record for record in load(variant) if record["identity"]["part"] != "validation"]


def render() -> dict[Path, str]:
    """docs/results.md and the README as the stored results make them."""
    records = reported(DEFAULT)
    return {
        DOCUMENT: between(DOCUMENT, "quality", tables(records)),
        FRONT: between(FRONT, "found", front(records)),
    }


# --- command line ----------------------------------------------------------------------------------------------------


def find_beds(names: Sequence[str], tiles: Path | None) -> list[tuple[Bed, Path]]:
    """Each set that is at hand, with its folder; says why another is not."""
    found = []
    for name in names:
        bed = BEDS[name]
        where = tiles if tiles and name == "magnetic tiles" else bed.find(ROOT / "data")
        if isinstance(where, str):
            print(f"Skipped {name}: {where}.", flush=True)
        else:
            found.append((bed, where))
    return found


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None, default_sets: Sequence[str] | None = None
) -> argparse.Namespace:
    """The options that benchmarks.quality and benchmarks.ablate share."""
    choices = (*BEDS, "textures")
    parser.add_argument("--sets", nargs="+", choices=choices, metavar="SET", help=f"of: {', '.join(choices)}")
    parser.add_argument("--seeds", type=int, help="how many: 0, 1, ...")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end after so many minutes")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--tiles", type=Path, help="folder of the magnetic tiles, in MVTec layout")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a field of the preset")
    parser.add_argument("--fresh", action="store_true", help="do again what is done")
    parser.add_argument("--tables", action="store_true", help="only write the tables from what is there")
    args = parser.parse_args(arguments)
    names = args.sets or default_sets or list(BEDS)
    args.sets = list(
        dict.fromkeys(n for name in names for n in (GROUPS["textures"] if name == "textures" else (name,)))
    )
    return args


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default=DEFAULT)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    args = parse(parser, arguments)
    done = True
    if not args.tables:
        settings = read_settings(args.set)
        config = preset(args.preset).replace(**settings)
        variant = "-".join([args.preset, *(slug(setting) for setting in args.set)])
        jobs = [
            Job(
                variant,
                bed,
                data,
                method,
                preset(bed.sibling(args.preset)).replace(**settings | bed.changes, seed=seed),
            )
            for seed in range(args.seeds or SEEDS)
            for bed, data in find_beds(args.sets, args.tiles)
            for method in args.methods
            if seed == 0 or method == CPC or BASELINES[method](config, None).seeded
        ]
        done = carry_out_all(jobs, torch.device(args.device), minutes=args.minutes, fresh=args.fresh)
        print(tables(reported(variant), variant))
    write_stale(render())
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
