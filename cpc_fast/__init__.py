"""Contrastive predictive coding, fast: fused InfoNCE kernels, and anomaly detection with the loss itself.

>>> from cpc_fast import Detector, info_nce
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from cpc_kernels import Negatives as Negatives
    from cpc_kernels import bilinear_info_nce as bilinear_info_nce
    from cpc_kernels import bilinear_info_nce_stats as bilinear_info_nce_stats
    from cpc_kernels import info_nce as info_nce
    from cpc_kernels import info_nce_stats as info_nce_stats
    from cpc_kernels import sampled_info_nce as sampled_info_nce
    from cpc_kernels import sampled_info_nce_stats as sampled_info_nce_stats

    from .config import Config as Config
    from .config import preset as preset
    from .detector import Detector as Detector
    from .model import CPC as CPC

_WHERE = {
    "CPC": ".model",
    "Config": ".config",
    "Detector": ".detector",
    "preset": ".config",
    "Negatives": "cpc_kernels",
    "bilinear_info_nce": "cpc_kernels",
    "bilinear_info_nce_stats": "cpc_kernels",
    "info_nce": "cpc_kernels",
    "info_nce_stats": "cpc_kernels",
    "sampled_info_nce": "cpc_kernels",
    "sampled_info_nce_stats": "cpc_kernels",
}

__all__ = [*_WHERE, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:  # imported when first asked for, so that the command line starts at once
        return getattr(import_module(_WHERE[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
