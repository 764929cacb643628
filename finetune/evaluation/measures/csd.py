"""CSD: likeness in style by a head trained to tell styles apart, whatever a picture shows.

The weights' folder holds a CLIP ViT-L/14 vision model in transformers layout and `csd_style_head.safetensors` with the
tensor `last_layer_style` (width, D); convert the published checkpoint once, since pickles are not read here.
"""

import numpy as np

from finetune.errors import BadInput
from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import CLIP_MEAN, CLIP_STD, load_model, prepared, unit

HEAD_FILE, HEAD = "csd_style_head.safetensors", "last_layer_style"


def _load(folder):
    from safetensors.torch import load_file

    if not (folder / HEAD_FILE).exists():
        raise BadInput(f"{HEAD_FILE} is not there", where=str(folder), fix=f"save the checkpoint's `{HEAD}` as safetensors beside the vision model")
    return load_model(folder, "CLIPVisionModel"), load_file(folder / HEAD_FILE)[HEAD].float()


def features(evidence: Evidence, pictures: list[Pixels]) -> np.ndarray:
    """(n, D) unit style vectors."""
    import torch

    model, head = evidence.once(("model", "csd"), lambda: _load(evidence.weights["csd"]))
    rows = []
    for pixels in pictures:
        with torch.no_grad():
            pooled = model(pixel_values=prepared([pixels], model.config.image_size, CLIP_MEAN, CLIP_STD)).pooler_output.float()
            rows.append((pooled @ head).numpy())
    return unit(np.concatenate(rows).astype(np.float64))


def values(evidence: Evidence) -> np.ndarray:
    style = evidence.once(("references", "csd"), lambda: unit(features(evidence, evidence.reference_pixels()).mean(0)))
    return features(evidence, list(evidence.pictures)) @ style


MEASURE = Measure("csd", "cosine of the picture's style vector to the references' mean style", "Somepalli et al., Measuring Style Similarity in Diffusion Models (2024)",
                  -1, 1, "higher", ("references", "weights:csd"), values=values)
