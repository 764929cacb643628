"""Masks: where in a picture its loss counts. Each is cut like its picture, brought down to the latent grid and cached.

A place of the grid counts by the darkest pixel that it covers. A latent is one answer for all its pixels: where a mask's edge
runs through it, any weight above zero teaches the whole of it, the masked part too, however small the weight is. Averaged
down, as in kohya's sd-scripts, a mask therefore lets a frame through that ends inside a place (measured in
tests/benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data_tools.progress import Progress
from finetune.errors import DataError
from finetune.training.encoding_cache import EncodingCache, key_of
from finetune.training.pixels import load_mask
from finetune.training.training_set import TrainingPicture


def mask_keys(pictures: Sequence[TrainingPicture], latents: Sequence[str]) -> list[str | None]:
    """The cache key of each picture's mask, None without one. latents: keys of the pictures' latents, which name the fit and
    the encoder, and so the grid."""
    return [key_of("mask of least weights", picture.mask_hash, key) if picture.mask_hash else None for picture, key in zip(pictures, latents, strict=True)]


def encode_masks(pictures: Sequence[TrainingPicture], keys: Sequence[str | None], latents: Sequence[str], unmasked_weight: float, cache: EncodingCache, progress: Progress) -> None:
    """Make sure that every mask is in the cache, as {"mask": (h, w) float32 in 0..1}. The latents must be there already.

    Raises DataError for a mask that leaves not one whole place of what its picture's crop shows.
    """
    missing = set(cache.missing(key for key in keys if key))
    todo = [(picture, key, latent) for picture, key, latent in zip(pictures, keys, latents, strict=True) if key in missing]
    if todo:
        with progress.phase("reading masks", len(todo)) as advance:
            for picture, key, latent in todo:
                pixels = torch.from_numpy(load_mask(picture.record.mask, picture.placement, picture.mask_hash)).float() / 255
                cache.put(key, {"mask": least_weights(pixels, cache.get(latent)["mean"].shape[-2:])})
                advance()
    for picture, key in zip(pictures, keys, strict=True):
        if key and not unmasked_weight and not cache.get(key)["mask"].any():
            bucket, (rows, columns) = picture.placement.bucket, cache.get(key)["mask"].shape
            raise DataError(f"the mask leaves nothing of what the crop shows of its picture: no place of {bucket.width // columns}x{bucket.height // rows} pixels, "
                            f"the least that a latent can tell apart, is free of black at {bucket}", where=str(picture.record.mask),
                            fix="widen or delete the mask, train at a larger data.resolution, or set data.unmasked_weight above 0")


def least_weights(mask: Tensor, grid: Sequence[int]) -> Tensor:
    """(H, W) in 0..1 -> (h, w) of `grid`: the least value among the pixels of each place."""
    return -torch.nn.functional.adaptive_max_pool2d(-mask[None], tuple(grid))[0]


def place_weights(mask: Tensor, unmasked_weight: float) -> Tensor:
    """(1, h, w) factors on the squared error at each latent position, 1 on average.

    The mask (h, w) in 0..1 is raised to `unmasked_weight` where it is below, and divided by its mean: a picture of which a
    tenth counts teaches as strongly as one that counts all over. This is OneTrainer's masked training with
    "normalize masked area loss" (modules/util/loss/masked_loss.py); kohya's sd-scripts (library/custom_train_functions.py,
    apply_masked_loss) leave out the division, so that small masks teach little there.
    """
    raised = mask.clamp(min=unmasked_weight)
    return (raised / raised.mean())[None]
