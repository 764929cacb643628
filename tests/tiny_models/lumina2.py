"""A Lumina 2 pipeline of 34 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_models import parts, tokenizers

PICTURE = (64, 96)


def build(seed: int = 0) -> diffusers.Lumina2Pipeline:
    torch.manual_seed(seed)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(600, 64, 64), cap_feat_dim=16)
    return parts.settle(diffusers.Lumina2Pipeline(
        scheduler=parts.flow(shift=6.0), vae=parts.autoencoder_kl(blocks=(4, 4, 4, 4)), text_encoder=parts.gemma(), tokenizer=tokenizers.gemma(),
        transformer=transformer), seed)
