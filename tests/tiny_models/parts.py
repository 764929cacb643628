"""Tiny encoders, autoencoders and schedulers that the tiny pipelines share."""

from __future__ import annotations

import diffusers
import torch
import transformers


def t5_encoder(width: int = 16) -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=48, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


def autoencoder_kl(channels: int = 4, shift: float | None = 0.1159, scale: float = 0.3611, blocks: tuple[int, ...] = (4, 4)) -> diffusers.AutoencoderKL:
    """Factor 2 ** (len(blocks) - 1)."""
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * len(blocks), up_block_types=["UpDecoderBlock2D"] * len(blocks),
        block_out_channels=blocks, layers_per_block=1, latent_channels=channels, norm_num_groups=2, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=shift, scaling_factor=scale, sample_size=32)


def settle(pipeline: diffusers.DiffusionPipeline, seed: int = 0) -> diffusers.DiffusionPipeline:
    """Evaluation mode, frozen, and small noise in every parameter that a fresh model holds constant.

    Zero-initialised gates and pad tokens would make outputs independent of what is tested.
    """
    noise = torch.Generator().manual_seed(seed)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    for parameter in pipeline.transformer.parameters():
        if parameter.numel() > 1 and parameter.std() == 0 or parameter.numel() == 1 and parameter.item() == 0:
            parameter.data += torch.randn(parameter.shape, generator=noise) * 0.05
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
