"""Maps for the server that judges MVTec AD 2, in the tree and with the names that it takes.

    OUT/anomaly_images/C/{test_private,test_private_mixed}/<name>.tiff               float16 (H, W)
    OUT/anomaly_images_thresholded/C/{test_private,test_private_mixed}/<name>.png    255 above the threshold, else 0

C is the category, <name> that of the image. The server's own script checks and packs the tree.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile
from PIL import Image

from .errors import UsageError
from .files import write_whole
from .images import naming, quoted, read_image
from .layouts import PRIVATE, find_private

if TYPE_CHECKING:
    from .detector import Detector

LARGEST = float(np.finfo(np.float16).max)


def write_submission(
    detector: Detector,
    category: str | os.PathLike,
    out: str | os.PathLike,
    *,
    on_image: Callable[[int, int], None] | None = None,
) -> int:
    """Score the private images of one category of MVTec AD 2; returns how many there are.

    Map values are rounded to float16 (three digits) and cut off at +-65504. Raises UsageError for a category without
    test_private. Source: the tree and names of MVTec's evaluation utilities for AD 2.

    >>> write_submission(detector, "data/mvtec_ad_2/can", "submission")      # doctest: +SKIP
    321
    """
    category, out = Path(category), Path(out)
    paths = find_private(category)
    if not paths:
        raise UsageError(
            f"{quoted(category)} has no images in {' or '.join(PRIVATE)}: only MVTec AD 2 is submitted; leave this out."
        )
    for done, path in enumerate(paths, start=1):
        with naming(path):
            found = detector.inspect(read_image(path, depth=detector.config.depth))
        place = Path(category.resolve().name, path.parent.name, path.name)
        map = found.map.clip(-LARGEST, LARGEST).astype(np.float16)
        mask = Image.fromarray(found.mask.astype(np.uint8) * 255)
        write_whole(
            (out / "anomaly_images" / place).with_suffix(".tiff"), lambda aside, map=map: tifffile.imwrite(aside, map)
        )
        write_whole(
            (out / "anomaly_images_thresholded" / place).with_suffix(".png"),
            lambda aside, mask=mask: mask.save(aside, "PNG"),
        )
        if on_image:
            on_image(done, len(paths))
    return len(paths)
