"""Attach adapters to a model with weights, several at once; take them off again without a trace; bake them in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_file import AdapterFile, peft_settings
from finetune.adapters.forms import OFT, Form, form_of
from finetune.adapters.layers import adapter_layers, forms_in, held, layers_by_module, layers_of, names_in, strength, unit_scale
from finetune.adapters.lora import adapter_names, inject, remove, weight_shapes
from finetune.adapters.lycoris import as_lora, in_one_form
from finetune.adapters.weight_change import turned, weight_change
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
        found, shape = adapter.layer_shape(module), shapes[module]
        if len(shape) == 4 and len(shape) != len(found) and shape[2:] == (1, 1):
            shape = shape[:2]
        if found[0] is None:
            found = (shape[0], *found[1:])
        if found != shape:
            raise AdapterError(f"{module}: the adapter was made for a layer {_shown(found)}, the model's is {_shown(shape)}",
                               fix="the adapter was made for another model, or for another size of it")


def _shown(shape: tuple[int, ...]) -> str:
    kernel = f" {shape[2]}x{shape[3]}" if len(shape) == 4 else ""
    return f"{shape[1]}->{shape[0]}{kernel}"


def attach(model: nn.Module, adapter: AdapterFile, name: str, weight: float = 1.0) -> int:
    """Add `adapter` to `model` under `name` at strength `weight`, beside those already there; return its module count.

    An adapter that also trains text encoders is refused: those parts are for `text_encoders.attach_encoders`. One without a
    tensor for `model` leaves it without the name.

    On any error the model is left as it was: AdapterError when the adapter does not fit, the name is taken or the weight
    is not finite. Nothing of the base is written, whatever the file contains.
    """
    import torch

    _check_weight(weight)
    if adapter.text_encoders:
        raise AdapterError(f"the adapter also trains {', '.join(sorted(adapter.text_encoders))}, which is not loaded here", fix="`brushwork generate` draws with all of it")
    if not adapter.tensors:
        return 0
    check_fit(adapter, weight_shapes(model))
    adapter = _beside_others(model, adapter)
    present = weights(model)
    inject(model, peft_settings(adapter.tensors), name, form=adapter.form, trainable=False)
    try:
        placed = 0
        with torch.no_grad():
            for module, layer in layers_of(model, name):
                parts = adapter.parts(module)
                for suffix, parameter in held(layer, name).items():
                    parameter.copy_(parts[suffix].reshape(parameter.shape))
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


def _beside_others(model: nn.Module, adapter: AdapterFile) -> AdapterFile:
    """The adapter as it can act beside those in the model: of one form where they add to the weights, so that a LoHa or LoKr
    is written out as LoRA where LoRAs are there already. AdapterError where the two cannot meet.

    An OFT turns the inputs of the layers that it is put around. It goes around the base's own, before the others, which then
    get the inputs that they were trained on; several of them turn one after the other."""
    adding = next((form for form in forms_in(model).values() if form is not OFT), None)
    if adding is None or adding is adapter.form:
        return adapter
    if adapter.form is OFT:
        raise AdapterError(f"an OFT adapter would also turn what the {adding.title} in this model gets", fix="attach the OFT first")
    if adding.name != "lora":
        raise AdapterError(f"a {adapter.form.title} cannot join a {adding.title} in one model", fix=f"attach the LoRA first: the {adding.title} is then written out as one")
    return as_lora(adapter)


def attach_together(model: nn.Module, adapters: Mapping[str, tuple[AdapterFile, float]]) -> None:
    """Attach name -> (adapter, strength), of whatever forms, in the order and shape in which they can act together; what they
    train of text encoders is left aside. AdapterError as `attach`."""
    shaped = dict(zip(adapters, in_one_form([adapter for adapter, _ in adapters.values()]), strict=True))
    for name in sorted(shaped, key=lambda name: shaped[name].form is not OFT):
        attach(model, replace(shaped[name], text_encoders={}), name, adapters[name][1])


def check_strength(form: Form, weight: float, where: str | None = None) -> None:
    """AdapterError for an OFT at a strength that is neither 0 nor 1: half a turn is not half of anything that was trained."""
    if form is OFT and weight not in (0.0, 1.0):
        raise AdapterError(f"an OFT adapter at a weight of {weight:g}", where=where, fix="OFT acts whole or not at all: 1 or 0")


LARGEST_WEIGHT = 2.0**16  # that far the proof of an adapter goes that has hardly learned


def _check_weight(weight: float) -> None:
    if not math.isfinite(weight) or abs(weight) > LARGEST_WEIGHT:
        raise AdapterError(f"a weight of {weight}", fix="weights are finite and usually between -2 and 2")


def weights(model: nn.Module) -> dict[str, float]:
    """Adapter name -> weight as set; {} for a model without adapters."""
    found: dict[str, float] = {}
    for _, layer in adapter_layers(model):
        for name in names_in(layer):
            found.setdefault(name, strength(layer, name))
    return {name: found[name] for name in adapter_names(model) if name in found}


def set_weights(model: nn.Module, chosen: Mapping[str, float]) -> None:
    """Give the named adapters these strengths; adapters not named keep theirs. At 0 an adapter takes no part at all.

    AdapterError for an OFT at a strength that is neither 0 nor 1, as `check_strength`.
    """
    unknown = sorted(set(chosen) - set(adapter_names(model)))
    if unknown:
        raise AdapterError(f"the model carries no adapter called {unknown[0]!r}", fix=f"it has {', '.join(adapter_names(model)) or 'none'}")
    for weight in chosen.values():
        _check_weight(weight)
    wanted = {**weights(model), **chosen}
    forms = forms_in(model)
    for name, weight in wanted.items():
        check_strength(forms[name], weight)
    active = [name for name, weight in wanted.items() if weight != 0]
    for _, layer in adapter_layers(model):
        training = [parameter for name in names_in(layer) for parameter in held(layer, name).values() if parameter.requires_grad]
        if hasattr(layer, "scaling"):
            for name, weight in wanted.items():
                layer.set_scale(name, weight)
        layer.set_adapter(active, inference_mode=True)
        for parameter in training:
            parameter.requires_grad_(True)


@contextmanager
def bypassed(model: nn.Module) -> Iterator[None]:
    """Inside the block the model computes what its base computes, bit for bit; adapters and gradients stay as they are."""
    layers = [layer for _, layer in adapter_layers(model)]
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
    layers = layers_by_module(model)
    for module, around in layers.items():
        base = around[0].get_base_layer()
        if type(base).__name__ in QUANTISED_LAYERS or not base.weight.dtype.is_floating_point or base.weight.dtype.itemsize < 2:
            raise AdapterError(f"{module} is quantised: baking into it would lose the adapter in the rounding",
                               fix="load the base in bf16 or fp32, bake, and quantise the result")
        baked_weight(module, around, wanted)
    with torch.no_grad():
        for module, around in layers.items():
            weight = around[0].get_base_layer().weight
            baked = baked_weight(module, around, wanted)
            if weight.device.type == "cpu" and not weight.is_pinned():
                # New memory: the old may be pages of a mapped file, which are let go after use and come back as the file has them.
                weight.data = baked
            else:
                weight.copy_(baked)
    detach(model)
    return len(layers)


def baked_weight(module: str, around: Sequence[Any], wanted: Mapping[str, float]) -> Tensor:
    """The weight inside the peft layers `around` it with the wanted adapters (name -> strength) in it, in the weight's own dtype.
    AdapterError when it is not finite."""
    import torch

    weight = around[0].get_base_layer().weight.detach()
    result = weight.float()
    carrying = {name: layer for layer in around for name in names_in(layer) if wanted.get(name)}
    parts = {name: {suffix: parameter.detach().to(weight.device) for suffix, parameter in held(layer, name).items()} for name, layer in carrying.items()}
    turning = [name for name, tensors in parts.items() if form_of(tensors) is OFT]
    for name in reversed(turning):  # inputs meet the first one first, weights the last
        result = turned(result, parts[name][OFT.zero])
    for name in wanted:
        if name in parts and name not in turning:
            result = result + weight_change(parts[name], weight, wanted[name] * unit_scale(carrying[name], name))
    result = result.to(weight.dtype)
    if not torch.isfinite(result).all():
        raise AdapterError(f"{module}: base and adapter together are not finite in {weight.dtype}")
    return result
