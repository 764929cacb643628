"""Flux.2 dev and Flux.2 Klein (black-forest-labs): patchified latents, language-model states of three layers.

Train Klein's base models, not the step-distilled ones. Latents are normalised by the autoencoder's BatchNorm buffers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_gates
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, deterministic, tiled
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.packing import flatten_grid, fold_patches, grid_ids, unflatten_grid
from finetune.families.protocol import (
    Conditioning, FamilyFacts, LatentDistribution, LicenceTerms, ModelShape, PictureGeometry, TextStream,
)
from finetune.families.schedules import flow_objective, token_shift
from finetune.families.text_encoding import keep, stack
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 512  # all tokens are attended to
ATTENTION = (r"(transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
             r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out))")
NON_COMMERCIAL = LicenceTerms(
    identifier="other", name="flux-dev-non-commercial-license", link="https://huggingface.co/black-forest-labs/FLUX.2-dev/blob/main/LICENSE.txt",
    notice="The FLUX.2 [dev] Model is licensed by Black Forest Labs Inc. under the FLUX Non-Commercial License.")


@dataclass(frozen=True)
class Flux2:
    """`ModelFamily`. with_negatives: the pipeline takes negative prompts (Klein) and no embedded guidance."""

    facts: FamilyFacts
    with_negatives: bool

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        return load_pipeline(folder, parts, dtype)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        # The pipeline's own shift depends on the number of drawing steps; training takes Flux's line over the tokens.
        return flow_objective(sampling, weighting, dynamic=token_shift(pipeline.scheduler, patch=1))

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        vae = pipeline.vae
        with tiled(vae, *pixels.shape[-2:]):
            patches = fold_patches(vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float())
        mean, variance = vae.bn.running_mean.float(), vae.bn.running_var.float()
        scaled = (patches - mean.view(1, -1, 1, 1)) / torch.sqrt(variance + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        return deterministic(scaled)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        return [Conditioning({"states": keep(pipeline.encode_prompt(prompt=prompt, max_sequence_length=TEXT_LENGTH)[0][0])}) for prompt in prompts]

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        model = getattr(transformer, "module", transformer)
        dtype, device, (height, width) = compute_dtype(model), noisy.device, noisy.shape[-2:]
        states = stack(conditionings, "states", device, dtype)
        text_ids = torch.zeros(states.shape[1], 4, device=device)
        text_ids[:, 3] = torch.arange(states.shape[1], device=device)
        guidance = torch.full((len(noisy),), level.guidance, device=device) if model.config.guidance_embeds else None
        output = transformer(
            hidden_states=flatten_grid(noisy).to(dtype), encoder_hidden_states=states, timestep=level.timestep.to(device, torch.float32) / 1000,
            guidance=guidance, img_ids=grid_ids(height, width, 4, device), txt_ids=text_ids, return_dict=False)[0]
        return unflatten_grid(output.float(), height, width)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor * 2
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        device, dtype = latents.device, compute_dtype(pipeline.transformer)
        inputs = {"prompt_embeds": stack(conditionings, "states", device, dtype), "latents": latents.to(dtype), "guidance_scale": guidance}
        if self.with_negatives:
            inputs["negative_prompt_embeds"] = stack(negatives, "states", device, dtype)
        return inputs

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("Flux2Transformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"double": config["num_layers"], "single": config["num_single_layers"]}, feed_forward_size=int(config["mlp_ratio"] * hidden),
            tokens_per_pixel=1 / 16**2, text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=16)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        checkpoint_blocks([*transformer.transformer_blocks, *transformer.single_transformer_blocks], checkpointed_blocks)
        lean_gates.install_on_halves(transformer, "Flux2SwiGLU")
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        message = [{"role": "user", "content": prompt}]
        text = pipeline.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)
        return {"language model": (len(tokenizer(text).input_ids), TEXT_LENGTH)}


def _facts(name: str, pipeline_class: str, licence: LicenceTerms) -> FamilyFacts:
    return FamilyFacts(
        name=name, pipeline_classes=(pipeline_class,), size_multiple=16, resolution=1024, licence=licence,
        targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out))"},
        never_quantise=("time_guidance_embed", "*_modulation*", "x_embedder", "context_embedder", "norm_out", "proj_out"),
        text_stream=TextStream(states="states", mask=None, placement="append"), told_guidance=True)


DEV = Flux2(_facts("flux2_dev", "Flux2Pipeline", NON_COMMERCIAL), with_negatives=False)
# The configuration does not say which of the two licences a Klein has, so a card must not claim the freer one.
KLEIN_TERMS = LicenceTerms(
    identifier="other", name="flux2-klein", link="https://huggingface.co/black-forest-labs",
    notice="FLUX.2 [klein] 4B is licensed under Apache-2.0, FLUX.2 [klein] 9B under the FLUX Non-Commercial License: the terms of the base hold.")
KLEIN = Flux2(_facts("flux2_klein", "Flux2KleinPipeline", KLEIN_TERMS), with_negatives=True)
