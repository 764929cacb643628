"""What the tests of all families share: one tiny pipeline on disk, its parts, and a step recorded inside its own call."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from finetune.families import packing, registry
from finetune.families.protocol import Conditioning, ModelFamily, PictureGeometry
from finetune.objectives import NoiseLevel
from tests.tiny_models.all import TINY, TinyModel

PROMPTS = ("a cat", 'a dog in the rain, "hi" style')
FEW_ROUNDINGS = 5e-7


@dataclass(frozen=True)
class Step:
    """One denoising step inside the pipeline: what the model saw and what the pipeline made of its output."""

    sample: Tensor
    timestep: float
    output: Tensor


class Specimen:
    """A family's tiny pipeline, saved and loaded in parts as the product does."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.tiny = name, folder, TINY[name]
        self.family: ModelFamily = registry.family(name)
        self.tiny.build().save_pretrained(folder)
        self.text = self.family.load(folder, frozenset({"text"}), torch.float32)
        self.drawer = self.family.load(folder, frozenset({"transformer", "vae"}), torch.float32)
        encoded = self.family.encode_prompts(self.text, [*PROMPTS, ""])
        self.conditionings: list[Conditioning] = encoded[:2]
        self.empty: Conditioning = encoded[2]
        height, width = self.tiny.picture
        self.latent_shape = self.family.latent_shape(self.drawer, height, width)
        self.geometry = PictureGeometry((1024, 1024) if name == "hunyuan_dit" else (height, width), (height, width))

    def fresh_transformer(self) -> Any:
        return self.family.load(self.folder, frozenset({"transformer"}), torch.float32).transformer

    def predict(self, transformer: Any, noisy: Tensor, timestep: Tensor, conditionings: list[Conditioning]) -> Tensor:
        level = NoiseLevel(sigma=timestep / 1000, timestep=timestep)
        return self.family.predict(transformer, noisy, level, conditionings, [self.geometry] * len(noisy))

    def noisy(self, count: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Latents and timesteps for `count` pictures."""
        drawn = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.latent_shape, generator=drawn), torch.tensor([312.0, 705.0, 48.0][:count])

    def unpacked(self, latents: Tensor) -> Tensor:
        """The pipeline's packing of latents undone."""
        _, height, width = self.latent_shape
        if latents.ndim == 5:
            return latents.squeeze(2)
        if latents.ndim == 3:
            whole = latents.shape[1] == height * width
            return packing.unflatten_grid(latents, height, width) if whole else packing.unpack(latents, height, width)
        return latents

    def recorded_step(self, pipeline: Any, prompt: int) -> Step:
        """The second of two steps of the pipeline's own call with guidance off. At the first, sigma 1 hides mistakes."""
        if self.name == "chroma":  # its own prompts come with an additive mask: a defect that our inputs avoid
            noise = torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(prompt))
            return self.watched_step(pipeline, **self.family.pipeline_inputs(pipeline, [self.conditionings[prompt]], [self.empty], noise, 1.0))
        return self.watched_step(pipeline, prompt=PROMPTS[prompt], generator=torch.Generator().manual_seed(prompt), **self.tiny.live)

    def watched_step(self, pipeline: Any, **call: Any) -> Step:
        """The second of two steps of this call of the pipeline."""
        steps: list[Step] = []
        plain = pipeline.scheduler.step

        @functools.wraps(plain)  # pipelines look at the signature
        def watched(output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            steps.append(Step(self.unpacked(sample).clone(), float(timestep), self.unpacked(output).clone()))
            return plain(output, timestep, sample, *args, **kwargs)

        pipeline.scheduler.step = watched
        height, width = self.tiny.picture
        try:
            pipeline(**({"height": height, "width": width, "num_inference_steps": 2, "output_type": "latent"} | call))
        finally:
            pipeline.scheduler.step = plain
        return steps[1]


def close(found: Tensor, expected: Tensor, tolerance: float = FEW_ROUNDINGS) -> bool:
    """Largest difference within `tolerance`, relative where values exceed 1."""
    return bool((found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


def stock_pipeline(specimen: Specimen, tiny: TinyModel) -> Any:
    """The pipeline as diffusers alone loads it; tokenizers pad as the family's loading makes them."""
    pipeline = getattr(diffusers, type(specimen.drawer).__name__).from_pretrained(specimen.folder)
    pipeline.set_progress_bar_config(disable=True)
    for slot in ("tokenizer", "tokenizer_4"):
        if getattr(specimen.text, slot, None) is not None:
            getattr(pipeline, slot).padding_side = getattr(specimen.text, slot).padding_side
    return tiny.after_load(pipeline)


# Targets whose output the model throws away: the last block's text stream, and its queries, which nobody reads.
NEVER_TRAINED = {
    "sd3": r"transformer_blocks\.1\.attn\.add_q_proj\.",
    "qwen_image": r"transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|txt_mlp)\.",
    "hunyuan_video_15": r"transformer_blocks\.1\.(attn\.(add_q_proj|to_add_out)|ff_context)\.",
}
