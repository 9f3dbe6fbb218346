"""Small images, small sets and a small config: a whole run in about a second."""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from cpc_fast.config import Config

TINY = {
    "width": 8, "stem": 4, "patch_size": 16, "patch_stride": 8, "steps": 2, "batch_size": 4, "epochs": 2,
    "bank_size": 64, "shifts": (),
}  # fmt: skip
TINY_CONFIG = Config(**TINY)
SET_TINY = [
    part
    for name, value in TINY.items()
    for part in ("--set", f"{name}={','.join(value) if isinstance(value, tuple) else value}")
]


def texture(seed: int, height: int = 48, width: int = 48) -> np.ndarray:
    """A striped surface with grain, uint8 (h, w, 1)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + random.uniform(0, 20, 2)[:, None, None]
    waves = 40 * np.sin(x / 2.5) + 25 * np.sin(y / 6)
    grain = 20 * ndimage.gaussian_filter(random.standard_normal((height, width)), 1)
    return (128 + waves + grain).clip(0, 255).astype(np.uint8)[..., None]


def holed(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A texture with a square hole, and the mask of it."""
    image, mask = texture(seed), np.zeros((48, 48), bool)
    mask[20:30, 12:26] = True
    image[mask] = 20
    return image, mask


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if pixels.ndim == 2 else pixels[..., 0]).save(path)
    return path


def make_set(root: Path, *, train: int = 10, good: int = 3, holes: int = 2, masks: bool = True) -> Path:
    """A set in MVTec layout with one defect, `hole`."""
    for i in range(train):
        save(root / "train" / "good" / f"{i:03d}.png", texture(i))
    for i in range(good):
        save(root / "test" / "good" / f"{i:03d}.png", texture(100 + i))
    for i in range(holes):
        image, mask = holed(200 + i)
        save(root / "test" / "hole" / f"{i:03d}.png", image)
        if masks:
            save(root / "ground_truth" / "hole" / f"{i:03d}_mask.png", mask.astype(np.uint8) * 255)
    return root
