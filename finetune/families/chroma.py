"""Chroma1 (lodestones): Flux without CLIP and guidance, T5 states with a mask, rectified flow.

The mask keeps one padding token. ChromaPipeline 0.42.1 hands it on as numbers, which attention adds to the logits:
padding is then only lowered by 1. Here it is boolean in training and drawing alike, so padding may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import flux
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import kl_latents
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.packing import grid_ids, pack, unpack
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 512
FACTS = FamilyFacts(
    name="chroma", pipeline_classes=("ChromaPipeline",), size_multiple=16, resolution=1024, targets=flux.TARGETS, licence=APACHE,
    never_quantise=("distilled_guidance_layer", "x_embedder", "context_embedder", "norm_out", "proj_out"),
    text_stream=TextStream(states="t5", mask=None, placement="append"))


class Chroma:
    """`ModelFamily` of Chroma1."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        return load_pipeline(folder, parts, dtype, image_encoder=None, feature_extractor=None)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=2)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            states, _, mask, *_ = pipeline.encode_prompt(prompt=prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
            found.append(Conditioning({"t5": keep(states[0, : int(mask[0].sum())])}))
        return found

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device, (height, width) = compute_dtype(transformer), noisy.device, noisy.shape[-2:]
        states, mask = stack_padded(conditionings, "t5", device, dtype)
        tokens = pack(noisy).to(dtype)
        everything = torch.cat([mask, torch.ones(tokens.shape[:2], dtype=torch.bool, device=device)], dim=1)
        is_padded = len({len(conditioning.tensors["t5"]) for conditioning in conditionings}) > 1  # asking the mask would wait for the GPU
        output = transformer(
            hidden_states=tokens, encoder_hidden_states=states, timestep=level.timestep.to(device, torch.float32) / 1000,
            img_ids=grid_ids(height // 2, width // 2, 3, device), txt_ids=torch.zeros(states.shape[1], 3, device=device),
            attention_mask=everything if is_padded else None, return_dict=False)[0]
        return unpack(output.float(), height, width)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        states, mask = stack_padded(conditionings, "t5", latents.device, dtype)
        negative, negative_mask = stack_padded(negatives, "t5", latents.device, dtype)
        return {"prompt_embeds": states, "prompt_attention_mask": mask, "negative_prompt_embeds": negative,
                "negative_prompt_attention_mask": negative_mask, "latents": pack(latents).to(dtype), "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        return flux.double_and_single_shape("ChromaTransformer2DModel", config, TEXT_LENGTH)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        # The library's own checkpointing drops the mask of the single blocks; ours passes on every argument.
        checkpoint_blocks([*transformer.transformer_blocks, *transformer.single_transformer_blocks], checkpointed_blocks)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"T5": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


FAMILY = Chroma()
