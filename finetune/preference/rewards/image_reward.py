"""ImageReward (Xu et al. 2023, arXiv 2304.05977): BLIP's text encoder looks at the picture, a small head scores what it saw.

The folder holds BLIP (large) in transformers' layout with its tokenizer, and `reward_head.safetensors` with the published
checkpoint's `mlp`: `layers.{0,2,4,6,7}.{weight,bias}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.errors import DataError
from data_tools.pickle_refusal import refuse_pickles
from finetune.errors import BaseModelError
from finetune.preference.rewards.clip_model import prepare_pixels

HEAD_FILE, HEAD_LAYERS = "reward_head.safetensors", (0, 2, 4, 6, 7)
TEXT_LENGTH = 35
# Mean and spread of the raw score over ordinary pictures, as published with the weights.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageReward:
    """score = (head(text state that has seen the picture) - mean) / std: about 0 on average, 1 in spread."""

    differentiable = True

    def __init__(self, folder: str):
        self.name, self.folder = "imagereward", folder
        refuse_pickles(folder)
        self.model, self.tokenizer = _load_blip(folder)
        self.head = _load_head(Path(folder) / HEAD_FILE)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        model, device = self.model, self.model.device
        seen = model.vision_model(pixel_values=prepare_pixels(pixels.to(device), model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD))[0]
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt").to(device)
        state = model.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen,
                                   encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=device), return_dict=True).last_hidden_state[:, 0].float()
        for layer in HEAD_LAYERS:
            state = F.linear(state, self.head[f"layers.{layer}.weight"].to(state), self.head[f"layers.{layer}.bias"].to(state))
        return ((state[:, 0] - MEAN) / STD).to(pixels.device)

    def description(self) -> dict[str, Any]:
        return {"v": 1, "kind": "image_reward", "model": self.folder}


def _load_blip(folder: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, BlipForImageTextRetrieval

    try:
        model = BlipForImageTextRetrieval.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).eval().requires_grad_(False)
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, RuntimeError for unusable folders
        raise BaseModelError(f"cannot be loaded as ImageReward's BLIP ({str(error).strip().splitlines()[0][:160]})", where=folder,
                             fix="give a folder with BLIP large in transformers' layout, its tokenizer and reward_head.safetensors") from None


def _load_head(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        head = {name.removeprefix("mlp."): tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise DataError(f"the head of ImageReward cannot be read ({type(error).__name__})", where=str(path), fix="save the published checkpoint's `mlp` as safetensors beside BLIP") from None
    missing = [f"layers.{layer}.{part}" for layer in HEAD_LAYERS for part in ("weight", "bias") if f"layers.{layer}.{part}" not in head]
    if missing:
        raise DataError(f"{missing[0]} is missing", where=str(path), fix="save the published checkpoint's `mlp` with the names it has there")
    return head
