"""Frozen linear layers whose weight is kept in one format and multiplied in another.

The weight is expanded into one scratch buffer that all layers of a model share, for the time of one product. Autograd
keeps neither the expanded weight nor the input: a frozen layer's backward pass needs the weight alone, which is
expanded once more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
        return F.linear(x, expand(x.dtype, x.device), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return gradient.matmul(ctx.expand(gradient.dtype, gradient.device)), None, None


def _multiply(x: Tensor, bias: Tensor | None, expand: Callable[[torch.dtype, torch.device], Tensor]) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    bias = None if bias is None else bias.to(x.dtype)
    with torch.autocast(device, enabled=False):
        return _Product.apply(x, bias, expand)


class HeldLinear(nn.Linear):
    """`nn.Linear` that takes its products in the dtype and on the device of its input, wherever its weight lies.

    The weight does not move with the model: it stays in the file or in host memory and is brought in when used.
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, scratch: Scratch, mapped: range = range(0)):
        """linear: what is replaced; its bias is taken over.  weight: (out, in), floating point, may be mapped from a file.
        mapped: addresses of the file whose pages are given back after each use; empty: they stay.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", linear.bias)
        self._scratch, self._mapped = scratch, mapped

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> HeldLinear:
        if self.bias is not None:
            self.bias = nn.Parameter(function(self.bias.data), requires_grad=False)
        return self

    def expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight (out, in) in this format and on this device; valid until the next layer's is asked for."""
        if self.weight.dtype == dtype and self.weight.device == device:
            return self.weight.data
        expanded = self._scratch.take(self.weight.shape, dtype, device).copy_(self.weight.data, non_blocking=True)
        if self._mapped:
            # The system keeps the file's pages as long as it has room; they no longer count as this process's memory.
            release_pages(self.weight.data, self._mapped)
        return expanded

    def forward(self, x: Tensor) -> Tensor:
        return _multiply(x, self.bias, self.expanded)


class Int8Linear(bitsandbytes.nn.Linear8bitLt):
    """bitsandbytes' 8-bit layer, with a product of our own on a CPU.

    There the library's training product keeps every input outside of autograd's sight, so that checkpointing frees
    nothing, and its evaluation product rounds the input to 8 bits as well (bitsandbytes 0.50.2).
    """

    def __init__(self, linear: nn.Linear, weight: Tensor, scales: Tensor, scratch: Scratch):
        """weight: (out, in) int8.  scales: (out,) float32, the largest absolute value of each row."""
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False, device="meta")
        self.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scales)
        self.bias = linear.bias
        self._scratch = scratch

    def _expanded(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        weight = self._scratch.take(self.weight.shape, dtype, device).copy_(self.weight.data)
        return weight.mul_((scales / 127).to(dtype).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda":
            return super().forward(x)
        return _multiply(x, self.bias, self._expanded)


def nf4_linear(linear: nn.Linear, weight: Tensor, statistics: dict[str, Tensor], compute: torch.dtype, device: torch.device) -> nn.Linear:
    """bitsandbytes' 4-bit layer from a weight that was quantised before.

    weight: packed uint8.  statistics: what goes with it, under the names of bitsandbytes' own state dict.
    """
    layer = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=compute,
                                       quant_type="nf4", device="meta")
    layer.weight = bitsandbytes.nn.Params4bit.from_prequantized(weight, dict(statistics), device=device, module=layer)
    layer.bias = linear.bias
    # In evaluation the library would repack the weight in place for bf16 CPUs; the base must stay what it is.
    layer.support_avx512bf16_for_cpu = False
    return layer
