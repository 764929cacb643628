"""Qwen-Image (Alibaba): packed tokens, rectified flow, Qwen2.5-VL states with a mask.

The model's `guidance` argument is never passed: its time embedding does not take it (diffusers 0.42.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import last_blocks, lean_attention, lean_norms
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, tiled
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.packing import pack, unpack
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 1024
JOINT = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
FACTS = FamilyFacts(
    name="qwen_image", pipeline_classes=("QwenImagePipeline",), size_multiple=16, resolution=1024,
    targets={"attention": JOINT, "attention_ff": rf"({JOINT}|transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2))"}, licence=APACHE,
    never_quantise=("time_text_embed", "img_in", "txt_in", "norm_out", "proj_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class QwenImage:
    """`ModelFamily` of Qwen-Image. The last block's text output is discarded: LoRA there gets no gradient."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        return load_pipeline(folder, parts, dtype)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=2)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        vae = pipeline.vae
        with tiled(vae, *pixels.shape[-2:]):
            posterior = vae.encode(pixels[:, :, None].to(vae.device, vae.dtype)).latent_dist
        mean, std = (torch.tensor(values, device=vae.device).view(1, -1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
        return LatentDistribution((posterior.mean.squeeze(2).float() - mean) / std, posterior.std.squeeze(2).float() / std)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        # One at a time, the pipeline returns no padding and no mask.
        return [Conditioning({"states": keep(pipeline.encode_prompt(prompt=prompt, max_sequence_length=TEXT_LENGTH)[0][0])}) for prompt in prompts]

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device, (height, width) = compute_dtype(transformer), noisy.device, noisy.shape[-2:]
        states, mask = stack_padded(conditionings, "states", device, dtype)
        padded = len({len(c.tensors["states"]) for c in conditionings}) > 1
        output = transformer(
            hidden_states=pack(noisy).to(dtype), timestep=level.timestep.to(device, torch.float32) / 1000, encoder_hidden_states=states,
            encoder_hidden_states_mask=mask if padded else None, img_shapes=[[(1, height // 2, width // 2)]] * len(noisy), return_dict=False)[0]
        return unpack(output.float(), height, width)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels // 4, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        states, mask = stack_padded(conditionings, "states", latents.device, dtype)
        inputs = {"prompt_embeds": states, "prompt_embeds_mask": mask, "latents": pack(latents).to(dtype), "true_cfg_scale": guidance}
        if guidance > 1:
            negative, negative_mask = stack_padded(negatives, "states", latents.device, dtype)
            inputs |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
        return inputs

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("QwenImageTransformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"double": config["num_layers"]}, feed_forward_size=4 * hidden, tokens_per_pixel=1 / 16**2, text_tokens=TEXT_LENGTH,
            latent_channels=config["in_channels"] // 4, latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        lean_attention.install(transformer.modules(), "QwenDoubleStreamAttnProcessor2_0", lean_attention.QwenAttention())
        last_blocks.shorten_qwen(transformer)
        checkpoint_blocks(transformer.transformer_blocks, checkpointed_blocks)
        lean_norms.install(transformer)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"Qwen": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH)}


FAMILY = QwenImage()
