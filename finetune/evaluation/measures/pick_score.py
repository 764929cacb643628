"""PickScore: which of two pictures of one prompt users of a web application would pick."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import loaded, text_likeness


def values(evidence: Evidence) -> np.ndarray:
    return loaded(evidence, "pick_score").scale * text_likeness(evidence, "pick_score")


MEASURE = Measure("pick_score", "learned preference: scaled cosine of picture and prompt; compare within a prompt only", "Kirstain et al., Pick-a-Pic (2023)",
                  -100, 100, "higher", ("weights:pick_score",), splits=("style", "holdout", "unrelated"), values=values)
