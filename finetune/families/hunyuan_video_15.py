"""HunyuanVideo 1.5 with one frame (Tencent): text-to-video models, Qwen2.5-VL states, ByT5 for quoted text.

The model sees [noisy latents; zeros for a first frame; zero mask] and zero picture embeddings, as its pipeline gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_norms
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.qwen_image import JOINT
from finetune.families.image_encoding import count_parameters, one_frame_latents
from finetune.families.licences import tencent
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.families.time_embedding import accept_float32_timesteps
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH, GLYPH_LENGTH, VISION_TOKENS = 1000, 256, 729
FACTS = FamilyFacts(
    name="hunyuan_video_15", pipeline_classes=("HunyuanVideo15Pipeline",), size_multiple=16, resolution=960,
    targets={"attention": JOINT, "attention_ff": rf"({JOINT}|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2))"},
    licence=tencent("https://huggingface.co/tencent/HunyuanVideo-1.5/blob/main/LICENSE", 2025, "European Union, United Kingdom, South Korea"),
    never_quantise=("x_embedder", "image_embedder", "context_embedder", "time_embed", "norm_out", "proj_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class HunyuanVideo15:
    """`ModelFamily` of HunyuanVideo 1.5, one frame. The last block's text output is discarded: LoRA there gets no gradient."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        if "vae" in parts:
            pipeline = load_pipeline(folder, parts, dtype)
            if pipeline.transformer is not None:
                accept_float32_timesteps(pipeline.transformer)
            pipeline.vae.enable_slicing()  # neither encodes nor decodes two at once: its attention mask lacks the heads' dimension
            return pipeline
        # The pipeline's constructor reads the autoencoder's configuration even where there is none (diffusers 0.42.1).
        pipeline = load_pipeline(folder, parts, dtype, vae=ConfigurationOnly(folder / "vae"))
        pipeline.vae = None
        if pipeline.transformer is not None:
            accept_float32_timesteps(pipeline.transformer)
        return pipeline

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=2)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return one_frame_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            states, mask, glyphs, glyph_mask = pipeline.encode_prompt(prompt=prompt, device=pipeline.text_encoder.device)
            found.append(Conditioning({"states": keep(states[0][mask[0].bool()]), "glyphs": keep(glyphs[0][glyph_mask[0].bool()])}))
        return found

    @staticmethod
    def _text(conditionings: Sequence[Conditioning], device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, mask, glyph states (256 rows), glyph mask."""
        return (*stack_padded(conditionings, "states", device, dtype), *stack_padded(conditionings, "glyphs", device, dtype, GLYPH_LENGTH))

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        model = getattr(transformer, "module", transformer)
        dtype, device = compute_dtype(model), noisy.device
        states, mask, glyphs, glyph_mask = self._text(conditionings, device, dtype)
        frame = noisy.unsqueeze(2).to(dtype)
        empty = torch.zeros(len(noisy), noisy.shape[1] + 1, *frame.shape[2:], device=device, dtype=dtype)
        return transformer(
            hidden_states=torch.cat([frame, empty], dim=1),
            timestep=level.timestep.to(device, torch.float32),
            encoder_hidden_states=states, encoder_attention_mask=mask.to(dtype), encoder_hidden_states_2=glyphs, encoder_attention_mask_2=glyph_mask.to(dtype),
            image_embeds=torch.zeros(len(noisy), VISION_TOKENS, model.config.image_embed_dim, device=device, dtype=dtype),
            return_dict=False)[0].squeeze(2).float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor_spatial
        return pipeline.transformer.config.out_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        # The guidance of this pipeline lives in its guider.
        pipeline.guider = pipeline.guider.new(guidance_scale=guidance, enabled=guidance > 1)
        inputs: dict[str, Any] = {"latents": latents.unsqueeze(2).to(dtype), "num_frames": 1}
        for side, group in (("", conditionings), ("negative_", negatives)):
            names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
            inputs |= {f"{side}{name}": value.to(dtype) for name, value in zip(names, self._text(group, latents.device, dtype), strict=True)}
        return inputs

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("HunyuanVideo15Transformer3DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"double": config["num_layers"]}, feed_forward_size=int(config["mlp_ratio"] * hidden), tokens_per_pixel=1 / 16**2,
            text_tokens=TEXT_LENGTH + GLYPH_LENGTH + VISION_TOKENS, latent_channels=config["out_channels"], latent_factor=16)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        checkpoint_blocks(transformer.transformer_blocks, checkpointed_blocks)
        lean_norms.install(transformer)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"Qwen": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


class ConfigurationOnly:
    """Stands in for an autoencoder whose weights are not wanted; answers what constructors ask."""

    def __init__(self, folder: Path):
        import json
        from types import SimpleNamespace

        self.config = SimpleNamespace(**json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
        self.spatial_compression_ratio = self.config.spatial_compression_ratio
        self.temporal_compression_ratio = self.config.temporal_compression_ratio


FAMILY = HunyuanVideo15()
