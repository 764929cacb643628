"""A CogView4 pipeline of 24 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


def build(seed: int = 0) -> diffusers.CogView4Pipeline:
    torch.manual_seed(seed)
    encoder = transformers.GlmModel(transformers.GlmConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=260,
        pad_token_id=256))
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=4, text_embed_dim=16,
        time_embed_dim=8, condition_dim=4, sample_size=8)
    scheduler = parts.flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear")
    return parts.settle(diffusers.CogView4Pipeline(
        scheduler=scheduler, vae=parts.autoencoder_kl(4, 0.0, 1.0), text_encoder=encoder, tokenizer=tokenizers.glm(), transformer=transformer), seed)
