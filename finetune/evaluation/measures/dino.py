"""DINO: likeness of picture and references in self-supervised features, which see shapes where CLIP sees topics."""

import numpy as np

from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import load_model, prepared, unit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SHORTER, SIZE = 256, 224


def features(evidence: Evidence, pictures: list[Pixels]) -> np.ndarray:
    """(n, D) unit class tokens."""
    import torch

    model = evidence.once(("model", "dino"), lambda: load_model(evidence.weights["dino"]))
    rows = []
    for pixels in pictures:
        with torch.no_grad():
            rows.append(model(pixel_values=prepared([pixels], SIZE, MEAN, STD, SHORTER)).last_hidden_state[:, 0].float().numpy())
    return unit(np.concatenate(rows).astype(np.float64))


def values(evidence: Evidence) -> np.ndarray:
    references = evidence.once(("references", "dino"), lambda: features(evidence, evidence.reference_pixels()))
    return (features(evidence, list(evidence.pictures)) @ references.T).mean(1)


MEASURE = Measure("dino", "mean cosine of the picture to all references in DINO's class token", "Caron et al., DINO (2021), as used by Ruiz et al., DreamBooth (2023); DINOv2 weights by default",
                  -1, 1, "higher", ("references", "weights:dino"), values=values)
