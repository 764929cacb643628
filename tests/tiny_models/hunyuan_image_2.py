"""A HunyuanImage-2.1 pipeline; most of its 4.4 million random parameters are a projection of fixed width."""

from __future__ import annotations

import diffusers
import torch
import transformers
from diffusers.guiders import AdaptiveProjectedMixGuidance

from tests.tiny_models import parts, tokenizers

PICTURE = (64, 128)
LIVE: dict = {}  # guidance lives in the guiders


def build(seed: int = 0, *, distilled: bool = False) -> diffusers.HunyuanImagePipeline:
    torch.manual_seed(seed)
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2, num_refiner_layers=1,
        mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(8, 8), guidance_embeds=distilled, use_meanflow=distilled)
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(32,) * 6, layers_per_block=1, spatial_compression_ratio=32,
        sample_size=64, scaling_factor=0.75289, downsample_match_channel=True, upsample_match_channel=True)
    guiders = {} if distilled else {slot: AdaptiveProjectedMixGuidance(guidance_scale=1.0, enabled=False) for slot in ("guider", "ocr_guider")}
    return parts.settle(diffusers.HunyuanImagePipeline(
        scheduler=parts.flow(shift=4.0 if distilled else 5.0), vae=vae, text_encoder=parts.qwen25_vl(layers=3), tokenizer=tokenizers.qwen(4096),
        text_encoder_2=parts.byt5(), tokenizer_2=transformers.ByT5Tokenizer(), transformer=transformer, **guiders), seed)
