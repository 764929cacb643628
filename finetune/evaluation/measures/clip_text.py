"""CLIP-T: likeness of picture and prompt in CLIP's common space."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import text_likeness


def values(evidence: Evidence) -> np.ndarray:
    return text_likeness(evidence, "clip")


MEASURE = Measure("clip_text", "cosine of the picture and its prompt in CLIP", "Radford et al., CLIP (2021); Hessel et al., CLIPScore (2021), without its factor 2.5",
                  -1, 1, "higher", ("weights:clip",), splits=("style", "holdout", "unrelated"), values=values)
