"""One factor at a time: what each choice of a preset is worth, by the rows of ablations.toml.

    python -m benchmarks.ablate                         every row that is not done, one seed, grass and tiles
    python -m benchmarks.ablate --factors score pooling --sets grass
    python -m benchmarks.ablate --split report          the images that are reported; only for what is chosen already
    python -m benchmarks.ablate --tables                only write docs/ablations.md anew

Judged on grass and on the validation halves of the magnetic tiles and (with --sets "solar cells") the solar
cells, and kept as trials.py keeps them, under results/quality/ablations/<base>/<row>. The base is a cheaper version of
the preset: one network, fewer epochs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cpc_fast.config import Config, preset, read_settings
from cpc_fast.errors import UsageError

from .ledger import slug
from .quality import find_beds, parse
from .readings import Merge, Other
from .report import between, table, write_stale
from .sets import BEDS, ROOT, Bed
from .trials import CPC, Job, Reading, Record, carry_out_all, load

TABLE, DOCUMENT = Path(__file__).with_name("ablations.toml"), ROOT / "docs" / "ablations.md"
COLUMNS = [
    (group, name, path)
    for group, columns in (("grass", 3), ("magnetic tiles", 3), ("solar cells", 1))
    for name, path in (
        ("image AUROC", ("image", "auroc")), ("pixel AUROC", ("pixel", "auroc")), ("AU-PRO", ("pixel", "au_pro_0.30"))
    )[:columns]
]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of ablations.toml: one of changes, shifts_without, read and merge."""

    factor: str
    name: str
    why: str
    changes: dict[str, Any] = field(default_factory=dict)
    shifts_without: tuple[str, ...] = ()
    read: dict[str, Any] = field(default_factory=dict)
    merge: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        return slug(f"{self.factor}-{self.name}")

    @property
    def reads(self) -> bool:
        """Whether it looks at fits of other rows, and needs none of its own."""
        return bool(self.read or self.merge)

    def config(self, base: Config) -> Config:
        changes = {name: tuple(value) if isinstance(value, list) else value for name, value in self.changes.items()}
        if self.shifts_without:
            changes["shifts"] = tuple(shift for shift in base.shifts if shift not in self.shifts_without)
        return base.replace(**changes)


@dataclass(frozen=True)
class Ablations:
    """The table: a base, and rows that each change one thing of it."""

    preset: str
    changes: dict[str, Any]
    seeds: int
    rows: list[Row]

    @classmethod
    def read(cls, path: Path | None = None) -> Ablations:
        """Raises UsageError for a row that asks for nothing, or for two things, or for what there is not."""
        path = path or TABLE
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**row) for row in told["row"]]
        names = [row.name for row in rows if not row.reads]
        base = preset(told["preset"]).replace(**told["changes"])
        for row in rows:
            asked = sum(map(bool, (row.changes, row.shifts_without, row.read, row.merge)))
            if asked != 1:
                raise UsageError(
                    f"{path.name}: row {row.name!r} asks for {asked} things; give it one of changes, shifts_without, "
                    "read and merge."
                )
            if missing := set(row.merge) - set(names):
                raise UsageError(f"{path.name}: row {row.name!r} merges {sorted(missing)}, which no row fits.")
            row.config(base)  # raises for a field or value that there is not
            Other(**row.read)
        if len({row.slug for row in rows}) < len(rows):
            raise UsageError(f"{path.name}: two rows have the same factor and name.")
        return cls(told["preset"], told["changes"], told["seeds"], rows)

    @property
    def variant(self) -> str:
        return "-".join([self.preset, *(slug(f"{name}={value}") for name, value in self.changes.items())])

    def variant_of(self, row: Row | None) -> str:
        return self.variant if row is None else f"ablations/{self.variant}/{row.slug}"

    def base(self, bed: Bed | None = None) -> Config:
        """What rows are compared with, on this set."""
        return preset(bed.sibling(self.preset) if bed else self.preset).replace(**self.changes)

    def config(self, row: Row | None, bed: Bed | None = None) -> Config:
        base = self.base(bed)
        return (base if row is None else row.config(base)).replace(**bed.changes if bed else {})

    def asks_nothing(self, row: Row, bed: Bed | None = None) -> bool:
        """Whether the base is what the row asks for, or cannot have it."""
        if row.read.get("closing") == self.config(None, bed).closing:
            return True
        if row.read.get("mirrored"):
            return self.config(None, bed).mirrored
        if "nearest" in row.read.get("form", ""):  # the distance stands where the loss from a place would
            return self.config(None, bed).place
        try:
            return not row.reads and self.config(row, bed) == self.config(None, bed)
        except UsageError:  # as 1 direction with mirror images
            return True

    def jobs(self, beds: Sequence[tuple[Bed, Path]], rows: Sequence[Row], seeds: int, part: str) -> list[Job]:
        """The base first, then each row that asks for something."""
        return [
            self._job(row, bed, data, seed, part)
            for seed in range(seeds)
            for row in (None, *rows)
            for bed, data in beds
            if row is None or not self.asks_nothing(row, bed)
        ]

    def _job(self, row: Row | None, bed: Bed, data: Path, seed: int, part: str) -> Job:
        config = self.config(row, bed).replace(seed=seed)
        fits: tuple[Job, ...] = ()
        reading: Reading | None = None
        if row is not None and row.reads:
            members = [None, *(other for name in row.merge for other in self.rows if other.name == name)]
            fits = tuple(self._job(member, bed, data, seed, part) for member in members)
            reading = Merge(("base", *row.merge)) if row.merge else Other(**row.read)
        return Job(self.variant_of(row), bed, data, CPC, config, part, reading, fits)


def judged(ablations: Ablations, row: Row | None, part: str = "validation") -> list[Record]:
    told = [(record["identity"], record) for record in load(ablations.variant_of(row))]
    return [record for one, record in told if one["part"] == (part if BEDS[one["set"]].halved else "all")]


def base_of(record: Record, bases: Sequence[Record]) -> Record | None:
    """What a row is compared with: the base on the same set and kind of CPU, of the same commit if there is one.

    CPUs of one maker with the same vectors round alike, and fits on them end in the same weights. (Where a set's base
    was measured more than once, earlier records lie beside the last, under other names.)
    """

    def kind(one: Record) -> tuple[str, int, str, bool]:
        device, told = one["environment"]["device"], one["identity"]
        return told["set"], told["seed"], device.split()[0], "AVX-512" in device

    alike = [base for base in bases if kind(base) == kind(record)]
    same = [base for base in alike if base["environment"]["commit"] == record["environment"]["commit"]]
    return (same or alike or [None])[-1]


def tables(ablations: Ablations, part: str = "validation") -> str:
    """Every row with its difference from its base."""
    bases = judged(ablations, None, part)
    if not bases:
        return "Not measured yet: `python -m benchmarks.ablate` measures it."

    def value(record: Record | None, path: tuple[str, str]) -> float | None:
        return None if record is None else record["metrics"][path[0]][path[1]]

    def cell(records: Sequence[Record], group: str, path: tuple[str, str]) -> str:
        own = [record for record in records if record["identity"]["set"] == group]
        values, zeros = (
            [found for record in several if (found := value(record, path)) is not None]
            for several in (own, [base_of(record, bases) for record in own])
        )
        if not values:
            return "-"
        found = statistics.mean(values)
        return f"{found:.3f}" + (f" ({found - statistics.mean(zeros):+.3f})" if len(zeros) == len(values) else "")

    told = [
        ", ".join(f"**{found:.3f}**" for base in bases if base["identity"]["set"] == group
                  and (found := value(base, path)) is not None) or "-"
        for group, _, path in COLUMNS
    ]  # fmt: skip
    rows = [("**the base**", "", *told, "")]
    missing, same = [], []
    for row in ablations.rows:
        records = judged(ablations, row, part)
        cells = [cell(records, group, path) for group, _, path in COLUMNS]
        if set(cells) == {"-"}:
            beds = [BEDS[group] for group in dict.fromkeys(group for group, _, _ in COLUMNS) if group in BEDS]
            nothing = all(ablations.asks_nothing(row, bed) for bed in beds)
            (same if nothing else missing).append(f"{row.factor}: {row.name}")
            continue
        rows.append((row.factor, row.name, *cells, row.why))
    records = [record for row in (None, *ablations.rows) for record in judged(ablations, row, part)]
    seeds = {record["identity"]["seed"] for record in records}
    commits = ", ".join(dict.fromkeys(record["environment"]["commit"] for record in records))
    devices = ", ".join(dict.fromkeys(record["environment"]["device"] for record in records))
    head = ("factor", "change", *(f"{group}, {name}" for group, name, _ in COLUMNS), "why it is tried")
    changed = ", ".join(f"{name} {value}" for name, value in ablations.changes.items())
    text = (
        f"{table(head, rows)}\n\nThe base: `{ablations.preset}`, or its sibling for the set, with {changed}; in "
        f"brackets the difference from it, on the same kind of CPU and, where measured more than once, commit; seeds "
        f"{', '.join(map(str, sorted(seeds)))}; {devices}, commit {commits}."
    )
    for title, names in (("Not tried, as the preset has it so or cannot have it", same), ("Not measured yet", missing)):
        text += f"\n\n{title}: {'; '.join(names)}." if names else ""
    return text


def render() -> dict[Path, str]:
    """docs/ablations.md as the stored results make it."""
    return {DOCUMENT: between(DOCUMENT, "ablations", tables(Ablations.read()))}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--factors", nargs="+", help="only rows of these factors")
    parser.add_argument("--rows", nargs="+", help="only rows of these names")
    parser.add_argument("--split", choices=("validation", "report"), default="validation")
    parser.add_argument("--preset", help="another base than the table's")
    args = parse(parser, arguments, default_sets=["grass", "magnetic tiles"])
    ablations, done = Ablations.read(), True
    if not args.tables:
        if args.preset or args.set:
            changes = {} if args.preset else ablations.changes
            ablations = Ablations(
                args.preset or ablations.preset, changes | read_settings(args.set), ablations.seeds, ablations.rows
            )
        rows = [
            row
            for row in ablations.rows
            if (not args.factors or row.factor in args.factors) and (not args.rows or row.name in args.rows)
        ]
        jobs = ablations.jobs(find_beds(args.sets, args.tiles), rows, args.seeds or ablations.seeds, args.split)
        done = carry_out_all(jobs, torch.device(args.device), minutes=args.minutes, fresh=args.fresh)
        print(tables(ablations, args.split))
    write_stale(render())
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
