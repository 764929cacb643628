"""Latents as token sequences and back, and the position ids of image tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): each 2x2 patch becomes a token, channels outermost (Flux, Chroma, Qwen-Image)."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height and width are those of the latent."""
    patches = tokens.reshape(len(tokens), height // 2, width // 2, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def fold_patches(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 4 C, h/2, w/2) with channel c at place p of its patch as 4 c + p (Flux.2)."""
    return torch.nn.functional.pixel_unshuffle(latents, 2)


def flatten_grid(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return latents.flatten(2).transpose(1, 2)


def unflatten_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `flatten_grid`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def grid_ids(height: int, width: int, columns: int, device: Any) -> Tensor:
    """(height * width, columns) float32: column 1 the row, column 2 the column of a token, the others zero."""
    ids = torch.zeros(height, width, columns, device=device)
    ids[..., 1] = torch.arange(height, device=device)[:, None]
    ids[..., 2] = torch.arange(width, device=device)[None, :]
    return ids.view(height * width, columns)
