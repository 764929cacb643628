"""A base's transformer and one small deterministic forward of it, for verbs that prove an adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_tools.progress import Progress

PROMPT = "a picture"
NOISE_SEED = 0


def load_for_probe(base: str, revision: str | None, progress: Progress) -> tuple[Any, Callable[[Any], Any]]:
    """(transformer, run): `run(transformer)` predicts for a fixed noise and prompt on a small picture, always the same."""
    import gc
    import json

    import torch

    from finetune.families.base_models import locate_base
    from finetune.families.protocol import PictureGeometry
    from finetune.objectives import NoiseLevel
    from finetune.randomness import generator

    found = locate_base(base, revision, ("text", "transformer"))
    family = found.family
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with progress.phase("encoding a prompt"):
        pipeline = family.load(found.folder, frozenset({"text"}), dtype)
        pipeline.to(device)
        conditionings = family.encode_prompts(pipeline, [PROMPT])
    del pipeline
    gc.collect()
    with progress.phase("loading the transformer"):
        pipeline = family.load(found.folder, frozenset({"transformer"}), dtype)
        pipeline.to(device)
        transformer = pipeline.transformer.eval()
    shape = family.shape(json.loads((found.folder / "transformer" / "config.json").read_text(encoding="utf-8")))
    edge = family.facts.size_multiple * 4
    latent = (1, shape.latent_channels, edge // shape.latent_factor, edge // shape.latent_factor)
    noise = torch.randn(latent, generator=generator(NOISE_SEED, "adapter probe")).to(device)
    level = NoiseLevel(sigma=torch.tensor([0.5]), timestep=torch.tensor([500.0]))
    geometry = PictureGeometry((edge, edge), (edge, edge))
    return transformer, lambda model: family.predict(model, noise, level, conditionings, [geometry])
