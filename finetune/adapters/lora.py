"""Put LoRA into a model by pattern, train it, collect it again. Works for any torch model; the class stays what it was.

The low-rank layers are peft's. What is ours: the numbers they start from are drawn by name, so that a run can be made
again; the trained tensors are float32 whatever the base is held in; and the model comes back exactly as it was.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finetune.absent_libraries import absent
from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.forms import A_SUFFIX, B_SUFFIX, LORA, Form, form_of, peft_config
from finetune.adapters.layers import adapter_layers, base_name, held, layers_of, names_in, unit_scale
from finetune.errors import AdapterError
from finetune.randomness import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NAME_RULE = re.compile(r"[a-z][a-z0-9_-]{2,63}")
INITIAL_A = "lora init"
# What an adapter started from, where that is not the base itself (PiSSA): a frozen adapter of this name beside it.
START = "-start"

# Names of the base's own parameters that asked for gradients before the first injection, to be given back on detach.
_trainable_before: weakref.WeakKeyDictionary[Any, frozenset[str]] = weakref.WeakKeyDictionary()


def check_name(name: str) -> None:
    """Adapter names become attribute names inside peft's layers; some would collide with its own. Raises AdapterError."""
    if not NAME_RULE.fullmatch(name) or name in "lora_":
        raise AdapterError(f"{name!r} cannot be an adapter's name", fix="use 3 to 64 of a-z, 0-9, _ and -, beginning with a letter")


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters in a model, in the order in which they came."""
    return list(getattr(model, "peft_config", {}))


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Module name -> shape of its weight, for every layer that can take LoRA: (out, in), or (out, in/groups, kh, kw)."""
    from torch import nn

    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            shapes[base_name(name)] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d) and ".lora_" not in name:
            shapes[base_name(name)] = tuple(module.weight.shape)
    return shapes


def match_targets(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Names of the layers that `targets` means: a regular expression over full names, or a list of full names.

    Raises AdapterError when the expression is broken, matches nothing, or a listed name is not a layer.
    """
    names = list(weight_shapes(model))
    if not isinstance(targets, str):
        missing = sorted(set(targets) - set(names))
        if missing:
            raise AdapterError(f"the model has no linear or convolution layer {missing[0]} ({len(missing)} of {len(targets)} names are unknown)")
        return [name for name in names if name in set(targets)]
    try:
        pattern = re.compile(targets)
    except re.error as problem:
        raise AdapterError(f"the target pattern is not a regular expression: {problem}", where=targets) from None
    found = [name for name in names if pattern.fullmatch(name)]
    if not found:
        raise AdapterError("the target pattern matches no layer of the model", where=targets, fix=f"layers are named like {', '.join(names[:3])}")
    return found


def inject_lora(model: nn.Module, targets: str | Sequence[str], rank: int, alpha: float | None = None, dropout: float = 0.0,
                *, seed: int, name: str = "default") -> list[str]:
    """Freeze the base and add trainable LoRA to the layers that `targets` means; return their names in order.

    alpha: the scale is alpha / rank; None means rank.  A is uniform in +-1/sqrt(fan in) as in peft, drawn from `seed`
    and the layer's position; B is zero, so that training starts at the base. Both are float32. (Other kinds of adapter,
    and ranks by module: `kinds.inject_adapter`.)
    """
    modules = match_targets(model, targets)
    settings = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "target_modules": modules, "bias": "none"}
    inject(model, settings, name, dropout=dropout, trainable=True)
    draw_start(model, name, seed)
    return modules


def draw_start(model: nn.Module, name: str, seed: int) -> None:
    """Give the tensors of an adapter their first values, by `seed` and the layer's position: one is zero, so that training
    starts at the base; the others are uniform in +-1/sqrt(fan in), as in peft."""
    import torch

    for index, (_, layer) in enumerate(layers_of(model, name)):
        parts = held(layer, name)
        zero = form_of(parts).zero
        for suffix, parameter in parts.items():
            with torch.no_grad():
                if suffix == zero:
                    parameter.zero_()
                elif parameter.ndim > 1:
                    purpose = INITIAL_A if suffix == A_SUFFIX else f"adapter init {suffix}"
                    bound = parameter[0].numel() ** -0.5
                    parameter.copy_(torch.rand(parameter.shape, generator=generator(seed, purpose, index=index)) * (2 * bound) - bound)


def inject(model: nn.Module, settings: Mapping[str, Any], name: str, *, form: Form = LORA, dropout: float = 0.0, trainable: bool) -> None:
    """Wrap the layers of peft `settings` for the adapter `name`; its tensors are float32 and hold no values yet.

    The first adapter freezes the base. Draws nothing from torch's global generator. Raises AdapterError.
    """
    import torch
    from peft import inject_adapter_in_model

    check_name(name)
    if name in adapter_names(model):
        raise AdapterError(f"the model already has an adapter called {name!r}", fix="detach it first, or choose another name")
    if not adapter_names(model):
        _trainable_before[model] = frozenset(key for key, value in model.named_parameters() if value.requires_grad)
        model.requires_grad_(False)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), _QuantisedFlags(model):
            warnings.simplefilter("ignore")
            inject_adapter_in_model(peft_config(form, settings, dropout), model, adapter_name=name)
    except ValueError as problem:
        remove(model, name)
        raise AdapterError(f"peft cannot put {form.title} there: {problem}") from None
    for _, layer in layers_of(model, name):
        # peft puts an adapter beside the base's weight; one that waits in host memory is computed with elsewhere.
        if (place := getattr(layer.get_base_layer(), "computes_on", None)) is not None:
            layer._move_adapter_to_device_of_base_layer(name, place)
        for parameter in held(layer, name).values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(trainable)


def _forget_what_is_installed() -> None:
    """peft keeps the answer to whether bitsandbytes is there for the life of the process; let it look again."""
    from peft.import_utils import is_bnb_4bit_available, is_bnb_available

    is_bnb_available.cache_clear()
    is_bnb_4bit_available.cache_clear()


class _QuantisedFlags:
    """peft looks at two flags of the model, not at its layers; say what the layers are while it wraps them."""

    def __init__(self, model: nn.Module):
        self.model = model
        kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
        flags = {"is_loaded_in_4bit": "Linear4bit" in kinds, "is_loaded_in_8bit": "Linear8bitLt" in kinds}
        # Where no layer is quantised, peft need not import bitsandbytes to find that out (1.5 s).
        self.absent = absent(*([] if any(flags.values()) else ["bitsandbytes"]))
        self.missing = [flag for flag, wanted in flags.items() if wanted and not getattr(model, flag, False)]

    def __enter__(self) -> None:
        self.absent.__enter__()
        _forget_what_is_installed()
        for flag in self.missing:
            setattr(self.model, flag, True)

    def __exit__(self, *_: object) -> None:
        for flag in self.missing:
            delattr(self.model, flag)
        self.absent.__exit__(None, None, None)
        _forget_what_is_installed()


def lora_parameters(model: nn.Module, name: str = "default") -> list[tuple[str, torch.nn.Parameter]]:
    """(`<module>.lora_A.weight`, parameter), A before B, in the model's order: what an optimizer trains and what a
    checkpoint keeps bit for bit. The scale alpha / rank is not in them. Of other forms, their own tensors."""
    return [(module + suffix, parameter) for module, layer in layers_of(model, name) for suffix, parameter in held(layer, name).items()]


def collect_lora(model: nn.Module, name: str = "default") -> AdapterFile:
    """The adapter as a file holds it: float32 on the CPU, the scale alpha / rank folded into B. An adapter that did not
    start at the base becomes the difference to its start, at the sum of both ranks."""
    tensors: dict[str, Tensor] = {}
    for module, layer in layers_of(model, name):
        parts = held(layer, name)
        scaled = form_of(parts).scaled
        for suffix, parameter in parts.items():
            value = parameter.detach().cpu()
            tensors[module + suffix] = value * unit_scale(layer, name) if suffix == scaled else value.clone()
    if not tensors:
        raise AdapterError(f"the model carries no adapter called {name!r}")
    if name + START in adapter_names(model):
        import torch

        start = collect_lora(model, name + START).tensors
        tensors = {key: torch.cat([value, start[key]], dim=1 if key.endswith(B_SUFFIX) else 0) for key, value in tensors.items()}
    return AdapterFile(tensors)


def remove(model: nn.Module, name: str | None = None) -> None:
    """Take the adapter `name` off, or all of them; after the last one every layer is the original object again."""
    around = {id(child): (parent, key) for parent in model.modules() for key, child in parent.named_children()}
    for _, layer in reversed(adapter_layers(model)):
        if name is None or set(names_in(layer)) <= {name}:
            parent, key = around[id(layer)]
            setattr(parent, key, layer.base_layer)
        elif name in names_in(layer):
            layer.set_adapter([other for other in layer.active_adapters if other != name], inference_mode=True)
            layer.delete_adapter(name)
    if name is not None:
        getattr(model, "peft_config", {}).pop(name, None)
    if name is None or not adapter_names(model):
        _forget(model)


def _forget(model: nn.Module) -> None:
    """Drop peft's bookkeeping and let the base ask for gradients where it did before the first injection."""
    if hasattr(model, "peft_config"):
        del model.peft_config
    wanted = _trainable_before.pop(model, frozenset())
    for key, parameter in model.named_parameters():
        if key in wanted:
            parameter.requires_grad_(True)
