"""Z-Image (Alibaba Tongyi): rectified flow told the share of signal, output negated, lists of pictures and texts.

Z-Image-Turbo is step-distilled: LoRA trained on it harms few-step drawing; train the base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_attention, lean_gates, lean_norms
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import keep
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 512
BLOCKS = r"(layers|noise_refiner|context_refiner)\.\d+"
ATTENTION = rf"{BLOCKS}\.attention\.(to_[qkv]|to_out\.0)"
FACTS = FamilyFacts(
    name="z_image", pipeline_classes=("ZImagePipeline",), size_multiple=16, resolution=1024,
    targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|{BLOCKS}\.feed_forward\.w[123])"}, licence=APACHE,
    never_quantise=("t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer", "*.adaLN_modulation*"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class ZImage:
    """`ModelFamily` of Z-Image."""

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
            # A list of its own for every call: the pipeline writes its template into the caller's (diffusers 0.42.1).
            states, _ = pipeline.encode_prompt(prompt=[prompt], do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
            found.append(Conditioning({"states": keep(states[0])}))
        return found

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        dtype, device = compute_dtype(transformer), noisy.device
        states = [c.tensors["states"].to(device, dtype) for c in conditionings]
        output = transformer(list(noisy.to(dtype).unsqueeze(2)), 1 - level.timestep.to(device, torch.float32) / 1000, states, return_dict=False)[0]
        return -torch.stack([picture.float() for picture in output]).squeeze(2)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        dtype = compute_dtype(pipeline.transformer)
        # This pipeline draws positive + g (positive - negative), with g <= 1 off: a scale of 2 or less is none here.
        return {"prompt_embeds": [c.tensors["states"].to(latents.device, dtype) for c in conditionings],
                "negative_prompt_embeds": [c.tensors["states"].to(latents.device, dtype) for c in negatives],
                "latents": latents.float(), "guidance_scale": max(guidance - 1, 0.0)}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        return ModelShape(
            parameters=count_parameters("ZImageTransformer2DModel", config), hidden_size=config["dim"], heads=config["n_heads"],
            blocks={"layer": config["n_layers"], "refiner": 2 * config["n_refiner_layers"]}, feed_forward_size=int(config["dim"] / 3 * 8),
            tokens_per_pixel=1 / 16**2, text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        lean_attention.install(transformer.modules(), "ZSingleStreamAttnProcessor", lean_attention.SingleStreamAttention())
        checkpoint_blocks([*transformer.noise_refiner, *transformer.context_refiner, *transformer.layers], checkpointed_blocks)
        lean_norms.install(transformer)
        lean_gates.install(transformer, "FeedForward", "w1", "w3", "w2")
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        text = pipeline.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=True)
        return {"Qwen": (len(pipeline.tokenizer(text).input_ids), TEXT_LENGTH)}


FAMILY = ZImage()
