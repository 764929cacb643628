"""HunyuanVideo with one frame (Tencent): pictures as videos of length one; Llama states with a mask and CLIP pooled.

Its embedded guidance is told 1000 times the scale, unlike Flux's. Trained with 1 where nobody says otherwise, as diffusion-pipe does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import lean_norms
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.flux import TARGETS
from finetune.families.image_encoding import count_parameters, one_frame_latents
from finetune.families.licences import tencent
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import scheduler_flow
from finetune.families.text_encoding import count_tokens, keep, stack, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 256
FACTS = FamilyFacts(
    name="hunyuan_video", pipeline_classes=("HunyuanVideoPipeline",), size_multiple=16, resolution=960, targets=TARGETS,
    licence=tencent("https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE", 2024, "European Union, United Kingdom, South Korea"),
    never_quantise=("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"),
    text_stream=TextStream(states="states", mask=None, placement="append"), told_guidance=True)


class HunyuanVideo:
    """`ModelFamily` of HunyuanVideo, one frame."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        pipeline = load_pipeline(folder, parts, dtype)
        if pipeline.tokenizer is not None:
            pipeline.tokenizer.padding_side = "right"  # transformers 5 makes Llama's pad on the left, which the masks do not expect
        return pipeline

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return scheduler_flow(pipeline.scheduler, sampling, weighting, patch=2)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return one_frame_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        found = []
        for prompt in prompts:
            states, pooled, mask = pipeline.encode_prompt(prompt=prompt, prompt_2=None, prompt_template=default_template(pipeline), max_sequence_length=TEXT_LENGTH)
            found.append(Conditioning({"states": keep(states[0][mask[0].bool()]), "pooled": keep(pooled[0])}))
        return found

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        model = getattr(transformer, "module", transformer)
        dtype, device = compute_dtype(model), noisy.device
        states, mask = stack_padded(conditionings, "states", device, dtype)
        guidance = torch.full((len(noisy),), 1000 * level.guidance, device=device) if model.config.guidance_embeds else None
        return transformer(
            hidden_states=noisy.unsqueeze(2).to(dtype), timestep=level.timestep.to(device, torch.float32), encoder_hidden_states=states,
            encoder_attention_mask=mask.long(), pooled_projections=stack(conditionings, "pooled", device, dtype), guidance=guidance,
            return_dict=False)[0].squeeze(2).float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor_spatial
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        device, dtype = latents.device, compute_dtype(pipeline.transformer)
        states, mask = stack_padded(conditionings, "states", device, dtype)
        return {"prompt_embeds": states, "prompt_attention_mask": mask.long(), "pooled_prompt_embeds": stack(conditionings, "pooled", device, dtype),
                "latents": latents.unsqueeze(2), "num_frames": 1, "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        return ModelShape(
            parameters=count_parameters("HunyuanVideoTransformer3DModel", config), hidden_size=hidden, heads=config["num_attention_heads"],
            blocks={"double": config["num_layers"], "single": config["num_single_layers"]}, feed_forward_size=int(config["mlp_ratio"] * hidden),
            tokens_per_pixel=1 / 16**2, text_tokens=TEXT_LENGTH, latent_channels=config["in_channels"], latent_factor=8)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        checkpoint_blocks([*transformer.transformer_blocks, *transformer.single_transformer_blocks], checkpointed_blocks)
        lean_norms.install(transformer)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"Llama": count_tokens(pipeline.tokenizer, prompt, TEXT_LENGTH), "CLIP": count_tokens(pipeline.tokenizer_2, prompt, 77)}


def default_template(pipeline: Any) -> dict[str, Any]:
    """The prompt template that the pipeline's call uses when it is not told otherwise."""
    import inspect

    return inspect.signature(pipeline.__call__).parameters["prompt_template"].default


FAMILY = HunyuanVideo()
