"""The whole idea on one page: a folder of pictures in, an adapter that a fresh base has loaded and drawn with out.

    python examples/bare_loop.py [--pictures FOLDER] [--steps 60] [--out bare]

No cache, no resume, no plan: those are what `brushwork train` adds. Every part used here is the product's own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from data_tools.bucket_choice import choose_buckets
from data_tools.buckets import assign
from data_tools.scan import scan_folder
from finetune import mini_base
from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.attach import attach
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.families.base_models import locate_base
from finetune.families.protocol import PictureGeometry
from finetune.objectives import LossWeighting
from finetune.randomness import generator
from finetune.sampling import PictureRequest, draw, encode_all
from finetune.training.pixels import load_pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=Path, default=mini_base.style_folder())
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("bare"))
    asked = parser.parse_args()

    # Pictures: found, checked, and each given the training size that loses least of it.
    base = locate_base("mini")
    family = base.family
    records = scan_folder(asked.pictures).records
    sizes = [(record.height, record.width) for record in records]
    buckets = choose_buckets(sizes, resolution=64, multiple=family.facts.size_multiple, most=4)
    placements = [assign(size, buckets) for size in sizes]
    captions = [f"{mini_base.TRIGGER}, {record.caption}" for record in records]

    # Latents and text states, once; then only the transformer is needed.
    pipeline = family.load(base.folder, frozenset({"vae", "text", "transformer"}), torch.float32)
    with torch.no_grad():
        arrays = [load_pixels(record.path, placement, "#ffffff") for record, placement in zip(records, placements, strict=True)]
        latents = [family.encode_images(pipeline, torch.from_numpy(a).permute(2, 0, 1)[None].float() / 127.5 - 1).mean[0] for a in arrays]
        words = encode_all(family, pipeline, [*captions, f"{mini_base.TRIGGER}, dog", ""])

    # LoRA on the attention layers; everything else is frozen.
    inject_lora(pipeline.transformer, family.facts.targets["attention"], rank=16, seed=0)
    family.prepare(pipeline.transformer, checkpointed_blocks=0)
    optimizer = torch.optim.AdamW([parameter for _, parameter in lora_parameters(pipeline.transformer)], lr=2e-3, weight_decay=0.0)
    objective = family.objective(pipeline, None, LossWeighting())

    for step in range(asked.steps):
        # One size a batch; every draw is named by (seed, purpose, step), so that a step can be made again.
        first = int(torch.randint(len(records), (), generator=generator(0, "first", step)))
        alike = [n for n in range(len(records)) if placements[n].bucket == placements[first].bucket]
        chosen = [alike[n] for n in torch.randint(len(alike), (8,), generator=generator(0, "batch", step))]
        clean = torch.stack([latents[n] for n in chosen])
        noise = torch.randn(clean.shape, generator=generator(0, "noise", step))
        level = objective.level(torch.rand(len(chosen), generator=generator(0, "noise level", step)), clean)
        size = (placements[first].bucket.height, placements[first].bucket.width)
        predicted = family.predict(pipeline.transformer, objective.add_noise(clean, noise, level), level,
                                   [words[captions[n]] for n in chosen], [PictureGeometry(size, size)] * len(chosen))
        loss = (predicted - objective.target(clean, noise, level)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)

    # A file, a fresh base, and the proof that a person believes: the same prompt and seed, before and after.
    path = write_adapter(asked.out / "pytorch_lora_weights.safetensors", collect_lora(pipeline.transformer))
    fresh = family.load(base.folder, frozenset({"vae", "transformer"}), torch.float32)
    request = PictureRequest(f"{mini_base.TRIGGER}, dog", seed=1, height=64, width=64, steps=20, guidance=2.5)
    draw(family, fresh, [request], words)[0].save(asked.out / "before.png")
    attach(fresh.transformer, read_adapter(path), "style")
    draw(family, fresh, [request], words)[0].save(asked.out / "after.png")
    print(f"before and after: {asked.out / 'before.png'} {asked.out / 'after.png'}")


if __name__ == "__main__":
    main()
