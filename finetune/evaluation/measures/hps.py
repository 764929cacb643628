"""HPSv2.1: human preference as a fine-tuned CLIP ViT-H/14 sees it. Versions 2.0 and 2.1 cannot be compared.

The weights' folder holds the checkpoint in transformers' CLIP layout with safetensors; convert it once, pickles are not
read here. Published tables print this number times 100, and so does this measure.
"""

import numpy as np

from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import text_likeness


def values(evidence: Evidence) -> np.ndarray:
    return 100 * text_likeness(evidence, "hps")


MEASURE = Measure("hps", "learned preference: 100 x cosine of picture and prompt; compare within the same prompts only", "Wu et al., Human Preference Score v2 (2023)",
                  -100, 100, "higher", ("weights:hps",), splits=("style", "holdout", "unrelated"), values=values)
