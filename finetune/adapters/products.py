"""Products with frozen weights, by the faster of the two libraries that torch brings for a CPU.

torch takes products in float32 with MKL, which has AVX-512 for Intel's processors and AVX2 for all others; oneDNN has it for
whatever processor does. Of AMD's with AVX-512, oneDNN needs 0.8 to 0.95 of the time (tests/benchmarks/README.md); with AVX2 alone MKL
is the faster. The choice depends on the processor and on shapes, never on a measurement, so that a resumed run takes the same.
"""

from __future__ import annotations

from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.processor import is_intel

# Below either, what a call of oneDNN costs is more than what it gains.
LEAST_ROWS, LEAST_NUMBERS = 64, 512 * 512


@cache
def onednn_is_faster() -> bool:
    """Of products in float32 on this machine's CPU."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not is_intel()


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """x (..., in), weight (out, in). What lies turned in memory MKL multiplies as it lies; oneDNN would be given a copy."""
    is_large = weight.numel() >= LEAST_NUMBERS and x.numel() >= LEAST_ROWS * x.shape[-1]
    return is_large and x.is_contiguous() and x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and onednn_is_faster()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) by weight (out, in), plus bias (out,): (..., out). Gives no gradient to any of them."""
    if _by_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def input_gradient(gradient: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    """gradient (..., out) of a product with weight (out, in) -> the gradient (..., in) of what was multiplied.

    onto: (rows, in) of a gradient (rows, out), to which it is added in place.
    """
    if _by_onednn(gradient, weight):
        found = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
        return found if onto is None else onto.add_(found)
    return gradient.matmul(weight) if onto is None else onto.addmm_(gradient, weight)


class _Frozen(torch.autograd.Function):
    """x (..., in) -> (..., out) by a weight and a bias that are not trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return input_gradient(gradient, weight) if ctx.needs_input_grad[0] else None, None, None


def _frozen_forward(self: nn.Linear, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu") or not _by_onednn(x, self.weight) or self.weight.requires_grad:
        return F.linear(x, self.weight, self.bias)
    return _Frozen.apply(x, self.weight, self.bias)


def take_faster_products(model: nn.Module) -> None:
    """Let the frozen linear layers of `model` take the faster library, where there is one. For a model in training."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.forward = MethodType(_frozen_forward, module)
