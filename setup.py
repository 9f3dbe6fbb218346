"""Builds the C++ CPU kernels where it can, and says what is missing, and what that costs, where it cannot.

Everything else about the package is in pyproject.toml. The kernels are one shared library, `cpc_kernels/_cpu*.so`,
loaded by cpc_kernels/capabilities.py; the package works without it.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

COST = (
    "cpc_fast is installed all the same, but its losses on the CPU will run in plain torch: sampled_info_nce up "
    "to 20 times slower, info_nce two to four. GPU kernels are not affected. `cpc-fast doctor` says it again."
)


def warn(missing: str) -> None:
    if "dist_info" in sys.argv:  # pip asks for the metadata first, and says it again when it builds
        return
    notice = f"\n*** cpc_fast: the C++ CPU kernels were not built: {missing}\n*** {COST}\n"
    print(notice, file=sys.stderr, flush=True)
    try:  # pip hides a build's output unless it fails or is asked to be verbose: speak to the terminal too
        with open("/dev/tty", "w") as terminal:
            terminal.write(notice)
    except OSError:
        pass


def find_missing() -> str | None:
    if os.environ.get("CPC_FAST_NO_EXTENSION"):
        return "CPC_FAST_NO_EXTENSION is set."
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error}). Install torch, then `pip install --no-build-isolation .` again."
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        return f"there is no C++ compiler ({compiler}). Install g++ (Debian: `apt install g++`), then install again."
    return None


def extension():
    """The extension and the command that builds it; neither when something is missing."""
    if missing := find_missing():
        warn(missing)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class Build(BuildExtension):
        """A compiler that fails (no headers, no disk) must not stop the install."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                warn(f"the compiler failed ({error}). Run with `pip install -v` to see its output.")

        def copy_extensions_to_source(self):
            for name in [e.name for e in self.extensions]:
                if not Path(self.get_ext_fullpath(name)).parent.exists():
                    return
            build_ext.copy_extensions_to_source(self)

        def get_export_symbols(self, ext):  # a torch op library, not a Python module: there is no PyInit to export
            return ext.export_symbols

    source = Path("kernels/csrc")
    library = CppExtension(
        name="cpc_kernels._cpu",
        sources=sorted(str(path) for path in source.glob("*.cpp")),
        depends=sorted(str(path) for path in source.glob("*.h")),
        # No -march: the inner loops are compiled once per instruction set and chosen at run time. Without -fopenmp
        # at::parallel_for is a plain loop: everything on one thread.
        extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-g0", "-fopenmp"],
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [library], "cmdclass": {"build_ext": Build}}


setup(**extension())
