"""Linear layers that read the same input, with their LoRA, as one product with a backward pass of its own.

Queries, keys and values are three layers on one input. Layer by layer, autograd makes and adds up nine skinny products and
scaled copies of every output and input gradient. Here the A factors are one matrix, scales are folded into the products,
and gradients of the input are summed where they are computed. Same function, same gradients to rounding.

Under autocast peft casts the input of each layer to the factors' float32, and autocast casts it back, for each layer once
more. Here it is cast once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finetune.adapters.products import input_gradient, product

# peft's layers with an ordinary LoRA beside a linear one, by what holds the base's weight.
LAYERS = ("Linear", "Linear8bitLt", "Linear4bit")
# What autocast casts; it leaves float64 as it is.
CAST = (torch.float32, torch.bfloat16, torch.float16)


class _Layer(NamedTuple):
    """weight(dtype, device) -> (out, in), bias: (out,) or None, both frozen.  a: (r, in), b: (out, r).  scale: of b a x.

    a, b and bias may be in other formats than the input, in whose format all products are taken.
    """

    weight: Callable[[torch.dtype, torch.device], Tensor]
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float


class _SharedInput(torch.autograd.Function):
    """x (rows, in) -> one (rows, out) a layer. layers: of `_Layer` with the trained a, b given once more, for autograd to see."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Sequence[_Layer], *trained: Tensor) -> tuple[Tensor, ...]:
        down = (torch.cat([layer.a for layer in layers]) if len(layers) > 1 else layers[0].a).to(x.dtype)
        low, ups = x.mm(down.t()), [layer.b.to(x.dtype) for layer in layers]
        outputs = []
        for layer, part, up in zip(layers, low.split([len(layer.a) for layer in layers], dim=1), ups, strict=True):
            output = product(x, layer.weight(x.dtype, x.device), None if layer.bias is None else layer.bias.to(x.dtype))
            outputs.append(output.addmm_(part, up.t(), alpha=layer.scale))
        ctx.save_for_backward(x, low, down, *ups)
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
            # Scaled in the product: what is rounded to 16 bits first can be infinite.
            found.append(torch.empty_like(up).addmm_(gradient.t(), part, beta=0, alpha=scale))
            part_gradient.addmm_(gradient, up, beta=0, alpha=scale)
            if ctx.needs_input_grad[0]:
                x_gradient = input_gradient(gradient, weight_in(x.dtype, x.device), onto=x_gradient)
        if x_gradient is not None:
            x_gradient.addmm_(low_gradient, down)
        downs = low_gradient.t().mm(x).split(ctx.ranks)
        pairs = [(None if up is None else down_gradient, up) for down_gradient, up in zip(downs, found, strict=True)]
        return (x_gradient, None, *(gradient for pair in pairs for gradient in pair))


def autocast_format(x: Tensor) -> torch.dtype | None:
    """In which autocast takes products with `x`; None where it does nothing to them."""
    is_mixed = not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype in CAST
    return torch.get_autocast_dtype(x.device.type) if is_mixed else None


def _plain_lora(layer: nn.Module, formats: Collection[torch.dtype]) -> _Layer | None:
    """The layer's parts when it is a frozen linear layer with exactly one ordinary LoRA, all in one of `formats`; else None.

    A base layer that keeps its weight in another format has a method `expanded` that gives it in the one asked for.
    """
    base = getattr(layer, "base_layer", None)
    is_plain = type(base) is nn.Linear and base.weight.dtype in formats
    if not (is_plain or hasattr(base, "expanded")) or base.weight.requires_grad or layer.merged or layer.disable_adapters:
        return None
    names = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
    if type(layer).__name__ not in LAYERS or len(names) != 1 or layer.lora_variant:
        return None
    name = names[0]
    a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(dropout) is not nn.Identity or a.bias is not None or b.bias is not None or a.weight.dtype not in formats or b.weight.dtype not in formats:
        return None
    # A weight that has to be cast is cast again for the backward pass: kept, the casts would be a second base.
    weight = (lambda dtype, _: base.weight.to(dtype)) if is_plain else base.expanded
    return _Layer(weight, base.bias, a.weight, b.weight, float(layer.scaling[name]))


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """[layer(x) for layer in layers], as one product where all of them are frozen linear layers with one plain LoRA each.

    x: (..., in).  Anything else (no adapter, several, DoRA, dropout, another format that autocast does not cast) is left to the layers.
    """
    mixed = autocast_format(x)
    is_watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)
    parts = [] if is_watched else [_plain_lora(layer, (x.dtype,) if mixed is None else CAST) for layer in layers]
    if not parts or any(part is None for part in parts):
        return [layer(x) for layer in layers]
    outputs = _SharedInput.apply(x.reshape(-1, x.shape[-1]).to(mixed or x.dtype), parts, *(factor for part in parts for factor in (part.a, part.b)))
    return [output.view(*x.shape[:-1], -1) for output in outputs]
