"""Linear layers that read the same input, with their LoRA, as one product with a backward pass of its own.

Queries, keys and values are three layers on one input. Layer by layer, autograd makes and adds up nine skinny products and
scaled copies of every output and input gradient. Here the A factors are one matrix, scales are folded into the products,
and gradients of the input are summed where they are computed. Same function, same gradients to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


# peft's layers with an ordinary LoRA beside a linear one, by what holds the base's weight.
LAYERS = ("Linear", "Linear8bitLt", "Linear4bit")


class _Layer(NamedTuple):
    """weight(dtype, device) -> (out, in), bias: (out,) or None, both frozen.  a: (r, in), b: (out, r).  scale: of b a x."""

    weight: Callable[[torch.dtype, torch.device], Tensor]
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


class _SharedInput(torch.autograd.Function):
    """x (rows, in) -> one (rows, out) a layer. layers: of `_Layer` with the trained a, b given once more, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[_Layer], *trained: Tensor) -> tuple[Tensor, ...]:
        down = torch.cat([layer.a for layer in layers]) if len(layers) > 1 else layers[0].a
        low = x.mm(down.t())
        outputs = []
        for layer, part in zip(layers, low.split([len(layer.a) for layer in layers], dim=1), strict=True):
            weight = layer.weight(x.dtype, x.device).t()
            output = x.mm(weight) if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, weight)
            outputs.append(output.addmm_(part, layer.b.t(), alpha=layer.scale))
        ctx.save_for_backward(x, low, down, *(layer.b for layer in layers))
        ctx.ranks, ctx.layers = [len(layer.a) for layer in layers], [(layer.weight, layer.scale) for layer in layers]
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, low, down, *ups = ctx.saved_tensors
        low_gradient = torch.zeros_like(low) if any(gradient is None for gradient in gradients) else torch.empty_like(low)
        found, x_gradient = [], None
        parts = zip(gradients, ups, ctx.layers, low.split(ctx.ranks, dim=1), low_gradient.split(ctx.ranks, dim=1), strict=True)
        for gradient, up, (weight_in, scale), part, part_gradient in parts:
            if gradient is None:
                found.append(None)
                continue
            found.append(gradient.t().mm(part).mul_(scale))
            part_gradient.copy_(gradient.mm(up)).mul_(scale)
            if ctx.needs_input_grad[0]:
                weight = weight_in(x.dtype, x.device)
                x_gradient = gradient.mm(weight) if x_gradient is None else x_gradient.addmm_(gradient, weight)
        if x_gradient is not None:
            x_gradient.addmm_(low_gradient, down)
        downs = low_gradient.t().mm(x).split(ctx.ranks)
        pairs = [(None if up is None else down_gradient, up) for down_gradient, up in zip(downs, found, strict=True)]
        return (x_gradient, None, *(gradient for pair in pairs for gradient in pair))


def _plain_lora(layer: nn.Module, x: Tensor) -> _Layer | None:
    """The layer's parts when it is a frozen linear layer with exactly one ordinary LoRA, all computed in the format of `x`; else None.

    A base layer that keeps its weight in another format has a method `expanded` that gives it in the one asked for.
    """
    base = getattr(layer, "base_layer", None)
    is_plain = type(base) is nn.Linear and base.weight.dtype == x.dtype
    if not (is_plain or hasattr(base, "expanded")) or base.weight.requires_grad or layer.merged or layer.disable_adapters:
        return None
    names = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
    if type(layer).__name__ not in LAYERS or len(names) != 1 or layer.lora_variant:
        return None
    name = names[0]
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(dropout) is not nn.Identity or a.bias is not None or b.bias is not None or not a.weight.dtype == b.weight.dtype == x.dtype:
        return None
    return _Layer((lambda *_: base.weight) if is_plain else base.expanded, base.bias, a.weight, b.weight, float(layer.scaling[name]))


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers], as one product where all of them are frozen linear layers with one plain LoRA each.

    x: (..., in).  Anything else (no adapter, several, DoRA, dropout, quantised weights, autocast, another format) is left to the layers.
    """
    is_watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    is_mixed = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    parts = [] if is_watched or is_mixed else [_plain_lora(layer, x) for layer in layers]
    if not parts or any(part is None for part in parts):
        return [layer(x) for layer in layers]
    outputs = _SharedInput.apply(x.reshape(-1, x.shape[-1]), parts, *(factor for part in parts for factor in (part.a, part.b)))
    return [output.view(*x.shape[:-1], -1) for output in outputs]
