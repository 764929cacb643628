"""Structure kept: whether the adapter still draws the scene that the base draws for the same prompt and seed."""

import numpy as np

from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import luminance

WINDOW, K1, K2 = 7, 0.01, 0.03


def _means(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of every window x window patch, by summed areas."""
    sums = np.pad(values, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    return (sums[window:, window:] - sums[:-window, window:] - sums[window:, :-window] + sums[:-window, :-window]) / window**2


def structure_similarity(one: Pixels, other: Pixels) -> float:
    """SSIM's structure and contrast terms on luminance (its lightness term is left out: a style may change that)."""
    a, b = luminance(one), luminance(other)
    window = min(WINDOW, *a.shape)
    mean_a, mean_b = _means(a, window), _means(b, window)
    var_a, var_b = np.maximum(_means(a * a, window) - mean_a**2, 0), np.maximum(_means(b * b, window) - mean_b**2, 0)
    covariance = _means(a * b, window) - mean_a * mean_b
    return float(((2 * covariance + K2**2) / (var_a + var_b + K2**2)).mean())


def values(evidence: Evidence) -> np.ndarray:
    return np.array([structure_similarity(one, other) if one.shape == other.shape else np.nan
                     for one, other in zip(evidence.pictures, evidence.base, strict=True)])


MEASURE = Measure(
    "structure_kept", "likeness of light-dark structure to the base's picture of the same prompt and seed",
    "contrast-structure term of SSIM, Wang et al. (2004), 7x7 windows", -1, 1, "higher", values=values)
