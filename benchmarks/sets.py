"""The sets that quality is judged on: where their images are, how a preset meets them, and which halves choose.

Choices are made on the textures, which are painted for that and reported all the same, and on the validation halves of
the magnetic tiles and the solar cells; their other halves are only reported (they chose once: docs/results.md).
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpc_fast.datasets import TEXTURES, write_elpv, write_textures
from cpc_fast.images import TestImage
from cpc_fast.layouts import find_test

ROOT = Path(__file__).parents[1]
TILES = ROOT.parent / "shared" / "data" / "magnetic_tile"
HALF_SEED = 2107  # of the split in halves; it stays as it is, or the halves have seen each other


@dataclass(frozen=True)
class Bed:
    """A set to judge on.

    Attributes:
        name: as it stands in tables and file names.
        find: the folder that holds it in MVTec layout, made under the folder given where it must be; or why not.
        changes: fields of the preset that this set needs otherwise.
        siblings: for a preset, the one of its family that is made for such a set.
        halved: whether its test images are split into a half to choose on and a half to report.
        free: whether its pictures may be published.
    """

    name: str
    find: Callable[[Path], Path | str]
    changes: dict[str, Any] = field(default_factory=dict)
    siblings: dict[str, str] = field(default_factory=dict)
    halved: bool = False
    free: bool = False

    def sibling(self, name: str) -> str:
        """The preset that meets this set in place of another."""
        return self.siblings.get(name, name)

    def tests(self, data: Path, part: str) -> list[TestImage]:
        """The test images of a part, "validation" or "report"; all of them where the set is not halved."""
        found = find_test(data)
        return halves(found)[part] if self.halved else found


def halves(tests: Sequence[TestImage], seed: int = HALF_SEED) -> dict[str, list[TestImage]]:
    """A seeded split of test images into two halves, defect by defect and the good ones too, by file name alone.

    An odd image goes to "report".
    """
    chosen: set[Path] = set()
    for defect in sorted({test.defect for test in tests}):
        paths = sorted((test.path for test in tests if test.defect == defect), key=lambda path: path.name)
        random = np.random.default_rng([seed, *defect.encode()])
        chosen |= {paths[i] for i in random.permutation(len(paths))[: len(paths) // 2]}
    return {
        "validation": [test for test in tests if test.path in chosen],
        "report": [test for test in tests if test.path not in chosen],
    }


def _textures(folder: Path) -> Path:
    there = (folder / "textures" / "dataset.json").exists()
    return folder / "textures" if there else write_textures(folder / "textures")


def _tiles(folder: Path) -> Path | str:
    beside = [path for path in (folder / "magnetic_tile", TILES) if path.is_dir()]
    return beside[0] if beside else f"no folder {folder / 'magnetic_tile'}; name one with --tiles"


def _elpv(folder: Path) -> Path | str:
    if (folder / "elpv" / "dataset.json").exists():
        return folder / "elpv"
    if importlib.util.find_spec("elpv_dataset") is None:
        return "the package elpv-dataset is not installed: pip install 'cpc_fast[elpv]'"
    return write_elpv(folder / "elpv")


# Textures are homogeneous, cells lie alike, and have presets for that; cells are scaled; every other choice is the
# preset's. No image here is so large that patches would grow.
SAME_PATCHES = {"made_for": None}
BEDS = {
    bed.name: bed
    for bed in (
        *(
            Bed(
                name,
                lambda folder, name=name: _textures(folder) / name,
                SAME_PATCHES,
                siblings={"quality": "texture"},
                free=True,
            )
            for name in TEXTURES
        ),
        Bed("magnetic tiles", _tiles, SAME_PATCHES, halved=True),
        Bed("solar cells", _elpv, SAME_PATCHES | {"image_size": 128}, siblings={"quality": "aligned"}, halved=True),
    )
}
GROUPS = {"textures": TEXTURES, "magnetic tiles": ("magnetic tiles",), "solar cells": ("solar cells",)}


def fingerprint(data: Path, tests: Sequence[TestImage]) -> str:
    """Which images a result rests on: the names and sizes of the files to learn from and to judge."""
    paths = [*sorted((data / "train" / "good").iterdir()), *(test.path for test in tests)]
    listed = "\n".join(f"{path.relative_to(data)} {path.stat().st_size}" for path in paths)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]
