"""Middle-sized random pipelines of the families that diffusers has an official LoRA script for: what `peers` runs on.

Transformers have 40 to 75 million parameters; encoders and autoencoders are tiny, so that the step is what is measured, or autoencoders
have the size that the families ship.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WIDTH, HEADS, HEAD_DIM = 512, 8, 64


@dataclass(frozen=True)
class PeerModel:
    """build() -> pipeline.  pixels: edge of the square training pictures, chosen for 256 image tokens."""

    build: Callable[[], Any]
    pixels: int


def _autoencoder_kl(shift: float | None, scale: float) -> Any:
    """16 channels, factor 8."""
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=(8, 8, 8, 8),
        layers_per_block=1, latent_channels=16, norm_num_groups=2, use_quant_conv=False, use_post_quant_conv=False, shift_factor=shift, scaling_factor=scale)


def _clip(width: int) -> Any:
    import transformers

    return transformers.CLIPTextConfig(bos_token_id=0, eos_token_id=1, pad_token_id=1, hidden_size=width, intermediate_size=64, num_attention_heads=2,
                                       num_hidden_layers=2, vocab_size=514, projection_dim=width)


def _flux() -> Any:
    import diffusers
    import transformers

    from tests.tiny_models import parts, tokenizers

    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=4, num_single_layers=6, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=WIDTH,
        pooled_projection_dim=64, axes_dims_rope=(8, 28, 28), guidance_embeds=True)
    return diffusers.FluxPipeline(
        scheduler=parts.flow(shift=3.0, **parts.DYNAMIC), vae=_autoencoder_kl(0.1159, 0.3611), text_encoder=transformers.CLIPTextModel(_clip(64)),
        tokenizer=tokenizers.clip(), text_encoder_2=parts.t5_encoder(WIDTH), tokenizer_2=tokenizers.t5(), transformer=transformer)


def _sd3() -> Any:
    import diffusers
    import transformers

    from tests.tiny_models import parts, tokenizers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=16, num_layers=8, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, caption_projection_dim=WIDTH,
        joint_attention_dim=WIDTH, pooled_projection_dim=128, out_channels=16, pos_embed_max_size=96, qk_norm="rms_norm")
    clips = [transformers.CLIPTextModelWithProjection(_clip(64)) for _ in range(2)]
    return diffusers.StableDiffusion3Pipeline(
        scheduler=parts.flow(shift=3.0), vae=_autoencoder_kl(0.0609, 1.5305), text_encoder=clips[0], tokenizer=tokenizers.clip(), text_encoder_2=clips[1],
        tokenizer_2=tokenizers.clip(), text_encoder_3=parts.t5_encoder(WIDTH), tokenizer_3=tokenizers.t5(), transformer=transformer)


def _sana() -> Any:
    import diffusers
    import transformers

    from tests.tiny_models import parts, tokenizers

    stages = 6
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=32, attention_head_dim=8, encoder_block_types=["ResBlock"] * stages, decoder_block_types=["ResBlock"] * stages,
        encoder_block_out_channels=[8, 8, 16, 16, 32, 32], decoder_block_out_channels=[8, 8, 16, 16, 32, 32], encoder_qkv_multiscales=[()] * stages, decoder_qkv_multiscales=[()] * stages,
        encoder_layers_per_block=[1] * stages, decoder_layers_per_block=[1] * stages, downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=32, out_channels=32, num_layers=10, num_attention_heads=16, attention_head_dim=32, num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM, cross_attention_dim=WIDTH, caption_channels=WIDTH, sample_size=16)
    gemma = transformers.Gemma2Model(transformers.Gemma2Config(
        head_dim=32, hidden_size=WIDTH, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=2, vocab_size=128,
        max_position_embeddings=2048, attn_implementation="eager"))
    return diffusers.SanaPipeline(scheduler=parts.flow(shift=3.0), vae=vae, text_encoder=gemma, tokenizer=tokenizers.gemma(), transformer=transformer)


def _qwen_image() -> Any:
    import diffusers
    import transformers

    from tests.tiny_models import parts, tokenizers

    text = parts.qwen25_text_config() | {"hidden_size": WIDTH, "intermediate_size": 64}
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=text | {"rope_scaling": {"mrope_section": [32, 48, 48], "rope_type": "default", "type": "default"}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH},
        image_token_id=259, video_token_id=259, vision_start_token_id=259, vision_end_token_id=259))
    vae = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=6, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 28, 28))
    scheduler = parts.flow(shift=1.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)
    return diffusers.QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizers.qwen(), transformer=transformer)


def _z_image() -> Any:
    import diffusers
    import transformers

    from tests.tiny_models import parts, tokenizers

    encoder = transformers.Qwen3Model(transformers.Qwen3Config(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=32, vocab_size=260,
        max_position_embeddings=2048))
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=16, dim=WIDTH, n_layers=10, n_refiner_layers=2, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=WIDTH, axes_dims=[16, 24, 24],
        axes_lens=[1024, 64, 64])
    return diffusers.ZImagePipeline(scheduler=parts.flow(shift=3.0), vae=_autoencoder_kl(0.1159, 0.3611), text_encoder=encoder, tokenizer=tokenizers.qwen(),
                                    transformer=transformer)


MODELS = {"flux": PeerModel(_flux, 256), "sd3": PeerModel(_sd3, 256), "sana": PeerModel(_sana, 512), "qwen_image": PeerModel(_qwen_image, 256),
          "z_image": PeerModel(_z_image, 256)}


def _full_kl() -> Any:
    """As Flux, SD3 and Z-Image have it but for its scale: 84 million parameters."""
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=(128, 256, 512, 512),
        layers_per_block=2, latent_channels=16, norm_num_groups=32, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)


def _full_qwen_image() -> Any:
    import diffusers

    return diffusers.AutoencoderKLQwenImage()


FULL_AUTOENCODERS = {"flux": _full_kl, "sd3": _full_kl, "z_image": _full_kl, "qwen_image": _full_qwen_image}


def write(name: str, folder: Path, pictures: int = 16, full_autoencoder: bool = False) -> tuple[Path, Path]:
    """(base, pictures): the pipeline and PNG files of the model's size, made once. Same seed, same weights."""
    from PIL import Image, ImageDraw

    base, shown, pixels = folder / (name + "-full" * full_autoencoder), folder / f"pictures-{MODELS[name].pixels}", MODELS[name].pixels
    if not (base / "model_index.json").is_file():
        import torch

        from tests.tiny_models import parts

        torch.manual_seed(0)
        pipeline = MODELS[name].build()
        if full_autoencoder:
            pipeline.register_modules(vae=FULL_AUTOENCODERS[name]())
        parts.settle(pipeline).save_pretrained(base)
    if not shown.is_dir():
        shown.mkdir(parents=True)
        for number in range(pictures):
            picture = Image.radial_gradient("L").resize((pixels, pixels)).convert("RGB")
            ImageDraw.Draw(picture).ellipse((8 * number, 10, 8 * number + pixels // 3, pixels // 2), fill=(16 * number, 255 - 16 * number, 90))
            picture.save(shown / f"{number:02d}.png")
    return base, shown
