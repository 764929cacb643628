"""A Sana pipeline of 32 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 64)


LIVE = {"guidance_scale": 1.0, "use_resolution_binning": False}


def build(seed: int = 0) -> diffusers.SanaPipeline:
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1],
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=32)
    scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return parts.settle(diffusers.SanaPipeline(
        scheduler=scheduler, vae=vae, text_encoder=parts.gemma(), tokenizer=tokenizers.gemma(), transformer=transformer), seed)
