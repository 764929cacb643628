"""Flux.2 pipelines of random parameters: Klein whole, and dev with a small language model in place of Mistral."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


def build(seed: int = 0, *, dev: bool = False) -> diffusers.DiffusionPipeline:
    torch.manual_seed(seed)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=48,
        timestep_guidance_channels=16, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=dev)
    vae = diffusers.AutoencoderKLFlux2(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False)
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    # Both pipelines read hidden states by number, up to layer 30.
    pipeline = diffusers.Flux2Pipeline if dev else diffusers.Flux2KleinPipeline
    return parts.settle(pipeline(
        scheduler=parts.flow(shift=3.0, **parts.DYNAMIC), vae=vae, text_encoder=parts.qwen3(layers=30), tokenizer=tokenizers.qwen(),
        transformer=transformer), seed)
