"""A Stable Diffusion 3.5 pipeline of 60 thousand random parameters, its first block with dual attention."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


def build(seed: int = 0, *, t5: bool = True) -> diffusers.StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=32, qk_norm="rms_norm", dual_attention_layers=(0,))
    clips = [transformers.CLIPTextModelWithProjection(parts.clip_config()) for _ in range(2)]
    return parts.settle(diffusers.StableDiffusion3Pipeline(
        scheduler=parts.flow(shift=3.0), vae=parts.autoencoder_kl(4, 0.0609, 1.5305), text_encoder=clips[0], tokenizer=tokenizers.clip(),
        text_encoder_2=clips[1], tokenizer_2=tokenizers.clip(), text_encoder_3=parts.t5_encoder(32) if t5 else None, tokenizer_3=tokenizers.t5() if t5 else None,
        transformer=transformer), seed)
