"""Attach adapters to a model with weights, several at once; take them off again without a trace; bake them in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_file import MAGNITUDE_SUFFIX, AdapterFile, peft_settings
from finetune.adapters.lora import adapter_names, inject, lora_layers, remove, weight_shapes
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

QUANTISED_LAYERS = ("Linear4bit", "Linear8bitLt", "LinearNF4", "LinearFP4")


def check_fit(adapter: AdapterFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every module of `adapter` is a layer of the model, of the right width. Raises AdapterError naming what is not.

    shapes: from `lora.weight_shapes`, or read off a base model's files.
    """
    unknown = [module for module in adapter.modules if module not in shapes]
    if unknown:
        raise AdapterError(
            f"{len(unknown)} of {len(adapter.modules)} modules are not layers of this model: {', '.join(unknown[:5])}",
            fix="the adapter was made for another model, or for another size of it",
        )
    for module in adapter.modules:
        a, b = adapter.pair(module)
        shape = shapes[module]
        if len(shape) == 4 and len(shape) != a.ndim and shape[2:] == (1, 1):
            shape = shape[:2]
        found = (b.shape[0], *a.shape[1:])
        if found != shape:
            raise AdapterError(f"{module}: the adapter was made for a layer {_shown(found)}, the model's is {_shown(shape)}",
                               fix="the adapter was made for another model, or for another size of it")


def _shown(shape: tuple[int, ...]) -> str:
    kernel = f" {shape[2]}x{shape[3]}" if len(shape) == 4 else ""
    return f"{shape[1]}->{shape[0]}{kernel}"


def attach(model: nn.Module, adapter: AdapterFile, name: str, weight: float = 1.0) -> int:
    """Add `adapter` to `model` under `name` at strength `weight`, beside those already there; return its module count.

    On any error the model is left as it was: AdapterError when the adapter does not fit, the name is taken or the weight
    is not finite. Nothing of the base is written, whatever the file contains.
    """
    import torch

    _check_weight(weight)
    check_fit(adapter, weight_shapes(model))
    present = weights(model)
    inject(model, peft_settings(adapter.tensors), name, trainable=False)
    try:
        placed = 0
        with torch.no_grad():
            for module, layer in lora_layers(model):
                if name not in layer.lora_A:
                    continue
                a, b = adapter.pair(module)
                layer.lora_A[name].weight.copy_(a.reshape(layer.lora_A[name].weight.shape))
                layer.lora_B[name].weight.copy_(b.reshape(layer.lora_B[name].weight.shape))
                if adapter.uses_dora:
                    layer.lora_magnitude_vector[name].weight.copy_(adapter.tensors[module + MAGNITUDE_SUFFIX])
                placed += 1
        if placed != len(adapter.modules):
            raise AdapterError(f"only {placed} of {len(adapter.modules)} modules could be placed")
        set_weights(model, {**present, name: weight})
    except BaseException:
        detach(model, name)
        if present:
            set_weights(model, present)
        raise
    return placed


def _check_weight(weight: float) -> None:
    if not math.isfinite(weight) or abs(weight) > 1000:
        raise AdapterError(f"a weight of {weight}", fix="weights are finite and usually between -2 and 2")


def weights(model: nn.Module) -> dict[str, float]:
    """Adapter name -> weight as set; {} for a model without adapters."""
    found: dict[str, float] = {}
    for _, layer in lora_layers(model):
        for name in layer.lora_A:
            unit = layer.lora_alpha[name] / layer.r[name]
            found.setdefault(name, layer.scaling[name] / unit if name in layer.active_adapters else 0.0)
    return {name: found[name] for name in adapter_names(model) if name in found}


def set_weights(model: nn.Module, chosen: Mapping[str, float]) -> None:
    """Give the named adapters these strengths; adapters not named keep theirs. At 0 an adapter takes no part at all."""
    unknown = sorted(set(chosen) - set(adapter_names(model)))
    if unknown:
        raise AdapterError(f"the model carries no adapter called {unknown[0]!r}", fix=f"it has {', '.join(adapter_names(model)) or 'none'}")
    for weight in chosen.values():
        _check_weight(weight)
    wanted = {**weights(model), **chosen}
    active = [name for name, weight in wanted.items() if weight != 0]
    for _, layer in lora_layers(model):
        training = {name for name in layer.lora_A if layer.lora_A[name].weight.requires_grad}
        for name, weight in wanted.items():
            layer.set_scale(name, weight)
        layer.set_adapter(active, inference_mode=True)
        for name in training:
            layer.lora_A[name].weight.requires_grad_(True)
            layer.lora_B[name].weight.requires_grad_(True)


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what its base computes, bit for bit; adapters and gradients stay as they are."""
    layers = [layer for _, layer in lora_layers(model)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all. After the last one the model holds its original layer objects again, untouched."""
    if name is not None and name not in adapter_names(model):
        raise AdapterError(f"the model carries no adapter called {name!r}", fix=f"it has {', '.join(adapter_names(model)) or 'none'}")
    remove(model, name)


def bake(model: nn.Module, chosen: Mapping[str, float] | None = None) -> int:
    """Write the attached adapters into the base weights and take them off; return the number of changed layers.

    chosen: adapter name -> weight; every attached one at its present weight when not given. Sums are made in float32
    and rounded once to the base's dtype. AdapterError, before anything is written, when a base layer is quantised (the
    rounding would destroy the adapter) or a sum is not finite.
    """
    import torch

    wanted = dict(weights(model) if chosen is None else chosen)
    unknown = sorted(set(wanted) - set(adapter_names(model)))
    if unknown:
        raise AdapterError(f"the model carries no adapter called {unknown[0]!r}")
    layers = lora_layers(model)
    for module, layer in layers:
        base = layer.get_base_layer()
        if type(base).__name__ in QUANTISED_LAYERS or not base.weight.dtype.is_floating_point or base.weight.dtype.itemsize < 2:
            raise AdapterError(f"{module} is quantised: baking into it would lose the adapter in the rounding",
                               fix="load the base in bf16 or fp32, bake, and quantise the result")
        if not torch.isfinite(_baked_weight(layer, wanted)).all():
            raise AdapterError(f"{module}: base and adapter together are not finite in {base.weight.dtype}")
    with torch.no_grad():
        for _, layer in layers:
            layer.get_base_layer().weight.copy_(_baked_weight(layer, wanted))
    detach(model)
    return len(layers)


def _baked_weight(layer: Any, wanted: Mapping[str, float]) -> Tensor:
    """The layer's weight with the wanted adapters in it, in the weight's own dtype."""
    weight = layer.get_base_layer().weight.detach()
    result = weight.float()
    for name, strength in wanted.items():
        if name not in layer.lora_A or strength == 0:
            continue
        update = delta(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), strength * layer.lora_alpha[name] / layer.r[name])
        if name in layer.lora_magnitude_vector:
            update = dora_delta(weight, update, layer.lora_magnitude_vector[name].weight.detach())
        result = result + update.reshape(result.shape)
    return result.to(weight.dtype)


def delta(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """scale * B @ A in float32, in the shape of the layer's weight: (out, in) or (out, in, kh, kw)."""
    product = b.float().flatten(1) @ a.float().flatten(1)
    return (product * scale).reshape(b.shape[0], *a.shape[1:])


def dora_delta(weight: Tensor, update: Tensor, magnitude: Tensor) -> Tensor:
    """What DoRA adds to `weight` (out, in): m * (W + dW) / |W + dW| - W, the norm taken per output row.
    Formula: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024), eq. 5."""
    total = weight.float() + update
    norm = total.flatten(1).norm(dim=1).reshape(-1, *[1] * (total.ndim - 1))
    return magnitude.float().reshape(norm.shape) / norm * total - weight.float()
