"""In which format an autoencoder computes. Beyond 65504 a number of fp16 is infinite and the picture black, which on cards without
bf16 is the format of everything else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def format_for(dtype: torch.dtype, config: Mapping[str, Any]) -> torch.dtype:
    """`dtype`, or float32 in place of fp16, unless the autoencoder's configuration says that fp16 is enough for it."""
    return torch.float32 if dtype == torch.float16 and config.get("force_upcast", True) else dtype


def compute_in(vae: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The autoencoder itself, computing in the format for `dtype`. Where that is another, it takes what pipelines hand to it in theirs."""
    own = format_for(dtype, vae.config)
    if vae.dtype != own:
        vae.to(own)
    if own != dtype:
        vae.decode = MethodType(_decode, vae)
    return vae


def _decode(self: nn.Module, latents: Tensor, *arguments: Any, **named: Any) -> Any:
    """The class's own `decode`, of latents in any format."""
    return type(self).decode(self, latents.to(self.dtype), *arguments, **named)
