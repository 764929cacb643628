"""Drift: what the adapter does to prompts that it has nothing to do with. A perfectly local adapter has 0."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import oklab


def values(evidence: Evidence) -> np.ndarray:
    return np.array([np.sqrt(((oklab(one) - oklab(other)) ** 2).sum(-1).mean()) if one.shape == other.shape else np.nan
                     for one, other in zip(evidence.pictures, evidence.base, strict=True)])


MEASURE = Measure(
    "drift", "colour difference to the base's picture of the same unrelated prompt and seed (OKLab, root mean square)",
    "paired difference adapter on against adapter off; colour difference of Ottosson (2020)", 0, 1.2, "lower", splits=("unrelated",), values=values)
