"""Palette: how far a picture's colours are from those of the style as a whole."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import palette_histogram, total_variation


def values(evidence: Evidence) -> np.ndarray:
    style = evidence.once("palette of the references", lambda: np.mean([palette_histogram(pixels) for pixels in evidence.reference_pixels()], axis=0))
    return np.array([total_variation(palette_histogram(pixels), style) for pixels in evidence.pictures])


MEASURE = Measure(
    "palette", "distance of the picture's colours to the style's (512 RGB bins, pooled references)",
    "half the L1 distance of colour histograms, after Swain and Ballard, Color Indexing (1991)", 0, 1, "lower", ("references",), values=values)
