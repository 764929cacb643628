"""Diversity: how different the pictures of one prompt are between seeds. Far below the base's, an adapter has collapsed."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.pixel_features import thumbnail


def values(evidence: Evidence) -> np.ndarray:
    """Of each picture: its mean distance to the other seeds of its prompt; NaN where there is only one seed."""
    small = np.stack([thumbnail(pixels).ravel() for pixels in evidence.pictures])
    ids = np.array([prompt.prompt_id for prompt in evidence.prompts])
    result = np.full(len(small), np.nan)
    for index in range(len(small)):
        others = np.flatnonzero((ids == ids[index]) & (np.arange(len(small)) != index))
        if len(others):
            result[index] = np.sqrt(((small[others] - small[index]) ** 2).mean(1)).mean()
    return result


MEASURE = Measure(
    "diversity", "mean distance between pictures of one prompt at different seeds (16x16 OKLab, root mean square)",
    "mean pairwise distance within a prompt, as in Zhu et al., BicycleGAN (2017), on colour thumbnails", 0, 1, "higher",
    splits=("style", "holdout", "unrelated"), values=values)
