"""Load an adapter file back into a fresh model and prove it: all keys placed, the output changes, baking says the same
as attaching, and the base comes back bit for bit. The model's one deterministic forward is given by the caller."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_file import AdapterFile, read_adapter
from finetune.adapters.attach import attach, baked_weight, bypassed, detach, set_weights, weights
from finetune.adapters.arithmetic import inner
from finetune.adapters.forms import LORA, OFT
from finetune.adapters.layers import adapter_layers, forms_in, layers_by_module
from finetune.adapters.lent_weights import lent_weights
from finetune.adapters.lora import adapter_names
from finetune.errors import VerifyError
from finetune.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor, nn

    from finetune.adapters.keys import KeyMap

NAME = "verified"
# Relative output difference between baked and attached that needs no look at rounding, by the base's dtype (measured on
# shallow models: 1.4e-7, 3.4e-3, 3.7e-4).
BAKE_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 5e-3, "float64": 1e-5}
# The adapter must change the output by more than one rounding of the products' format, which need not be the weights'; one that
# does not at strength 1 gets a chance at larger ones: after a few steps, or at one noise level, it may change little. A dead one
# changes nothing at any. They go on to where the format shows what float32 showed at strength 1: rounding is to 8, 11 and 24 bits,
# so up to 2^16 and 2^13, in steps of 8; what is less than that has learned nothing that could be drawn.
NOISE = {"float32": 1e-7, "bfloat16": 4e-3, "float16": 5e-4, "float64": 1e-7}
LOUDER = (8.0, 64.0, 512.0)
LOUDER_STILL = {"bfloat16": (4096.0, 32768.0), "float16": (4096.0,)}
# A sum of terms in float32 that is less than this of their sizes is rounding: four times that of one number.
CANCELLED = 2.0**-22
# The largest relative error of rounding to such weights, which is what baking does; a number that moves by it lands on its neighbour.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True)
class VerifyResult:
    """keys: tensors in the file.  placed: of them, in the model.  changed: the output differs from the base's.
    change: by how much, relative.  bake_error: relative difference of baked and attached; None where the base is
    quantised and baking is refused.  restored: the base was bit-identical after taking the adapter off."""

    keys: int
    placed: int
    changed: bool
    change: float
    baked_equals_attached: bool | None
    bake_error: float | None
    restored: bool

    def as_json(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def verify_adapter(path: Path | str, fresh_model: nn.Module, run: Callable[[nn.Module], Tensor],
                   key_maps: Mapping[str, KeyMap] | None = None, *, trained: AdapterFile | None = None,
                   seen: Callable[[Tensor], None] = lambda tensor: None) -> VerifyResult:
    """Prove the file at `path` on `fresh_model`, which must carry no adapter and is returned to what it was.

    run: one deterministic forward of the model, same inputs every time.  trained: the adapter in memory that the file
    was written from; its tensors must equal the file's.  seen: called with every weight that was looked at as a whole, so
    that one which lies in a mapped file need not stay in memory. Raises VerifyError that names what failed, AdapterError when
    the file cannot be read or does not fit.
    """
    adapter = read_adapter(path, key_maps)
    if trained is not None:
        same_tensors(adapter, trained, str(path))
    return prove_on(adapter, fresh_model, run, str(path), seen)


def prove_on(adapter: AdapterFile, fresh_model: nn.Module, run: Callable[[nn.Module], Tensor], where: str,
             seen: Callable[[Tensor], None] = lambda tensor: None) -> VerifyResult:
    """The same for an adapter that is read already; text encoders that it also trains are proven apart, on themselves."""
    if adapter_names(fresh_model):
        raise VerifyError("the model to verify on already carries an adapter", where=where)
    adapter = replace(adapter, text_encoders={})
    if _cancels(adapter):
        raise VerifyError("the adapter has no effect (what it adds is less than the rounding of its own numbers)", where=where, fix="it was saved before its first step or has hardly learned")
    before = fingerprints(fresh_model, seen)
    base = _output(run, fresh_model)
    placed = attach(fresh_model, adapter, NAME)
    try:
        change = _check_strengths(fresh_model, run, base, where)
        bake_error = _bake_error(fresh_model, run, where, seen)
    finally:
        if adapter_names(fresh_model):
            detach(fresh_model, NAME)
    after = fingerprints(fresh_model, seen)
    if after != before:
        odd = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        raise VerifyError(f"{len(odd)} base tensors changed, first {odd[0]}", where=where)
    if not base.equal(_output(run, fresh_model)):
        raise VerifyError("the output after taking the adapter off is not the base's", where=where)
    keys = len(adapter.tensors)
    return VerifyResult(keys, placed * keys // len(adapter.modules), True, change, None if bake_error is None else True, bake_error, True)


def same_tensors(adapter: AdapterFile, trained: AdapterFile, where: str) -> None:
    """The file's tensors are those in memory, text encoders' too. Raises VerifyError that names the first that is not."""
    found, wanted = _all_tensors(adapter), _all_tensors(trained)
    if set(found) != set(wanted):
        odd = sorted(set(found) ^ set(wanted))
        raise VerifyError(f"{len(odd)} tensors differ between the file and the trained model, first {odd[0]}", where=where)
    for key, tensor in wanted.items():
        if not tensor.to(found[key].dtype).equal(found[key]):
            raise VerifyError(f"{key} in the file is not what was trained", where=where)


def _all_tensors(adapter: AdapterFile) -> dict[str, Tensor]:
    return {**adapter.tensors, **{f"{part}.{key}": value for part, values in adapter.text_encoders.items() for key, value in values.items()}}


def _output(run: Callable[[nn.Module], Tensor], model: nn.Module) -> Tensor:
    import torch

    with torch.no_grad():
        return run(model).detach().float().cpu().clone()


def _dtype_of(model: nn.Module) -> str:
    for _, layer in adapter_layers(model):
        name = str(layer.get_base_layer().weight.dtype).removeprefix("torch.")
        return name if name in NOISE else "bfloat16"
    return "float32"


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.norm() / reference.norm().clamp_min(1e-30))


def _effect(model: nn.Module, run: Callable[[nn.Module], Tensor], base: Tensor, where: str) -> tuple[float, float, Tensor]:
    """(relative change of the output at strength 1, the strength at which it is beyond rounding, the output there). An adapter
    that has learned little changes less than bfloat16 can tell, and yet is not dead. Raises VerifyError for one that is."""
    formats: list[str] = []
    hook = adapter_layers(model)[0][1].register_forward_hook(lambda _, __, output: formats.append(str(output.dtype).removeprefix("torch.")))
    output = _output(run, model)
    hook.remove()
    if not output.isfinite().all():
        raise VerifyError("the output with the adapter is not finite", where=where)
    products = formats[0] if formats else _dtype_of(model)
    noise, at_one = NOISE.get(products, NOISE["bfloat16"]), _relative(output - base, base)
    if at_one > noise:
        return at_one, 1.0, output
    for strength in (*LOUDER, *LOUDER_STILL.get(products, ())) if forms_in(model)[NAME] is not OFT else ():
        set_weights(model, {NAME: strength})
        output = _output(run, model)
        # What overflows at a strength that nobody uses tells nothing: behind a gate that is shut it makes NaN of zero.
        if output.isfinite().all() and _relative(output - base, base) > noise:
            return at_one, strength, output
    raise VerifyError(f"the adapter has no effect (the output changes by {at_one:.1e})", where=where,
                      fix="it was saved before its first step or has hardly learned, or acts on layers that this model does not use")


def _cancels(adapter: AdapterFile) -> bool:
    """Whether B A is in every module no more than what rounding leaves of its terms. A PiSSA that has not learned holds its start twice, with
    opposite signs, and a large strength would show that rounding as if it were an effect. Magnitudes of DoRA act for themselves."""
    if adapter.form is not LORA or adapter.uses_dora or not adapter.modules:
        return False
    for pair in map(adapter.pair, adapter.modules):
        a, b = (factor.double().flatten(1) for factor in pair)
        if math.sqrt(max(0.0, inner(pair, pair))) > CANCELLED * float((b.norm(dim=0) * a.norm(dim=1)).sum()):
            return False
    return True


def _check_strengths(model: nn.Module, run: Callable[[nn.Module], Tensor], base: Tensor, where: str) -> float:
    """The output with the adapter differs from the base's, at twice the strength from that (OFT has one strength), at 0 not
    at all. Returns the change at 1."""
    change, strength, acting = _effect(model, run, base, where)
    if forms_in(model)[NAME] is not OFT:
        set_weights(model, {NAME: 2 * strength})
        if _output(run, model).equal(acting):
            raise VerifyError(f"strength {2 * strength:g} gives the same output as strength {strength:g}", where=where)
    set_weights(model, {NAME: 0.0})
    if not _output(run, model).equal(base):
        raise VerifyError("the output at strength 0 is not the base's", where=where)
    set_weights(model, {NAME: 1.0})
    with bypassed(model):
        if not _output(run, model).equal(base):
            raise VerifyError("the output with adapters bypassed is not the base's", where=where)
    return change


def _bake_error(model: nn.Module, run: Callable[[nn.Module], Tensor], where: str, seen: Callable[[Tensor], None]) -> float | None:
    """Relative output difference of baking against attaching; each layer is baked for the time of its own product, so that
    nothing of the base is copied or written to. None for a quantised base, which is never baked into."""
    layers = list(layers_by_module(model).items())
    bases = [around[0].get_base_layer() for _, around in layers]
    if not all(base.weight.dtype.is_floating_point and base.weight.dtype.itemsize >= 2 for base in bases):
        return None
    dtype, attached, wanted = _dtype_of(model), _output(run, model), weights(model)

    def baked(number: int) -> Tensor:
        result = baked_weight(*layers[number], wanted)
        seen(bases[number].weight.detach())
        return result

    with bypassed(model), lent_weights(bases, baked):
        error = _relative(_output(run, model) - attached, attached)
    allowed = BAKE_TOLERANCE[dtype]
    if not error <= allowed and dtype in ROUNDING:
        # The neighbour is three and a half times as far as rounding goes on average; the factor is for models that blow it up unevenly.
        allowed = max(allowed, 1.5 * _rounding_error(model, run, bases, ROUNDING[dtype], seen))
    if not error <= allowed:
        raise VerifyError(f"baked and attached differ by {error:.1e} (allowed for {dtype}: {allowed:.0e})", where=where)
    return error


def _rounding_error(model: nn.Module, run: Callable[[nn.Module], Tensor], bases: list[nn.Module], rounding: float,
                    seen: Callable[[Tensor], None]) -> float:
    """How far the base's output moves when every weight of these layers moves to its neighbour in the format, up or down: what a
    deep model makes of rounding alone."""
    import torch

    def neighbour(number: int) -> Tensor:
        weight = bases[number].weight.data
        up = torch.rand(weight.shape, generator=generator(0, "rounding of weights", index=number)) < 0.5
        moved = (weight.float() * torch.where(up, 1 + rounding, 1 - rounding).to(weight.device)).to(weight.dtype)
        seen(weight)
        return moved

    with bypassed(model):
        exact = _output(run, model)
        with lent_weights(bases, neighbour):
            return _relative(_output(run, model) - exact, exact)


def fingerprints(model: nn.Module, seen: Callable[[Tensor], None] = lambda tensor: None) -> dict[str, str]:
    """Name of every parameter and buffer -> hash of its bytes, dtype and shape."""
    import torch

    found = {}
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy() if flat.numel() else b""
        found[key] = hashlib.blake2b(raw, digest_size=16, person=str(tensor.dtype).encode()[:16]).hexdigest() + str(tuple(tensor.shape))
        seen(tensor.detach())
    return found
