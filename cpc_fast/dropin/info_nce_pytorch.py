"""info-nce-pytorch 0.1.4: `info_nce` and `InfoNCE`, all three kinds of negatives.

    s_ij = <q_i, k_j> / (|q_i| |k_j| temperature)
    loss_i = -log( exp(s_ip) / (exp(s_ip) + sum over the negatives j of i of exp(s_ij)) )

Negatives: the other queries' positive keys (none given), one set for all queries ("unpaired", (M, D)), or a set for
each query ("paired", (N, M, D)).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpc_kernels import info_nce as dense_info_nce
from cpc_kernels.arguments import spell

from .arguments import check_tensors, inverse

MODES = ("unpaired", "paired")
REDUCTIONS = ("none", "sum", "mean")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """InfoNCE of cosine similarities, as info-nce-pytorch 0.1.4 computes it.

    query: (N, D). positive_key: (N, D). negative_keys: None, (M, D) when negative_mode is "unpaired", or (N, M, D) when
    it is "paired". temperature: a number or a one-element tensor, which may learn. reduction: none, sum or mean.
    Returns a scalar, or (N,) for "none"; float32 for 16-bit inputs. Raises ValueError for arguments that do not fit.

    >>> info_nce(torch.randn(32, 128), torch.randn(32, 128), torch.randn(48, 128), reduction="none").shape
    torch.Size([32])
    """
    check(query, positive_key, negative_keys, reduction, negative_mode)
    query, positive_key = F.normalize(query, dim=-1), F.normalize(positive_key, dim=-1)
    scale = inverse("info_nce", temperature)
    if negative_keys is None:
        own = torch.arange(query.shape[0], device=query.device)
        return dense_info_nce(query, positive_key, own, scale=scale, reduction=reduction)
    if negative_mode == "unpaired":
        negatives = F.normalize(negative_keys, dim=-1)
        return dense_info_nce(query, negatives, positive_key, scale=scale, reduction=reduction)
    return paired(query, positive_key, negative_keys, scale, reduction)


def paired(query: Tensor, positive: Tensor, negatives: Tensor, scale: float | Tensor, reduction: str) -> Tensor:
    """(N, D), (N, D) unit vectors, (N, M, D) of any length. The scores are D times smaller than the negatives that were
    given, so they are kept; a normalised copy of the negatives is not made: their lengths divide the scores."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    length = torch.linalg.vector_norm(negatives, dim=-1, dtype=dtype).clamp(min=1e-12)  # (N, M)
    scores = (negatives @ query[..., None])[..., 0].to(dtype) / length * scale
    own = (query.to(dtype) * positive).sum(-1) * scale
    loss = -F.logsigmoid(own - scores.logsumexp(-1)) if scores.shape[1] else own * 0  # no negatives: nothing to lose
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(loss.shape[0], 1)


def check(query, positive_key, negative_keys, reduction, negative_mode) -> None:
    got = {"query": query, "positive_key": positive_key}
    if negative_keys is not None:
        got["negative_keys"] = negative_keys
    if reduction not in REDUCTIONS:
        raise ValueError(f"info_nce: reduction must be none, sum or mean. Got {reduction!r}.")
    if negative_mode not in MODES:
        raise ValueError(f"info_nce: negative_mode must be unpaired or paired. Got {negative_mode!r}.")
    check_tensors("info_nce", **got)
    if query.ndim != 2 or positive_key.ndim != 2:
        raise ValueError(f"info_nce: query and positive_key must both be (N, D). {spell(**got)}")
    if query.shape[0] != positive_key.shape[0]:
        raise ValueError(f"info_nce: query and positive_key must have as many rows. {spell(**got)}")
    if negative_keys is not None:
        form, ndim = ("(M, D)", 2) if negative_mode == "unpaired" else ("(N, M, D)", 3)
        if negative_keys.ndim != ndim:
            raise ValueError(f"info_nce: negative_keys must be {form} when they are {negative_mode}. {spell(**got)}")
        if negative_mode == "paired" and negative_keys.shape[0] != query.shape[0]:
            raise ValueError(f"info_nce: paired negative_keys must have as many rows as query. {spell(**got)}")
    if any(t.shape[-1] != query.shape[-1] for t in got.values()):
        raise ValueError(f"info_nce: all vectors must have as many features. {spell(**got)}")


class InfoNCE(nn.Module):
    """`info_nce` as a module.

    temperature, reduction, negative_mode: as there. Call it with query (N, D), positive_key (N, D) and, if there are
    any, negative_keys.

    >>> InfoNCE(negative_mode="paired")(torch.randn(8, 16), torch.randn(8, 16), torch.randn(8, 5, 16)).shape
    torch.Size([])
    """

    def __init__(
        self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        return info_nce(query, positive_key, negative_keys, self.temperature, self.reduction, self.negative_mode)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, negative_mode={self.negative_mode!r}"
