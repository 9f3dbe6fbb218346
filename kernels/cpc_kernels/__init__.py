"""InfoNCE, fused: contrastive losses over all candidates or over sampled ones, in O(N + M) memory.

Imports torch and the standard library; Triton only when a tensor on a GPU asks for it.
"""

from .arguments import InfoNCEStats
from .bilinear_info_nce import bilinear_info_nce, bilinear_info_nce_stats
from .capabilities import Capability, capabilities
from .info_nce import info_nce, info_nce_stats
from .negatives import Negatives, draw_negatives
from .ring_info_nce import bilinear_info_nce_across_ranks, info_nce_across_ranks, sampled_info_nce_across_ranks
from .sampled_info_nce import sampled_info_nce, sampled_info_nce_stats

__all__ = [
    "Capability",
    "InfoNCEStats",
    "Negatives",
    "bilinear_info_nce",
    "bilinear_info_nce_across_ranks",
    "bilinear_info_nce_stats",
    "capabilities",
    "draw_negatives",
    "info_nce",
    "info_nce_across_ranks",
    "info_nce_stats",
    "sampled_info_nce",
    "sampled_info_nce_across_ranks",
    "sampled_info_nce_stats",
]
