"""The forms that an adapter's change of a weight can have, as data: which tensors a module has, in files and in peft's layers.

    lora   dW = B @ A                                        dora: the same, and one magnitude an output row
    loha   dW = (w1_a @ w1_b) * (w2_a @ w2_b), elementwise    Hyeon-Woo et al., "FedPara" (2022)
    lokr   dW = kron(w1, w2), w2 = w2_a @ w2_b where large    Yeh et al., "LyCORIS" (2024)
    oft    W' = W @ R', R block-diagonal, made from oft_R     Qiu et al., "Controlling Text-to-Image Diffusion by
                                                             Orthogonal Finetuning" (2023)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
# PEFT's prefix in the files of every form but LoRA, which no loader of diffusers reads.
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Form:
    """suffixes: of a module's tensors, in the order in which they are trained.  zero: the tensor that starts at zero, so
    that training starts at the base.  scaled: the tensor into which a file folds the scale (None: there is none).
    peft_type, config: how peft calls it.  alpha: name of peft's setting for the scale's numerator."""

    name: str
    title: str
    suffixes: tuple[str, ...]
    zero: str
    scaled: str | None
    peft_type: str
    config: str
    alpha: str


LORA = Form("lora", "LoRA", (A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX), B_SUFFIX, B_SUFFIX, "LORA", "LoraConfig", "lora_alpha")
LOHA = Form("loha", "LoHa", (".hada_w1_a", ".hada_w1_b", ".hada_w2_a", ".hada_w2_b"), ".hada_w2_b", ".hada_w2_b", "LOHA", "LoHaConfig", "alpha")
LOKR = Form("lokr", "LoKr", (".lokr_w1", ".lokr_w2", ".lokr_w2_a", ".lokr_w2_b"), ".lokr_w1", ".lokr_w1", "LOKR", "LoKrConfig", "alpha")
OFT = Form("oft", "OFT", (".oft_R.weight",), ".oft_R.weight", None, "OFT", "OFTConfig", "")
FORMS = (LORA, LOHA, LOKR, OFT)
_OF_SUFFIX = {suffix: form for form in FORMS for suffix in form.suffixes}
SUFFIXES = tuple(_OF_SUFFIX)


def split_key(key: str) -> tuple[str, str] | None:
    """(module, suffix) of a canonical key, or None when it is no adapter's."""
    for suffix in _OF_SUFFIX:
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return None


def form_of(keys: Iterable[str]) -> Form:
    """The form of canonical tensors, told by the first key that has one; LoRA for none. (`check_tensors` refuses mixtures.)"""
    return next((_OF_SUFFIX[found[1]] for key in keys if (found := split_key(key))), LORA)


def rank_of(form: Form, parts: Mapping[str, Tensor]) -> int:
    """The rank of one module's tensors: of OFT its block size, of a LoKr with two full factors the least that gives them."""
    if form is LORA:
        return parts[A_SUFFIX].shape[0]
    if form is LOHA:
        return parts[".hada_w1_b"].shape[0]
    if form is OFT:
        return block_size(parts[".oft_R.weight"].shape[1])
    return parts[".lokr_w2_b"].shape[0] if ".lokr_w2_b" in parts else -(-max(parts[".lokr_w2"].shape) // 2)


def block_size(elements: int) -> int:
    """Edge of a skew-symmetric block with that many free numbers: edge * (edge - 1) / 2 = elements."""
    return round((1 + (1 + 8 * elements) ** 0.5) / 2)


def layer_shape(form: Form, parts: Mapping[str, Tensor]) -> tuple[int | None, ...]:
    """(outputs, inputs, ...) of the layer that one module's tensors belong to; None where they do not tell."""
    if form is LORA:
        return (parts[B_SUFFIX].shape[0], *parts[A_SUFFIX].shape[1:])
    if form is LOHA:
        return parts[".hada_w1_a"].shape[0], parts[".hada_w1_b"].shape[1]
    if form is OFT:
        blocks = parts[".oft_R.weight"]
        return None, blocks.shape[0] * block_size(blocks.shape[1])
    rows, columns = parts[".lokr_w1"].shape
    if ".lokr_w2" in parts:
        return rows * parts[".lokr_w2"].shape[0], columns * parts[".lokr_w2"].shape[1]
    return rows * parts[".lokr_w2_a"].shape[0], columns * parts[".lokr_w2_b"].shape[1]


def check_parts(form: Form, module: str, parts: Mapping[str, Tensor], where: str) -> None:
    """The tensors of one module of a form other than LoRA are whole, finite and belong together. Raises AdapterError."""
    import torch

    wanted = {*form.suffixes} - ({".lokr_w2"} if ".lokr_w2_a" in parts else {".lokr_w2_a", ".lokr_w2_b"})
    if set(parts) != wanted:
        odd = sorted(set(parts) ^ wanted)[0]
        raise AdapterError(f"{module}: {odd[1:]} is {'missing' if odd in wanted else 'one too many'}", where=where, fix="the file is incomplete")
    for suffix, tensor in parts.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2 or tensor.ndim != 2:
            raise AdapterError(f"{module}{suffix}: not a matrix of 16- or 32-bit floats", where=where)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{module}{suffix} contains NaN or infinity", where=where, fix="the training that made it blew up")
    if form is OFT:
        elements = parts[".oft_R.weight"].shape[1]
        fits = block_size(elements) * (block_size(elements) - 1) // 2 == elements
    else:
        pairs = [("_a", "_b")] if form is LOKR else [("w1_a", "w1_b"), ("w2_a", "w2_b")]
        stem = ".lokr_w2" if form is LOKR else ".hada_"
        fits = all(stem + left not in parts or parts[stem + left].shape[1] == parts[stem + right].shape[0] for left, right in pairs)
        fits &= form is LOKR or all(parts[f".hada_w1_{end}"].shape == parts[f".hada_w2_{end}"].shape for end in "ab")
    if not fits:
        raise AdapterError(f"{module}: the {form.title} tensors do not belong together", where=where)


def peft_config(form: Form, settings: Mapping[str, Any], dropout: float) -> Any:
    """peft's configuration object. dropout: of LoRA's input; of output rows of dW for LoHa and LoKr; OFT has none."""
    import peft

    more = {"lora_dropout": dropout, "init_lora_weights": False} if form is LORA else {"init_weights": False}
    if form in (LOHA, LOKR):
        more["rank_dropout"] = dropout
    return getattr(peft, form.config)(**settings, **more)
