"""Gated feed-forward layers as training runs them: the library's function, and only what the way back needs is kept.

Autograd keeps the gate, its SiLU and the gated values; the SiLU is made again from the gate here, a third of what a gated layer
keeps. Of a frozen convolution it keeps the input, which only the gradient of its weight would ask for. Put on one model when
it is prepared for training.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.adapters.shared_input import autocast_format, project


class _GatedSilu(torch.autograd.Function):
    """gate, value (..., d) of one format -> silu(gate) * value. N. Shazeer, "GLU Variants Improve Transformer" (2020): SwiGLU without its products."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * value, gate)
        return of_gate, F.silu(gate).mul_(gradient)


class _HalvesGated(torch.autograd.Function):
    """x (..., 2 d), gates before values -> silu(gates) * values (..., d)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        found = torch.empty_like(x)
        of_gate, of_value = found.chunk(2, dim=-1)
        of_gate.copy_(torch.ops.aten.silu_backward(gradient * value, gate))
        torch.mul(F.silu(gate), gradient, out=of_value)
        return found


class _FrozenConvolution(torch.autograd.Function):
    """x (B, in, H, W) -> F.conv2d of it. weight, bias: frozen.  settings: stride, padding, dilation and groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, Any, Any, int]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings, ctx.layout = settings, (x.shape, x.stride())
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # The operator asks for an input, of which it takes the shape, and by whose layout it chooses its way.
        shaped = gradient.new_empty_strided(*ctx.layout)
        found = torch.ops.aten.convolution_backward(gradient, shaped, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        return found[0], None, None, None


def gated(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, of the same shape (..., d)."""
    return _GatedSilu.apply(gate, value) if gate.dtype == value.dtype else F.silu(gate) * value


def convolved(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """layer(x), of a plain frozen layer without what nobody asks for afterwards; of any other as it is."""
    if type(layer) is not nn.Conv2d or layer.weight.requires_grad or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return layer(x)
    weight, bias = layer.weight, layer.bias
    if (dtype := autocast_format(x)) is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _FrozenConvolution.apply(x, weight, bias, (layer.stride, layer.padding, layer.dilation, layer.groups))


def install(model: nn.Module, library_class: str, gate: str, value: str, out: str) -> None:
    """Make every module of the library class out(silu(gate(x)) * value(x)), with these names of its linear layers, as it is already."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return project(gated(*project(x, getattr(self, gate), getattr(self, value))), getattr(self, out))[0]

    _put(model, library_class, forward)


def install_on_halves(model: nn.Module, library_class: str) -> None:
    """Make every module of the library class silu(first half) * second half, as it is already."""
    _put(model, library_class, lambda self, x: _HalvesGated.apply(x))


def install_on_convolutions(model: nn.Module) -> None:
    """Put it in the place of every `GLUMBConv` of Sana."""
    _put(model, "GLUMBConv", _inverted_bottleneck)


def _inverted_bottleneck(self: nn.Module, hidden_states: Tensor) -> Tensor:
    """`GLUMBConv.forward` of diffusers. hidden_states: (B, d, H, W)."""
    value, gate = convolved(self.conv_depth, self.nonlinearity(convolved(self.conv_inverted, hidden_states))).chunk(2, dim=1)
    found = convolved(self.conv_point, gated(gate, value))
    if self.norm_type == "rms_norm":
        found = self.norm(found.movedim(1, -1)).movedim(-1, 1)
    return found + hidden_states if self.residual_connection else found


def _put(model: nn.Module, library_class: str, forward: Callable[..., Tensor]) -> None:
    for module in model.modules():
        if type(module).__name__ == library_class:
            module.forward = MethodType(forward, module)
