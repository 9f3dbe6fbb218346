"""The whole CPC model: images in, losses out.

images -> patches -> for each member: latents, contexts, predictions -> losses

Members learn the same, from other weights at the start and other batches. What one of them misses another may see, and
their false alarms do not agree: see scoring.py for how they are put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .bank import Bank, bank_losses
from .config import Config
from .contexts import ContextNet, PlaceNet
from .errors import UsageError
from .latents import PatchEncoder, encode
from .loss import accuracy, cpc_loss
from .patches import extract_patches, grid_shape, jittered, patch_places, places_turned_over, turned_over
from .predictions import Predictions, Predictor, geometry
from .shapes import Frames, Images, Latents, Losses, Places, Shifted

# Mean and spread of each channel that pretrained backbones were trained with; grey takes the mean of the three.
IMAGENET = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.449,), (0.226,))}


@dataclass
class StepResult:
    """One training step: the scalar loss, and how often (0..1) a prediction ranks its own patch first."""

    loss: Tensor
    accuracy: Tensor


class Member(nn.Module):
    """One network: a patch encoder, contexts, and the predictions made from them."""

    def __init__(self, config: Config, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config, features = config, config.features
        if encoder is None:
            encoder = PatchEncoder(config.channels, config.width, config.stem, config.norm)
        else:
            side, training = config.patch_size, encoder.training
            encoder.eval()  # a batch norm must not count these zeros
            with torch.no_grad():
                features = encode(encoder, torch.zeros(1, 1, 1, config.channels, side, side)).shape[-1]
            encoder.train(training)
        self.encoder = encoder
        self.context = ContextNet(config.context, features, config.directions)
        self.predictor = Predictor(features, config.offsets, config.directions, config.place)
        self.place = PlaceNet(features) if config.place else None

    def latents(self, images: Images, stride: int | None = None, draws: torch.Generator | None = None) -> Latents:
        """(b, c, h, w) -> (b, gy, gx, d), on the grid of training unless another stride is given.

        draws: in training, what the patch_jitter of the config is drawn from.
        """
        patches = extract_patches(images, self.config.patch_size, stride or self.config.patch_stride)
        if draws is not None and self.config.patch_jitter:
            patches = jittered(patches, self.config.patch_jitter, draws, each=3)
        return encode(self.encoder, patches)

    def predictions(
        self, latents: Latents, places: Places | None, stride: int | None = None, axes: tuple[int, ...] = ()
    ) -> Predictions:
        """From the latents of a grid. One that is finer than that of training holds several such, shifted against each
        other, and the predictions are those of each.

        axes: of (c, h, w) that were turned over; the predictions are those about the grid as it was before.
        places: of the patches of that grid; for a model that knows of places.
        """
        stride, placed = stride or self.config.patch_stride, None
        apart = self.config.patch_stride // stride
        if self.place is not None:
            if places is None:
                raise UsageError("The model predicts patches from their places; give these.")
            placed = self.place(places)
        contexts = self.context(latents, apart)
        if axes:  # flip copies, even where it turns nothing over
            contexts = contexts.flip([axis + 1 for axis in axes])
        return self.predictor(contexts, apart, placed, axes)

    def compare(self, latents: Latents, images: int, places: Places | None = None, seed: int = 0) -> StepResult:
        """The loss of a batch from its latents; those behind the first `images` are of shifted ones. places: of the
        patches of those first, for a model that knows of places."""
        config, own = self.config, latents[:images]
        predictions = self.predictions(own, places)
        loss = cpc_loss(
            predictions, latents, negatives=config.negatives, count=config.negatives_count, seed=seed,
            shifted=len(latents) - images, across_ranks=config.across_ranks,
        )  # fmt: skip
        return StepResult(loss, accuracy(predictions, own))


class CPC(nn.Module):
    """Contrastive predictive coding on a grid of patches.

    Args:
        config: the choices of the run.
        encoder: any module that maps patches (n, c, p, p) to vectors (n, d), in place of the built-in ResNet; for one
            member only. With nothing in it that requires a gradient it is frozen: always in eval mode, and in training
            run once for each image.

    The latents of all members stand side by side in the last dimension: d is their sum.

    >>> from cpc_fast.config import Config
    >>> model = CPC(Config(width=8))
    >>> model(torch.randn(2, 1, 128, 128)).loss.shape
    torch.Size([])
    """

    members: Sequence[Member]
    pixel_mean: Tensor
    pixel_spread: Tensor

    def __init__(self, config: Config, encoder: nn.Module | None = None) -> None:
        super().__init__()
        if encoder is not None and config.members > 1:
            raise UsageError(f"config: members is {config.members}; with an encoder of your own it must be 1.")
        self.config = config
        self.members = nn.ModuleList(Member(config, encoder) for _ in range(config.members))  # pyright: ignore[reportAttributeAccessIssue]
        self.register_buffer("pixel_mean", torch.tensor(127.5))
        self.register_buffer("pixel_spread", torch.tensor(64.0))

    def measure_pixels(self, images: Sequence[np.ndarray]) -> None:
        """Take the mean and spread of the training images' pixels, for standardise."""
        moments = torch.tensor([[image.mean(), np.square(image, dtype=np.float32).mean()] for image in images]).mean(0)
        self.pixel_mean.fill_(moments[0])
        self.pixel_spread.fill_((moments[1] - moments[0] ** 2).clamp_min(1.0).sqrt())

    def standardise(self, image: np.ndarray) -> Tensor:
        """(h, w, c) of 0 to 255 -> float32 (c, h, w) of mean about 0 and variance about 1, on the model's device.

        By the training set's mean and spread, the image's own, or those that backbones of ImageNet expect: standardise
        of the config says which.
        """
        # Contiguous: torch takes no negative strides, which mirrored arrays have.
        return self.rescaled(torch.tensor(np.ascontiguousarray(image)).permute(2, 0, 1))

    def rescaled(self, pixels: Tensor) -> Tensor:
        """The same of one image (c, h, w), or of windows (b, c, h, w) where no image's own mean is asked for."""
        pixels = pixels.to(self.pixel_mean.device).float()
        if self.config.standardise == "set":
            return (pixels - self.pixel_mean) / self.pixel_spread
        if self.config.standardise == "imagenet":
            mean, spread = (pixels.new_tensor(value)[:, None, None] for value in IMAGENET[pixels.shape[-3]])
            return (pixels / 255 - mean) / spread
        return (pixels - pixels.mean()) / pixels.std(correction=0).clamp_min(1.0)

    @property
    def frozen(self) -> bool:
        """Whether nothing in the encoders learns."""
        return not any(weight.requires_grad for member in self.members for weight in member.encoder.parameters())

    def train(self, mode: bool = True) -> CPC:
        """As of any module; a frozen encoder stays in eval mode, or its batch norms would go on counting."""
        super().train(mode)
        if self.frozen:
            for member in self.members:
                member.encoder.eval()
        return self

    def latents(self, images: Images, stride: int | None = None) -> Latents:
        """(b, c, h, w) -> (b, gy, gx, d), on the grid of training unless another stride is given."""
        return torch.cat([member.latents(images, stride) for member in self.members], -1)

    def forward(
        self,
        images: Images,
        shifted: Shifted | None = None,
        seed: int = 0,
        frames: Frames | None = None,
        draws: torch.Generator | None = None,
    ) -> StepResult:
        """The loss of a batch, the mean over the members: each has an equal part of the images, in their order. One
        that has none, as in a batch of fewer images than members, counts as 0.

        shifted: transformed images whose patches are further wrong answers, an equal part for each member too.
        frames: where each image was cut from; they are whole by default.
        draws: what the patch_jitter of the config is drawn from; without it there is none.
        """
        members = len(self.members)
        frames = whole_frames(images) if frames is None else frames
        lengths = self.config.patch_size, self.config.patch_stride
        parts = [
            (len(part), patch_places(part, images.shape[2:], *lengths) if self.config.place else None)
            for part in frames.tensor_split(members)
        ]
        everything = [images.tensor_split(members)]
        if shifted is not None:
            everything.append(shifted.tensor_split(members))
        results = [
            member.compare(member.latents(torch.cat(own), draws=draws), *part, seed)
            for member, part, *own in zip(self.members, parts, *everything, strict=True)
        ]
        mean = [torch.stack([getattr(result, name) for result in results]).mean() for name in ("loss", "accuracy")]
        return StepResult(*mean)

    def examine(self, image: Tensor) -> list[tuple[Latents, Predictions]]:
        """For each view of one image (c, h, w) and each member the latents on the grid of scoring, and the predictions
        about them; of a mirror image as they lie in the image, patch for patch."""
        lengths, places, found = (self.config.patch_size, self.config.scoring_stride), None, []
        patches = extract_patches(image[None], *lengths)
        if self.config.place:
            places = patch_places(whole_frames(image[None]), image.shape[1:], *lengths)
        for axes in mirrors(self.config):
            seen = turned_over(patches, axes)
            where = None if places is None else places_turned_over(places, axes)
            for member in self.members:
                latents = encode(member.encoder, seen)
                found.append((latents.flip(axes), member.predictions(latents, where, lengths[1], axes)))
        return found

    def losses(self, examined: Sequence[tuple[Latents, Predictions]], bank: Bank) -> Losses:
        """Of all that was examined, one after the other: (views * members * n,)."""
        return bank_losses(examined, bank)

    @torch.no_grad()
    def surprise(self, image: Tensor, bank: Bank) -> tuple[Losses, Tensor, Tensor, list[int]]:
        """The losses of one image (c, h, w) against a bank (m, d) of normal latents.

        Returns losses (n,), sources (n,) and targets (n,) as flat grid indices, and the number of predictions of each
        (view, member, direction, step); views are the image and its mirror images. What is predicted in one of these
        stands where it lies in the image: looking down in one that is upside down is looking up.
        """
        config, views = self.config, mirrors(self.config)
        losses = self.losses(self.examine(image), bank)
        gy, gx = grid_shape(image.shape[1], image.shape[2], config.patch_size, config.scoring_stride)
        ahead = tuple(offset * config.finer for offset in config.offsets)
        sources, targets, counts = geometry((1, gy, gx), ahead, config.directions, image.device, place=config.place)
        sources = sources % (gy * gx)  # a place is numbered behind the patches
        times = len(views) * len(self.members)
        return losses, sources.repeat(times), targets.repeat(times), counts * times


def mirrors(config: Config) -> tuple[tuple[int, ...], ...]:
    """Which axes of (c, h, w) are turned over, for each image that is scored in place of one: none, then others."""
    return ((), (1,), (2,), (1, 2)) if config.mirrored else ((),)


def whole_frames(images: Images) -> Frames:
    """The frames of images that are whole: (b, 4)."""
    return images.new_tensor([0.0, 0.0, *images.shape[2:]]).expand(len(images), 4)
