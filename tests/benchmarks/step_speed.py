"""Ours beside a plain peft + diffusers loop: seconds and peak memory of a step, on the same random model and batch.

    python -m tests.benchmarks.step_speed [--model mid|mini|full] [--pairs 3] [--steps 8] [--threads 1]

Both sides have latents and text in memory, the same targets, rank, dtype and data. Each measurement is a process of
its own; sides take turns. Time is CPU time of the process (other programs on the machine do not count), the median of
its steps; the ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

MODELS = {
    "mini": {"layers": 6, "heads": 4, "head_dim": 64, "ff": 2.0, "text": 128, "t5": 128, "pixels": 64, "batch": 16, "equal_padding": True},
    "mid": {"layers": 8, "heads": 8, "head_dim": 64, "ff": 4.0, "text": 1024, "t5": 2048, "pixels": 256, "batch": 1},
    "full": {"layers": 40, "heads": 16, "head_dim": 88, "ff": 4.3637, "text": 1024, "t5": 2048, "pixels": 256, "batch": 1},
}
RANK = 16


def build(size: dict):
    import diffusers
    import torch

    torch.manual_seed(0)
    hidden = size["heads"] * size["head_dim"]
    model = diffusers.HunyuanDiT2DModel(
        num_attention_heads=size["heads"], attention_head_dim=size["head_dim"], hidden_size=hidden, in_channels=4, patch_size=2, sample_size=128,
        num_layers=size["layers"], mlp_ratio=size["ff"], cross_attention_dim=size["text"], cross_attention_dim_t5=size["t5"], pooled_projection_dim=1024,
        use_style_cond_and_image_meta_size=False)
    if size.get("equal_padding"):
        model.text_embedding_padding.data[:] = model.text_embedding_padding.data[:1].clone()
    return model


def plain_steps(size: dict, steps: int):
    """As a user writes it from the libraries' documentation."""
    import torch
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from peft import LoraConfig, inject_adapter_in_model

    model = build(size)
    model.requires_grad_(False)
    model = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), model)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    batch, grid = size["batch"], size["pixels"] // 16
    latents = torch.randn(batch, 4, 2 * grid, 2 * grid)
    text, t5 = torch.randn(batch, 77, size["text"]), torch.randn(batch, 256, size["t5"])
    mask, t5_mask = torch.ones(batch, 77).long(), torch.ones(batch, 256).long()
    mask[:, 20:], t5_mask[:, 30:] = 0, 0
    table = get_2d_rotary_pos_embed(size["head_dim"], ((0, 0), (grid, grid)), (grid, grid), output_type="pt")
    alphas = torch.linspace(0.999, 0.01, 1000)
    for _ in range(steps):
        began = time.process_time(), time.perf_counter()
        noise, timestep = torch.randn_like(latents), torch.randint(0, 1000, (batch,))
        scale = alphas[timestep].view(-1, 1, 1, 1)
        noisy, target = scale.sqrt() * latents + (1 - scale).sqrt() * noise, scale.sqrt() * noise - (1 - scale).sqrt() * latents
        output = model(noisy, timestep.float(), encoder_hidden_states=text, text_embedding_mask=mask, encoder_hidden_states_t5=t5,
                       text_embedding_mask_t5=t5_mask, image_rotary_emb=table, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(output.chunk(2, dim=1)[0], target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        yield time.process_time() - began[0], time.perf_counter() - began[1]


def our_steps(size: dict, steps: int):
    """The product's own step: imports, family, objective, optimizer and accelerator as a run uses them."""
    from finetune.families.preloading import late_imports

    with late_imports(Path()):
        import torch
    from accelerate import Accelerator

    from finetune.adapters.lora import inject_lora, lora_parameters
    from finetune.adapters.products import take_faster_products
    from finetune.families.protocol import Conditioning, PictureGeometry
    from finetune.families.registry import family
    from finetune.objectives import NoiseLevel
    from finetune.training.allocator import keep_freed_memory
    from finetune.training.optimizers import build_optimizer
    from finetune.training.step import optimizer_step

    keep_freed_memory()
    dit, model = family("hunyuan_dit"), build(size)
    inject_lora(model, dit.facts.targets["attention"], RANK, seed=0)
    dit.prepare(model, 0)
    take_faster_products(model)
    parameters = [parameter for _, parameter in lora_parameters(model)]
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(build_optimizer("adamw", parameters, 1e-4, 0.0))
    batch, edge = size["batch"], size["pixels"] // 8
    latents = torch.randn(batch, 4, edge, edge)
    t5_mask = torch.ones(256, dtype=torch.bool)
    t5_mask[30:] = False
    conditionings = [Conditioning({"clip": torch.randn(20, size["text"]), "t5": torch.randn(256, size["t5"]), "t5_mask": t5_mask}) for _ in range(batch)]
    geometries = [PictureGeometry((size["pixels"],) * 2, (size["pixels"],) * 2)] * batch
    alphas = torch.linspace(0.999, 0.01, 1000)

    def losses(_: list[int]) -> torch.Tensor:
        noise, timestep = torch.randn_like(latents), torch.randint(0, 1000, (batch,))
        scale = alphas[timestep].view(-1, 1, 1, 1)
        noisy, target = scale.sqrt() * latents + (1 - scale).sqrt() * noise, scale.sqrt() * noise - (1 - scale).sqrt() * latents
        prediction = dit.predict(model, noisy, NoiseLevel(timestep / 1000, timestep.float()), conditionings, geometries)
        return (prediction - target).pow(2).flatten(1).mean(1)

    for _ in range(steps):
        began = time.process_time(), time.perf_counter()
        optimizer_step(accelerator, optimizer, parameters, [list(range(batch))], losses, 1.0)
        yield time.process_time() - began[0], time.perf_counter() - began[1]


def measure(side: str, model: str, steps: int) -> dict:
    """In this process: median CPU and wall seconds after two steps of warm-up, and the peak resident size."""
    import torch

    from finetune.training.memory import peak_memory_bytes

    took = list({"ours": our_steps, "plain": plain_steps}[side](MODELS[model], steps))[2:]
    return {"cpu": statistics.median(cpu for cpu, _ in took), "wall": statistics.median(wall for _, wall in took), "best": min(cpu for cpu, _ in took),
            "peak": peak_memory_bytes(torch.device("cpu"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mid")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--side", choices=("ours", "plain"))
    options = parser.parse_args()
    if options.side:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.side, options.model, options.steps)))
        return
    command = [sys.executable, "-m", "tests.benchmarks.step_speed", "--model", options.model, "--steps", str(options.steps), "--threads", str(options.threads), "--side"]
    found: dict[str, list[dict]] = {"ours": [], "plain": []}
    for _ in range(options.pairs):
        for side, results in found.items():
            output = subprocess.run([*command, side], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)}).stdout
            results.append(json.loads(output.splitlines()[-1]))
            print(side, results[-1], flush=True)
    for key in ("cpu", "wall", "best", "peak"):
        ratios = [ours[key] / plain[key] for ours, plain in zip(found["ours"], found["plain"], strict=True)]
        print(f"{options.model:5} {key:5} ours {statistics.median(r[key] for r in found['ours']):.4g}  plain {statistics.median(r[key] for r in found['plain']):.4g}  ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
