"""An AuraFlow pipeline of 105 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


def build(seed: int = 0) -> diffusers.AuraFlowPipeline:
    torch.manual_seed(seed)
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(vocab_size=48, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=16, out_channels=4, pos_embed_max_size=256)
    return parts.settle(diffusers.AuraFlowPipeline(
        scheduler=parts.flow(shift=1.73), vae=parts.autoencoder_kl(4, None, 0.13025), text_encoder=encoder, tokenizer=tokenizers.t5(),
        transformer=transformer), seed)
