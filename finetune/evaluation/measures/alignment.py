"""Alignment: how much the prompt helps the bare base to explain the picture. No other model is needed."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure


def values(evidence: Evidence) -> np.ndarray:
    return evidence.judge.prompt_gain(evidence.pictures, [prompt.prompt for prompt in evidence.prompts])


MEASURE = Measure(
    "alignment", "share of the base's denoising error on the picture that its prompt removes, against the empty prompt; a style that the base does not draw lowers it too",
    "conditional against unconditional denoising error, Li et al., Your Diffusion Model is Secretly a Zero-Shot Classifier (2023)",
    float("-inf"), 1, "higher", ("judge",), splits=("style", "holdout", "unrelated"), values=values)
