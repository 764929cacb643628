"""What worker processes do: open a picture and fit it to its bucket. No torch here, so that workers start fast."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_tools.buckets import Placement
from data_tools.images import apply_placement, open_image, to_array


def load_pixels(path: Path, placement: Placement, background: str) -> np.ndarray:
    """(H, W, 3) uint8 sRGB of the bucket's size. Raises DataError when the picture cannot be opened any more."""
    return to_array(apply_placement(open_image(path, background=background), placement, background=background))
