"""One test image with everything a detector said about it: what `evaluate` makes and what `report` draws."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scored:
    """A test image, its score, its anomaly map and, where there is one, its ground truth.

    Args:
        name: how the image is called in tables and captions, mostly its file name.
        defect: the kind of defect, "good" for a normal image.
        image: uint8 (H, W, C), C 1 or 3, at the original resolution.
        score: the image score; higher is stranger.
        map: float32 (H, W), the surprise per pixel in the units of the score.
        truth: bool (H, W), True on the defect; None where the set has no mask for this image.
        other_light: whether it is lit as none of the fit (Prediction.other_light).

    Example:
        >>> Scored("000.png", "good", np.zeros((4, 4, 1), np.uint8), 0.5, np.zeros((4, 4), np.float32), None).good
        True
    """

    name: str
    defect: str
    image: np.ndarray
    score: float
    map: np.ndarray
    truth: np.ndarray | None
    other_light: bool = False

    @property
    def good(self) -> bool:
        """Whether the image is a normal one."""
        return self.defect == "good"
