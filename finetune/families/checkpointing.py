"""Gradient checkpointing of a chosen number of blocks, the same for every family.

The library's own switch is all or nothing, absent from some models and wrong in others (a mask is dropped in Chroma's
single blocks, diffusers 0.42.1); wrapping the block's own forward passes on whatever the block was called with.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def _recomputed(block: nn.Module, plain: Any, *args: Any, **kwargs: Any) -> Any:
    if not (torch.is_grad_enabled() and block.training):
        return plain(*args, **kwargs)
    # Non-reentrant: with LoRA the inputs of the first blocks carry no gradient, and the reentrant form would yield none.
    return checkpoint(plain, *args, use_reentrant=False, **kwargs)


def checkpoint_blocks(blocks: Iterable[nn.Module], count: int) -> int:
    """Recompute the first `count` blocks in the backward pass instead of keeping their activations; 0 undoes it.

    Gradients are the same bit for bit. Returns how many blocks are checkpointed now.
    """
    done = 0
    for block in blocks:
        if "_plain_forward" in vars(block):
            block.forward = block._plain_forward
            del block._plain_forward
            if getattr(block.forward, "__func__", None) is type(block).forward:
                del block.forward
        if done >= count:
            continue
        block._plain_forward = block.forward
        block.forward = partial(_recomputed, block, block._plain_forward)
        done += 1
    return done
