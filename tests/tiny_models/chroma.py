"""A Chroma pipeline of 28 thousand random parameters."""

from __future__ import annotations

import diffusers
import torch

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


def build(seed: int = 0) -> diffusers.ChromaPipeline:
    torch.manual_seed(seed)
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1)
    return parts.settle(diffusers.ChromaPipeline(
        scheduler=parts.flow(shift=3.0, **parts.DYNAMIC), vae=parts.autoencoder_kl(), text_encoder=parts.t5_encoder(), tokenizer=tokenizers.t5(),
        transformer=transformer), seed)
