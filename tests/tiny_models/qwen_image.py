"""A Qwen-Image pipeline of 100 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


LIVE = {"true_cfg_scale": 1.0}


def build(seed: int = 0) -> diffusers.QwenImagePipeline:
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[2.0, 1.5, 1.0, 0.5])
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2))
    scheduler = parts.flow(shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    return parts.settle(diffusers.QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=parts.qwen25_vl(), tokenizer=tokenizers.qwen(), transformer=transformer), seed)
