"""Lumina-Image 2.0 (Alpha-VLLM): rectified flow told the share of signal, output negated; Gemma 2 states.

Prompts are encoded behind the pipeline's system prompt, negatives and the empty prompt without it, as the pipeline does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_gates, lean_norms
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 256
BLOCKS = r"(layers|noise_refiner|context_refiner)\.\d+"
ATTENTION = rf"{BLOCKS}\.attn\.(to_[qkv]|to_out\.0)"
FACTS = FamilyFacts(
    name="lumina2", pipeline_classes=("Lumina2Pipeline",), size_multiple=16, resolution=1024,
    targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|{BLOCKS}\.feed_forward\.linear_[123])"}, licence=APACHE,
    never_quantise=("x_embedder", "time_caption_embed", "norm_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class Lumina2:
    """`ModelFamily` of Lumina-Image 2.0."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        return load_pipeline(folder, parts, dtype)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=2)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            negative = self._encode(pipeline, "", prompt)
            found.append(Conditioning({"states": self._encode(pipeline, prompt, None) if prompt else negative, "negative": negative}))
        return found

    @staticmethod
    def _encode(pipeline: Any, prompt: str, negative: str | None) -> Tensor:
        states, mask, negative_states, negative_mask = pipeline.encode_prompt(
            prompt=prompt, do_classifier_free_guidance=negative is not None, negative_prompt=negative, max_sequence_length=TEXT_LENGTH)
        return keep(states[0][mask[0].bool()]) if negative is None else keep(negative_states[0][negative_mask[0].bool()])

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device = compute_dtype(transformer), noisy.device
        states, mask = stack_padded(conditionings, "states", device, dtype)  # rotary positions count from the mask's sum: pad on the right
        output = transformer(
            hidden_states=noisy.to(dtype), timestep=1 - level.timestep.to(device, torch.float32) / 1000, encoder_hidden_states=states,
            encoder_attention_mask=mask, return_dict=False)[0]
        return -output.float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        length = max(len(c.tensors[key]) for group, key in ((conditionings, "states"), (negatives, "negative")) for c in group)
        states, mask = stack_padded(conditionings, "states", latents.device, dtype, length)
        negative, negative_mask = stack_padded(negatives, "negative", latents.device, dtype, length)
        return {"prompt_embeds": states, "prompt_attention_mask": mask, "negative_prompt_embeds": negative,
                "negative_prompt_attention_mask": negative_mask, "latents": latents.to(dtype), "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        return ModelShape(
            parameters=count_parameters("Lumina2Transformer2DModel", config), hidden_size=config["hidden_size"], heads=config["num_attention_heads"],
            blocks={"layer": config["num_layers"], "refiner": 2 * config["num_refiner_layers"]}, feed_forward_size=int(4 * config["hidden_size"] * 2 / 3),
            tokens_per_pixel=1 / (8 * config["patch_size"]) ** 2, text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        # The library's own checkpointing leaves the refiners out.
        checkpoint_blocks([*transformer.context_refiner, *transformer.noise_refiner, *transformer.layers], checkpointed_blocks)
        lean_norms.install(transformer)
        lean_gates.install(transformer, "LuminaFeedForward", "linear_1", "linear_3", "linear_2")
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        whole = f"{pipeline.system_prompt} <Prompt Start> {prompt}"
        return {"Gemma": count_tokens(pipeline.tokenizer, whole, TEXT_LENGTH)}


FAMILY = Lumina2()
