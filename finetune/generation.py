"""Pictures from a base and adapter files, with one part of the base in memory at a time. Takes no recipe.

`sampling` draws with a pipeline that is loaded already; this file is for those who start from files: the command,
candidates for rating, evaluation.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from data_tools.progress import Progress
from finetune.adapters.attach import attach, set_weights
from finetune.sampling import PictureRequest, draw, encode_all, prompts_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from finetune.adapters.adapter_file import AdapterFile
    from finetune.families.base_models import BaseModel
    from finetune.families.protocol import Conditioning


@dataclass(frozen=True)
class DrawnPicture:
    """A picture and what it was drawn with; `weights` has each adapter's name and strength."""

    image: Image
    request: PictureRequest
    weights: Mapping[str, float]


def best_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 or fp16 on a GPU, fp32 on a CPU, where 16-bit products are several times slower."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def usual_size(base: BaseModel) -> int:
    """The edge in pixels that a base draws by itself: its own sample size, else what is usual for the family."""
    config = read_transformer_config(base)
    own = config.get("sample_size")
    if isinstance(own, int):
        return own * base.family.shape(config).latent_factor
    return base.family.facts.resolution


def read_transformer_config(base: BaseModel) -> dict[str, Any]:
    """The transformer's `config.json`."""
    import json

    return json.loads((base.folder / "transformer" / "config.json").read_text(encoding="utf-8"))


def encode_prompts(base: BaseModel, prompts: Sequence[str], dtype: torch.dtype, device: torch.device, progress: Progress) -> dict[str, Conditioning]:
    """Every prompt encoded; the text encoders are gone from memory afterwards."""
    with progress.phase("encoding prompts", len(prompts)) as advance:
        pipeline = base.family.load(base.folder, frozenset({"text"}), dtype)
        pipeline.to(device)
        encoded = encode_all(base.family, pipeline, prompts)
        advance(len(prompts))
    del pipeline
    gc.collect()
    return encoded


def draw_from_files(base: BaseModel, adapters: Mapping[str, AdapterFile], weight_sets: Sequence[Mapping[str, float]], requests: Sequence[PictureRequest], *,
                    progress: Progress | None = None, batch_size: int = 8) -> Iterator[DrawnPicture]:
    """Draw every request with every set of adapter strengths, set after set.

    adapters: name -> adapter, attached together.  weight_sets: name -> strength; adapters not named in a set are off.
    Raises AdapterError when an adapter does not fit the base, BadInput for sizes that it cannot draw.
    """
    progress, device = progress or Progress(), best_device()
    dtype = best_dtype(device)
    conditionings = encode_prompts(base, prompts_of(requests), dtype, device, progress)
    with progress.phase("loading the model"):
        pipeline = base.family.load(base.folder, frozenset({"transformer", "vae"}), dtype)
        pipeline.to(device)
    for name, adapter in adapters.items():
        attach(pipeline.transformer, adapter, name)
    for weights in weight_sets:
        if adapters:
            set_weights(pipeline.transformer, {name: weights.get(name, 0.0) for name in adapters})
        pictures = draw(base.family, pipeline, requests, conditionings, batch_size=batch_size, progress=progress)
        for request, image in zip(requests, pictures, strict=True):
            yield DrawnPicture(image, request, dict(weights))
