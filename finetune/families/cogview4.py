"""CogView4 (Zhipu): rectified flow with a linear dynamic shift, GLM states padded on the left, told picture sizes.

There is no text mask, and encoding several captions at once changes their values: one at a time, and pictures of one
prediction share a text length; a mixed batch is predicted in groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import flow_objective
from finetune.families.text_encoding import count_tokens, keep, stack
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 1024
ATTENTION = r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)"
FACTS = FamilyFacts(
    name="cogview4", pipeline_classes=("CogView4Pipeline",), size_multiple=16, resolution=1024,
    targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|transformer_blocks\.\d+\.ff\.net\.(0\.proj|2))"}, licence=APACHE,
    never_quantise=("patch_embed", "time_condition_embed", "norm_out", "proj_out"), equal_text_lengths=True,
    text_stream=TextStream(states="states", mask=None, placement="append"))


class CogView4:
    """`ModelFamily` of CogView4."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        return load_pipeline(folder, parts, dtype)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        config = pipeline.scheduler.config
        base, low, high = config.get("base_image_seq_len") or 256, config.get("base_shift") or 0.25, config.get("max_shift") or 0.75

        def shift(shape: torch.Size) -> float:
            # mu = max sqrt(N / base) + base_shift is itself the shift: `calculate_shift` of the pipeline, time_shift_type linear
            return high * (shape[-2] * shape[-1] / 4 / base) ** 0.5 + low

        return flow_objective(sampling, weighting, dynamic=shift)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        return [Conditioning({"states": keep(pipeline.encode_prompt(
            prompt=prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)[0][0])}) for prompt in prompts]

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        lengths = [len(c.tensors["states"]) for c in conditionings]
        if len(set(lengths)) == 1:
            return self._predict(transformer, noisy, level.timestep, conditionings, geometries)
        groups = [[i for i, own in enumerate(lengths) if own == length] for length in sorted(set(lengths))]
        parts = [self._predict(transformer, noisy[group], level.timestep[group], [conditionings[i] for i in group], [geometries[i] for i in group])
                 for group in groups]
        order = torch.tensor([i for group in groups for i in group], device=noisy.device).argsort()
        return torch.cat(parts)[order]

    @staticmethod
    def _predict(transformer: Any, noisy: Tensor, timestep: Tensor, conditionings: Sequence[Conditioning],
                 geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device = compute_dtype(transformer), noisy.device
        sizes = {name: torch.tensor([getattr(g, own) for g in geometries], dtype=dtype, device=device)
                 for name, own in (("original_size", "original"), ("target_size", "target"), ("crop_coords", "crop"))}
        return transformer(hidden_states=noisy.to(dtype), encoder_hidden_states=stack(conditionings, "states", device, dtype),
                           timestep=timestep.to(device, torch.float32), return_dict=False, **sizes)[0].float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        device, dtype = latents.device, compute_dtype(pipeline.transformer)
        return {"prompt_embeds": stack(conditionings, "states", device, dtype), "negative_prompt_embeds": stack(negatives, "states", device, dtype),
                "latents": latents.float(), "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("CogView4Transformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"joint": config["num_layers"]}, feed_forward_size=4 * hidden, tokens_per_pixel=1 / 16**2, text_tokens=TEXT_LENGTH,
            latent_channels=config["in_channels"], latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        # The library makes the tables of angles in host memory and brings them to the device twice in every block (diffusers 0.42.1).
        transformer.rope.forward = MethodType(_angles, transformer.rope)
        checkpoint_blocks(transformer.transformer_blocks, checkpointed_blocks)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"GLM": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


def _angles(self: torch.nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """`CogView4RotaryPosEmbed.forward`, where the pictures are."""
    cos, sin = type(self).forward(self, hidden_states)
    return cos.to(hidden_states.device), sin.to(hidden_states.device)


FAMILY = CogView4()
