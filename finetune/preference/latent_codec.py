"""Pixels to latents and back with gradients, for any VAE whose configuration says how its latents are normalised.

`ModelFamily.encode_images` works without gradients and there is no decoding in the protocol: sampling goes through the
pipeline. Direct reward gradients and rewards on latents need both ways as plain functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finetune.errors import BaseModelError


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """(shift, scale) such that the model's latent = (raw - shift) * scale."""
    config = vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scaling = config.get("scaling_factor")
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (like.ndim - 2))
        shift = torch.tensor(mean, device=like.device, dtype=torch.float32).view(shape)
        scale = 1 / torch.tensor(std, device=like.device, dtype=torch.float32).view(shape)
        return shift, scale * (scaling or 1.0)
    if scaling is None:
        raise BaseModelError(f"the VAE {type(vae).__name__} does not say how its latents are scaled", where="vae/config.json", fix="use --method dpo, which needs no decoding")
    return torch.tensor(float(config.get("shift_factor") or 0.0), device=like.device), torch.tensor(float(scaling), device=like.device)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """pixels (B, 3, H, W) in [0, 1] -> the most likely latents (B, C, h, w) float32, as the transformer sees them."""
    video = _is_video(vae)
    picture = (pixels * 2 - 1).to(vae.dtype)
    output = vae.encode(picture.unsqueeze(2) if video else picture)
    raw = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
    raw = (raw.squeeze(2) if video else raw).float()
    shift, scale = _statistics(vae, raw)
    return (raw - shift) * scale


def decode(vae: Any, latents: Tensor) -> Tensor:
    """latents (B, C, h, w) -> pixels (B, 3, H, W) float32; [0, 1] where the picture is valid, not clamped."""
    shift, scale = _statistics(vae, latents)
    raw = (latents.float() / scale + shift).to(vae.dtype)
    pixels = vae.decode(raw.unsqueeze(2) if _is_video(vae) else raw).sample
    return ((pixels.squeeze(2) if _is_video(vae) else pixels).float() + 1) / 2


def _is_video(vae: Any) -> bool:
    """VAEs of video models take a time axis, of length one for a picture."""
    return any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
