"""Committed results to the tables in README.md and docs/performance.md, and to the plots in docs/plots.

    python -m benchmarks.report                      write them
    python -m benchmarks.report --check              exit 1 and name what is stale
    python -m benchmarks.report --predictions FILE   take over what `python -m benchmarks.aot --json FILE` predicted

Text between `<!-- NAME:start -->` and `<!-- NAME:end -->` is ours, the rest is not touched. Measured and predicted stay
apart; where no figure exists, the table says "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import plots
from .cases import CASES, Case
from .ledger import BESIDE, RESULTS, milliseconds, peak, rounded, slug

ROOT = Path(__file__).parents[1]
PREDICTIONS = RESULTS / "predictions.json"
HEADLINES = (
    "CPC, S 16, D 256",
    "CPC v1, S 64, D 1024",
    "CPC, 20000 anchors, S 256",
    "CLIP 32k, D 256",
    "CLIP 32k, D 512",
    "dense 8192, D 256",
    "dense 8192, D 256, bf16",
    "bank of 1M patches, 4k queries",
)
PLAIN = ("eager", "eager, fp32", "eager gather")
FASTER = (  # on a CPU: case, ours, than whom, how many times at least
    ("CPC, S 16, D 256", "ours: cpp", "eager gather", 30),
    ("CPC, S 16, D 256", "ours: cpp", "torch.compile of it", 10),
    ("CPC v1, S 64, D 1024", "ours: cpp", "eager gather", 30),
    ("CPC v1, S 64, D 1024", "ours: cpp", "torch.compile of it", 10),
    ("CPC, 20000 anchors, S 256", "ours: cpp", "eager gather", 30),
    ("CPC, 20000 anchors, S 256", "ours: cpp", "torch.compile of it", 10),
    ("dense 8192, D 256", "ours: chunked", "torch.compile", 1),
    ("dense 8192, D 256, bf16", "ours: chunked", "eager, fp32", 2),
)
Told = dict[str, Any]


def load() -> list[Told]:
    """Every committed device, GPUs first, of each kind the one measured last."""
    files = [
        path for path in sorted(RESULTS.glob("*.json")) if path != PREDICTIONS and not path.name.startswith("dry-")
    ]
    newest = sorted(
        (json.loads(path.read_text()) for path in files), key=lambda t: t["environment"]["date"], reverse=True
    )
    return sorted(newest, key=is_cpu)


def is_cpu(told: Told) -> bool:
    return "cuda" not in told["environment"]


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    right = "|".join("---" if i == 0 else "--:" for i in range(len(head)))
    lines = ["| " + " | ".join(head) + " |", f"|{right}|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def origin(environment: Told) -> str:
    """The device, versions and commit of a row or table."""
    driver = f", driver {environment['driver']}" if "driver" in environment else ""
    return (
        f"{environment['device']}{driver}, torch {environment['torch']}, triton {environment['triton']}, "
        f"commit {environment['commit']}, {environment['date']}"
    )


def ordered(told: Told) -> list[tuple[str, Told]]:
    """The measured cases, in the order of the table of cases."""
    names = [case.name for case in CASES]
    return [(name, told["cases"][name]) for name in names if name in told.get("cases", {})]


def rows_of(record: Told, names: tuple[str, ...]) -> list[Told]:
    return [row for name in names for row in record["rows"] if row["provider"] == name and "median_ms" in row]


def best(rows: list[Told]) -> Told | None:
    return min((row for row in rows if "median_ms" in row), key=lambda row: row["median_ms"], default=None)


def find(record: Told, *names: str) -> Told | None:
    return next((row for row in record["rows"] if row["provider"] in names and "median_ms" in row), None)


def ends_of(record: Told) -> tuple[Told | None, Told | None]:
    """Ours and plain of an end-to-end record; neither where it failed."""
    mine, plain = (best([row for row in record["rows"] if row["ours"] is ours]) for ours in (True, False))
    return mine, plain


def time(row: Told | None) -> str:
    return "not measured" if row is None else f"{milliseconds(row['median_ms'])} ms"


def memory(row: Told | None) -> str:
    return "not measured" if row is None or row.get("extra_mb") is None else f"{row['extra_mb']:,.0f} MB"


# --- README ---------------------------------------------------------------------------------------------------------


def summary(devices: list[Told]) -> str:
    """Of every GPU, and of the CPU measured last: ours beside the best plain torch and the best of the others."""
    parts = []
    for told in [*(told for told in devices if not is_cpu(told)), *[told for told in devices if is_cpu(told)][:1]]:
        rows = []
        for name, record in ordered(told):
            if name not in HEADLINES:
                continue
            mine = best([row for row in record["rows"] if row["ours"]])
            plain = best(rows_of(record, PLAIN))
            other = best([row for row in record["rows"] if not row["ours"] and row["provider"] not in PLAIN])
            against = best([row for row in (plain, other) if row])
            factor = f"{against['ratio'] / mine['ratio']:.1f}x" if mine and against else "-"
            named = f"{time(other)} ({other['provider']})" if other else "none runs here"
            rows.append((name, time(mine), time(plain), named, f"**{factor}**", f"{memory(mine)} / {memory(plain)}"))
        for name, record in told.get("end_to_end", {}).items():
            mine, plain = ends_of(record)
            rows.append((name, time(mine), time(plain), "-", f"**{plain['ratio']:.1f}x**" if plain else "-", "-"))
        head = (
            "forward and backward",
            "ours",
            "plain torch",
            "best other",
            "ours is faster by",
            "memory, ours / plain",
        )
        parts.append(table(head, rows) + f"\n\n{origin(told['environment'])}. {slower(told)}")
    if all(map(is_cpu, devices)):
        parts.append("GPU: not measured. `python3 -m benchmarks.gpu_check --out results` measures it in nine minutes.")
    if not devices:
        return "\n\n".join(["CPU: not measured. `make bench` measures it in a quarter of an hour.", *parts])
    parts.append(
        "Medians of runs in turns; every row was checked against float64 first. Factors are medians of the ratios "
        "within turns, against the faster of the two columns before them, below 1 where ours is slower. Spreads, all "
        "providers and the method: [docs/performance.md](docs/performance.md)."
    )
    return "\n\n".join(parts)


def slower(told: Told) -> str:
    """Where somebody else wins."""
    lost = []
    for name, record in ordered(told):
        mine = best([row for row in record["rows"] if row["ours"]])
        first = best(record["rows"])
        if mine and first and not first["ours"]:
            lost.append(f"{name} ({first['provider']}, {mine['ratio'] / first['ratio']:.2f}x)")
    return f"Another is faster on: {'; '.join(lost)}." if lost else "Ours is the fastest in every case measured."


# --- docs/performance.md --------------------------------------------------------------------------------------------


def measured(devices: list[Told]) -> str:
    """Every device whole; a CPU measured earlier than another is folded away."""
    parts, cpus = [], 0
    for told in devices:
        section = of_device(told)
        cpus += is_cpu(told)
        if is_cpu(told) and cpus > 1:
            section = f"<details><summary>Another CPU: {told['device']}</summary>\n\n{section}\n\n</details>"
        parts.append(section)
    if all(map(is_cpu, devices)):
        parts.append("### GPU\n\nNot measured.")
    if not devices:
        parts.insert(0, "### CPU\n\nNot measured.")
    return "\n\n".join(parts)


def of_device(told: Told) -> str:
    parts = [f"### {told['device']}\n\n{origin(told['environment'])}."]
    if found := told.get("ceilings"):
        rates = ", ".join(f"{kind} {tera(rate)}" for kind, rate in found["matmul_tflop_s"].items())
        copy = f"copy {found['copy_gb_s']:,.3g} GB/s (read plus written)"
        parts.append(f"Ceilings, measured in the same runs: {copy}; matrix products {rates}.")
    else:
        parts.append("Ceilings: not measured.")
    rows = []
    for name, record in ordered(told):
        case, first = Case.from_json(record["case"]), True
        for row in record["rows"]:
            if row["status"] == "unavailable":
                continue
            rows.append((name if first else "", *detail(told, case, record, row)))
            first = False
    head = (
        "case",
        "provider",
        "median",
        "quartiles",
        "ratio to ours",
        "extra memory",
        "rate",
        "share of peak",
        "answer",
    )
    parts.append(table(head, rows))
    commits = {record["environment"]["commit"] for _, record in ordered(told)}
    if len(commits) > 1:
        parts.append("Measured at several commits: " + ", ".join(
            f"{name} at {record['environment']['commit']}" for name, record in ordered(told)) + ".")  # fmt: skip
    parts += [section for section in (ends(told), growth(told), matrix(told), targets(told), pictures(told)) if section]
    return "\n\n".join(parts)


def tera(rate: float) -> str:
    return f"{rate:.3g} TFLOP/s" if rate >= 1 else f"{1e3 * rate:.3g} GFLOP/s"


def detail(told: Told, case: Case, record: Told, row: Told) -> tuple[str, ...]:
    if "median_ms" not in row:
        return row["provider"], "-", "-", "-", "-", "-", "-", f"{row['status']}: {row.get('why', '')}".replace("|", "/")
    rate = case.flops / row["median_ms"] / 1e9
    low, high = row["quartiles_ms"]
    spread = f"{milliseconds(low)} - {milliseconds(high)}"
    told_too = [f"{name}: {milliseconds(row[key])} ms" for name, key in BESIDE.items() if key in row]
    graph = f" ({', '.join(told_too)})" if told_too else ""
    error = max(row["errors"].values())
    top = peak(told["ceilings"], case.dtype) if "ceilings" in told else None  # where they could not be measured
    share = f"{rate / top:.0%}" if top else "-"
    name = f"**{row['provider']}**" if row["ours"] else row["provider"]
    return (
        name,
        time(row) + graph,
        spread,
        f"{row['ratio']:.2f}",
        memory(row),
        tera(rate),
        share,
        f"right ({error:.0e})",
    )


def ends(told: Told) -> str:
    rows, shares = [], []
    for name, record in told.get("end_to_end", {}).items():
        for row in record["rows"]:
            if "median_ms" not in row:
                rows.append((name, row["provider"], f"{row['status']}: {row['why']}".replace("|", "/"), "-", "-", "-"))
                continue
            low, high = row["quartiles_ms"]
            spread = f"{milliseconds(low)} - {milliseconds(high)}"
            pace = f"{row['images_per_s']:,.3g}"
            shown = name if row["ours"] else ""
            provider = f"{row['provider']}, {row['dtype']}" if "dtype" in row else row["provider"]
            rows.append((shown, provider, time(row), spread, f"{row['ratio']:.2f}", pace))
        if record["shares"]:
            shares.append(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in record["shares"].items()))
    if not rows:
        return ""
    head = ("end to end", "", "median", "quartiles", "ratio to ours", "images/s")
    title = "Parts of the step, timed alone (the loss forward and backward)"
    return table(head, rows) + (f"\n\n{title}: {'; '.join(shares)}." if shares else "")


def growth(told: Told) -> str:
    rows = []
    for name, sweep in told.get("scaling", {}).items():
        for provider, series in sweep["series"].items():
            sizes = sweep["sizes"][: len(series["ms"])]
            times = " -> ".join(milliseconds(ms) for ms in series["ms"])
            known = None not in series["extra_mb"]
            sizes_mb = " -> ".join(f"{mb:,.0f}" for mb in series["extra_mb"]) if known else "not measured"
            slope = f"{series['memory_exponent']:.2f}" if "memory_exponent" in series else "-"
            rows.append(
                (
                    f"{name} = {sizes[0]} .. {sizes[-1]}",
                    provider,
                    times,
                    f"{series['time_exponent']:.2f}",
                    sizes_mb,
                    slope,
                )
            )
    if not rows:
        return ""
    head = ("grows by factors of two", "provider", "ms", "exponent", "extra MB", "exponent")
    return table(head, rows) + "\n\nExponents are fitted to the last three doublings: 1 is linear, 2 quadratic."


def matrix(told: Told) -> str:
    found = told.get("correctness")
    if not found:
        return ""
    bad = [f"{row['probe']} ({row.get('why', row['status'])})" for row in found["rows"] if row["status"] != "passed"]
    tail = f" Failed: {'; '.join(bad)}." if bad else ""
    return (f"Correctness on this device: {found['passed']} of {found['passed'] + found['failed']} probes passed, "
            f"{found['not_reached']} not reached.{tail}")  # fmt: skip


def targets(told: Told) -> str:
    """What was promised for the CPU, and what came out."""
    if not is_cpu(told):
        return ""
    rows: list[tuple[str, ...]] = []

    def ask(what: str, value: float | None, sign: str, bound: float, unit: str = "x") -> None:
        if value is None:
            found = ("not measured", "-")
        else:
            met = value >= bound if sign == ">=" else value <= bound
            found = (f"{value:.3g}{unit}", "yes" if met else "**no**")
        rows.append((what, f"{sign} {bound}{unit}", *found))

    for name, ours, other, least in FASTER:
        record = told.get("cases", {}).get(name, {"rows": []})
        mine = find(record, ours)
        row = find(record, other) if mine else None
        ask(f"{name}: faster than {other}", row["ratio"] if row else None, ">=", least)
        if name.startswith("dense"):
            known = mine and row and row.get("extra_mb") and mine.get("extra_mb") is not None
            share = 100 * mine["extra_mb"] / row["extra_mb"] if known else None
            ask(f"{name}: extra memory beside {other}", share, "<=", 5, "%")
    for name, record in told.get("end_to_end", {}).items():
        mine, plain = ends_of(record)
        if name.startswith("scoring"):
            ask(name, mine["median_ms"] if mine else None, "<=", 25, " ms")
        else:
            ask(f"{name}: faster than plain", plain["ratio"] if plain else None, ">=", 3)
    return table(("target", "wanted", "measured", "met"), rows)


# --- plots ----------------------------------------------------------------------------------------------------------


def drawn(told: Told) -> dict[str, str]:
    """File name -> SVG of one device."""
    name, found = slug(told["device"]), {}
    square = told.get("scaling", {}).get("dense, N = M")
    if square:
        speed, sizes = {}, square["sizes"]
        mine = next(series for provider, series in square["series"].items() if provider.startswith("ours"))
        for provider, series in square["series"].items():
            if not provider.startswith("ours"):
                pairs = zip(sizes, series["ms"], mine["ms"], strict=False)
                speed[f"against {provider}, all candidates"] = [(n, theirs / ours) for n, theirs, ours in pairs]
        sampled = told["scaling"].get("sampled, N")
        if sampled and "eager gather" in sampled["series"]:
            cpp = next(series for provider, series in sampled["series"].items() if provider.startswith("ours"))
            pairs = zip(sampled["sizes"], sampled["series"]["eager gather"]["ms"], cpp["ms"], strict=False)
            speed["against eager gather, sampled"] = [(n, theirs / ours) for n, theirs, ours in pairs]
        speed["as fast"] = [(sizes[0], 1.0), (sizes[-1], 1.0)]
        found[f"{name}-speedup.svg"] = plots.lines(
            f"Times faster, {told['device']}", "anchors N", "theirs / ours", speed, dashed=["as fast"]
        )
        used = {
            provider: [(n, mb) for n, mb in zip(sizes, series["extra_mb"], strict=False) if mb]
            for provider, series in square["series"].items() if None not in series["extra_mb"]
        }  # fmt: skip
        line = "one N x M matrix of scores"
        used[line] = list(zip(sizes, square["scores_mb"], strict=True))
        found[f"{name}-memory.svg"] = plots.lines(
            f"Extra memory of a step, {told['device']}", "N = M", "MB", used, dashed=[line]
        )
    records = [(name, record) for name, record in ordered(told) if best(record["rows"])]
    if records and "ceilings" in told:
        groups = []
        roof: dict[str, list[tuple[float, float]]] = {"ours": [], "others": []}
        for case_name, record in records:
            case = Case.from_json(record["case"])
            mine = best([row for row in record["rows"] if row["ours"]])
            other = best([row for row in record["rows"] if not row["ours"]])
            group = {}
            for who, row in (("ours", mine), ("others", other)):
                if row:
                    rate = case.flops / row["median_ms"] / 1e9
                    group["ours" if who == "ours" else "best other"] = 100 * rate / peak(told["ceilings"], case.dtype)
                    roof[who].append((case.flops / case.bytes, rate))
            groups.append((case_name, group))
        found[f"{name}-share-of-peak.svg"] = plots.bars(f"Share of the matrix peak, {told['device']}", "%", groups)
        intensities = [x for shown in roof.values() for x, _ in shown]
        copy, top = told["ceilings"]["copy_gb_s"] / 1e3, max(told["ceilings"]["matmul_tflop_s"].values())
        low, high = min([*intensities, top / copy]) / 2, max([*intensities, top / copy]) * 2
        named = {
            "roof": [(low, low * copy), (top / copy, top), (high, top)],
            "ours": roof["ours"],
            "best other": roof["others"],
        }
        found[f"{name}-roofline.svg"] = plots.lines(
            f"Roofline, {told['device']}", "least flops / least bytes", "TFLOP/s", named, dashed=["roof"],
            points=["ours", "best other"],
        )  # fmt: skip
    return found


def pictures(told: Told) -> str:
    return "\n".join(f"![{name.removesuffix('.svg').replace('-', ' ')}](plots/{name})" for name in drawn(told))


# --- predictions ----------------------------------------------------------------------------------------------------


def predicted() -> str:
    """Times that the compiled kernels' units would need, from data sheets; never beside a measurement."""
    if not PREDICTIONS.exists():
        steps = "`python -m benchmarks.aot --json FILE`, then `python -m benchmarks.report --predictions FILE`"
        return f"Not predicted yet: {steps}."
    told = json.loads(PREDICTIONS.read_text())
    targets = list(dict.fromkeys(row["arch"] for row in told["predictions"]))
    bounds = {(row["case"], row["op"], row["arch"]): row for row in told["predictions"]}
    rows = [
        (case, op, *(bounding(bounds[case, op, target]) for target in targets))
        for case, op in dict.fromkeys((row["case"], row["op"]) for row in told["predictions"])
    ]
    parts = [
        "Least milliseconds in bf16, and the unit that needs them: `matrix` products, `exp`, the `L2` past which the "
        "other side streams, `HBM`.",
        table(("case", "kernel", *targets), rows),
        "The kernels as compiled, D padded to the next of 64, 128, 256, 512; `+ids`: with ids, in pieces; `tma`: rows "
        f"through descriptors, else pointers (Triton {told['triton']}):",
    ]
    head = ("entry", "tile", "warps", "registers", "stack", "shared, bytes", "matrix instructions", "in the loop",
            "blocks per SM")  # fmt: skip
    for target in dict.fromkeys(row[0] for row in told["kernels"]):
        rows = [tuple(str(value) for value in row[1:]) for row in told["kernels"] if row[0] == target]
        summary = f"<summary>{target}, {len(rows)} entries</summary>"
        parts.append(f"<details>{summary}\n\n{table(head, rows)}\n\n</details>")
    return "\n\n".join(parts)


def bounding(row: Told) -> str:
    return f"{row[row['bound']]:.3g} {row['bound']} ({row['issue']:.3g})"


def take_predictions(file: Path) -> None:
    """Keep what the document shows of aot's JSON: the predictions, and every kernel in one line."""
    from importlib import metadata

    told = json.loads(file.read_text())
    kernels = [
        [row["arch"], row["name"], "x".join(map(str, row["tile"])), row["warps"], row["registers"], row["stack"],
         f"{row['shared']:,}", " ".join(f"{count} {name}" for name, count in row["matrix"].items()) or "-",
         row["loop"] or "-", row["blocks"] or "-"]
        for row in told["reports"]
    ]  # fmt: skip
    lists = {"predictions": rounded(told["predictions"]), "kernels": kernels}
    lines = [f' "{name}": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]" for name, rows in lists.items()]
    PREDICTIONS.parent.mkdir(parents=True, exist_ok=True)
    PREDICTIONS.write_text(",\n".join([f'{{\n "triton": "{metadata.version("triton")}"', *lines]) + "\n}\n")


# --- tiles ----------------------------------------------------------------------------------------------------------


def tile_table() -> str:
    """The tiles of the dense kernels, for kernels/README.md."""
    from cpc_kernels import tiles

    def cells(op: str, d: int, width: int) -> list[str]:
        return [spelled(tiles.tile(op, d, width, arch)) for arch in tiles.ARCHITECTURES]

    rows = []
    for width, element in ((16, "16 bits"), (32, "float32")):
        largest = tiles.one_pass_max_d(width)
        for op in ("forward", "scores", "backward"):
            for d in (d for d in tiles.BUCKETS if d <= largest):
                rows.append((f"{op}, {element}, D <= {d}", *cells(op, d, width)))
                if (with_ids := cells(f"{op}+ids", d, width)) != cells(op, d, width):
                    rows.append((f"{op}+ids, {element}, D <= {d}", *with_ids))
        rows.append((f"scores, {element}, D > {largest}", *cells("streamed", 1024, width)))
    return table(("kernel", *tiles.ARCHITECTURES), rows)


def spelled(tile) -> str:
    return f"{tile.rows}x{tile.columns}/{tile.warps}/{tile.stages}{'*' if tile.descriptors else ''}"


# --- files ----------------------------------------------------------------------------------------------------------


def between(path: Path, name: str, inside: str, text: str | None = None) -> str:
    """The file's text (or `text` instead) with the part between its markers replaced."""
    whole = path.read_text() if text is None else text
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    if whole.count(start) != 1 or whole.count(end) != 1 or whole.index(start) > whole.index(end):
        raise SystemExit(f"{path.name} needs a line {start} and, after it, a line {end}, each once.")
    before, after = whole.split(start)[0], whole.split(end)[1]
    return f"{before}{start}\n{inside}\n{end}{after}"


def render(root: Path = ROOT) -> dict[Path, str]:
    """Every file this writes, with its text."""
    devices, made = load(), {}
    if (root / "README.md").exists():
        made[root / "README.md"] = between(root / "README.md", "performance", summary(devices))
    engine = root / "kernels" / "README.md"
    made[engine] = between(engine, "tiles", tile_table())
    document = root / "docs" / "performance.md"
    made[document] = between(document, "predicted", predicted(), between(document, "measured", measured(devices)))
    for told in devices:
        made |= {root / "docs" / "plots" / name: picture for name, picture in drawn(told).items()}
    from . import ranks  # which uses the tables of this file

    return made | ranks.rendered(root)


def write_stale(files: dict[Path, str], check: bool = False) -> bool:
    """Write those that are other, or with `check` only name them; whether there were any."""
    from cpc_fast.files import write_text

    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'stale' if check else 'written'}: {path}")
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, files[path])
    return bool(stale)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is stale")
    parser.add_argument("--predictions", type=Path, help="JSON written by benchmarks.aot")
    args = parser.parse_args(arguments)
    if args.predictions:
        take_predictions(args.predictions)
    return int(write_stale(render(), args.check) and args.check)


if __name__ == "__main__":
    sys.exit(main())
