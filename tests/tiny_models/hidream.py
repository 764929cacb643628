"""A HiDream pipeline of 140 thousand random parameters; `inference_output` is how the library's script loads it."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (32, 48)


def build(seed: int = 0, *, inference_output: bool = False) -> diffusers.HiDreamImagePipeline:
    torch.manual_seed(seed)
    clips = [transformers.CLIPTextModelWithProjection(parts.clip_config(248)) for _ in range(2)]
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_channels=[16, 16], text_emb_dim=32, num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 32), llama_layers=(0, 1), force_inference_output=inference_output)
    pipeline = diffusers.HiDreamImagePipeline(
        scheduler=parts.flow(shift=3.0), vae=parts.autoencoder_kl(), text_encoder=clips[0], tokenizer=tokenizers.clip(248),
        text_encoder_2=clips[1], tokenizer_2=tokenizers.clip(248), text_encoder_3=parts.t5_encoder(), tokenizer_3=tokenizers.t5(),
        text_encoder_4=parts.llama(transformers.LlamaForCausalLM), tokenizer_4=tokenizers.llama(), transformer=transformer)
    return after_load(parts.settle(pipeline, seed))


def after_load(pipeline: diffusers.HiDreamImagePipeline) -> diffusers.HiDreamImagePipeline:
    """The pipeline scales every request to the area of its default size, which it does not save."""
    pipeline.default_sample_size = 16
    return pipeline
