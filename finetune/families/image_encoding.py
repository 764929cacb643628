"""Latents of pictures as their transformers see them, for the kinds of autoencoder that families share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finetune.families.protocol import LatentDistribution


TILED_ABOVE = 1536 * 1536


@contextmanager
def tiled(vae: Any, height: int, width: int) -> Iterator[None]:
    """Within the block, pictures above `TILED_ABOVE` pixels are encoded and decoded in overlapping tiles.

    An autoencoder's memory grows with the picture and would exceed the transformer's; the seams are blended by the library.
    """
    wanted = height * width > TILED_ABOVE and hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
    if wanted:
        vae.enable_tiling()
    try:
        yield
    finally:
        if wanted:
            vae.disable_tiling()


def kl_latents(vae: Any, pixels: Tensor) -> LatentDistribution:
    """`AutoencoderKL`: (z - shift_factor) * scaling_factor, both from the autoencoder's own configuration."""
    with tiled(vae, *pixels.shape[-2:]):
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    shift, scale = getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    return LatentDistribution((posterior.mean.float() - shift) * scale, posterior.std.float() * scale)


def one_frame_latents(vae: Any, pixels: Tensor) -> LatentDistribution:
    """Video autoencoders with a scaling factor: the picture is one frame; encoded one at a time.

    `AutoencoderKLHunyuanVideo15` cannot encode two: its attention mask lacks the heads' dimension (diffusers 0.42.1).
    """
    scale = vae.config.scaling_factor
    with tiled(vae, *pixels.shape[-2:]):
        posteriors = [vae.encode(picture[None, :, None].to(vae.device, vae.dtype)).latent_dist for picture in pixels]
    mean = torch.cat([p.mean for p in posteriors]).squeeze(2).float()
    return LatentDistribution(mean * scale, torch.cat([p.std for p in posteriors]).squeeze(2).float() * scale)


def deterministic(latents: Tensor) -> LatentDistribution:
    """Of an encoder that has no distribution."""
    return LatentDistribution(latents, torch.zeros_like(latents))


def count_parameters(class_name: str, config: Mapping[str, Any]) -> int:
    """Parameters of a diffusers model with this configuration; nothing is allocated, and each is built once a process."""
    return _count_parameters(class_name, json.dumps(dict(config)))


@cache
def _count_parameters(class_name: str, config: str) -> int:
    import diffusers
    from accelerate import init_empty_weights

    # Buffers too: a table of positions can be larger than all that training needs.
    with init_empty_weights(include_buffers=True):
        model = getattr(diffusers, class_name).from_config(json.loads(config))
    return sum(parameter.numel() for parameter in model.parameters())
