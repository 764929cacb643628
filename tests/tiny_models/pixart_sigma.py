"""A PixArt-Sigma pipeline of 23 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


LIVE = {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}


def build(seed: int = 0) -> diffusers.PixArtSigmaPipeline:
    torch.manual_seed(seed)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=16, in_channels=4,
        cross_attention_dim=16, out_channels=8)
    return parts.settle(diffusers.PixArtSigmaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(), vae=parts.autoencoder_kl(4, None, 0.13025), text_encoder=parts.t5_encoder(),
        tokenizer=tokenizers.t5(), transformer=transformer), seed)
