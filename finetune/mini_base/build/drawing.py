"""Pictures from the finished folder by the stock pipeline, with fixed seeds, and sheets of them."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

STEPS, GUIDANCE, BATCH = 20, 3.0, 16


def open_pipeline(folder: Path):
    """The stock pipeline in fp32 with a fast second-order solver."""
    from diffusers import DPMSolverMultistepScheduler, HunyuanDiTPipeline

    pipeline = HunyuanDiTPipeline.from_pretrained(folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def draw(pipeline, prompts: list[str], size: tuple[int, int], first_seed: int, steps: int = STEPS, guidance: float = GUIDANCE) -> np.ndarray:
    """[n, height, width, 3] in 0..1; picture k starts from seed `first_seed` + k, whatever the batch."""
    pictures = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start:start + BATCH]
        generators = [torch.Generator().manual_seed(first_seed + start + k) for k in range(len(batch))]
        # Without switching binning off the pipeline would draw a megapixel.
        pictures.append(pipeline(batch, height=size[0], width=size[1], num_inference_steps=steps, guidance_scale=guidance,
                                 generator=generators, use_resolution_binning=False, output_type="np").images)
    return np.concatenate(pictures)


def save_sheet(pictures: list[np.ndarray], columns: int, file: Path, zoom: int = 2, gap: int = 3) -> None:
    """Pictures in 0..1 side by side on grey, as a small indexed PNG."""
    height, width = max(p.shape[0] for p in pictures), max(p.shape[1] for p in pictures)
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 200, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * (height + gap) + gap, number % columns * (width + gap) + gap
        sheet[top:top + picture.shape[0], left:left + picture.shape[1]] = (np.clip(picture, 0, 1) * 255).round()
    image = Image.fromarray(sheet)
    image.resize((image.width * zoom, image.height * zoom), Image.NEAREST).quantize(160).save(file, optimize=True)
