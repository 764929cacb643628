"""Text states as families share them: put cached rows back into a batch, count tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finetune.families.protocol import Conditioning

# The layers of CLIP's text encoder that take LoRA, in transformers of today and of old.
CLIP_ATTENTION = r"(text_model\.)?encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj"


def stack(conditionings: Sequence[Conditioning], key: str, device: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Tensors of equal shape as one batch; integers and masks keep their dtype when `dtype` is None. They may come from different
    devices: a caption with trained tokens lies where those are trained, a dropped one beside it where the cache left it."""
    return torch.stack([c.tensors[key].to(device=device, dtype=dtype) for c in conditionings])


def stack_padded(conditionings: Sequence[Conditioning], key: str, device: Any, dtype: torch.dtype,
                 length: int | None = None) -> tuple[Tensor, Tensor]:
    """(L_i, D) rows as (B, L, D) with zeros on the right, and the bool mask (B, L). L is the longest, or `length`."""
    rows = [c.tensors[key] for c in conditionings]
    length = max(len(row) for row in rows) if length is None else length
    states = torch.zeros(len(rows), length, *rows[0].shape[1:], device=device, dtype=dtype)
    mask = torch.zeros(len(rows), length, dtype=torch.bool, device=device)
    for index, row in enumerate(rows):
        states[index, : len(row)] = row.to(device=device, dtype=dtype)
        mask[index, : len(row)] = True
    return states, mask


def is_finite(conditioning: Conditioning) -> bool:
    """Whether every number is one. Text encoders that were made in bf16 may overflow in fp16."""
    return all(bool(tensor.isfinite().all()) for tensor in conditioning.tensors.values() if tensor.is_floating_point())


def keep(tensor: Tensor) -> Tensor:
    """A tensor as it is cached: detached, on the CPU, with memory of its own."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def count_tokens(tokenizer: Any, text: str, limit: int) -> tuple[int, int]:
    """(tokens of this text with special ones and without truncation, limit)."""
    return len(tokenizer(text, truncation=False).input_ids), limit
