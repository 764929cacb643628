"""Copy this file to add a family. It runs: a small flow-matching model with all that the loop, sampling and the plan ask for.

Then: one line in `registry.py`, one builder in `tests/tiny_models/` with its line in `all.py`. Every test of every family
then runs for yours; the first to look at is the one that compares your `predict` with the pipeline's own step.
A real family takes its transformer and pipeline from diffusers; the two small classes at the end stand in for them here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from finetune.families.checkpointing import checkpoint_blocks
from finetune.families.image_encoding import deterministic
from finetune.families.licences import APACHE
from finetune.families.loading import compute_dtype, fill, iterate_tensors
from finetune.families.protocol import Conditioning, FamilyFacts, LatentDistribution, ModelShape, PictureGeometry, TextStream
from finetune.families.schedules import flow_objective
from finetune.families.text_encoding import keep, stack_padded
from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling

TEXT_LENGTH = 32
# 1. What is constant. Targets are full-match expressions over module names: count what they match before you trust them.
FACTS = FamilyFacts(
    name="template", pipeline_classes=("TemplatePipeline",), size_multiple=8, resolution=32,
    targets={"attention": r"blocks\.\d+\.attention\.(query|key|value|out)"}, licence=APACHE, never_quantise=("patch", "unpatch", "time"),
    text_stream=TextStream(states="states", mask=None, placement="append"))


class Template:
    """`ModelFamily` of the example."""

    facts = FACTS

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        # 2. Real families call `load_pipeline(folder, parts, dtype)`; library defects of loading are mended here.
        config = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        transformer = TemplateTransformer(**config) if "transformer" in parts else None
        if transformer is not None:
            fill(transformer, iterate_tensors([folder / "transformer" / "model.safetensors"]), dtype, folder)
            transformer.eval().requires_grad_(False)
        return TemplatePipeline(transformer, with_text="text" in parts, with_vae="vae" in parts)

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        # 3. From the scheduler's configuration that the base ships, never from a constant of yours.
        return flow_objective(sampling, weighting, shift=pipeline.scheduler.config.shift)

    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        # 4. Scaled as the transformer sees latents; scale and shift from the autoencoder's configuration.
        return deterministic(nn.functional.pixel_unshuffle(pixels.float(), 2) * pipeline.vae.scale)

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        # 5. One prompt at a time, so that no neighbour changes a value; padding is left out only where that is exact.
        return [Conditioning({"states": keep(pipeline.text_encoder(prompt[:TEXT_LENGTH]))}) for prompt in prompts]

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        # 6. Packing, timestep scale, sign, masks: all that is peculiar is undone here, so that the loop sees one velocity.
        states, mask = stack_padded(conditionings, "states", noisy.device, compute_dtype(transformer))
        return transformer(noisy.to(states.dtype), level.timestep.to(noisy.device) / 1000, states, mask).float()

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        return pipeline.transformer.config["channels"], height // 2, width // 2

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        # 7. What the pipeline's own call takes in place of prompts; guidance under its name and scale.
        dtype = compute_dtype(pipeline.transformer)
        return {"text": stack_padded(conditionings, "states", latents.device, dtype), "negative_text": stack_padded(negatives, "states", latents.device, dtype),
                "latents": latents, "guidance_scale": guidance}

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        # 8. Sizes for the plan, from the configuration alone; on the meta device nothing is allocated.
        with torch.device("meta"):
            parameters = sum(p.numel() for p in TemplateTransformer(**config).parameters())
        width = config["width"]
        return ModelShape(parameters, width, 2, {"block": config["layers"]}, 2 * width, 1 / 16, TEXT_LENGTH, config["channels"], 2)

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        # 9. Called after LoRA is injected. Workarounds for defects of training belong here.
        checkpoint_blocks(transformer.blocks, checkpointed_blocks)
        transformer.train()

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        return {"characters": (len(prompt), TEXT_LENGTH)}


FAMILY = Template()


class Attention(nn.Module):
    """Picture tokens attend to picture and text tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        source = torch.cat([tokens, text], dim=1)
        seen = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, tokens.shape[1]), mask], dim=1)
        query, key, value = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer, x in ((self.query, tokens), (self.key, source), (self.value, source)))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward, both residual."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.norm = Attention(width), nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.norm(tokens), text, mask)
        return tokens + self.feed_forward(self.norm(tokens))


class TemplateTransformer(nn.Module):
    """Stands in for a diffusers transformer: velocity of latents (B, channels, h, w) at sigma (B,), with masked text."""

    def __init__(self, channels: int = 12, width: int = 16, layers: int = 2):
        super().__init__()
        self.config = {"channels": channels, "width": width, "layers": layers}
        self.patch, self.unpatch = nn.Conv2d(channels, width, 2, stride=2), nn.ConvTranspose2d(width, channels, 2, stride=2)
        self.time = nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        patches = self.patch(latents)
        tokens = patches.flatten(2).transpose(1, 2) + self.time(sigma[:, None].to(patches.dtype))[:, None]
        for block in self.blocks:
            tokens = block(tokens, text, mask)
        return self.unpatch(tokens.transpose(1, 2).view_as(patches))


class TemplatePipeline:
    """Stands in for a diffusers pipeline: Euler steps of rectified flow with classifier-free guidance."""

    def __init__(self, transformer: TemplateTransformer | None, *, with_text: bool, with_vae: bool):
        self.transformer = transformer
        self.vae = SimpleNamespace(scale=0.5) if with_vae else None
        self.text_encoder = self._encode if with_text else None
        self.scheduler = SimpleNamespace(config=SimpleNamespace(shift=3.0))

    @staticmethod
    def _encode(prompt: str) -> Tensor:
        """(characters + 1, 16): sines of the character codes, and a row that ends the text."""
        codes = torch.tensor([*prompt.encode(), 0], dtype=torch.float32)
        return torch.sin(codes[:, None] * torch.arange(1, 17))

    @torch.no_grad()
    def __call__(self, text: tuple[Tensor, Tensor], negative_text: tuple[Tensor, Tensor], latents: Tensor, guidance_scale: float, *,
                 steps: int) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1]."""
        sigmas = torch.linspace(1, 0, steps + 1)
        sigmas = self.scheduler.config.shift * sigmas / (1 + (self.scheduler.config.shift - 1) * sigmas)
        for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            level = now.expand(len(latents))
            velocity = self.transformer(latents, level, *text)
            if guidance_scale > 1:
                unguided = self.transformer(latents, level, *negative_text)
                velocity = unguided + guidance_scale * (velocity - unguided)
            latents = latents + (after - now) * velocity
        return nn.functional.pixel_shuffle(latents / self.vae.scale, 2).clamp(-1, 1)
