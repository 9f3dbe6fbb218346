"""A ResNet-18 v2 up to its third stage over patches, on CPUs with bfloat16 products: csrc/patch_encoder.cpp.

    h = stem(x)      h = shortcut(h) + conv2(relu(norm2(conv1(relu(norm1(h))))))  six times      latent = mean relu(h)

A few patches at a time pass through the whole network in the cache. Memory: the output of each convolution in bfloat16,
where a gradient is asked for, else none. Nothing depends on the number of threads, and a latent on its own patch alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .capabilities import PATCH_ENCODER


def can_encode(patches: Tensor, width: int, stem: int, kernel: int) -> bool:
    """Whether `encode_patches` has loops for these patches (b, gy, gx, c, p, p) and a network of that width."""
    channels, side = patches.shape[3], patches.shape[5]
    line = 8 if kernel <= 8 else 16
    return (
        PATCH_ENCODER.available and patches.device.type == "cpu" and not patches.requires_grad
        and width in (16, 32, 64) and side % (8 * stem) == 0 and channels * kernel * line <= 512
    )  # fmt: skip


def encode_patches(patches: Tensor, parameters: list[Tensor], *, stem: int, norm: bool, eps: float = 1e-5) -> Tensor:
    """Latents of patches, products in bfloat16 and sums in float32.

    Args:
        patches: (b, gy, gx, c, p, p), a view of overlapping windows too; p a multiple of 8 * stem.
        parameters: weight and bias of the stem, (w, c, k, k) and (w,); then for each of six blocks of w, w, 2w, 2w, 4w
            and 4w features: gain and bias of norm1 (none without norm), weight of conv1 (and bias, without norm), the
            same of norm2 and conv2, and the weight of the shortcut where it changes the width.
        stem: stride of the first convolution.
        norm: whether there are group norms, of 16 channels a group.

    Returns bfloat16 (b, gy, gx, 4w). Gradients for the parameters only, once. Raises RuntimeError where `can_encode` is
    false, or the parameters are others.
    """
    if torch.is_grad_enabled() and any(p.requires_grad for p in parameters):
        return _Encode.apply(patches, stem, norm, eps, *parameters)
    return torch.ops.cpc_kernels_cpu.encode_forward(patches, parameters, stem, norm, eps, False)[0]


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, patches: Tensor, stem: int, norm: bool, eps: float, *parameters: Tensor) -> Tensor:
        latents, maps, stats = torch.ops.cpc_kernels_cpu.encode_forward(patches, parameters, stem, norm, eps, True)
        ctx.save_for_backward(patches, maps, stats, *parameters)
        ctx.choices = stem, norm, eps
        return latents

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        patches, maps, stats, *parameters = ctx.saved_tensors
        grads = torch.ops.cpc_kernels_cpu.encode_backward(grad, patches, parameters, maps, stats, *ctx.choices)
        return None, None, None, None, *grads
