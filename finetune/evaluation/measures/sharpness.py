"""Sharpness of a picture; a sudden fall means blur, a rise noise."""

import numpy as np

from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import luminance


def sharpness(pixels: Pixels) -> float:
    light = np.pad(luminance(pixels), 1, mode="edge")
    laplacian = light[2:, 1:-1] + light[:-2, 1:-1] + light[1:-1, 2:] + light[1:-1, :-2] - 4 * light[1:-1, 1:-1]
    return float(laplacian.std())


def values(evidence: Evidence) -> np.ndarray:
    return np.array([sharpness(pixels) for pixels in evidence.pictures])


MEASURE = Measure("sharpness", "standard deviation of the Laplacian of luminance", "variance of the Laplacian, Pech-Pacheco et al. (2000), as its root",
                  0, 4, "none", splits=("style", "holdout", "unrelated"), values=values)
