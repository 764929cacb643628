"""The layers that peft puts around a model's own, of whatever form: what they hold under an adapter's name, and its scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finetune.adapters.forms import FORMS, Form, form_of

if TYPE_CHECKING:
    from torch import nn

# suffix in files -> the attribute of peft's layer that holds the tensor by adapter name
_CONTAINERS = {suffix: suffix[1:].removesuffix(".weight") for form in FORMS for suffix in form.suffixes}


def base_name(name: str) -> str:
    """The model's own name of a layer, whatever is around it: peft puts layers of different forms around each other."""
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(module name, peft layer) of every layer that carries an adapter, in the model's order; of layers around the same
    module the outer one first."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(base_name(name), module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def layers_by_module(model: nn.Module) -> dict[str, list[Any]]:
    """Module name -> the peft layers around it, the outer one first."""
    found: dict[str, list[Any]] = {}
    for module, layer in adapter_layers(model):
        found.setdefault(module, []).append(layer)
    return found


def layers_of(model: nn.Module, name: str) -> list[tuple[str, Any]]:
    """Those that carry the adapter `name`."""
    return [(module, layer) for module, layer in adapter_layers(model) if name in names_in(layer)]


def names_in(layer: Any) -> list[str]:
    """Adapters that a peft layer carries."""
    return list(dict.fromkeys(name for attribute in _CONTAINERS.values() for name in getattr(layer, attribute, ())))


def held(layer: Any, name: str) -> dict[str, nn.Parameter]:
    """suffix -> parameter of one adapter in one layer."""
    from torch import nn

    found = {}
    for suffix, attribute in _CONTAINERS.items():
        container = getattr(layer, attribute, {})
        if name in container:
            value = container[name]
            found[suffix] = value if isinstance(value, nn.Parameter) else value.weight
    return found


def forms_in(model: nn.Module) -> dict[str, Form]:
    """Name -> form of every adapter that a model carries."""
    return {name: form_of(held(layer, name)) for _, layer in adapter_layers(model) for name in names_in(layer)}


def unit_scale(layer: Any, name: str) -> float:
    """The scale of an adapter at strength 1: alpha / rank, alpha / sqrt(rank) for rsLoRA, 1 for OFT."""
    alphas = getattr(layer, "lora_alpha", None) or getattr(layer, "alpha", None)
    if not alphas:
        return 1.0
    rank = layer.r[name]
    return alphas[name] / (math.sqrt(rank) if getattr(layer, "use_rslora", {}).get(name) else rank)


def strength(layer: Any, name: str) -> float:
    """The strength at which an adapter acts in a layer; 0 when it is off."""
    if name not in layer.active_adapters:
        return 0.0
    scaling = getattr(layer, "scaling", None)
    return scaling[name] / unit_scale(layer, name) if scaling else 1.0
