"""The results of one device: a JSON file that grows case by case, and the table printed last.

    benchmarks/results/<device>.json = {"device", "environment", "ceilings", "cases": {name: record}, "scaling": {...},
                                        "end_to_end": {...}, "correctness": {...}}

Written after every addition (aside, then renamed), so that a run that is cut off keeps what it has. A case measured
again replaces its record; each record names its own commit and versions.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BESIDE = {"graph": "graph_ms", "with Python": "wall_ms"}  # other times of a row: see measure.py


def slug(name: str) -> str:
    """The name of a device as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def rounded(value: Any) -> Any:
    """Four significant digits everywhere: more would be noise in every diff."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def peak(found: dict[str, Any], dtype: str) -> float:
    """TFLOP/s that inputs of that type may reach; bf16 where it is not fast is multiplied as float32, and float32 as
    such or, on matrix units, as three products of tf32."""
    rates = found["matmul_tflop_s"]
    if dtype == "float32":
        return max(rates["float32"], rates.get("tf32", 0.0) / 3)
    return rates.get(dtype, rates["float32"])


class Ledger:
    """Opens (or begins) the file of a device."""

    def __init__(self, path: Path, environment: dict[str, Any]) -> None:
        self.path, self.touched = path, []
        self.told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        self.told |= {"device": environment["device"], "environment": environment}

    def add(self, section: str, name: str | None, record: dict[str, Any]) -> None:
        if name is None:
            self.told[section] = record
        else:
            self.told.setdefault(section, {})[name] = record
            self.touched.append((section, name))
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".json.part")
        aside.write_text(json.dumps(rounded(self.told), indent=1) + "\n")
        os.replace(aside, self.path)

    def table(self) -> str:
        """Case, provider, median, ratio to ours, extra memory, right or wrong, of what this run added."""
        lines = [("case", "provider", "median", "quartiles", "ratio", "extra memory", "")]
        for section, name in sorted(self.touched, key=lambda one: one[0]):  # cases, then end_to_end
            for row in self.told[section][name].get("rows", ()):  # a sweep has none
                if row["status"] != "unavailable":  # what cannot run here is in the file, with its reason
                    lines.append((name, row["provider"], *row_cells(row)))
                    name = ""
        if len(lines) == 1:
            return "no case was measured"
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def row_cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    """median, quartiles, ratio, extra memory, verdict."""
    verdict = {"ok": "correct", "wrong": "WRONG: " + row.get("why", "")}.get(
        row["status"], f"{row['status']}: {row.get('why', '')}"
    )
    if "median_ms" not in row:
        return "-", "-", "-", "-", verdict
    low, high = row["quartiles_ms"]
    extra = f"{row['extra_mb']:,.1f} MB" if row.get("extra_mb") is not None else "-"
    beside = "".join(f" ({name} {milliseconds(row[key])})" for name, key in BESIDE.items() if key in row)
    return (
        f"{milliseconds(row['median_ms'])} ms{beside}",
        f"{milliseconds(low)}-{milliseconds(high)}",
        f"{row['ratio']:.2f}x",
        extra,
        verdict,
    )


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
