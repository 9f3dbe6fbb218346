"""Documents that are run: the README's Python, the examples in docstrings, the links between files."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/*.md")])
MODULES = sorted(
    ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")
    for source, package in ((ROOT, "cpc_fast"), (ROOT / "kernels", "cpc_kernels"), (ROOT, "benchmarks"))
    for path in (source / package).rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8")
)
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<(?:img|a)[^>]* (?:src|href)=\"([^\"]+)\"")


def blocks(path: Path) -> list[str]:
    return FENCE.findall(path.read_text(encoding="utf-8"))


def test_there_is_a_readme():
    assert (ROOT / "README.md").is_file()


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d)], ids=lambda path: path.name)
def test_python_in_documents_runs(document, tmp_path, monkeypatch):
    """All blocks of a document, in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for n, block in enumerate(blocks(document), start=1):
        if block.lstrip().startswith("# not run"):  # e.g. it needs a GPU, or data of one's own
            continue
        exec(compile(block, f"{document.name}, Python block {n}", "exec"), namespace)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_point_somewhere(document):
    for groups in LINK.findall(document.read_text(encoding="utf-8")):
        link = next(filter(None, groups))
        if re.match(r"[a-z]+:", link) or link.startswith("#"):
            continue
        target = (document.parent / link.split("#")[0]).resolve()
        assert target.exists(), f"{document.name} links to {link}, which is not there"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    names = {"np": importlib.import_module("numpy"), "torch": importlib.import_module("torch"), **vars(module)}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name, extraglobs=None, globs=names):
        if test.examples:
            said: list[str] = []
            runner.run(test, out=said.append, clear_globs=True)
            assert not runner.failures, "".join(said)
