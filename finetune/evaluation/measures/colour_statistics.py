"""Colour statistics: mean and spread of lightness and colour, compared with the style's own variation."""

import numpy as np

from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import oklab

# Spread below which references count as equal; OKLab units, about what an eye sees.
SMALLEST_SPREAD = 0.02


def statistics(pixels: Pixels) -> np.ndarray:
    """(6,) means and standard deviations of the three OKLab channels."""
    lab = oklab(pixels).reshape(-1, 3)
    return np.concatenate([lab.mean(0), lab.std(0)])


def values(evidence: Evidence) -> np.ndarray:
    style = evidence.once("colour statistics of the references", lambda: np.stack([statistics(pixels) for pixels in evidence.reference_pixels()]))
    mean, spread = style.mean(0), np.maximum(style.std(0), SMALLEST_SPREAD)
    return np.array([np.sqrt((((statistics(pixels) - mean) / spread) ** 2).mean()) for pixels in evidence.pictures])


MEASURE = Measure(
    "colour_statistics", "mean and spread of OKLab channels: root mean square distance to the references, in their standard deviations",
    "statistics of Reinhard et al., Color Transfer between Images (2001), in OKLab", 0, float("inf"), "lower", ("references",), values=values)
