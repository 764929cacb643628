"""Root mean square norms as training runs them: the library's function, with a backward pass of its own.

Autograd keeps the input once more in float32 where the model computes in 16 bits, and walks over it nine times on the way
back. Here the input as it came and one number a row are kept, and it is walked over five times. Put on one model when it is
prepared for training.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class _RootMeanSquare(torch.autograd.Function):
    """x (..., d) -> x / sqrt(mean(x^2) + eps) * weight, as `RMSNorm.forward` of diffusers rounds it. weight: (d,), frozen, or None.

    B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization" (2019).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, weight)
        normed = x * inverse
        if weight is None:
            return normed.to(x.dtype)
        if weight.dtype in (torch.float16, torch.bfloat16):
            normed = normed.to(weight.dtype)
        return normed.mul_(weight) if normed.dtype == weight.dtype else normed * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, weight = ctx.saved_tensors
        weighted = (gradient if weight is None else gradient * weight).float()
        along = torch.linalg.vecdot(weighted, x.float()).unsqueeze(-1)
        # d(x r)/dx = r - x x^T r^3 / d, with r = 1 / sqrt(mean(x^2) + eps)
        return torch.addcmul(weighted * inverse, x, along.mul_(inverse.pow(3)).div_(-x.shape[-1])).to(x.dtype), None, None


def _forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """`RMSNorm.forward` of diffusers."""
    return _RootMeanSquare.apply(hidden_states, self.weight, self.eps)


def install(model: nn.Module) -> None:
    """Put it in the place of every `RMSNorm` of diffusers in the model whose weight is frozen. The class stays what it is."""
    from diffusers.models.normalization import RMSNorm

    for module in model.modules():
        if type(module) is RMSNorm and module.bias is None and (module.weight is None or not module.weight.requires_grad):
            module.forward = MethodType(_forward, module)
