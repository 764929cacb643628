"""HiDream-I1 (HiDream.ai): mixture of experts, four text encoders, rectified flow, output negated.

Experts run without gradients unless the model trains and `force_inference_output` is off, and then the output keeps
another layout: it is put back into a picture here (diffusers 0.42.1). Every non-square size costs as much as the largest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_gates
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, LicenceTerms, ModelShape, PictureGeometry, PictureLimits
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 128
BLOCK = r"(double|single)_stream_blocks\.\d+\.block"
ATTENTION = rf"{BLOCK}\.attn1\.(to_[qkv](_t)?|to_out(_t)?)"
FACTS = FamilyFacts(
    name="hidream", pipeline_classes=("HiDreamImagePipeline",), size_multiple=16, resolution=1024,
    # Experts are numbered too, and a range of blocks means the other number.
    targets={"attention": ATTENTION, "attention_ff": rf"({ATTENTION}|{BLOCK}\.ff_[it]\.(shared_experts\.)?w[123])",
             "all": rf"({ATTENTION}|{BLOCK}\.ff_[it]\.(shared_experts\.|experts\.[0-9]+\.)?w[123])"},
    licence=LicenceTerms(identifier="mit", name="MIT", link="https://opensource.org/license/mit",
                         notice="The Llama 3.1 text encoder has the Llama 3.1 Community License."),
    never_quantise=("t_embedder", "p_embedder", "x_embedder", "final_layer", "*.gate", "caption_projection"),
    limits=lambda config: PictureLimits(pixels=math.prod(config["max_resolution"]) * 8**2))


class HiDream:
    """`ModelFamily` of HiDream-I1. A caption's states are large: every layer of Llama, 33 MB in bfloat16."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        pipeline = load_pipeline(folder, parts, dtype)
        if "text" in parts and pipeline.tokenizer_4 is not None:
            pipeline.tokenizer_4.padding_side = "right"  # transformers 5 makes Llama's pad on the left
        return pipeline

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=2)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
                prompt=prompt, prompt_2=None, prompt_3=None, prompt_4=None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
            found.append(Conditioning({"t5": keep(t5[0]), "llama": keep(llama[:, 0]), "pooled": keep(pooled[0])}))
        return found

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        model = getattr(transformer, "module", transformer)
        dtype, device = compute_dtype(model), noisy.device
        # Pictures that are not square are padded to the position table's full length and masked inside the model.
        output = transformer(
            hidden_states=noisy.to(dtype), timesteps=level.timestep.to(device, torch.float32), encoder_hidden_states_t5=stack(conditionings, "t5", device, dtype),
            encoder_hidden_states_llama3=stack(conditionings, "llama", device, dtype).transpose(0, 1),
            pooled_embeds=stack(conditionings, "pooled", device, dtype), return_dict=False)[0]
        if model.training and not model.config.force_inference_output:
            output = self._patches_to_picture(output, noisy.shape[-2], noisy.shape[-1], model.config.patch_size)
        return -output.float()

    @staticmethod
    def _patches_to_picture(patches: Tensor, height: int, width: int, patch: int) -> Tensor:
        """(B, C, tokens, patch ** 2), the form of training, to (B, C, height, width); tokens beyond the picture are padding."""
        rows, columns = height // patch, width // patch
        grid = patches[:, :, : rows * columns].unflatten(3, (patch, patch)).unflatten(2, (rows, columns))
        return grid.permute(0, 1, 2, 4, 3, 5).reshape(len(patches), -1, height, width)

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        device, dtype = latents.device, compute_dtype(pipeline.transformer)
        # The pipeline stretches every request to the area of its default size; ours is drawn as it is. The margin is for
        # its rounding down.
        pipeline.default_sample_size = math.sqrt(latents.shape[-2] * latents.shape[-1]) * (1 + 1e-6)
        inputs: dict[str, Any] = {"latents": latents.to(dtype), "guidance_scale": guidance}
        for side, group in (("", conditionings), ("negative_", negatives)):
            inputs |= {f"{side}prompt_embeds_t5": stack(group, "t5", device, dtype), f"{side}pooled_prompt_embeds": stack(group, "pooled", device, dtype),
                       f"{side}prompt_embeds_llama3": stack(group, "llama", device, dtype).transpose(0, 1).contiguous()}
        return inputs

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("HiDreamImageTransformer2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"double": config["num_layers"], "single": config["num_single_layers"]}, feed_forward_size=int(hidden * 8 / 3),
            tokens_per_pixel=1 / 16**2, text_tokens=3 * TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=8,
            extra={"experts": config["num_routed_experts"], "active_experts": config["num_activated_experts"]})

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        for module in transformer.modules():
            if hasattr(module, "_force_inference_output"):
                module._force_inference_output = False  # experts would run under no_grad
        transformer.register_to_config(force_inference_output=False)
        checkpoint_blocks([*transformer.double_stream_blocks, *transformer.single_stream_blocks], checkpointed_blocks)
        lean_gates.install(transformer, "HiDreamImageFeedForwardSwiGLU", "w1", "w3", "w2")
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        named = (("CLIP", pipeline.tokenizer), ("T5", pipeline.tokenizer_3), ("Llama", pipeline.tokenizer_4))
        return {name: count_tokens(tokenizer, prompt, TEXT_LENGTH) for name, tokenizer in named}


FAMILY = HiDream()
