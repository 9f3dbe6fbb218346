"""patches -> latents: the patch encoder.

ResNet-18 v2 (pre-activation) up to its third residual stage, averaged over the patch. Each patch is encoded alone: a
pixel never reaches a latent other than through its own patch, or the prediction task could be solved by peeking.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import CpcFastError
from .shapes import Latents, Patches
from .stages import stage


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel, (b, c, h, w) -> (b, c, h, w)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(kind: str, channels: int) -> nn.Module:
    """`group` (16 channels a group), `layer` (over channels) or `none`. Batch norm is left out on purpose: statistics
    over a batch tell a patch about its neighbours, and a score would depend on its company."""
    if kind == "group":
        return nn.GroupNorm(max(1, channels // 16), channels)
    return ChannelNorm(channels) if kind == "layer" else nn.Identity()


class ResidualBlock(nn.Module):
    """Pre-activation residual block of two 3 x 3 convolutions (He et al. 2016, arXiv 1603.05027).

    The shortcut takes the input before its norm, also where it changes the width, and the encoder ends without a norm:
    so brightness and contrast of a patch, which a norm over the patch removes, still reach the latent.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        bias = norm == "none"
        self.norm1 = make_norm(norm, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)
        self.norm2 = make_norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=bias)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, bias=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # Not a convolution with a stride: oneDNN's on AVX2 writes past its memory for fewer than 8 channels.
        shortcut = x if self.shortcut is None else self.shortcut(x[..., :: self.stride, :: self.stride])
        # what a group norm returns nobody else reads: in place saves memory and time
        fresh = isinstance(self.norm1, nn.GroupNorm)
        x = F.relu(self.norm2(self.conv1(F.relu(self.norm1(x), fresh))), fresh)
        return self.conv2(x).add_(shortcut) if fresh else shortcut + self.conv2(x)


class PatchEncoder(nn.Module):
    """The built-in encoder: (n, c, p, p) -> (n, 4 * width).

    Args:
        channels: 1 for grayscale, 3 for colour.
        width: channels of the first stage; the paper's family uses 64.
        stem: stride of the first convolution.
        norm: "group", "layer" or "none".

    >>> PatchEncoder(channels=1, width=16)(torch.zeros(5, 1, 32, 32)).shape
    torch.Size([5, 64])
    """

    def __init__(self, channels: int, width: int = 64, stem: int = 2, norm: str = "group") -> None:
        super().__init__()
        kernel = {1: 3, 2: 5, 4: 7, 8: 11}[stem]
        self.stem = nn.Conv2d(channels, width, kernel, stem, kernel // 2)
        stages = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        blocks: list[nn.Module] = []
        for inputs, outputs, stride in stages:
            blocks += [ResidualBlock(inputs, outputs, stride, norm), ResidualBlock(outputs, outputs, 1, norm)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.blocks(self.stem(x))).mean((2, 3))


@stage("latents")
def encode(encoder: nn.Module, patches: Patches) -> Latents:
    """Run any module that maps (n, c, p, p) to (n, d) over a grid of patches.

    Raises CpcFastError when the module returns anything but one vector per patch.
    """
    b, gy, gx, c, p, _ = patches.shape
    flat = patches.reshape(b * gy * gx, c, p, p)
    if c > 1:
        flat = flat.contiguous(memory_format=torch.channels_last)
    latents = encoder(flat)
    if latents.ndim != 2 or latents.shape[0] != flat.shape[0]:
        raise CpcFastError(
            f"The encoder turned patches of shape {tuple(flat.shape)} into {tuple(latents.shape)}; "
            "it must return one vector per patch, (n, d). Pool or flatten its output."
        )
    return latents.unflatten(0, (b, gy, gx))
