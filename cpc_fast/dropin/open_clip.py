"""open_clip 3: `ClipLoss`, images against texts and texts against images, across processes.

    loss = ( mean_i -log softmax_j(scale <x_i, y_j>)[i]  +  mean_j -log softmax_i(scale <x_i, y_j>)[j] ) / 2

local_loss: each process scores its own rows against everybody's; else every process scores all rows. gather_with_grad:
gradients go back to the processes that the rows came from; else only to this one's.
"""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cpc_kernels import info_nce, info_nce_across_ranks
from cpc_kernels.arguments import spell
from cpc_kernels.exchange import averaged, gather_rows, shares

from .arguments import check_tensors, one_number


class ClipLoss(nn.Module):
    """The symmetric contrastive loss of CLIP, as open_clip computes it.

    local_loss, gather_with_grad: see above. rank, world_size: of this process, as open_clip takes them; processes may
    hold different numbers of rows (with local_loss, a row then weighs the same everywhere). cache_labels: accepted and
    not needed. use_horovod: not supported.
    Call it with image_features, text_features (N, D), normalised as the model made them, and logit_scale, a number or
    one-element tensor. logit_bias, one number for all pairs, does not change the loss; its gradient is 0.
    Returns a scalar, float32 for 16-bit inputs, or {"contrastive_loss": it} with output_dict. Raises ValueError for
    arguments that do not fit. Source: Radford et al. 2021 (arXiv 2103.00020).

    >>> ClipLoss()(torch.randn(8, 16), torch.randn(8, 16), logit_scale=torch.tensor(14.3)).shape
    torch.Size([])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: Horovod is not supported. Use torch.distributed, with use_horovod=False.")
        if not 0 <= rank < world_size:
            raise ValueError(f"ClipLoss: rank must lie in 0..world_size - 1. Got rank {rank}, world_size {world_size}.")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        images, texts = image_features, text_features
        check_tensors("ClipLoss", image_features=images, text_features=texts)
        logit_scale = one_number("ClipLoss", "logit_scale", logit_scale)
        if images.ndim != 2 or images.shape != texts.shape:
            raise ValueError(
                "ClipLoss: image and text features must both be (N, D). "
                + spell(image_features=images, text_features=texts)
            )
        if isinstance(logit_bias, Tensor) and logit_bias.numel() != 1:
            raise ValueError(
                f"ClipLoss: logit_bias must be one number, the same for all pairs. Got shape {tuple(logit_bias.shape)}."
            )
        if self.world_size > 1:
            loss = self.across_ranks(images, texts, logit_scale)
        else:
            own = torch.arange(images.shape[0], device=images.device)
            loss = info_nce(images, texts, own, scale=logit_scale) + info_nce(texts, images, own, scale=logit_scale)
        loss = loss / 2
        if isinstance(logit_bias, Tensor):  # a softmax does not see it; its gradient is 0 rather than missing
            loss = loss + (0 * logit_bias.sum()).to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss

    def across_ranks(self, images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"ClipLoss: world_size is {self.world_size}, but torch.distributed has not been started. "
                "Call torch.distributed.init_process_group first, or leave world_size at 1."
            )
        of = shares(len(images), images.device)
        before, after = of.first(), of.first() + len(images)
        if self.local_loss:  # own rows against everybody's
            own = torch.arange(len(images), device=images.device) + before
            to = (texts, images) if self.gather_with_grad else (texts.detach(), images.detach())
            rows = [
                info_nce_across_ranks(q, k, own, scale=scale, reduction="none")
                for q, k in zip((images, texts), to, strict=True)
            ]
            return (rows[0] + rows[1]).sum() * (of.world / max(of.total, 1))
        if self.gather_with_grad:  # the mean of all rows is the same on all ranks, whoever computes it
            own = torch.arange(len(images), device=images.device) + before
            if isinstance(scale, Tensor):
                scale = averaged(scale)
            pairs = (images, texts), (texts, images)
            first, second = (info_nce_across_ranks(q, k, own, scale=scale) for q, k in pairs)
            return first + second
        every = []
        for features in (images, texts):
            everyone = gather_rows(features, of)
            every.append(torch.cat([everyone[:before], features, everyone[after:]]))
        all_images, all_texts = every
        own = torch.arange(of.total, device=images.device)
        return info_nce(all_images, all_texts, own, scale=scale) + info_nce(all_texts, all_images, own, scale=scale)

    def extra_repr(self) -> str:
        return (
            f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, "
            f"rank={self.rank}, world_size={self.world_size}"
        )
