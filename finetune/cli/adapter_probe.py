"""A base's transformer and one small deterministic forward of it, for verbs that prove an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from data_tools.progress import Progress

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.adapters.verify import VerifyResult
    from finetune.families.base_models import BaseModel
    from finetune.families.protocol import Conditioning, ModelFamily

PROMPT = "a picture"
NOISE_SEED = 0


def prove(adapter: AdapterFile, file: Path, base: str, revision: str | None, progress: Progress) -> VerifyResult:
    """Prove an adapter, read from `file`, on its base: on the transformer, and on the text encoders that it trains. Its thinking tokens, if
    it has any, take part in the prediction. Raises AdapterError where they are missing, others, or fit another model."""
    import torch

    from finetune.adapters.verify import prove_on
    from finetune.training.text_training import prove_encoders, together

    found, pipeline, conditionings, run = load_for_probe(base, revision, progress, adapter, file)
    proofs = [prove_on(adapter, pipeline.transformer, run, str(file))] if adapter.tensors else []
    if adapter.text_encoders:
        dtype = torch.bfloat16 if pipeline.transformer.device.type == "cuda" else torch.float32
        proofs.append(prove_encoders(found, pipeline, adapter, SimpleNamespace(conditioning=lambda _: conditionings[0]), PROMPT, dtype, str(file))[0])
    return together(proofs)


def load_for_probe(base: str, revision: str | None, progress: Progress, adapter: AdapterFile | None = None,
                   file: Path = Path()) -> tuple[BaseModel, Any, list[Conditioning], Callable[[Any], Any]]:
    """(base, pipeline, conditionings, run): `run(pipeline.transformer)` predicts for a fixed noise and prompt on a small
    picture, always the same. adapter, file: whose thinking tokens take part."""
    import gc
    import json

    import torch

    from finetune.families.base_models import locate_base
    from finetune.families.protocol import PictureGeometry
    from finetune.objectives import NoiseLevel
    from finetune.offload import place_encoders
    from finetune.randomness import generator

    found = locate_base(base, revision, ("text", "transformer"))
    family = found.family
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with progress.phase("encoding a prompt"):
        pipeline = family.load(found.folder, frozenset({"text"}), dtype)
        place_encoders(pipeline, device)
        conditionings = family.encode_prompts(pipeline, [PROMPT])
    if adapter is not None:
        conditionings = _with_tokens(adapter, file, family, conditionings)
    del pipeline
    gc.collect()
    with progress.phase("loading the transformer"):
        pipeline = family.load(found.folder, frozenset({"transformer"}), dtype)
        pipeline.to(device)
        pipeline.transformer.eval()
    shape = family.shape(json.loads((found.folder / "transformer" / "config.json").read_text(encoding="utf-8")))
    edge = family.facts.size_multiple * 4
    latent = (1, shape.latent_channels, edge // shape.latent_factor, edge // shape.latent_factor)
    noise = torch.randn(latent, generator=generator(NOISE_SEED, "adapter probe")).to(device)
    level = NoiseLevel(sigma=torch.tensor([0.5]), timestep=torch.tensor([500.0]))
    geometry = PictureGeometry((edge, edge), (edge, edge))
    return found, pipeline, conditionings, lambda model: family.predict(model, noise, level, conditionings, [geometry])


def _with_tokens(adapter: AdapterFile, file: Path, family: ModelFamily, conditionings: list[Conditioning]) -> list[Conditioning]:
    from finetune.thinking.tokens import tokens_of

    tokens = tokens_of(adapter, file, family.facts.text_stream)
    return conditionings if tokens is None else [tokens.joined_to(each) for each in conditionings]
