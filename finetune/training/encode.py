"""Encode every picture and caption once, with only the encoder that is needed in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache

from data_tools.progress import Progress
from finetune.errors import TrainingError
from finetune.families.protocol import Conditioning, LatentDistribution
from finetune.families.text_encoding import is_finite
from finetune.offload import place_encoders
from finetune.training.encoding_cache import EncodingCache, component_fingerprint, key_of
from finetune.training.encoding_claims import Claims
from finetune.training.masks import encode_masks, mask_keys
from finetune.training.pixels import load_pixels
from finetune.training.training_set import TrainingPicture, TrainingSet

if TYPE_CHECKING:
    import numpy as np

    from finetune.families.base_models import BaseModel
    from finetune.recipe_settings import DataSettings

PROMPTS_AT_ONCE = 16
# Below this many pictures a pool of processes takes longer to start than it saves.
PICTURES_WORTH_A_POOL = 64
MOST_WORKERS = 8
# Pictures that each worker may be ahead of the encoder: memory for them is bounded, and so is what a process claims at a time.
READ_AHEAD = 4


def latent_keys(base: BaseModel, pictures: Sequence[TrainingPicture], background: str, cache: EncodingCache) -> list[str]:
    """The cache key of each picture's latents."""
    encoder = component_fingerprint([base.folder / "vae"], cache.folder)
    return [key_of("latents", base.family.facts.name, encoder, picture.record.content_hash, background, asdict(picture.placement)) for picture in pictures]


def text_keys(base: BaseModel, prompts: Iterable[str], cache: EncodingCache) -> dict[str, str]:
    """The cache key of each prompt's Conditioning."""
    index = json.loads((base.folder / "model_index.json").read_text(encoding="utf-8"))
    folders = [base.folder / name for name in sorted(index) if name.startswith(("text_encoder", "tokenizer")) and (base.folder / name).is_dir()]
    encoder = component_fingerprint(folders, cache.folder)
    return {prompt: key_of("text", base.family.facts.name, encoder, prompt) for prompt in prompts}


def is_encoded(base: BaseModel, training_set: TrainingSet, extra_prompts: Iterable[str], data: DataSettings, cache: EncodingCache) -> bool:
    """Whether the cache has an entry for all that `encode_everything` would ask for. The entries are not read, nor the base's text
    encoders where a picture is missing."""
    if not cache.folder.is_dir():
        return False
    latents = latent_keys(base, training_set.pictures, data.background, cache)
    if not all(cache.path(key).is_file() for key in latents):
        return False
    texts = text_keys(base, [*training_set.captions.every_caption(), *extra_prompts], cache)
    return all(cache.path(key).is_file() for key in texts.values())


class Encodings:
    """What was encoded, by picture number and by caption. Reads from the cache; nothing is computed here."""

    def __init__(self, cache: EncodingCache, latents: Sequence[str], texts: dict[str, str], masks: Sequence[str | None]):
        self.cache, self._latents, self._texts, self._masks = cache, latents, texts, masks

    def _entry(self, key: str) -> dict[str, torch.Tensor]:
        entry = self.cache.get(key)
        if entry is None:
            raise TrainingError("an encoding vanished or was damaged during the run", where=str(self.cache.path(key)), fix="resume the run: it is made again")
        return entry

    def latents(self, picture: int) -> LatentDistribution:
        """(C, h, w) mean and std of one picture."""
        entry = self._entry(self._latents[picture])
        return LatentDistribution(entry["mean"], entry["std"])

    def mask(self, picture: int) -> torch.Tensor | None:
        """(h, w) in 0..1: where the loss of one picture counts; None where it counts everywhere."""
        key = self._masks[picture]
        return self._entry(key)["mask"] if key else None

    def conditioning(self, prompt: str) -> Conditioning:
        return Conditioning(self._entry(self._texts[prompt]))


def worker_count(setting: str | int, pictures: int) -> int:
    """Processes that read pictures; 0 reads in this one."""
    if setting != "auto":
        return int(setting)
    return min(MOST_WORKERS, (os.cpu_count() or 1) - 1) if pictures >= PICTURES_WORTH_A_POOL else 0


def _pixels(claimed: Iterable[tuple[str, TrainingPicture]], background: str, workers: int) -> Iterator[tuple[str, TrainingPicture, np.ndarray]]:
    """Each key and picture with its uint8 (H, W, 3) array, in order. Workers load no torch, so starting them is cheap."""
    if workers == 0:
        yield from ((key, picture, load_pixels(picture.record.path, picture.placement, background, picture.record.content_hash)) for key, picture in claimed)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: deque = deque()
        for key, picture in claimed:
            ahead.append((key, picture, pool.submit(load_pixels, picture.record.path, picture.placement, background, picture.record.content_hash)))
            if len(ahead) > READ_AHEAD * workers:
                *first, pending = ahead.popleft()
                yield *first, pending.result()
        yield from ((key, picture, pending.result()) for key, picture, pending in ahead)


def _encode_pictures(base: BaseModel, pictures: dict[str, TrainingPicture], background: str, cache: EncodingCache,
                     device: torch.device, workers: int, progress: Progress) -> None:
    """Make the entries of `pictures`, by key, together with whatever other processes are at it."""
    waiting, pipeline = list(pictures), None
    with progress.phase("encoding pictures", len(pictures)) as advance, Claims(cache) as claims, torch.no_grad():
        while waiting:
            claimed = ((key, pictures[key]) for key in claims.unmade(waiting))
            with closing(_pixels(claimed, background, workers)) as stream:
                # One at a time, so that an entry does not depend on which pictures it was encoded with.
                for key, picture, array in stream:
                    if pipeline is None:
                        # fp32: some encoders overflow in half precision, and this is done once.
                        pipeline = base.family.load(base.folder, frozenset({"vae"}), torch.float32)
                        pipeline.vae.to(device)
                    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].to(device, torch.float32) / 127.5 - 1
                    encoded = base.family.encode_images(pipeline, pixels)
                    if not (encoded.mean.isfinite().all() and encoded.std.isfinite().all()):
                        raise TrainingError("the encoder gave numbers that are not finite", where=str(picture.record.path), fix="check the picture, or leave it out")
                    cache.put(key, {"mean": encoded.mean[0].float(), "std": encoded.std[0].float()})
                    claims.made(key)
                    advance()
            waiting = _left_to_others(cache, claims, waiting)


def _left_to_others(cache: EncodingCache, claims: Claims, keys: Iterable[str]) -> list[str]:
    """Keys that other processes had claimed and have not made yet, once the first of them is made or its process is dead."""
    waiting = cache.missing(keys)
    if waiting:
        claims.wait(waiting[0])
    return waiting


def encode_prompts(base: BaseModel, prompts: Iterable[str], cache: EncodingCache, device: torch.device, dtype: torch.dtype, progress: Progress) -> dict[str, str]:
    """Make sure that every prompt is in the cache; returns its key by prompt."""
    keys = text_keys(base, dict.fromkeys(prompts), cache)
    waiting = cache.missing(keys.values())
    if not waiting:
        return keys
    prompt_of, encoders = {key: prompt for prompt, key in keys.items()}, _TextEncoders(base, device, dtype, progress)
    with progress.phase("encoding captions", len(waiting)) as advance, Claims(cache) as claims, torch.no_grad():
        while waiting:
            unmade = claims.unmade(waiting)
            while some := list(islice(unmade, PROMPTS_AT_ONCE)):
                encoded = encoders.encode([prompt_of[key] for key in some])
                for key, conditioning in zip(some, encoded, strict=True):
                    cache.put(key, dict(conditioning.tensors))
                    claims.made(key)
                advance(len(some))
            waiting = _left_to_others(cache, claims, waiting)
    return keys


class _TextEncoders:
    """The base's text encoders, loaded when something is to be encoded."""

    def __init__(self, base: BaseModel, device: torch.device, dtype: torch.dtype, progress: Progress):
        self.base, self.device, self.dtype, self.progress = base, device, dtype, progress
        self._pipeline: Any = None

    def encode(self, prompts: Sequence[str]) -> list[Conditioning]:
        """One Conditioning a prompt. Where fp16 is too small for what the encoders compute, from here on in float32.
        Raises TrainingError for a prompt that gives numbers that are not finite all the same."""
        encoded = self._encoded(prompts)
        bad = [prompt for prompt, conditioning in zip(prompts, encoded, strict=True) if not is_finite(conditioning)]
        if bad and self.dtype == torch.float16:
            self.progress.say("the text encoders overflow in fp16: they go on in float32, which takes twice the memory")
            self.dtype, self._pipeline = torch.float32, None
            clear_device_cache(garbage_collection=True)
            return self.encode(prompts)
        if bad:
            raise TrainingError(f"the text encoders gave numbers that are not finite for the caption {bad[0]!r}", where=str(self.base.folder), fix="check the base's text encoders, or set base.dtype = fp32")
        return encoded

    def _encoded(self, prompts: Sequence[str]) -> list[Conditioning]:
        if self._pipeline is None:
            self._pipeline = self.base.family.load(self.base.folder, frozenset({"text"}), self.dtype)
            if waiting_bytes := place_encoders(self._pipeline, self.device):
                self.progress.say(f"{waiting_bytes / 2**30:.1f} GiB of the text encoders do not fit the free memory of the GPU: their weights come one by one, which takes longer")
        return self.base.family.encode_prompts(self._pipeline, prompts)


def encode_everything(base: BaseModel, training_set: TrainingSet, extra_prompts: Iterable[str], data: DataSettings, cache: EncodingCache,
                      device: torch.device, dtype: torch.dtype, workers: str | int, progress: Progress) -> Encodings:
    """Fill the cache with all pictures and their masks, all captions any step can ask for, and `extra_prompts`.

    Each encoder is loaded only when something is missing, and is gone again when this returns. Several processes, of one
    run or of many, share the work: none makes what another has made or is making.
    """
    keys = latent_keys(base, training_set.pictures, data.background, cache)
    missing = set(cache.missing(keys))
    todo = {key: picture for picture, key in zip(training_set.pictures, keys, strict=True) if key in missing}
    if todo:
        _encode_pictures(base, todo, data.background, cache, device, worker_count(workers, len(todo)), progress)
    masks = mask_keys(training_set.pictures, keys)
    encode_masks(training_set.pictures, masks, keys, data.unmasked_weight, cache, progress)
    texts = encode_prompts(base, [*training_set.captions.every_caption(), *extra_prompts], cache, device, dtype, progress)
    if not todo and not cache.made:
        progress.say(f"{len(keys)} pictures and {len(texts)} captions were encoded before")
    return Encodings(cache, keys, texts, masks)
