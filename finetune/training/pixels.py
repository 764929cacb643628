"""What worker processes do: open a picture and fit it to its bucket. No torch here, so that workers start fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.buckets import Placement
from data_tools.images import apply_placement, open_image, to_array


def load_pixels(path: Path, placement: Placement, background: str) -> np.ndarray:
    """(H, W, 3) uint8 sRGB of the bucket's size. Raises DataError when the picture cannot be opened any more."""
    return to_array(apply_placement(open_image(path, background=background), placement, background=background))


def load_mask(path: Path, placement: Placement) -> np.ndarray:
    """(H, W) uint8 of the bucket's size, cut as its picture is; 255 is learned fully. What is transparent, and the border of
    a picture that does not fill its bucket, is black. Raises DataError when the mask cannot be opened any more."""
    fitted = apply_placement(open_image(path, background="#000000"), placement, background="#000000")
    return np.array(fitted.convert("L"), dtype=np.uint8)
