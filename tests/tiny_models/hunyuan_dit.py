"""A HunyuanDiT pipeline of 100 thousand random parameters; text lengths are the real ones, the model fixes them."""

from __future__ import annotations

import diffusers
import torch
import transformers

from tests.tiny_models import parts, tokenizers

PICTURE = (64, 96)  # height, width in pixels: 4 x 4 image tokens
LIVE = {"guidance_scale": 1.0, "use_resolution_binning": False}


def build(seed: int = 0, *, version: str = "1.2", equal_padding: bool = False, layers: int = 4) -> diffusers.HunyuanDiTPipeline:
    """version: "1.1" has size and style conditions and a longer noise schedule, "1.2" has neither."""
    torch.manual_seed(seed)
    tokenizer = tokenizers.bert()
    bert = transformers.BertModel(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=77))
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=32, in_channels=4, patch_size=2, sample_size=8, num_layers=layers,
        mlp_ratio=2.0, cross_attention_dim=32, cross_attention_dim_t5=24, pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=version == "1.1")
    if equal_padding:
        transformer.text_embedding_padding.data[:] = transformer.text_embedding_padding.data[:1].clone()
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.03 if version == "1.1" else 0.018, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    return parts.settle(diffusers.HunyuanDiTPipeline(
        vae=parts.autoencoder_kl(4, None, 0.13025, (8, 8, 8, 8)), text_encoder=bert, tokenizer=tokenizer, transformer=transformer,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        text_encoder_2=parts.t5_encoder(24), tokenizer_2=tokenizers.t5(256)), seed)
