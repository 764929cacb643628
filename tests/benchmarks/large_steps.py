"""LoRA steps of a model of full size with random weights, held in each way.

    python -m tests.benchmarks.large_steps FOLDER [--holds fp32 streamed nf4] [--pixels 256] [--blocks 0 40] [--steps 2] [--threads 2]
    python -m tests.benchmarks.large_steps FOLDER --model hunyuan_image_2 --holds nf4 --pixels 512 --blocks 60 --steps 1

FOLDER keeps the random base (HunyuanDiT v1.2: 1.5 billion, 3 GB; HunyuanImage-2.1: 17.4 billion, 35 GB; both bf16) and the
quantised weights. Each measurement is a process of its own; printed are seconds of the last step (wall and CPU), peak
resident and anonymous memory, and the share of the machine's product speed in the same minute.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANK = 16


def status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


class AnonymousPeak(threading.Thread):
    """Watches the anonymous part of the resident set, of which the system keeps no maximum."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.finished = 0, threading.Event()

    def run(self) -> None:
        while not self.finished.wait(0.05):
            self.peak = max(self.peak, status("RssAnon"))


def product_rate(dtype: str = "float32") -> float:
    """Operations a CPU second of the best of some products 2048 x 2048 x 2048, by the library that a run takes."""
    import torch

    from finetune.adapters.products import product

    left = torch.ones(2048, 2048, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(6):
        began = time.process_time()
        product(left, left)
        best = min(best, time.process_time() - began)
    return 2 * 2048**3 / best


def measure(folder: Path, hold: str, pixels: int, blocks: int, steps: int) -> dict:
    """Load, inject, take `steps` steps at random noise."""
    import torch

    from data_tools.progress import Progress
    from finetune.adapters.lora import inject_lora, lora_parameters
    from finetune.adapters.products import take_faster_products
    from finetune.families.base_models import locate_base
    from finetune.training.allocator import keep_freed_memory
    from finetune.training.optimizers import build_optimizer
    from finetune.training.placement import Hold, load_held

    keep_freed_memory()
    watch = AnonymousPeak()
    watch.start()
    base = locate_base(str(folder / "base"), parts=())
    began = time.perf_counter()
    pipeline = load_held(base, Hold(hold, torch.float32, ""), torch.device("cpu"), folder / "cache", Progress())
    loaded, model = time.perf_counter() - began, pipeline.transformer
    inject_lora(model, base.family.facts.targets["attention"], RANK, seed=0)
    base.family.prepare(model, blocks)
    take_faster_products(model)
    named = lora_parameters(model)
    optimizer = build_optimizer("adamw", [parameter for _, parameter in named], 1e-4, 0.0)
    predict = random_input(base.family, model, pixels)
    walls, cpus, rates = [], [], [product_rate()]
    for _ in range(steps):
        began, began_cpu = time.perf_counter(), time.process_time()
        predict().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        walls.append(round(time.perf_counter() - began, 2))
        cpus.append(round(time.process_time() - began_cpu, 2))
        rates.append(product_rate())
    watch.finished.set()
    return {"load": round(loaded, 1), "wall": min(walls), "cpu": min(cpus), "cpus": cpus, "peak_mib": status("VmHWM") >> 20, "anonymous_mib": watch.peak >> 20,
            "rate": max(rates), "trainable": sum(parameter.numel() for _, parameter in named)}


def random_input(family: Any, model: Any, pixels: int) -> Callable[[], Any]:
    """A prediction for one square picture of random noise and a random caption."""
    import torch

    from finetune.families.example_text import example_conditioning
    from finetune.families.protocol import Conditioning, PictureGeometry
    from finetune.objectives import NoiseLevel

    shape = family.shape(dict(model.config))
    edge = pixels // shape.latent_factor
    noisy, geometry = torch.randn(1, shape.latent_channels, edge, edge), PictureGeometry((pixels, pixels), (pixels, pixels))
    example = example_conditioning(family.facts.name, model.config, torch.device("cpu"))
    conditioning = Conditioning({name: tensor if tensor.dtype == torch.bool else torch.randn(tensor.shape) for name, tensor in example.tensors.items()})
    level = NoiseLevel(sigma=torch.tensor([0.5]), timestep=torch.tensor([500.0]))
    return lambda: family.predict(model, noisy, level, [conditioning], [geometry])


def required_flops(base_folder: Path, pixels: int) -> float:
    """Of one LoRA step with a frozen base and nothing computed twice, counted on the meta device."""
    from finetune.adapters.kinds import AdapterSize
    from finetune.families.base_models import locate_base
    from finetune.training.plan_model import step_cost

    base = locate_base(str(base_folder), parts=())
    config = json.loads((base.folder / "transformer" / "config.json").read_text())
    return step_cost(base.family, config["_class_name"], config, base.family.facts.targets["attention"], AdapterSize(rank=RANK), 1, (pixels, pixels), 4).flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=("hunyuan_dit", "hunyuan_image_2"), default="hunyuan_dit")
    parser.add_argument("--holds", nargs="+", default=["fp32", "streamed", "nf4"])
    parser.add_argument("--pixels", type=int, nargs="+", default=[256])
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 40])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true")
    options = parser.parse_args()
    if options.one:
        import torch

        torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.folder, options.holds[0], options.pixels[0], options.blocks[0], options.steps)))
        return
    import torch

    from tests.benchmarks import random_base

    getattr(random_base, options.model)(options.folder / "base", torch.bfloat16)
    print("| hold | pixels | checkpointed | load s | step s | CPU s | peak MiB | anonymous MiB | of product speed |\n|---|---|---|---|---|---|---|---|---|")
    for pixels in options.pixels:
        work = required_flops(options.folder / "base", pixels)
        for hold in options.holds:
            for blocks in options.blocks:
                command = [sys.executable, "-m", "tests.benchmarks.large_steps", str(options.folder), "--holds", hold, "--pixels", str(pixels), "--blocks", str(blocks),
                           "--steps", str(options.steps), "--threads", str(options.threads), "--one"]
                run = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
                if run.returncode:
                    print(f"| {hold} | {pixels} | {blocks} | failed: {run.stderr.strip().splitlines()[-1][:120] if run.stderr.strip() else run.returncode} |", flush=True)
                    continue
                found = json.loads(run.stdout.splitlines()[-1])
                # Against CPU seconds of all threads, so that other programs on the machine do not count.
                share = work / (found["cpu"] * found["rate"])
                print(f"| {hold} | {pixels} | {blocks} | {found['load']} | {found['wall']} | {found['cpu']} | {found['peak_mib']} | {found['anonymous_mib']} | {share:.0%} |", flush=True)


if __name__ == "__main__":
    main()
