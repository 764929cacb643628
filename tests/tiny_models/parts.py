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


def clip_config(positions: int = 77) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=514, projection_dim=16, max_position_embeddings=positions)


def gemma(layers: int = 2) -> transformers.Gemma2Model:
    return transformers.Gemma2Model(transformers.Gemma2Config(
        head_dim=8, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=layers, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=2048, attn_implementation="eager"))


def qwen3(kind: type = transformers.Qwen3ForCausalLM, layers: int = 2) -> transformers.PreTrainedModel:
    return kind(transformers.Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        vocab_size=260, max_position_embeddings=1024))


def llama(kind: type = transformers.LlamaModel, layers: int = 2) -> transformers.PreTrainedModel:
    return kind(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, vocab_size=128, max_position_embeddings=1024,
        attn_implementation="eager"))


ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}


def qwen25_text_config(layers: int = 2) -> dict:
    return dict(hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=2, vocab_size=260,
                rope_scaling=ROPE, rope_theta=1e6)


def qwen25_vl(layers: int = 2) -> transformers.Qwen2_5_VLForConditionalGeneration:
    return transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=qwen25_text_config(layers),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16),
        image_token_id=259, video_token_id=259, vision_start_token_id=259, vision_end_token_id=259))


def byt5(width: int = 16) -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=400, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def flow(**settings: float | bool | str) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


DYNAMIC = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
