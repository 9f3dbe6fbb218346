"""What CPC's loss must beat: simple methods, trained from scratch on the same normal images and judged the same way.

    mean image        |x - m|             m, s: mean and spread of each pixel over the training images,
    pixel Gaussian    |x - m| / s         all scaled to one square
    patch PCA         ||p - PCA(p)||^2    p: patches; the components that hold 90% of their variance
    autoencoder       |x - x'|^2, or 1 - SSIM(x, x'); convolutional, trained on random windows with that very loss
    latent neighbour  ||z - nearest z'||  z: latents of our own encoder; z' those of normal images, as PatchCore keeps
                                          them of pretrained features (Roth et al. 2022, arXiv 2106.08265)

Each has `fit(images)`, which returns it, and `inspect(image)`, which gives a map at the original resolution and its
maximum as the score: what cpc_fast.evaluate.score_all asks for. Images come and go as uint8 (h, w, c).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from cpc_fast.anomaly_map import anomaly_map
from cpc_fast.bank import reservoir
from cpc_fast.config import Config
from cpc_fast.detector import Detector
from cpc_fast.images import resize, to_channels
from cpc_fast.patches import extract_patches
from cpc_fast.train import autocast


class Answer:
    """A map, float32 (h, w), and a score, its maximum unless another is given."""

    def __init__(self, map: np.ndarray, score: float | None = None) -> None:
        self.map, self.score = map, float(map.max()) if score is None else score


def stretch(pixels: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(h, w, c) -> float64 (*size, c), bilinear."""
    planes = torch.tensor(pixels, dtype=torch.float64).permute(2, 0, 1)[None]
    return F.interpolate(planes, size=list(size), mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


class Baseline:
    """Scales images as `config` says (shorter side, channels) and stretches the map of the scaled one back."""

    seeded = True  # whether another seed gives another result

    def settings(self) -> dict[str, int | float | str]:
        """What it was made with, besides the config."""
        own = {name.lower(): getattr(self, name) for name in dir(self) if name.isupper()}
        return own | {name: value for name, value in vars(self).items() if isinstance(value, (int, float, str))}

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self, image: np.ndarray) -> np.ndarray:
        image = to_channels(image, self.config.channels)
        return image if self.config.image_size is None else resize(image, self.config.image_size)

    def fit(self, images: Sequence[np.ndarray]) -> Baseline:
        """Learn from normal images, scaled already or not."""
        self.learn([self.prepare(image) for image in images])
        return self

    def inspect(self, image: np.ndarray) -> Answer:
        found = self.surprise(self.prepare(image))
        if found.shape != image.shape[:2]:
            found = stretch(found[..., None], image.shape[:2])[..., 0]
        return Answer(found.astype(np.float32))

    def learn(self, images: list[np.ndarray]) -> None:
        raise NotImplementedError

    def surprise(self, image: np.ndarray) -> np.ndarray:
        """(h, w, c) -> (h, w)"""
        raise NotImplementedError


class PixelGaussian(Baseline):
    """Distance of each pixel from its mean, in units of its spread or (scaled=False) in grey values, smoothed a little.

    A method for parts that lie still; on a texture every place looks the same to it.
    """

    SMOOTH = 2.0  # pixels: one odd pixel is noise
    seeded = False

    def __init__(self, config: Config, scaled: bool = True) -> None:
        super().__init__(config)
        self.scaled = scaled

    def _square(self, image: np.ndarray) -> np.ndarray:
        return stretch(image, (self.side, self.side))

    def learn(self, images: list[np.ndarray]) -> None:
        self.side = min(min(image.shape[:2]) for image in images)
        total = square = np.zeros(())
        for image in images:
            pixels = self._square(image)
            total, square = total + pixels, square + pixels**2
        self.mean = total / len(images)
        variance = np.maximum(square / len(images) - self.mean**2, 0)
        self.spread = np.sqrt(variance + variance.mean() / 100 + 1e-6) if self.scaled else np.ones_like(variance)

    def surprise(self, image: np.ndarray) -> np.ndarray:
        distance = (np.abs(self._square(image) - self.mean) / self.spread).mean(2)
        return stretch(ndimage.gaussian_filter(distance, self.SMOOTH)[..., None], image.shape[:2])[..., 0]


class PatchPCA(Baseline):
    """Squared error of each patch when only the main directions of normal patches may explain it."""

    SIZE, STRIDE, SAMPLE, VARIANCE = 16, 4, 20_000, 0.9

    def _patches(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
        patches = extract_patches(pixels, self.SIZE, self.STRIDE)  # (1, gy, gx, c, p, p)
        return patches.flatten(3).flatten(0, 2).numpy(), (patches.shape[1], patches.shape[2])

    def learn(self, images: list[np.ndarray]) -> None:
        rows = reservoir((torch.from_numpy(self._patches(image)[0]) for image in images), self.SAMPLE, self.config.seed)
        self.pca = PCA(self.VARIANCE, svd_solver="full").fit(rows.numpy())

    def surprise(self, image: np.ndarray) -> np.ndarray:
        patches, shape = self._patches(image)
        error = patches - self.pca.inverse_transform(self.pca.transform(patches))
        grid = torch.from_numpy(np.square(error).mean(1).astype(np.float32)).view(shape)
        return anomaly_map(grid, self.SIZE, self.STRIDE, image.shape[:2], image.shape[:2]).numpy()


def similarity(a: Tensor, b: Tensor, size: int = 11) -> Tensor:
    """SSIM around each pixel, (n, c, h, w) -> (n, c, h, w), with a box of `size` and values of unit variance.

    Wang et al. 2004, Image quality assessment: from error visibility to structural similarity. The constants are those
    of a dynamic range of 4 standard deviations.
    """

    def box(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, [size // 2] * 4, mode="reflect"), size, 1)

    c1, c2 = (0.01 * 4) ** 2, (0.03 * 4) ** 2
    ma, mb = box(a), box(b)
    va, vb, cov = box(a * a) - ma**2, box(b * b) - mb**2, box(a * b) - ma * mb
    return (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))


class Autoencoder(Baseline):
    """Four strides of 2 down to a narrow grid, and back (after Bergmann et al. 2019, arXiv 1807.02011).

    loss: "l2" or "ssim", in training and in the map. `epochs` passes over one random window of each image.
    """

    WIDTH, BOTTLENECK, WINDOW = 32, 16, 64

    def __init__(self, config: Config, loss: str = "l2", epochs: int = 100) -> None:
        super().__init__(config)
        self.loss, self.epochs = loss, epochs

    def _make(self) -> nn.Sequential:
        w, layers, channels = self.WIDTH, [], self.config.channels
        for inputs, outputs in ((channels, w), (w, w), (w, 2 * w), (2 * w, 4 * w)):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(4 * w, self.BOTTLENECK, 3, 1, 1), nn.Conv2d(self.BOTTLENECK, 4 * w, 3, 1, 1)]
        for inputs, outputs in ((4 * w, 2 * w), (2 * w, w), (w, w), (w, channels)):
            layers += [nn.LeakyReLU(0.2), nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)]
        return nn.Sequential(*layers)

    def _errors(self, x: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, 1, h, w)"""
        again = self.net(x).float()
        error = (x - again) ** 2 if self.loss == "l2" else 1 - similarity(x, again)
        return error.mean(1, keepdim=True)

    def _standard(self, image: np.ndarray) -> Tensor:
        return (torch.tensor(image).permute(2, 0, 1).float() - self.mean) / self.spread

    def learn(self, images: list[np.ndarray]) -> None:
        torch.manual_seed(self.config.seed)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.mean = float(np.mean([image.mean() for image in images]))
        self.spread = float(np.mean([image.std() for image in images])) + 1e-6
        side = min(self.WINDOW, min(min(image.shape[:2]) for image in images) // 16 * 16)
        pixels = [self._standard(image) for image in images]
        self.net = self._make()
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(pixels), generator=generator).split(16):
                batch = []
                for i in chosen.tolist():
                    top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in pixels[i].shape[1:])
                    batch.append(pixels[i][:, top : top + side, left : left + side])
                loss = self._errors(torch.stack(batch)).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def surprise(self, image: np.ndarray) -> np.ndarray:
        h, w = image.shape[:2]
        pixels = F.pad(self._standard(image)[None], (0, -w % 16, 0, -h % 16), mode="reflect")
        with torch.inference_mode():
            errors = self._errors(pixels)[0, 0, :h, :w]
        return ndimage.gaussian_filter(errors.numpy(), 2.0)


class LatentNeighbour(Baseline):
    """Distance of each patch's latent, by the encoder of a fitted detector, from the nearest normal one."""

    SAMPLE = 10_000

    def __init__(self, config: Config, detector: Detector | None) -> None:
        super().__init__(detector.config if detector else config)
        self.model = detector.model if detector else None

    def _latents(self, image: np.ndarray) -> Tensor:
        """(gy, gx, d)"""
        assert self.model is not None, "a latent neighbour needs the detector whose encoder it uses"
        with torch.inference_mode(), autocast(self.model.pixel_mean.device, self.config.precision):
            return self.model.latents(self.model.standardise(image)[None])[0].float().cpu()

    def learn(self, images: list[np.ndarray]) -> None:
        rows = reservoir((self._latents(image).flatten(0, 1) for image in images), self.SAMPLE, self.config.seed)
        self.known = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(rows.numpy())

    def surprise(self, image: np.ndarray) -> np.ndarray:
        latents = self._latents(image)
        distances = self.known.kneighbors(latents.flatten(0, 1).numpy())[0][:, 0].astype(np.float32)
        grid, size = torch.from_numpy(distances).view(latents.shape[:2]), image.shape[:2]
        return anomaly_map(grid, self.config.patch_size, self.config.patch_stride, size, size).numpy()


BASELINES: dict[str, Callable[[Config, Detector | None], Baseline]] = {
    "mean image": lambda config, _: PixelGaussian(config, scaled=False),
    "pixel Gaussian": lambda config, _: PixelGaussian(config),
    "patch PCA": lambda config, _: PatchPCA(config),
    "autoencoder, L2": lambda config, _: Autoencoder(config, "l2"),
    "autoencoder, SSIM": lambda config, _: Autoencoder(config, "ssim"),
    "latent neighbour": lambda config, detector: LatentNeighbour(config, detector),
}
