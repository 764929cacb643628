"""The kinds of adapter that can be trained, and putting one into a model: by kind, with ranks and alphas by module.

    lora    plain                                     rslora  LoRA at alpha / sqrt(rank)
    dora    LoRA with a magnitude for every output    pissa   LoRA that starts from the weight's main directions
    loha    Hadamard product of two low-rank parts    lokr    Kronecker product
    oft     the weight's inputs turned, block by block

rsLoRA and PiSSA are plain LoRAs in a file; LoHa, LoKr and OFT have forms of their own (`finetune.adapters.forms`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.forms import A_SUFFIX, B_SUFFIX, LOHA, LOKR, LORA, MAGNITUDE_SUFFIX, OFT, Form
from finetune.adapters.layers import held, layers_of, unit_scale
from finetune.adapters.lora import START, draw_start, inject, match_targets, weight_shapes
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class KindFacts:
    """title: as people write it.  form: of its tensors.  linear_only: it takes no convolutions.
    whole_weights: it looks at the weight itself, so 4-bit ones will not do.  says: what a file of it is, for the card."""

    title: str
    form: Form
    linear_only: bool = True
    whole_weights: bool = False
    says: str = ""


KINDS = {
    "lora": KindFacts("LoRA", LORA, linear_only=False),
    "rslora": KindFacts("rsLoRA", LORA, linear_only=False, says="a plain LoRA file, its scale alpha / sqrt(rank) folded in"),
    "dora": KindFacts("DoRA", LORA, says="LoRA with a magnitude for every output"),
    "pissa": KindFacts("PiSSA", LORA, says="a plain LoRA file of twice the trained rank: the difference to its start"),
    "loha": KindFacts("LoHa", LOHA, whole_weights=True, says="in PEFT's layout, which peft loads"),
    "lokr": KindFacts("LoKr", LOKR, whole_weights=True, says="in PEFT's layout, which peft loads"),
    "oft": KindFacts("OFT", OFT, says="in PEFT's layout, which peft loads; it acts whole, at a strength of 1"),
}


@dataclass(frozen=True)
class AdapterSize:
    """rank, alpha: of every module that no pattern names; alpha None means the module's rank.  dropout: [0, 1).
    rank_pattern, alpha_pattern: expression over whole module names -> rank or alpha; the first that fits decides."""

    kind: str = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def ranks(self, modules: Sequence[str]) -> dict[str, int]:
        """Module -> rank. AdapterError for an expression that fits no module."""
        return _by_pattern(modules, self.rank_pattern, dict.fromkeys(modules, self.rank), "adapter.rank_pattern")

    def alphas(self, modules: Sequence[str]) -> dict[str, float]:
        """Module -> alpha. AdapterError for an expression that fits no module."""
        usual = {module: float(rank if self.alpha is None else self.alpha) for module, rank in self.ranks(modules).items()}
        return _by_pattern(modules, self.alpha_pattern, usual, "adapter.alpha_pattern")


def _by_pattern(modules: Sequence[str], pattern: Mapping[str, Any], usual: dict[str, Any], key: str) -> dict[str, Any]:
    chosen, used = dict(usual), set()
    for module in modules:
        found = next((expression for expression in pattern if re.fullmatch(expression, module)), None)
        if found is not None:
            chosen[module] = pattern[found]
        used |= {expression for expression in pattern if re.fullmatch(expression, module)}
    unused = [expression for expression in pattern if expression not in used]
    if unused:
        raise AdapterError(f"the expression {unused[0]} fits none of the {len(modules)} layers that are trained", where=key,
                           fix=f"they are named like {', '.join(modules[:3])}")
    return chosen


def inject_adapter(model: nn.Module, targets: str | Sequence[str], size: AdapterSize, *, seed: int, name: str = "default") -> list[str]:
    """Freeze the base and add a trainable adapter of `size.kind` to the layers that `targets` means; return their names.

    All tensors are float32, start values follow from `seed` and the layer's position, and training starts at the base.
    Raises AdapterError for layers that the kind does not take and for patterns that fit none.
    """
    modules = match_targets(model, targets)
    facts = KINDS[size.kind]
    _check_layers(model, modules, size, facts)
    inject(model, _peft_settings(size, facts.form, modules), name, form=facts.form, dropout=size.dropout, trainable=True)
    draw_start(model, name, seed)
    if size.kind == "dora":
        _measure_magnitudes(model, name)
    if size.kind == "pissa":
        _start_at_main_directions(model, name, seed)
    return modules


def start_parameters(model: nn.Module, name: str = "default") -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of what the adapter started from, where that is not the base: frozen, and kept in checkpoints."""
    return [(f"start/{module}{suffix}", parameter) for module, layer in layers_of(model, name + START) for suffix, parameter in held(layer, name + START).items()]


def parameter_count(kind: str, rank: int, shape: Sequence[int]) -> int:
    """Trainable numbers on a layer whose weight has `shape` (out, in, ...)."""
    outputs, inputs = shape[0], 1
    for axis in shape[1:]:
        inputs *= axis
    if kind == "oft":
        return inputs * (rank - 1) // 2
    if kind == "lokr":
        from peft.tuners.lokr.layer import factorization

        (left, right), (top, bottom) = factorization(outputs), factorization(inputs)
        return left * top + (right * bottom if rank >= max(right, bottom) / 2 else rank * (right + bottom))
    return rank * (outputs + inputs) * (2 if kind == "loha" else 1) + (outputs if kind == "dora" else 0)


def _peft_settings(size: AdapterSize, form: Form, modules: list[str]) -> dict[str, Any]:
    if form is OFT:
        return {"r": 0, "oft_block_size": size.rank, "target_modules": modules, "bias": "none"}
    settings: dict[str, Any] = {"r": size.rank, form.alpha: size.rank if size.alpha is None else size.alpha, "target_modules": modules}
    if form is LORA:
        settings |= {"bias": "none", "use_rslora": size.kind == "rslora", "use_dora": size.kind == "dora"}
    # Spelled out for every module, anchored: peft matches expressions as suffixes.
    if size.rank_pattern:
        settings["rank_pattern"] = {"^" + re.escape(module): rank for module, rank in size.ranks(modules).items()}
    if size.rank_pattern or size.alpha_pattern:
        settings["alpha_pattern"] = {"^" + re.escape(module): alpha for module, alpha in size.alphas(modules).items()}
    return settings


def _check_layers(model: nn.Module, modules: list[str], size: AdapterSize, facts: KindFacts) -> None:
    shapes, ranks = weight_shapes(model), size.ranks(modules)
    for module in modules:
        shape = shapes[module]
        if facts.linear_only and len(shape) != 2:
            raise AdapterError(f"{module} is a convolution, which {facts.title} does not take here", where="adapter.targets", fix="name linear layers only, or take the kind lora or rslora")
        if size.kind == "oft" and shape[1] % size.rank:
            raise AdapterError(f"blocks of {size.rank} do not divide the {shape[1]} inputs of {module}", where="adapter.rank", fix="OFT's rank is its block size: a divisor of all inputs, such as 8 or 4")
        if size.kind == "pissa" and ranks[module] > min(shape):
            raise AdapterError(f"{module} has only {min(shape)} directions to start from", where="adapter.rank", fix="lower the rank")
        weight = getattr(model.get_submodule(module), "weight", None)
        if facts.whole_weights and weight is not None and tuple(weight.shape) != shape:
            raise AdapterError(f"{facts.title} needs whole weights, and {module} is held in 4 bits", where="base.hold", fix="hold it in int8, bf16 or streamed, or take the kind lora")


def _base_weight(layer: Any) -> Tensor:
    """(out, in) float32, whatever the layer holds it in."""
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer.get_base_layer()).detach().float()


def _measure_magnitudes(model: nn.Module, name: str) -> None:
    """DoRA starts with the norm of each row of the base's weight."""
    import torch

    with torch.no_grad():
        for _, layer in layers_of(model, name):
            held(layer, name)[MAGNITUDE_SUFFIX].copy_(_base_weight(layer).norm(dim=1))


def _start_at_main_directions(model: nn.Module, name: str, seed: int) -> None:
    """PiSSA (Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024), on an untouched base.

    There the base loses its main directions and the adapter begins as them: (W - B0 A0) + B A. Here the base stays W,
    and -B0 A0 acts beside the adapter as a frozen one; so the base may be quantised, mapped from its file or shared.
    """
    import torch

    from finetune.adapters.arithmetic import low_rank
    from finetune.adapters.attach import attach

    start: dict[str, Tensor] = {}
    with torch.no_grad():
        for module, layer in layers_of(model, name):
            parts, scale = held(layer, name), unit_scale(layer, name)
            a, b, _ = low_rank(_base_weight(layer), len(parts[A_SUFFIX]), seed)
            parts[A_SUFFIX].copy_(a / scale**0.5)
            parts[B_SUFFIX].copy_(b / scale**0.5)
            start |= {module + A_SUFFIX: parts[A_SUFFIX].detach().cpu().clone(), module + B_SUFFIX: parts[B_SUFFIX].detach().cpu() * -scale}
    attach(model, AdapterFile(start), name + START)
