"""Edges: whether lines and surfaces are drawn as the style draws them, whatever they show."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import edge_histogram, total_variation


def values(evidence: Evidence) -> np.ndarray:
    style = evidence.once("edges of the references", lambda: np.mean([edge_histogram(pixels) for pixels in evidence.reference_pixels()], axis=0))
    return np.array([total_variation(edge_histogram(pixels), style) for pixels in evidence.pictures])


MEASURE = Measure(
    "edges", "distance of the distribution of edge strengths and directions to the style's",
    "edge histogram after MPEG-7 (Manjunath et al. 2001), with strengths; half the L1 distance", 0, 1, "lower", ("references",), values=values)
