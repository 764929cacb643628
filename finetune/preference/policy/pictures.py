"""Latents of a folder's pictures, for learning from comparisons: each picture once, at a size that the family takes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from data_tools.buckets import Bucket
from data_tools.images import fit_to_bucket, open_image
from data_tools.progress import Progress

from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.pairs import Pair
from finetune.preference.rewards.preference_head import pixels_of


def encode_pairs(loaded: LoadedBase, folder: CandidateFolder, pairs: Iterable[Pair], progress: Progress) -> tuple[list[Pair], dict[str, Tensor], list[tuple[str, str]]]:
    """(usable pairs, candidate id -> latents (C, h, w) on the CPU, (pair, reason) of those left out).

    A pair whose pictures have different shapes cannot be compared at the same noise and is left out.
    """
    pairs = list(pairs)
    items = sorted({item for pair in pairs for item in (pair.better, pair.worse)})
    latents: dict[str, Tensor] = {}
    with progress.phase("encoding pictures", len(items)) as advance:
        for item in items:
            image = open_image(folder.picture(item))
            height, width = trained_size(image.height, image.width, loaded)
            if (height, width) != (image.height, image.width):
                image = fit_to_bucket(image, Bucket(height, width), upscale=True)
            with torch.no_grad():
                latents[item] = loaded.encode_pictures(pixels_of([image]))[0].cpu()
            advance(1)
    usable, left_out = [], []
    for pair in pairs:
        if latents[pair.better].shape == latents[pair.worse].shape:
            usable.append(pair)
        else:
            left_out.append((f"{pair.better} and {pair.worse}", "the two pictures have different shapes"))
    return usable, latents, left_out


def trained_size(height: int, width: int, loaded: LoadedBase) -> tuple[int, int]:
    """The picture's own size, reduced to the family's usual area and rounded down to sizes that it takes."""
    facts = loaded.family.facts
    scale = min(1.0, facts.resolution / math.sqrt(height * width))
    return tuple(max(facts.size_multiple, int(edge * scale) // facts.size_multiple * facts.size_multiple) for edge in (height, width))
