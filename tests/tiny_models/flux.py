"""A Flux.1 pipeline of 57 thousand random parameters; `guidance` tells dev from schnell."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


def build(seed: int = 0, *, guidance: bool = True) -> diffusers.FluxPipeline:
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance)
    scheduler = parts.flow(shift=3.0, **parts.DYNAMIC) if guidance else parts.flow(shift=1.0)
    return parts.settle(diffusers.FluxPipeline(
        scheduler=scheduler, vae=parts.autoencoder_kl(), text_encoder=transformers.CLIPTextModel(parts.clip_config()),
        tokenizer=tokenizers.clip(), text_encoder_2=parts.t5_encoder(), tokenizer_2=tokenizers.t5(), transformer=transformer), seed)
