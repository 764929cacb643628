"""Base style: distance to the style in the features of the base model's own picture encoder."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure


# Spread below which references count as equal in a channel; latents have a spread of about 1.
SMALLEST_SPREAD = 0.05


def standardised(evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Features of the pictures (n, D) and of the references (m, D), in the references' mean and standard deviations."""
    judge = evidence.judge
    style = evidence.once("base features of the references", lambda: judge.style_features(evidence.reference_pixels()))
    mine = evidence.once(("base features", id(evidence.pictures)), lambda: judge.style_features(evidence.pictures))
    mean, spread = style.mean(0), np.maximum(style.std(0), SMALLEST_SPREAD)
    return (mine - mean) / spread, (style - mean) / spread


def values(evidence: Evidence) -> np.ndarray:
    return np.sqrt((standardised(evidence)[0] ** 2).mean(1))


MEASURE = Measure(
    "base_style", "mean and spread of each latent channel of the base's encoder: root mean square distance to the references, in their standard deviations",
    "feature statistics as style, Huang and Belongie, AdaIN (2017)", 0, float("inf"), "lower", ("references", "judge"), values=values)
