"""Let a half-precision model be told float32 timesteps: bfloat16 keeps only every second to fourth of the high ones apart."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def _to_own_dtype(embedder: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    # The bias names the dtype: a 4-bit weight is uint8.
    dtype = embedder.linear_1.bias.dtype
    return tuple(value.to(dtype) if isinstance(value, Tensor) else value for value in arguments)


def accept_float32_timesteps(model: nn.Module) -> None:
    """Cast the sinusoids, not the timesteps: every `TimestepEmbedding` takes its input in its own dtype. Once a model."""
    from diffusers.models.embeddings import TimestepEmbedding

    for module in model.modules():
        if isinstance(module, TimestepEmbedding) and not getattr(module, "_takes_float32", False):
            module.register_forward_pre_hook(_to_own_dtype)
            module._takes_float32 = True
