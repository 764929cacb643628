"""ImageReward: human preference by BLIP and a small head, about normally distributed over ordinary pictures.

The weights' folder holds BLIP (large) in transformers layout, its tokenizer, and `reward_head.safetensors` with
`layers.{0,2,4,6,7}.{weight,bias}`; convert the published checkpoint once, since pickles are not read here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from finetune.errors import BadInput
from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure
from finetune.evaluation.picture_text_model import CLIP_MEAN, CLIP_STD, load_model, prepared

HEAD_FILE, HEAD_LAYERS = "reward_head.safetensors", (0, 2, 4, 6, 7)
TEXT_LENGTH, MEAN, STD = 35, 0.16717362830052426, 1.0333394966054072


def _load(folder) -> tuple[Any, Any, dict]:
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    if not (folder / HEAD_FILE).exists():
        raise BadInput(f"{HEAD_FILE} is not there", where=str(folder), fix="save the checkpoint's `mlp` as safetensors beside BLIP")
    head = {name.removeprefix("mlp."): tensor.float() for name, tensor in load_file(folder / HEAD_FILE).items()}
    return load_model(folder, "BlipForImageTextRetrieval"), AutoTokenizer.from_pretrained(folder, local_files_only=True), head


def reward(model: Any, tokenizer: Any, head: dict, pixels: Pixels, prompt: str) -> float:
    """(head(text state that has seen the picture) - mean) / std. The head's layers are linear, its dropout is off."""
    import torch
    import torch.nn.functional as F

    size = model.config.vision_config.image_size
    tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
    with torch.no_grad():
        seen = model.vision_model(pixel_values=prepared([pixels], size, CLIP_MEAN, CLIP_STD))[0]
        state = model.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
                                   encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long), return_dict=True).last_hidden_state[:, 0].float()
        for layer in HEAD_LAYERS:
            state = F.linear(state, head[f"layers.{layer}.weight"], head[f"layers.{layer}.bias"])
    return (float(state) - MEAN) / STD


def values(evidence: Evidence) -> np.ndarray:
    parts = evidence.once(("model", "image_reward"), lambda: _load(evidence.weights["image_reward"]))
    return np.array([reward(*parts, pixels, prompt.prompt) for pixels, prompt in zip(evidence.pictures, evidence.prompts, strict=True)])


MEASURE = Measure("image_reward", "learned preference, about 0 on average and 1 in spread; compare within the same prompts only", "Xu et al., ImageReward (2023)",
                  float("-inf"), float("inf"), "higher", ("weights:image_reward",), splits=("style", "holdout", "unrelated"), values=values)
