"""The layers that peft puts around a model's own, of whatever form: what they hold under an adapter's name, and its scale."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finetune.adapters.forms import FORMS, Form, form_of

if TYPE_CHECKING:
    from torch import nn

# suffix in files -> the attribute of peft's layer that holds the tensor by adapter name
_CONTAINERS = {suffix: suffix[1:].removesuffix(".weight") for form in FORMS for suffix in form.suffixes}


def adapter_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """(module name, peft layer) of every layer that carries an adapter, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


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


def form_in(model: nn.Module) -> Form | None:
    """The form of the adapters that a model carries, None where there are none. A model carries one form at a time."""
    layers = adapter_layers(model)
    return form_of(held(layers[0][1], names_in(layers[0][1])[0])) if layers else None


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
