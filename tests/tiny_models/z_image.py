"""A Z-Image pipeline of 300 thousand random parameters (its time embedding has a fixed width)."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


LIVE = {"guidance_scale": 0.0}


def build(seed: int = 0) -> diffusers.ZImagePipeline:
    torch.manual_seed(seed)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 2, 2], axes_lens=[1024, 32, 32])
    return parts.settle(diffusers.ZImagePipeline(
        scheduler=parts.flow(shift=3.0), vae=parts.autoencoder_kl(), text_encoder=parts.qwen3(transformers.Qwen3Model),
        tokenizer=tokenizers.qwen(), transformer=transformer), seed)
