"""A HunyuanVideo pipeline of 86 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


LIVE = {"guidance_scale": 1.0, "num_frames": 1}


def build(seed: int = 0) -> diffusers.HunyuanVideoPipeline:
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=4,
        scaling_factor=0.476986, spatial_compression_ratio=8, temporal_compression_ratio=4)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=16, rope_axes_dim=(2, 2, 4))
    return parts.settle(diffusers.HunyuanVideoPipeline(
        scheduler=parts.flow(shift=7.0), vae=vae, text_encoder=parts.llama(layers=3), tokenizer=tokenizers.llama(),
        text_encoder_2=transformers.CLIPTextModel(parts.clip_config()), tokenizer_2=tokenizers.clip(), transformer=transformer), seed)
