"""AuraFlow (fal): rectified flow, UMT5 states whose padding is zero and attended to, SDXL's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_gates
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, PictureLimits
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 256
ATTENTION = r"(joint|single)_transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FACTS = FamilyFacts(
    name="auraflow", pipeline_classes=("AuraFlowPipeline",), size_multiple=16, resolution=1024,
    targets={"attention": ATTENTION,
             "attention_ff": rf"({ATTENTION}|(joint|single)_transformer_blocks\.\d+\.ff(_context)?\.(linear_[12]|out_projection))"}, licence=APACHE,
    never_quantise=("register_tokens", "pos_embed", "context_embedder", "time_step_proj", "time_step_embed", "norm_out", "proj_out"),
    limits=lambda config: PictureLimits(side=int(config["pos_embed_max_size"] ** 0.5) * config["patch_size"] * 8))


class AuraFlow:
    """`ModelFamily` of AuraFlow."""

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
            states, mask, *_ = pipeline.encode_prompt(prompt=prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
            found.append(Conditioning({"states": keep(states[0][: int(mask[0].sum())])}))
        return found

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device = compute_dtype(transformer), noisy.device
        states, _ = stack_padded(conditionings, "states", device, dtype, TEXT_LENGTH)
        return transformer(noisy.to(dtype), encoder_hidden_states=states, timestep=level.timestep.to(device, torch.float32) / 1000, return_dict=False)[0].float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        states, mask = stack_padded(conditionings, "states", latents.device, dtype, TEXT_LENGTH)
        negative, negative_mask = stack_padded(negatives, "states", latents.device, dtype, TEXT_LENGTH)
        return {"prompt_embeds": states, "prompt_attention_mask": mask, "negative_prompt_embeds": negative,
                "negative_prompt_attention_mask": negative_mask, "latents": latents.to(dtype), "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("AuraFlowTransformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"joint": config["num_mmdit_layers"], "single": config["num_single_dit_layers"]}, feed_forward_size=int(hidden * 8 / 3),
            tokens_per_pixel=1 / 16**2, text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        checkpoint_blocks([*transformer.joint_transformer_blocks, *transformer.single_transformer_blocks], checkpointed_blocks)
        lean_gates.install(transformer, "AuraFlowFeedForward", "linear_1", "linear_2", "out_projection")
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"UMT5": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


FAMILY = AuraFlow()
