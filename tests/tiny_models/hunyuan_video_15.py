"""A HunyuanVideo 1.5 pipeline; most of its 4.4 million random parameters are a projection of fixed width."""

from __future__ import annotations

import diffusers
import torch
import transformers
from diffusers.guiders import ClassifierFreeGuidance

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


LIVE = {"num_frames": 1}


def build(seed: int = 0) -> diffusers.HunyuanVideo15Pipeline:
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False)
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1, mlp_ratio=2.0,
        text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=8, rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v")
    encoder = transformers.Qwen2_5_VLTextModel(transformers.Qwen2_5_VLTextConfig(**parts.qwen25_text_config(3)))
    return parts.settle(diffusers.HunyuanVideo15Pipeline(
        text_encoder=encoder, tokenizer=tokenizers.qwen(4096), transformer=transformer, vae=vae, scheduler=parts.flow(shift=7.0),
        text_encoder_2=parts.byt5(), tokenizer_2=transformers.ByT5Tokenizer(), guider=ClassifierFreeGuidance(guidance_scale=1.0)), seed)
