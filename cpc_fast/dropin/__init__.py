"""Losses of other packages, computed by the kernels: change one import line, keep the loss.

One module per package replaced, named like it: `cpc_fast.dropin.lightly.NTXentLoss` takes the arguments of
`lightly.loss.NTXentLoss`. Names that only one package has are here too. What is the same and what differs, loss by
loss, is in docs/dropin.md.

>>> from cpc_fast.dropin import InfoNCE
>>> InfoNCE(temperature=0.1)(torch.randn(32, 128), torch.randn(32, 128)).shape
torch.Size([])
"""

from typing import Any

from . import greedy_infomax, info_nce_pytorch, lightly, open_clip, pytorch_metric_learning
from .greedy_infomax import GreedyInfoMaxLoss
from .info_nce_pytorch import InfoNCE, info_nce
from .open_clip import ClipLoss
from .pytorch_metric_learning import SupConLoss

__all__ = [
    "ClipLoss",
    "GreedyInfoMaxLoss",
    "InfoNCE",
    "SupConLoss",
    "greedy_infomax",
    "info_nce",
    "info_nce_pytorch",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
]


def __getattr__(name: str) -> Any:
    if name == "NTXentLoss":  # an AttributeError would be replaced by "cannot import name"
        raise ImportError(
            "cpc_fast.dropin: two packages have an NTXentLoss, with other arguments. Import it from "
            "cpc_fast.dropin.lightly (two views) or cpc_fast.dropin.pytorch_metric_learning (labels)."
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
