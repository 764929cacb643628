"""Can the model learn a style? A plain LoRA on the style folder, measured on the held-out subjects.

`python -m finetune.mini_base.build.style_check --model DIR`. It uses peft alone, so that it judges the model and not
Brushwork's own trainer.
"""
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .autoencoder import LATENT_CHANNELS, to_model_range
from .drawing import draw, open_pipeline, save_sheet
from .measures import palette_distance, shape_score
from .packed_text import PackedTransformer, rotary_table
from .text_encoders import CaptionEncoder

TARGETS = r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"


def read_folder(folder: Path) -> list[tuple[np.ndarray, str]]:
    """Pictures in 0..1 with their captions, in the order of their names."""
    return [(np.asarray(Image.open(file).convert("RGB"), np.float32) / 255, file.with_suffix(".txt").read_text("utf-8").strip())
            for file in sorted(folder.glob("*.png"))]


def with_trigger(caption: str, trigger: str) -> str:
    return f"{trigger}, {caption}" if trigger else caption


def train_adapter(pipeline, encoders: Path, pictures: list, trigger: str, steps: int, rate: float, rank: int, seed: int = 0,
                  batch: int = 16) -> list[float]:
    """Puts a LoRA into the pipeline's transformer and trains it; returns the losses."""
    from diffusers import DDPMScheduler
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    transformer = pipeline.transformer.requires_grad_(False)
    get_peft_model(transformer, LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights="gaussian"))
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    levels = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    packed, encode = PackedTransformer(transformer), CaptionEncoder(encoders)
    by_size: dict = {}
    with torch.no_grad():
        for picture, caption in pictures:
            latent = pipeline.vae.encode(to_model_range(picture[None])).latent_dist.mode() * pipeline.vae.config.scaling_factor
            by_size.setdefault(picture.shape[:2], []).append((latent[0], with_trigger(caption, trigger)))
    random, generator, losses = np.random.default_rng(seed), torch.Generator().manual_seed(seed), []
    sizes = list(by_size)
    shares = np.array([len(by_size[size]) for size in sizes]) / len(pictures)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - 0.9 * step / steps)
        size = sizes[random.choice(len(sizes), p=shares)]
        chosen = [by_size[size][row] for row in random.integers(len(by_size[size]), size=batch)]
        latents = torch.stack([latent for latent, _ in chosen])
        captions = ["" if random.random() < 0.1 else caption for _, caption in chosen]
        timesteps = ((torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * 1000).long()
        noise = torch.randn(latents.shape, generator=generator)
        signal, spread = levels[timesteps].sqrt().view(-1, 1, 1, 1), (1 - levels[timesteps]).sqrt().view(-1, 1, 1, 1)
        velocity = signal * noise - spread * latents
        predicted = packed(signal * latents + spread * noise, timesteps.float(), encode(captions), rotary_table(transformer, size))
        loss = (predicted[:, :LATENT_CHANNELS] - velocity).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    transformer.set_default_attn_processor()
    return losses


def check_style(model: Path, style: Path, held_out: Path, trigger: str, steps: int = 200, rate: float = 2e-3, rank: int = 16,
                sheet: Path | None = None) -> dict:
    pipeline = open_pipeline(model)
    truths = read_folder(held_out)
    size = truths[0][0].shape[:2]
    true_pictures = np.stack([picture for picture, _ in truths])
    prompts = [with_trigger(caption, trigger) for _, caption in truths]
    before = draw(pipeline, prompts, size, 4000)
    started = time.monotonic()
    losses = train_adapter(pipeline, model, read_folder(style), trigger, steps, rate, rank)
    seconds = time.monotonic() - started
    after = draw(pipeline, prompts, size, 4000)
    if sheet:
        save_sheet([*before[:12], *after[:12], *true_pictures[:12], *before[12:], *after[12:], *true_pictures[12:]], 12, sheet, zoom=1)
    distances = palette_distance(before, true_pictures), palette_distance(after, true_pictures)
    return {"trigger": trigger, "steps": steps, "rate": rate, "rank": rank, "seconds": round(seconds, 1),
            "loss": [round(float(np.mean(losses[:20])), 3), round(float(np.mean(losses[-20:])), 3)],
            "palette": [round(distance, 3) for distance in distances], "palette_ratio": round(distances[1] / distances[0], 3),
            "shape": [round(shape_score(before, true_pictures), 3), round(shape_score(after, true_pictures), 3)]}


def main() -> None:
    from finetune.mini_base import TRIGGER, held_out_folder, style_folder, weights_folder

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=weights_folder())
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--trigger", default=TRIGGER)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    print(json.dumps(check_style(options.model, style_folder(), held_out_folder(), options.trigger, options.steps,
                                 options.rate, options.rank, options.sheet)))


if __name__ == "__main__":
    main()
