"""Stable Diffusion 3 and 3.5 (Stability AI): rectified flow, two CLIP encoders and an optional T5, no text mask."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_attention, lean_norms
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import (
    Conditioning, FamilyFacts, LatentDistribution, LicenceTerms, ModelShape, PictureGeometry, PictureLimits, TextStream,
)
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import CLIP_ATTENTION, count_tokens, keep, stack
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

T5_LENGTH = 256
# attn2 exists in the dual-attention blocks of 3.5 medium only.
ATTENTION = r"transformer_blocks\.\d+\.attn2?\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FACTS = FamilyFacts(
    name="sd3", pipeline_classes=("StableDiffusion3Pipeline",), size_multiple=16, resolution=1024,
    targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2))"},
    licence=LicenceTerms(
        identifier="other", name="stabilityai-ai-community", link="https://huggingface.co/stabilityai/stable-diffusion-3.5-medium/blob/main/LICENSE.md",
        notice="This Stability AI Model is licensed under the Stability AI Community License, Copyright © Stability AI Ltd. All Rights Reserved."),
    never_quantise=("pos_embed", "time_text_embed", "context_embedder", "norm_out", "proj_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"), trainable_encoders=dict.fromkeys(("text_encoder", "text_encoder_2"), CLIP_ATTENTION),
    limits=lambda config: PictureLimits(side=config["pos_embed_max_size"] * config["patch_size"] * 8))


class StableDiffusion3:
    """`ModelFamily` of SD3 medium and SD3.5 medium, large, large turbo."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        pipeline = load_pipeline(folder, parts, dtype, image_encoder=None, feature_extractor=None)
        if "text" in parts and "transformer" not in parts and pipeline.text_encoder_3 is None:
            # In place of T5's states the pipeline puts zeros, and asks its transformer's configuration how wide they are.
            config = json.loads((Path(folder) / "transformer" / "config.json").read_text(encoding="utf-8"))
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
        return pipeline

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=2)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            states, _, pooled, _ = pipeline.encode_prompt(
                prompt=prompt, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False, max_sequence_length=T5_LENGTH)
            found.append(Conditioning({"states": keep(states[0]), "pooled": keep(pooled[0])}))
        return found

    def encode_live(self, pipeline: Any, prompts: Sequence[str], cached: Sequence[Conditioning]) -> list[Conditioning]:
        return [Conditioning({**before.tensors, **self._clip(pipeline, prompt, before.tensors["states"])}) for prompt, before in zip(prompts, cached, strict=True)]

    def _clip(self, pipeline: Any, prompt: str, states: Tensor) -> dict[str, Tensor]:
        """The two CLIPs side by side in the first rows of the states, widened with zeros; T5's rows stay."""
        (first, pooled), (second, pooled_too) = (pipeline._get_clip_prompt_embeds(prompt, clip_model_index=index) for index in (0, 1))
        rows = torch.cat([first, second], dim=-1)[0]
        rows = torch.nn.functional.pad(rows, (0, states.shape[-1] - rows.shape[-1]))
        return {"states": torch.cat([rows, states[len(rows):].to(rows)]), "pooled": torch.cat([pooled, pooled_too], dim=-1)[0]}

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device = compute_dtype(transformer), noisy.device
        return transformer(
            hidden_states=noisy.to(dtype), timestep=level.timestep.to(device, torch.float32), return_dict=False,
            encoder_hidden_states=stack(conditionings, "states", device, dtype), pooled_projections=stack(conditionings, "pooled", device, dtype),
        )[0].float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        device, dtype = latents.device, compute_dtype(pipeline.transformer)
        return {
            "prompt_embeds": stack(conditionings, "states", device, dtype), "pooled_prompt_embeds": stack(conditionings, "pooled", device, dtype),
            "negative_prompt_embeds": stack(negatives, "states", device, dtype),
            "negative_pooled_prompt_embeds": stack(negatives, "pooled", device, dtype), "latents": latents.to(dtype), "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("SD3Transformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"joint": config["num_layers"]}, feed_forward_size=4 * hidden, tokens_per_pixel=1 / 16**2, text_tokens=77 + T5_LENGTH,
            latent_channels=config["in_channels"], latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        lean_attention.install(transformer.modules(), "JointAttnProcessor2_0", lean_attention.JointAttention())
        checkpoint_blocks(transformer.transformer_blocks, checkpointed_blocks)
        lean_norms.install(transformer)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        counts = {"CLIP": count_tokens(pipeline.tokenizer, prompt, 77)}
        return counts | ({"T5": count_tokens(pipeline.tokenizer_3, prompt, T5_LENGTH)} if pipeline.tokenizer_3 is not None else {})


FAMILY = StableDiffusion3()
