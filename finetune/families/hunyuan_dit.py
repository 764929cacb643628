"""HunyuanDiT v1.1, v1.2 and the distilled one (Tencent-Hunyuan/HunyuanDiT): DDPM with v-prediction, two text encoders.

Versions differ only in their configuration files: `beta_end` in the scheduler's, the size and style conditions in the
transformer's. Nothing is inferred from a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.families import hunyuan_dit_forward
from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import count_parameters, kl_latents
from finetune.families.licences import tencent
from finetune.families.loading import compute_dtype, load_pipeline
from finetune.families.protocol import (
    Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream,
)
from finetune.families.schedules import ddpm_objective
from finetune.families.text_encoding import count_tokens, keep, stack, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

CLIP_LENGTH, T5_LENGTH = 77, 256  # fixed by the model: its learned padding has 333 rows, its pooler 257 positions
ATTENTION = r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"

FACTS = FamilyFacts(
    name="hunyuan_dit",
    pipeline_classes=("HunyuanDiTPipeline",),
    size_multiple=16,
    resolution=1024,
    targets={
        "attention": ATTENTION,
        "self_attention": r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",
        "attention_ff": rf"({ATTENTION}|blocks\.\d+\.ff\.net\.(0\.proj|2))",
        "all": rf"({ATTENTION}|blocks\.\d+\.(ff\.net\.(0\.proj|2)|skip_linear|norm1\.linear))",
    },
    licence=tencent("https://huggingface.co/Tencent-Hunyuan/HunyuanDiT/blob/main/LICENSE.txt", 2024, "European Union"),
    # The pooler hands its packed weight to multi_head_attention_forward, which cannot read it.
    never_quantise=("time_extra_emb", "text_embedder", "pos_embed", "norm_out", "proj_out"),
    text_stream=TextStream(states="t5", mask="t5_mask", placement="last_slots"),
)


def centred_region(grid: tuple[int, int], square: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(top, left), (bottom, right) of a picture of grid (height, width) in tokens that is scaled to fit a square of so many, and centred
    in it. The formula of diffusers 0.42.1, pipelines/hunyuandit/pipeline_hunyuandit.py, get_resize_crop_region_for_grid, whose import would load
    the pipeline and the models of transformers before the first step: 65 MiB."""
    height, width = grid
    fitted = (square, round(square / height * width)) if height > width else (round(square / width * height), square)
    top, left = (round((square - edge) / 2) for edge in fitted)
    return (top, left), (top + fitted[0], left + fitted[1])


@lru_cache(maxsize=32)
def rotary_table(head_dim: int, grid_height: int, grid_width: int, base: int) -> tuple[Tensor, Tensor]:
    """cos and sin, each (tokens, head_dim), as the pipeline makes them for this grid; one table a bucket."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    grid = (grid_height, grid_width)
    return get_2d_rotary_pos_embed(head_dim, centred_region(grid, base), grid, output_type="pt")


class HunyuanDiT:
    """`ModelFamily` of the HunyuanDiT models."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        pipeline = load_pipeline(folder, parts, dtype, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        if pipeline.transformer is not None:
            hunyuan_dit_forward.install(pipeline.transformer)
        return pipeline

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        return ddpm_objective(pipeline.scheduler, sampling, weighting)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        return kl_latents(pipeline.vae, pixels)

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        """clip (n, D) without padding, which the model replaces; t5 (256, D) whole, since its pooler has no mask."""
        found = []
        for prompt in prompts:
            clip, clip_mask = self._encode(pipeline, prompt, 0)
            t5, t5_mask = self._encode(pipeline, prompt, 1)
            found.append(Conditioning({"clip": keep(clip[: int(clip_mask.sum())]), "t5": keep(t5), "t5_mask": keep(t5_mask)}))
        return found

    @staticmethod
    def _encode(pipeline: Any, prompt: str, index: int) -> tuple[Tensor, Tensor]:
        tokenizer, encoder = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))[index]
        tokens = tokenizer(prompt, padding="max_length", max_length=(CLIP_LENGTH, T5_LENGTH)[index], truncation=True,
                           return_attention_mask=True, return_tensors="pt").to(encoder.device)
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0][0], tokens.attention_mask[0]

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        model = getattr(transformer, "module", transformer)
        hunyuan_dit_forward.install(model)
        dtype, device, config = compute_dtype(model), noisy.device, model.config
        patch = config.patch_size
        table = rotary_table(model.inner_dim // model.num_heads, noisy.shape[-2] // patch, noisy.shape[-1] // patch, 64 // patch)
        # The timestep stays float32: bfloat16 would keep only 507 of the 1000 steps apart.
        output = transformer(
            noisy.to(dtype), level.timestep.to(device, torch.float32), **self._text(conditionings, device, dtype),
            **self._picture_conditions(config, geometries, device), image_rotary_emb=table, return_dict=False)[0]
        return (output.chunk(2, dim=1)[0] if config.learn_sigma else output).float()

    @staticmethod
    def _text(conditionings: Sequence[Conditioning], device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        clip, clip_mask = stack_padded(conditionings, "clip", device, dtype, CLIP_LENGTH)
        return {
            "encoder_hidden_states": clip,
            "text_embedding_mask": clip_mask,
            "encoder_hidden_states_t5": stack(conditionings, "t5", device, dtype),
            "text_embedding_mask_t5": stack(conditionings, "t5_mask", device),
        }

    @staticmethod
    def _picture_conditions(config: Any, geometries: Sequence[PictureGeometry], device: Any) -> dict[str, Tensor]:
        """v1.1 is told sizes as the pipeline tells them, and a style of which the released weights have only number 0."""
        if not config.use_style_cond_and_image_meta_size:
            return {}
        sizes = [[*g.original, *g.target, *g.crop] for g in geometries]
        return {"image_meta_size": torch.tensor(sizes, dtype=torch.float32, device=device),
                "style": torch.zeros(len(sizes), dtype=torch.long, device=device)}

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        factor = pipeline.vae_scale_factor
        return pipeline.transformer.config.in_channels, height // factor, width // factor

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        device, dtype = latents.device, compute_dtype(pipeline.transformer)
        positive, negative = self._text(conditionings, device, dtype), self._text(negatives, device, dtype)
        inputs: dict[str, Any] = {"latents": latents.to(dtype), "guidance_scale": guidance, "use_resolution_binning": False}
        for side, text in (("", positive), ("negative_", negative)):
            inputs |= {
                f"{side}prompt_embeds": text["encoder_hidden_states"], f"{side}prompt_attention_mask": text["text_embedding_mask"].long(),
                f"{side}prompt_embeds_2": text["encoder_hidden_states_t5"], f"{side}prompt_attention_mask_2": text["text_embedding_mask_t5"].long(),
            }
        return inputs

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        hidden = config["num_attention_heads"] * config["attention_head_dim"]
        patch = config["patch_size"]
        return ModelShape(
            parameters=count_parameters("HunyuanDiT2DModel", config), hidden_size=hidden, heads=config["num_attention_heads"], blocks={"block": config["num_layers"]},
            feed_forward_size=int(hidden * config["mlp_ratio"]), tokens_per_pixel=1 / (8 * patch) ** 2,
            text_tokens=config["text_len"] + config["text_len_t5"], latent_channels=config["in_channels"], latent_factor=8,
            extra={"text_width": config["cross_attention_dim"], "skip_blocks": config["num_layers"] // 2 - 1},
        )

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        hunyuan_dit_forward.install(transformer)
        checkpoint_blocks(transformer.blocks, checkpointed_blocks)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"BERT": count_tokens(pipeline.tokenizer, prompt, CLIP_LENGTH), "T5": count_tokens(pipeline.tokenizer_2, prompt, T5_LENGTH)}


FAMILY = HunyuanDiT()
