"""A base's transformer and one small deterministic forward of it, for verbs that prove an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.progress import Progress

if TYPE_CHECKING:
    from finetune.families.protocol import Conditioning, ModelFamily

PROMPT = "a picture"
NOISE_SEED = 0


def load_for_probe(base: str, revision: str | None, progress: Progress, adapter: Path | None = None) -> tuple[Any, Callable[[Any], Any]]:
    """(transformer, run): `run(transformer)` predicts for a fixed noise and prompt on a small picture, always the same.

    adapter: the file that is to be proven; its thinking tokens, if it has any, take part in the prediction. Raises
    AdapterError where they are missing, others, or fit another model.
    """
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
    if adapter is not None:
        conditionings = _with_tokens(adapter, family, conditionings)
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


def _with_tokens(file: Path, family: ModelFamily, conditionings: list[Conditioning]) -> list[Conditioning]:
    from finetune.adapters.adapter_file import read_adapter
    from finetune.families.key_layouts import KEY_MAPS
    from finetune.thinking.tokens import tokens_of

    tokens = tokens_of(read_adapter(file, KEY_MAPS), file, family.facts.text_stream)
    return conditionings if tokens is None else [tokens.joined_to(each) for each in conditionings]
