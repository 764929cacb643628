"""Colourfulness of a picture; shown because rewards and styles often move it unasked."""

import numpy as np

from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure


def colourfulness(pixels: Pixels) -> float:
    red, green, blue = np.moveaxis(pixels.astype(np.float64), -1, 0)
    opponents = red - green, (red + green) / 2 - blue
    return float(np.hypot(*(axis.std() for axis in opponents)) + 0.3 * np.hypot(*(axis.mean() for axis in opponents)))


def values(evidence: Evidence) -> np.ndarray:
    return np.array([colourfulness(pixels) for pixels in evidence.pictures])


MEASURE = Measure("colourfulness", "how colourful a picture is: 0 grey, above 60 very", "Hasler and Suesstrunk, Measuring Colourfulness in Natural Images (2003)",
                  0, 250, "none", splits=("style", "holdout", "unrelated"), values=values)
