"""CLIP-I: likeness of picture and references in CLIP's space. Very high may mean copying: read it beside near_copies."""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import loaded, reference_vectors


def values(evidence: Evidence) -> np.ndarray:
    return (loaded(evidence, "clip").pictures(evidence.pictures) @ reference_vectors(evidence, "clip").T).mean(1)


MEASURE = Measure("clip_image", "mean cosine of the picture to all references in CLIP", "Ruiz et al., DreamBooth (2023), CLIP-I", -1, 1, "higher",
                  ("references", "weights:clip"), values=values)
