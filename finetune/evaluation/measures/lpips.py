"""LPIPS: perceived difference to the base's picture on unrelated prompts, so drift as people see it.

The weights are one safetensors file: AlexNet's convolutions `features.{0,3,6,8,10}.{weight,bias}` and the linear
weights `lin{0..4}` (C,), both converted once from the published checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from finetune.errors import BadInput
from finetune.evaluation.evidence import Evidence, Pixels
from finetune.evaluation.measure import Measure

if TYPE_CHECKING:
    from torch import Tensor

# Of each convolution: number in AlexNet, stride, padding, and whether a 3x3 stride-2 maximum comes before it.
LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def load_weights(path: Path) -> dict[str, Tensor]:
    """Raises BadInput when tensors are missing."""
    from safetensors.torch import load_file

    path = path / "lpips_alex.safetensors" if path.is_dir() else path
    tensors = load_file(path)
    missing = [name for index, (number, *_) in enumerate(LAYERS) for name in (f"features.{number}.weight", f"features.{number}.bias", f"lin{index}") if name not in tensors]
    if missing:
        raise BadInput(f"{missing[0]} is missing", where=str(path), fix="convert AlexNet's convolutions and LPIPS's linear weights into one safetensors file")
    return {name: tensor.float() for name, tensor in tensors.items()}


def distance(one: Pixels, other: Pixels, weights: dict[str, Tensor]) -> float:
    """Sum over layers of the spatial mean of squared differences of unit features, weighted by channel."""
    import torch
    import torch.nn.functional as F

    pair = torch.from_numpy(np.stack([one, other])).permute(0, 3, 1, 2).float() / 127.5 - 1
    states = (pair - torch.tensor(SHIFT).view(1, 3, 1, 1)) / torch.tensor(SCALE).view(1, 3, 1, 1)
    total = 0.0
    for index, (number, stride, padding, pooled) in enumerate(LAYERS):
        states = F.max_pool2d(states, 3, 2) if pooled else states
        states = F.relu(F.conv2d(states, weights[f"features.{number}.weight"], weights[f"features.{number}.bias"], stride, padding))
        normal = states / (states.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)
        total += float(((normal[0] - normal[1]).pow(2) * weights[f"lin{index}"].view(-1, 1, 1)).sum(0).mean())
    return total


def values(evidence: Evidence) -> np.ndarray:
    weights = evidence.once(("model", "lpips"), lambda: load_weights(evidence.weights["lpips"]))
    return np.array([distance(one, other, weights) for one, other in zip(evidence.pictures, evidence.base, strict=True)])


MEASURE = Measure("lpips", "perceived difference to the base's picture of the same unrelated prompt and seed", "Zhang et al., The Unreasonable Effectiveness of Deep Features (2018), AlexNet, v0.1",
                  0, float("inf"), "lower", ("weights:lpips",), splits=("unrelated",), values=values)
