"""CMMD: distance of the distributions of pictures and references in CLIP's space; steadier than FID for small sets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import loaded, reference_vectors

SIGMA, SCALE = 10.0, 1000.0


def gaussian_kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    squared = (one**2).sum(1)[:, None] + (other**2).sum(1)[None] - 2 * one @ other.T
    return np.exp(-squared / (2 * SIGMA**2))


def cmmd(within: np.ndarray, across: np.ndarray, others: np.ndarray) -> float:
    """Squared MMD with the diagonals kept, times 1000, as published; compare equal numbers of pictures only."""
    return float(SCALE * (within.mean() + others.mean() - 2 * across.mean()))


def of_set(evidence: Evidence) -> Callable[[np.ndarray], float]:
    mine, references = loaded(evidence, "cmmd").pictures(evidence.pictures), reference_vectors(evidence, "cmmd")
    within, across, others = gaussian_kernel(mine, mine), gaussian_kernel(mine, references), gaussian_kernel(references, references)
    return lambda chosen: cmmd(within[np.ix_(chosen, chosen)], across[chosen], others)


MEASURE = Measure("cmmd", "kernel distance between all pictures and all references in CLIP ViT-L/14-336", "Jayasumana et al., Rethinking FID (2024)", 0, float("inf"), "lower",
                  ("references", "weights:cmmd"), of_set=of_set)
