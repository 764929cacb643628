"""HunyuanImage-2.1 base (Tencent, 17.4 billion): rectified flow with shift 5, Qwen2.5-VL states, ByT5 for quoted text.

The distilled one learned pairs of noise levels: plain training on it teaches the wrong target, so it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_norms
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.licences import tencent
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.families.time_embedding import accept_float32_timesteps
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH, GLYPH_LENGTH = 1000, 128
ATTENTION = r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
FACTS = FamilyFacts(
    name="hunyuan_image_2", pipeline_classes=("HunyuanImagePipeline",), size_multiple=64, resolution=2048,
    targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|{FEED_FORWARD})"},
    licence=tencent("https://huggingface.co/tencent/HunyuanImage-2.1/blob/main/LICENSE", 2025, "European Union, United Kingdom, South Korea"),
    never_quantise=("x_embedder", "time_guidance_embed", "context_embedder", "norm_out", "proj_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class HunyuanImage2:
    """`ModelFamily` of HunyuanImage-2.1."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        pipeline = load_pipeline(folder, parts, dtype)
        if pipeline.transformer is not None:
            accept_float32_timesteps(pipeline.transformer)
        if pipeline.vae is not None:
            # The library's own takes its picture for a video and raises ValueError (diffusers 0.42.1).
            pipeline.vae.tiled_encode = MethodType(tiled_encode, pipeline.vae)
        return pipeline

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=1)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            states, mask, glyphs, glyph_mask = pipeline.encode_prompt(prompt=prompt)
            found.append(Conditioning({"states": keep(states[0][mask[0].bool()]), "glyphs": keep(glyphs[0][glyph_mask[0].bool()])}))
        return found

    @staticmethod
    def _text(conditionings: Sequence[Conditioning], device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, mask, glyph states, glyph mask; a caption without quoted text has one masked glyph row."""
        glyph_length = max(1, *(len(c.tensors["glyphs"]) for c in conditionings))
        return (*stack_padded(conditionings, "states", device, dtype), *stack_padded(conditionings, "glyphs", device, dtype, glyph_length))

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device = compute_dtype(transformer), noisy.device
        states, mask, glyphs, glyph_mask = self._text(conditionings, device, dtype)
        return transformer(
            hidden_states=noisy.to(dtype), timestep=level.timestep.to(device, torch.float32), encoder_hidden_states=states,
            encoder_attention_mask=mask.long(), encoder_hidden_states_2=glyphs, encoder_attention_mask_2=glyph_mask.long(), return_dict=False)[0].float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        # The guidance of this pipeline lives in its guiders.
        for slot in ("guider", "ocr_guider"):
            if getattr(pipeline, slot) is not None:
                setattr(pipeline, slot, getattr(pipeline, slot).new(guidance_scale=guidance, enabled=guidance > 1))
        inputs: dict[str, Any] = {"latents": latents.to(dtype)}
        for side, group in (("", conditionings), ("negative_", negatives)):
            names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
            text = self._text(group, latents.device, dtype)
            inputs |= {f"{side}{name}": value.long() if value.dtype == torch.bool else value for name, value in zip(names, text, strict=True)}
        return inputs

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("HunyuanImageTransformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"double": config["num_layers"], "single": config["num_single_layers"]}, feed_forward_size=int(config["mlp_ratio"] * hidden),
            tokens_per_pixel=1 / 32**2, text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=32)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        # The library's own checkpointing raises TypeError: it takes no arguments by name (diffusers 0.42.1).
        checkpoint_blocks([*transformer.transformer_blocks, *transformer.single_transformer_blocks], checkpointed_blocks)
        lean_norms.install(transformer)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"Qwen": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


def tiled_encode(vae: Any, pixels: Tensor) -> Tensor:
    """(B, 3, H, W) -> moments (B, 2C, h, w) from overlapping tiles, blended over their overlap as `vae.tiled_decode` does."""
    size, overlap = vae.tile_sample_min_size, vae.tile_overlap_factor
    step, blended = int(size * (1 - overlap)), int(vae.tile_latent_min_size * overlap)
    kept = vae.tile_latent_min_size - blended
    height, width = pixels.shape[-2:]
    rows = [[vae.encoder(pixels[..., top:top + size, left:left + size]) for left in range(0, width, step)] for top in range(0, height, step)]
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            if y:
                tile = vae.blend_v(rows[y - 1][x], tile, blended)
            if x:
                vae.blend_h(row[x - 1], tile, blended)
    return torch.cat([torch.cat([tile[..., :kept, :kept] for tile in row], dim=-1) for row in rows], dim=-2)


FAMILY = HunyuanImage2()
