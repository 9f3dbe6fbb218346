"""The packages whose losses `cpc_fast.dropin` replaces, without what they would drag in.

lightly and open_clip import torchvision at their top. Only the files of their losses are loaded here, by path.
`make setup` installs the packages; by hand: pip install --no-deps -r peers.txt
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import distributed as dist

INSTALL = "pip install --no-deps -r peers.txt"


class Missing(Exception):
    """An original is not installed."""


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"{package} is not installed: {INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))


def info_nce():
    folder("info_nce")
    return importlib.import_module("info_nce")


def pytorch_metric_learning():
    folder("pytorch_metric_learning")
    if importlib.util.find_spec("tqdm") is None:
        raise Missing(f"pytorch_metric_learning needs tqdm: {INSTALL}")
    return importlib.import_module("pytorch_metric_learning.losses")


def open_clip():
    spec = importlib.util.spec_from_file_location("open_clip_loss", folder("open_clip") / "loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def concat_all_gather(rows):
    """What the memory bank takes from lightly.models.utils, which needs torchvision."""
    everyone = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, rows)
    return torch.cat(everyone)


def lightly():
    root = folder("lightly")
    before = set(sys.modules)
    try:
        for name in ("lightly", "lightly.loss", "lightly.models", "lightly.models.modules", "lightly.utils"):
            sys.modules[name] = ModuleType(name)  # packages whose __init__ is not run
            sys.modules[name].__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        utils = sys.modules["lightly.models.utils"] = ModuleType("lightly.models.utils")
        utils.concat_all_gather = concat_all_gather
        sys.modules["lightly.models"].utils = utils
        return importlib.import_module("lightly.loss.ntx_ent_loss")
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "lightly":
                del sys.modules[name]
