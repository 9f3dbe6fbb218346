"""Who may import whom: data flows through the tree in one direction, and the kernels know nothing of the package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "cpc_fast", ROOT / "kernels" / "cpc_kernels"

# A module imports only from modules to its left. A new module finds its place here first.
ORDER = (
    "version", "errors", "torchrun", "shapes", "config", "stages",
    "images", "files", "inputs", "layouts", "runs", "datasets",
    "patches", "shifts", "latents", "contexts", "predictions", "loss", "bank", "anomaly_map", "segments",
    "scored", "metrics", "report",
    "model", "latent_cache", "train", "scoring", "saving", "checkpoint", "detector", "evaluate", "journal",
    "answers", "submission", "export", "profiling", "doctor", "progress", "commands", "cli",
)  # fmt: skip
FLOW = (
    "shapes", "config", "images", "patches", "latents", "contexts", "predictions", "loss", "model", "bank",
    "anomaly_map", "segments", "metrics", "report", "train", "evaluate", "cli",
)  # fmt: skip


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if path.stem not in ("__init__", "__main__"))


COMMANDS = modules(PACKAGE / "commands")
VERBS = ("demo", "fit", "evaluate", "predict", "export", "data", "doctor", "profile")


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, late imports and imports for types included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module in (".", "cpc_fast"):
                found |= {alias.name for alias in node.names}
            elif module.startswith((".", "cpc_fast.")):
                found.add(module.removeprefix(".").removeprefix("cpc_fast.").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("cpc_fast.")}
    return found & {*(path.stem for path in modules(PACKAGE)), "commands"}


def test_every_module_has_a_place():
    assert {path.stem for path in modules(PACKAGE)} | {"commands"} == set(ORDER)


@pytest.mark.parametrize("path", modules(PACKAGE), ids=lambda path: path.stem)
def test_imports_point_leftward(path):
    place = ORDER.index(path.stem)
    right = {name for name in imports(path) if ORDER.index(name) >= place}
    assert not right, f"{path.stem} imports {right}, which lie to its right in the flow"


@pytest.mark.parametrize("name", FLOW)
def test_every_noun_of_the_flow_has_its_file(name):
    assert (PACKAGE / f"{name}.py").is_file()


def test_no_drawer_for_everything():
    names = {path.stem for folder in (PACKAGE, KERNELS, ROOT / "benchmarks") for path in folder.rglob("*.py")}
    assert not names & {"utils", "util", "common", "base", "helpers", "misc", "profile"}
    assert not any(path.name in ("utils", "common", "base") for path in ROOT.glob("*/*") if path.is_dir())


def test_the_kernels_name_torch_triton_and_the_standard_library_only():
    allowed = sys.stdlib_module_names | {"torch", "triton", "cpc_kernels"}
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"


def fresh(code: str) -> str:
    """What a new interpreter prints, started where no folder is called like a package."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.anchor, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernels_load_without_the_package():
    loaded = fresh("import sys, cpc_kernels; print(*sys.modules)").split()
    assert "cpc_kernels" in loaded
    assert not [name for name in loaded if name.split(".")[0] in ("cpc_fast", "triton", "skimage", "sklearn")]


SLOW = {"torch", "triton", "numpy", "scipy", "skimage", "sklearn", "PIL", "rich", "jinja2"}


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_that_computes(arguments):
    code = f"import sys, cpc_fast.cli as cli; assert cli.run({arguments}) == 0; print(*sys.modules)"
    assert not set(fresh(code).splitlines()[-1].split()) & SLOW


def test_what_cannot_work_is_refused_before_torch_is_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    empty, none = str(tmp_path / "empty"), str(tmp_path / "none")
    cases = [
        ["fit", none, "--out", none],
        ["fit", empty, "--out", none],
        ["fit", empty, "--out", none, "--device", "abacus"],
        ["evaluate", none, empty],
        ["evaluate", empty, empty],
        ["predict", none, empty, "--out", none],
        ["demo", "--device", "abacus"],
        ["demo", "--set", "colour=3"],
    ]
    code = f"import sys, cpc_fast.cli as cli; print([cli.run(c) for c in {cases}], 'torch' in sys.modules)"
    assert fresh(code) == "[2, 2, 2, 2, 2, 2, 2, 2] False\n"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_commands_import_late_what_is_slow(path):
    """At the top of a command only what is quick; the rest inside, after what can be refused without it."""
    quick = {"config", "errors", "torchrun", "version", *(command.stem for command in COMMANDS)}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            modules = {node.module} if node.module else {alias.name for alias in node.names}
            assert modules <= quick, f"{path.name} imports {modules} at its top"


def test_files_are_written_and_reports_drawn_without_torch():
    assert fresh("import sys, cpc_fast.files, cpc_fast.report; print('torch' in sys.modules)") == "False\n"


def test_the_package_loads_what_it_exports_when_asked():
    assert (
        fresh("import cpc_fast, sys; print('torch' in sys.modules, cpc_fast.Config(steps=1).offsets)") == "False (2,)\n"
    )
    missing = "[name for name in cpc_fast.__all__ if not hasattr(cpc_fast, name)]"
    assert fresh(f"import cpc_fast; print({missing})") == "[]\n"
