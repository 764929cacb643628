"""Frozen linear layers whose weight is kept in one format and multiplied in another.

The weight is expanded into one scratch buffer that all layers of a model share, for the time of one product. Autograd
keeps neither the expanded weight nor the input: a frozen layer's backward pass needs the weight alone, which is
expanded once more.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.products import input_gradient, product
from finetune.families.mapped_pages import release_pages


class Scratch:
    """Memory for one expanded weight, grown to the largest that was asked for."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor that is valid until the next `take`."""
        size = shape.numel()
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


class _Product(torch.autograd.Function):
    """x (..., in) -> (..., out) by a weight that `expand(dtype, device)` gives as (out, in). No gradient to weight and bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, expand: Callable[[torch.dtype, torch.device], Tensor]) -> Tensor:
        ctx.expand = expand
        return product(x, expand(x.dtype, x.device), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return input_gradient(gradient, ctx.expand(gradient.dtype, gradient.device)), None, None


def multiply(x: Tensor, bias: Tensor | None, expand: Callable[[torch.dtype, torch.device], Tensor]) -> Tensor:
    """x (..., in) -> (..., out) in autocast's format where it is on, else in that of x, by the weight that `expand(dtype, device)` gives."""
    device = x.device.type
    can_mix = torch.amp.is_autocast_available(device)  # the meta device cannot
    if can_mix and torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(device, enabled=False) if can_mix else nullcontext():
        return _Product.apply(x, bias, expand)


class HeldLinear(nn.Linear):
    """`nn.Linear` that takes its products in the dtype and on the device of its input, wherever its weight lies.

    The weight does not move with the model: it stays in the file or in host memory and is brought in when used. `computes_on` is
    where the model was moved to: what works beside the weight, such as an adapter, belongs there.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, scratch: Scratch, mapped: range = range(0)):
        """linear: what is replaced; its bias is taken over.  weight: (out, in), floating point, may be mapped from a file.
        mapped: addresses of the file whose pages are given back after each use; empty: they stay.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self._scratch, self._mapped, self.computes_on = scratch, mapped, weight.device

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldLinear:
        if self.bias is not None:
            self.bias = nn.Parameter(function(self.bias.data), requires_grad=False)
        self.computes_on = function(torch.empty(0, device=self.computes_on)).device
        return self

    def expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight (out, in) in this format and on this device; valid until the next layer's is asked for."""
        if self.weight.dtype == dtype and self.weight.device == device:
            return self.weight.data
        weight = self.weight.data
        if weight.dtype != dtype:
            # First there, then cast: a copy that does both casts on the CPU.
            weight = weight.to(device, non_blocking=True)
        expanded = self._scratch.take(self.weight.shape, dtype, device).copy_(weight, non_blocking=True)
        if self._mapped:
            # The system keeps the file's pages as long as it has room; they no longer count as this process's memory.
            release_pages(self.weight.data, self._mapped)
        return expanded

    def forward(self, x: Tensor) -> Tensor:
        return multiply(x, self.bias, self.expanded)
