"""Flux.1 dev and schnell (black-forest-labs): packed tokens, rectified flow, CLIP pooled and T5 states.

dev is guidance-distilled: told guidance 1 in training, as `objective.guidance` is where nobody says otherwise, it keeps its behaviour at higher
values more intact (ai-toolkit and musubi-tuner do the same; the script of diffusers tells it 3.5). schnell embeds none and is few-step distilled: LoRA harms that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import last_blocks, lean_attention
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.packing import grid_ids, pack, unpack
from finetune.families.protocol import (
    Conditioning, FamilyFacts, LatentDistribution, LicenceTerms, ModelShape, PictureGeometry, TextStream,
)
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import CLIP_ATTENTION, count_tokens, keep, stack
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

ATTENTION = r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FEED_FORWARD = r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
TARGETS = {"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|{FEED_FORWARD})"}
NEVER_QUANTISE = ("time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out")

NON_COMMERCIAL = LicenceTerms(
    identifier="other", name="flux-1-dev-non-commercial-license",
    link="https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
    notice="The FLUX.1 [dev] Model is licensed by Black Forest Labs Inc. under the FLUX.1 [dev] Non-Commercial License.")


def double_and_single_shape(class_name: str, config: Mapping[str, Any], text_tokens: int, factor: int = 8) -> ModelShape:
    """Of transformers with Flux's two kinds of blocks and 2x2 packing."""
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    return ModelShape(
        parameters=count_parameters(class_name, config), hidden_size=hidden, heads=config["num_attention_heads"],
        blocks={"double": config["num_layers"], "single": config["num_single_layers"]}, feed_forward_size=4 * hidden,
        tokens_per_pixel=1 / (2 * factor) ** 2, text_tokens=text_tokens, latent_channels=config["in_channels"] // 4, latent_factor=factor)


@dataclass(frozen=True)
class Flux:
    """`ModelFamily`. text_length: T5 tokens, all of which are attended to, so none may be dropped."""

    facts: FamilyFacts
    text_length: int

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
            states, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=self.text_length)
            found.append(Conditioning({"t5": keep(states[0]), "pooled": keep(pooled[0])}))
        return found

    def encode_live(self, pipeline: Any, prompts: Sequence[str], cached: Sequence[Conditioning]) -> list[Conditioning]:
        return [Conditioning({**before.tensors, "pooled": pipeline._get_clip_prompt_embeds(prompt)[0]}) for prompt, before in zip(prompts, cached, strict=True)]

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        model = getattr(transformer, "module", transformer)
        dtype, device, (height, width) = compute_dtype(model), noisy.device, noisy.shape[-2:]
        states = stack(conditionings, "t5", device, dtype)
        guidance = torch.full((len(noisy),), level.guidance, device=device) if model.config.guidance_embeds else None
        output = transformer(
            hidden_states=pack(noisy).to(dtype), encoder_hidden_states=states, pooled_projections=stack(conditionings, "pooled", device, dtype),
            timestep=level.timestep.to(device, torch.float32) / 1000, guidance=guidance, img_ids=grid_ids(height // 2, width // 2, 3, device),
            txt_ids=torch.zeros(states.shape[1], 3, device=device), return_dict=False)[0]
        return unpack(output.float(), height, width)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        device, dtype = latents.device, compute_dtype(pipeline.transformer)
        return {"prompt_embeds": stack(conditionings, "t5", device, dtype), "pooled_prompt_embeds": stack(conditionings, "pooled", device, dtype),
                "latents": pack(latents).to(dtype), "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        return double_and_single_shape("FluxTransformer2DModel", config, self.text_length)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        lean_attention.install(transformer.modules(), "FluxAttnProcessor", lean_attention.FluxAttention())
        last_blocks.shorten_flux(transformer)
        checkpoint_blocks([*transformer.transformer_blocks, *transformer.single_transformer_blocks], checkpointed_blocks)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"CLIP": count_tokens(pipeline.tokenizer, prompt, 77), "T5": count_tokens(pipeline.tokenizer_2, prompt, self.text_length)}


def _facts(name: str, licence: LicenceTerms) -> FamilyFacts:
    return FamilyFacts(name=name, pipeline_classes=("FluxPipeline",), size_multiple=16, resolution=1024, targets=TARGETS, licence=licence,
                       never_quantise=NEVER_QUANTISE, text_stream=TextStream(states="t5", mask=None, placement="append"), trainable_encoders={"text_encoder": CLIP_ATTENTION},
                       told_guidance=True)


DEV = Flux(_facts("flux_dev", NON_COMMERCIAL), text_length=512)
SCHNELL = Flux(_facts("flux_schnell", APACHE), text_length=256)
