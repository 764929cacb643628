"""PixArt-Sigma (PixArt-alpha team): DDPM with epsilon and a learned variance, T5 states with a mask, SDXL's autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, LicenceTerms, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import ddpm_objective
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 300
ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)"
FACTS = FamilyFacts(
    name="pixart_sigma", pipeline_classes=("PixArtSigmaPipeline",), size_multiple=16, resolution=1024,
    targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|transformer_blocks\.\d+\.ff\.net\.(0\.proj|2))"},
    licence=LicenceTerms(identifier="openrail++", name="CreativeML Open RAIL++-M", link="https://huggingface.co/PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    never_quantise=("pos_embed", "adaln_single", "caption_projection", "proj_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class PixArtSigma:
    """`ModelFamily` of PixArt-Sigma."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        return load_pipeline(folder, parts, dtype)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return ddpm_objective(pipeline.scheduler, sampling, weighting)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            states, mask, *_ = pipeline.encode_prompt(prompt=prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
            found.append(Conditioning({"states": keep(states[0][mask[0].bool()])}))
        return found

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device = compute_dtype(transformer), noisy.device
        states, mask = stack_padded(conditionings, "states", device, dtype)
        output = transformer(
            noisy.to(dtype), encoder_hidden_states=states, encoder_attention_mask=mask.long(), timestep=level.timestep.to(device, torch.float32),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False)[0]
        return output[:, : noisy.shape[1]].float()  # the other half is the learned variance

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        length = max(len(c.tensors["states"]) for c in (*conditionings, *negatives))
        states, mask = stack_padded(conditionings, "states", latents.device, dtype, length)
        negative, negative_mask = stack_padded(negatives, "states", latents.device, dtype, length)
        return {"prompt_embeds": states, "prompt_attention_mask": mask.long(), "negative_prompt": None, "negative_prompt_embeds": negative,
                "negative_prompt_attention_mask": negative_mask.long(), "latents": latents.to(dtype), "guidance_scale": guidance,
                "use_resolution_binning": False}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("PixArtTransformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"cross": config["num_layers"]}, feed_forward_size=4 * hidden, tokens_per_pixel=1 / (8 * config["patch_size"]) ** 2,
            text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        checkpoint_blocks(transformer.transformer_blocks, checkpointed_blocks)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"T5": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


FAMILY = PixArtSigma()
