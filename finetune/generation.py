"""Pictures from a base and adapter files, with one part of the base in memory at a time. Takes no recipe.

`sampling` draws with a pipeline that is loaded already; this file is for those who start from files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache

from data_tools.progress import Progress
from finetune.adapters.attach import attach_together, check_strength, set_weights
from finetune.adapters.text_encoders import attach_encoders, detach_encoders
from finetune.errors import AdapterError
from finetune.families.picture_limits import picture_limits
from finetune.families.text_encoding import is_finite
from finetune.offload import place_encoders, take_turns
from finetune.sampling import PictureRequest, check_request, draw, encode_all, prompts_of
from finetune.thinking.tokens import ThinkingTokens, conditionings_with_tokens, tokens_of

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from finetune.adapters.adapter_file import AdapterFile
    from finetune.families.base_models import BaseModel
    from finetune.families.protocol import Conditioning

# text -> {encoder: (tokens, limit)}
TokenCounts = Callable[[str], Mapping[str, tuple[int, int]]]
Rewrite = Callable[[str, TokenCounts], str]


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as read, and the file or folder it came from (where its thinking tokens lie, if it has any)."""

    file: AdapterFile
    path: Path


@dataclass(frozen=True)
class DrawnPicture:
    """A picture and what it was drawn with. asked: the prompt before any rewriting.  weights: adapter name -> strength."""

    image: Image
    request: PictureRequest
    asked: str
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
    return json.loads((base.folder / "transformer" / "config.json").read_text(encoding="utf-8"))


def encode_texts(base: BaseModel, texts: Sequence[str], dtype: torch.dtype, device: torch.device,
                 worn: Sequence[Sequence[tuple[AdapterFile, float]]] = ((),)) -> list[dict[str, Conditioning]]:
    """Every text, once for each entry of `worn`: adapters with strengths, whose parts for text encoders these then carry.

    The encoders are in memory only for this. Raises AdapterError for an adapter that does not fit them.
    """
    pipeline = base.family.load(base.folder, frozenset({"text"}), dtype)
    place_encoders(pipeline, device)
    encoded = _encoded(base, pipeline, texts, worn)
    del pipeline
    clear_device_cache(garbage_collection=True)
    return encode_texts(base, texts, torch.float32, device, worn) if _overflowed(encoded, dtype) else encoded


def _overflowed(encoded: Iterable[Mapping[str, Conditioning]], dtype: torch.dtype) -> bool:
    """Whether text encoders that computed in this format would give finite numbers in a larger one."""
    return dtype == torch.float16 and not all(is_finite(conditioning) for texts in encoded for conditioning in texts.values())


@torch.no_grad()
def _encoded(base: BaseModel, pipeline: Any, texts: Sequence[str], worn: Sequence[Sequence[tuple[AdapterFile, float]]]) -> list[dict[str, Conditioning]]:
    """As `encode_texts`, by text encoders that are loaded; what no adapter changes is encoded once."""
    bare, encoded = None, []
    for adapters in worn:
        training = [(adapter, weight) for adapter, weight in adapters if adapter.text_encoders and weight]
        if not training:
            bare = bare or encode_all(base.family, pipeline, texts)
            encoded.append(dict(bare))
            continue
        for number, (adapter, weight) in enumerate(training):
            attach_encoders(pipeline, adapter, f"worn{number}", weight)
        encoded.append(encode_all(base.family, pipeline, texts))
        detach_encoders(pipeline)
    return encoded


def draw_from_files(base: BaseModel, adapters: Mapping[str, LoadedAdapter], weight_sets: Sequence[Mapping[str, float]], requests: Sequence[PictureRequest], *,
                    rewrite: Rewrite | None = None, progress: Progress | None = None, batch_size: int = 8, offload: bool = False,
                    on_drawn: Callable[[DrawnPicture], None] | None = None) -> list[DrawnPicture]:
    """Draw every request with every set of adapter strengths, set after set.

    adapters: name -> adapter, attached together.  weight_sets: name -> strength; adapters not named in a set are off.
    rewrite: gives the text to draw with for a prompt; called once a prompt, while the tokenizers are loaded.
    offload: the transformer and the autoencoder take turns on the device, so that it must hold only the larger; same pictures.
    on_drawn: called with each picture as soon as it is there, batch by batch.
    Raises AdapterError when an adapter does not fit the base, BadInput for sizes that it cannot draw.
    """
    progress, device = progress or Progress(), best_device()
    dtype = best_dtype(device)
    for weights in weight_sets:
        for name, weight in weights.items():
            check_strength(adapters[name].file.form, weight, str(adapters[name].path))
    limits = picture_limits(base)
    for request in requests:
        check_request(base.family, request, limits)
    tokens = _thinking_tokens(base, adapters)
    rewritten, encoded = _encode(base, adapters, weight_sets, requests, rewrite, dtype, device, progress)
    with progress.phase("loading the model"):
        pipeline = base.family.load(base.folder, frozenset({"transformer", "vae"}), dtype)
        if not offload:
            pipeline.to(device)
    attach_together(pipeline.transformer, {name: (adapter.file, 1.0) for name, adapter in adapters.items()})
    if offload:
        take_turns(pipeline, device)
    negatives, found = {request.negative for request in requests}, []
    for weights, conditionings in zip(weight_sets, encoded, strict=True):
        set_weights(pipeline.transformer, {name: weights.get(name, 0.0) for name, adapter in adapters.items() if adapter.file.tensors})
        active = next((found for name, found in tokens.items() if weights.get(name)), None)
        of_set, keep = _keeping(requests, rewritten, weights, on_drawn)
        draw(base.family, pipeline, rewritten, conditionings_with_tokens(conditionings, active, negatives), batch_size=batch_size, progress=progress, on_picture=keep)
        found += [of_set[place] for place in range(len(requests))]
    return found


def _keeping(requests: Sequence[PictureRequest], rewritten: Sequence[PictureRequest], weights: Mapping[str, float],
             on_drawn: Callable[[DrawnPicture], None] | None) -> tuple[dict[int, DrawnPicture], Callable[[int, Any], None]]:
    """Where the pictures of a set of strengths will be by their places, and what puts them there."""
    found: dict[int, DrawnPicture] = {}

    def keep(place: int, image: Any) -> None:
        found[place] = DrawnPicture(image, rewritten[place], requests[place].prompt, dict(weights))
        if on_drawn is not None:
            on_drawn(found[place])

    return found, keep


def _thinking_tokens(base: BaseModel, adapters: Mapping[str, LoadedAdapter]) -> dict[str, ThinkingTokens]:
    """Adapter name -> its thinking tokens. Only one adapter may have some: they would take each other's places."""
    stream = base.family.facts.text_stream
    found = {name: tokens_of(adapter.file, adapter.path, stream) for name, adapter in adapters.items()}
    carrying = {name: tokens for name, tokens in found.items() if tokens is not None}
    if len(carrying) > 1:
        raise AdapterError(f"{', '.join(carrying)} all have thinking tokens, which cannot be used together", fix="use one of them at a time")
    return carrying


def _encode(base: BaseModel, adapters: Mapping[str, LoadedAdapter], weight_sets: Sequence[Mapping[str, float]], requests: Sequence[PictureRequest],
            rewrite: Rewrite | None, dtype: torch.dtype, device: torch.device, progress: Progress) -> tuple[list[PictureRequest], list[dict[str, Conditioning]]]:
    """The requests with the texts to draw with, and every text encoded for each set of strengths (the same for all sets
    unless an adapter trains text encoders); the encoders are gone from memory afterwards."""
    with progress.phase("encoding prompts", len(prompts_of(requests))) as advance:
        pipeline = base.family.load(base.folder, frozenset({"text"}), dtype)
        texts = {request.prompt: request.prompt for request in requests}
        if rewrite is not None:
            texts = {prompt: rewrite(prompt, lambda text: base.family.token_counts(pipeline, text)) for prompt in texts}
        rewritten = [replace(request, prompt=texts[request.prompt]) for request in requests]
        place_encoders(pipeline, device)  # not before: who rewrites may be a model that needs the room
        worn = [[(adapter.file, weights.get(name, 0.0)) for name, adapter in adapters.items()] for weights in weight_sets]
        encoded = _encoded(base, pipeline, prompts_of(rewritten), worn)
        advance(len(prompts_of(requests)))
    del pipeline
    clear_device_cache(garbage_collection=True)
    if _overflowed(encoded, dtype):
        encoded = encode_texts(base, prompts_of(rewritten), torch.float32, device, worn)
    return rewritten, encoded
