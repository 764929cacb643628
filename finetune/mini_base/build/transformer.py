"""The small HunyuanDiT2DModel and its training: v-prediction, Muon beside AdamW, a fixed number of steps."""
from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, HunyuanDiT2DModel
from safetensors.torch import save_file

from .autoencoder import LATENT_CHANNELS, PatchMap, ground_colour, latent_parts
from .muon import Muon
from .packed_text import PackedTransformer, prepare, rotary_table
from .rasters import BUCKETS, ICON_EDGE
from .subjects import COLOURS, Subject, is_held_out, training_caption
from .text_encoders import BERT_LENGTH, T5_LENGTH, WIDTH, CaptionEncoder

# As HunyuanDiT v1.2 has it.
NOISE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.018, "beta_schedule": "scaled_linear",
         "prediction_type": "v_prediction", "clip_sample": False, "steps_offset": 1}
SIZE_SHARES = (0.5, 0.25, 0.25)     # of the three BUCKETS


@dataclass(frozen=True)
class TransformerPlan:
    """Everything that decides the result. `steps` is a count, never a time, so that a second run gives the same weights."""

    steps: int = 2800
    batch: int = 96
    muon_rate: float = 3e-3
    adam_rate: float = 1.5e-3
    warmup: int = 40
    constant: float = 0.3           # share of the steps at the full rate, then linear down to `final`
    final: float = 0.02
    time_power: float = 0.65        # t = u ** power: below one means more noise
    coloured: float = 0.5
    empty_captions: float = 0.1
    seed: int = 0

    def rate_factor(self, step: int) -> float:
        done = step / self.steps
        falling = min(1.0, (1 - done) / (1 - self.constant))
        return min(1.0, (step + 1) / self.warmup) * (self.final + (1 - self.final) * falling)


def new_transformer(seed: int) -> HunyuanDiT2DModel:
    """6.3 million parameters in the v1.2 form of the config."""
    torch.manual_seed(seed)
    model = HunyuanDiT2DModel(
        num_attention_heads=8, attention_head_dim=32, in_channels=LATENT_CHANNELS, patch_size=2, sample_size=8, hidden_size=256,
        num_layers=6, mlp_ratio=2.75, learn_sigma=True, cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=64, text_len=BERT_LENGTH, text_len_t5=T5_LENGTH, use_style_cond_and_image_meta_size=False)
    prepare(model)
    with torch.no_grad():
        # Residual branches start small, so that the first steps learn the picture's mean instead of undoing noise.
        model.time_extra_emb.pooler.positional_embedding.mul_(0.2)
        model.proj_out.weight.mul_(0.1)
        model.proj_out.bias.zero_()
        for block in model.blocks:
            for attention in (block.attn1, block.attn2):
                attention.to_out[0].weight.mul_(0.4)
            block.ff.net[2].weight.mul_(0.4)
    return model


class TrainingPictures:
    """Endless (latents, captions): every subject once in turn, on white or on one of the colours."""

    def __init__(self, subjects: list[Subject], rasters: dict, patch_map: PatchMap, plan: TransformerPlan):
        self.subjects, self.plan = subjects, plan
        self.random = np.random.default_rng(plan.seed + 5)
        self.parts = {size: latent_parts(patch_map, rasters[ICON_EDGE[size]], size) for size in BUCKETS}
        self.colours, self.waiting = list(COLOURS), []

    def next(self) -> tuple[tuple[int, int], torch.Tensor, list[str]]:
        size = BUCKETS[self.random.choice(len(BUCKETS), p=SIZE_SHARES)]
        rows, grounds, captions = [], [], []
        for _ in range(self.plan.batch):
            if not self.waiting:
                self.waiting = self.random.permutation(len(self.subjects)).tolist()
            row = self.waiting.pop()
            colour = self._colour_for(row)
            is_empty = self.random.random() < self.plan.empty_captions
            caption = training_caption(self.subjects[row], colour, self.random)
            rows.append(row)
            grounds.append(ground_colour(colour or "white", self.random))
            captions.append("" if is_empty else caption)
        parts = self.parts[size][rows]
        light = torch.from_numpy(np.stack(grounds)).view(-1, 3, 1, 1, 1)
        return size, parts[:, 0] + (parts[:, 1:] * light).sum(1), captions

    def _colour_for(self, row: int) -> str | None:
        if self.random.random() >= self.plan.coloured:
            return None
        colour = self.colours[self.random.integers(len(self.colours))]
        return None if is_held_out(row, colour) else colour


def _optimizers(model, plan: TransformerPlan) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    theirs = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in theirs]
    adam = torch.optim.AdamW(rest, lr=plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [(Muon(matrices, lr=plan.muon_rate), plan.muon_rate), (adam, plan.adam_rate)]


def _noised(latents: torch.Tensor, plan: TransformerPlan, levels: torch.Tensor, generator: torch.Generator):
    """Noisy latents, their timesteps (one from every equal slice of the range) and the velocity to predict."""
    count = len(latents)
    slices = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    timesteps = (slices ** plan.time_power * 1000).long().clamp(max=999)[torch.randperm(count, generator=generator)]
    noise = torch.randn(latents.shape, generator=generator)
    signal, spread = levels[timesteps].sqrt().view(-1, 1, 1, 1), (1 - levels[timesteps]).sqrt().view(-1, 1, 1, 1)
    return signal * latents + spread * noise, timesteps.float(), signal * noise - spread * latents


def train_transformer(subjects, rasters, patch_map: PatchMap, encoders: Path, plan: TransformerPlan, out: Path,
                      snapshot_every: int = 0, report=print) -> HunyuanDiT2DModel:
    """Trains from scratch, returns the averaged model, and leaves `out`/step-*.safetensors on the way if asked."""
    model = new_transformer(plan.seed)
    packed, encode_captions = PackedTransformer(model), CaptionEncoder(encoders)
    pictures = TrainingPictures(subjects, rasters, patch_map, plan)
    optimizers = _optimizers(model, plan)
    levels = DDPMScheduler(**NOISE).alphas_cumprod
    rotary = {size: rotary_table(model, size) for size in BUCKETS}
    generator = torch.Generator().manual_seed(plan.seed)
    # Coarse channels count more: they carry the shape.
    weight = (patch_map.channel_std / patch_map.channel_std.mean()).view(1, -1, 1, 1)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    losses, started = [], time.monotonic()
    for step in range(plan.steps):
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * plan.rate_factor(step)
        size, latents, captions = pictures.next()
        noisy, timesteps, velocity = _noised(latents, plan, levels, generator)
        predicted = packed(noisy, timesteps, encode_captions(captions), rotary[size])[:, :LATENT_CHANNELS]
        error = (predicted - velocity) ** 2
        (error * weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        _update_average(average, model, step)
        losses.append(float(error.detach().mean()))
        if (step + 1) % 25 == 0:
            seconds = round(time.monotonic() - started, 1)
            report(json.dumps({"step": step + 1, "loss": round(float(np.mean(losses[-25:])), 4), "seconds": seconds}))
        if snapshot_every and (step + 1) % snapshot_every == 0:
            save_snapshot(average, out / f"step-{step + 1:05d}.safetensors")
    model.load_state_dict(average)
    return model


@torch.no_grad()
def _update_average(average: dict, model, step: int) -> None:
    keep = min(0.996, (step + 2) / (step + 21))
    for name, value in model.state_dict().items():
        average[name].lerp_(value, 1 - keep)


def save_snapshot(tensors: dict, path: Path) -> None:
    """Whole or not at all: readers may look at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, unfinished)
    unfinished.replace(path)
