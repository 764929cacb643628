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


def cmmd(within: np.ndarray, across: np.ndarray, others: np.ndarray, prompts: np.ndarray, chosen: np.ndarray | None = None) -> float:
    """Squared MMD with the diagonals kept, times 1000, as published for one picture a prompt; compare equal numbers of pictures only.

    prompts: (n,) which prompt each picture is of.  chosen: indices of the pictures to take, with repeats when resampling. The diagonal
    is kept once for each; other pictures of its prompt, and its repeats, are left out as in `kid`.
    """
    chosen = np.arange(len(within)) if chosen is None else chosen
    own, different = within[np.ix_(chosen, chosen)], prompts[chosen][:, None] != prompts[chosen][None]
    apart = own[different].mean() if different.any() else 1.0
    together = (apart * (len(chosen) - 1) + np.diag(own).mean()) / len(chosen)
    return float(SCALE * (together + others.mean() - 2 * across[chosen].mean()))


def of_set(evidence: Evidence) -> Callable[[np.ndarray], float]:
    mine, references = loaded(evidence, "cmmd").pictures(evidence.pictures), reference_vectors(evidence, "cmmd")
    within, across, others = gaussian_kernel(mine, mine), gaussian_kernel(mine, references), gaussian_kernel(references, references)
    prompts = np.array([prompt.prompt_id for prompt in evidence.prompts])
    return lambda chosen: cmmd(within, across, others, prompts, chosen)


MEASURE = Measure("cmmd", "kernel distance between all pictures and all references in CLIP ViT-L/14-336", "Jayasumana et al., Rethinking FID (2024)", 0, float("inf"), "lower",
                  ("references", "weights:cmmd"), version=2, of_set=of_set)
