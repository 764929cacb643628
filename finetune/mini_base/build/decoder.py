"""Training of the decoder, and how well it shows what the encoder kept."""
from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .autoencoder import PatchMap, ground_colour, mixed_pictures, new_autoencoder, set_encoder, to_model_range
from .muon import Muon
from .rasters import BUCKETS, ICON_EDGE, compose
from .subjects import COLOURS


@dataclass(frozen=True)
class DecoderPlan:
    """Everything that decides the result."""

    steps: int = 2400
    batch: int = 12
    muon_rate: float = 3e-3
    adam_rate: float = 2e-3
    warmup: int = 40
    foreign: float = 0.3            # share of pictures in palettes that the base itself never draws
    latent_noise: float = 0.08      # a sampled latent is never exact
    seed: int = 40

    def rate_factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


def train_decoder(rasters: dict, patch_map: PatchMap, plan: DecoderPlan, snapshot: Path | None = None, report=print) -> AutoencoderKL:
    """A fresh autoencoder with the set encoder and a decoder trained for exactly `plan.steps` steps."""
    torch.manual_seed(plan.seed)
    autoencoder = new_autoencoder(len(patch_map.matrix))
    set_encoder(autoencoder, patch_map)
    network = autoencoder.decoder.to(memory_format=torch.channels_last)
    filters = [p for p in network.parameters() if p.ndim == 4 and len(p) > 3]
    theirs = {id(p) for p in filters}
    rest = [p for p in network.parameters() if id(p) not in theirs]
    optimizers = [(Muon(filters, lr=plan.muon_rate, weight_decay=0.0), plan.muon_rate),
                  (torch.optim.AdamW(rest, lr=plan.adam_rate, betas=(0.9, 0.98), weight_decay=0.0), plan.adam_rate)]
    random, generator = np.random.default_rng(plan.seed), torch.Generator().manual_seed(plan.seed)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    losses, started = [], time.monotonic()
    for step in range(plan.steps):
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * plan.rate_factor(step)
        size = BUCKETS[(0, 1, 0, 2)[step % 4]]
        pictures = mixed_pictures(rasters, plan.batch, size, random, plan.foreign).contiguous(memory_format=torch.channels_last)
        latents = patch_map.encode(pictures)
        amount = plan.latent_noise / patch_map.scale * torch.rand(len(latents), 1, 1, 1, generator=generator)
        shown = network(latents + amount * torch.randn(latents.shape, generator=generator))
        loss = F.l1_loss(shown, pictures) + 0.5 * F.mse_loss(shown, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        keep = min(0.99, (step + 1) / (step + 20))
        with torch.no_grad():
            for name, value in network.state_dict().items():
                average[name].lerp_(value, 1 - keep)
        losses.append(float(loss.detach()))
        if (step + 1) % 100 == 0:
            report(json.dumps({"step": step + 1, "loss": round(float(np.mean(losses[-100:])), 4),
                               "seconds": round(time.monotonic() - started, 1)}))
        if snapshot and (step + 1) % 1000 == 0:
            _save_snapshot(autoencoder, average, snapshot, report, rasters)
    network.load_state_dict(average)
    return autoencoder.to(memory_format=torch.contiguous_format).eval()


def _save_snapshot(autoencoder, average: dict, folder: Path, report, rasters) -> None:
    """The averaged weights as they stand, for a look on the way; training goes on with its own."""
    own = {name: value.clone() for name, value in autoencoder.decoder.state_dict().items()}
    autoencoder.decoder.load_state_dict(average)
    autoencoder.save_pretrained(folder)
    report(json.dumps(decoder_quality(autoencoder, rasters, per_size=32)))
    autoencoder.decoder.load_state_dict(own)


@torch.no_grad()
def decoder_quality(autoencoder, rasters: dict, per_size: int = 96, seed: int = 99) -> dict[str, float]:
    """Mean PSNR in dB after encoding and decoding, per size: half of the pictures on white, half on the colours."""
    random, names, quality = np.random.default_rng(seed), list(COLOURS), {}
    for size in BUCKETS:
        icons, pictures = rasters[ICON_EDGE[size]], []
        for number in range(per_size):
            name = names[number // 2 % len(names)] if number % 2 else "white"
            pictures.append(compose(icons[number * 17 % len(icons)], ground_colour(name, random), size))
        truth = to_model_range(np.stack(pictures))
        shown = autoencoder.decode(autoencoder.encode(truth).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((shown - truth) / 2).pow(2).mean((1, 2, 3))
        quality[f"{size[0]}x{size[1]}"] = round(float((-10 * error.log10()).mean()), 2)
    return quality
