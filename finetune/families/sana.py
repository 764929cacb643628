"""Sana 1.0 and 1.5 (NVIDIA): linear attention, deep-compression autoencoder without a distribution, Gemma 2 states.

Prompts are encoded behind the pipeline's own instruction, negatives and the empty prompt without it, as the pipeline does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_attention, lean_gates
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, deterministic, tiled
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, LicenceTerms, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 300
ATTENTION = r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)"
FACTS = FamilyFacts(
    name="sana", pipeline_classes=("SanaPipeline",), size_multiple=32, resolution=1024,
    targets={"attention": ATTENTION},  # the feed-forward is convolutional, one of them depthwise
    licence=LicenceTerms(
        identifier="other", name="nvidia-open-model-license", link="https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
        notice="Licensed by NVIDIA Corporation under the NVIDIA Open Model License. The text encoder has the Gemma terms of use."),
    never_quantise=("patch_embed", "time_embed", "caption_projection", "caption_norm", "proj_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class Sana:
    """`ModelFamily` of Sana."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        return load_pipeline(folder, parts, dtype)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=1)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        vae = pipeline.vae
        with tiled(vae, *pixels.shape[-2:]):
            return deterministic(vae.encode(pixels.to(vae.device, vae.dtype)).latent.float() * vae.config.scaling_factor)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            negative = self._encode(pipeline, prompt, None)
            states = self._encode(pipeline, prompt, default_instruction(pipeline)) if prompt else negative
            found.append(Conditioning({"states": states, "negative": negative}))
        return found

    @staticmethod
    def _encode(pipeline: Any, prompt: str, instruction: list[str] | None) -> Tensor:
        states, mask, *_ = pipeline.encode_prompt(
            prompt=prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH, complex_human_instruction=instruction)
        return keep(states[0][mask[0].bool()])

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        model = getattr(transformer, "module", transformer)
        dtype, device = compute_dtype(model), noisy.device
        states, mask = stack_padded(conditionings, "states", device, dtype)
        timestep = level.timestep.to(device, torch.float32) * model.config.timestep_scale
        padded = len({len(c.tensors["states"]) for c in conditionings}) > 1
        output = transformer(noisy.to(dtype), encoder_hidden_states=states, encoder_attention_mask=mask.long() if padded else None, timestep=timestep, return_dict=False)[0]
        return output[:, : noisy.shape[1]].float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        length = max(len(c.tensors[key]) for group, key in ((conditionings, "states"), (negatives, "negative")) for c in group)
        states, mask = stack_padded(conditionings, "states", latents.device, dtype, length)
        negative, negative_mask = stack_padded(negatives, "negative", latents.device, dtype, length)
        return {"prompt_embeds": states, "prompt_attention_mask": mask.long(), "negative_prompt": None, "negative_prompt_embeds": negative,
                "negative_prompt_attention_mask": negative_mask.long(), "latents": latents, "guidance_scale": guidance, "use_resolution_binning": False}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("SanaTransformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"linear": config["num_layers"]}, feed_forward_size=int(config["mlp_ratio"] * hidden), tokens_per_pixel=1 / 32**2,
            text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=32)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        lean_attention.install(transformer.modules(), "SanaLinearAttnProcessor2_0", lean_attention.LinearAttention())
        lean_gates.install_on_convolutions(transformer)
        checkpoint_blocks(transformer.transformer_blocks, checkpointed_blocks)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"Gemma": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


def default_instruction(pipeline: Any) -> list[str]:
    """The instruction that the pipeline's call puts before prompts when it is not told otherwise."""
    import inspect

    return list(inspect.signature(pipeline.__call__).parameters["complex_human_instruction"].default)


FAMILY = Sana()
