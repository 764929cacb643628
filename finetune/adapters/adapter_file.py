"""AdapterFile: an adapter at rest, in one canonical layout whatever dialect it came in.

Canonical tensors are named by the base model's own module names, without a prefix, and carry no scale:
`delta W = B @ A` for every module, which is what "alpha equals rank" means in a file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.forms import (
    A_SUFFIX, B_SUFFIX, LORA, MAGNITUDE_SUFFIX, OFT, PEFT_PREFIX, SUFFIXES, Form, check_parts, form_of, layer_shape, rank_of, split_key,
)
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.adapters.keys import KeyMap

FILE_PREFIX = "transformer."
PEFT_KEY, PROVENANCE_KEY = "lora_adapter_metadata", "brushwork"
FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class AdapterFile:
    """tensors: `<module>.lora_A.weight` (r, in) or (r, in, kh, kw), `<module>.lora_B.weight` (out, r) or (out, r, 1, 1),
    for DoRA also `<module>.lora_magnitude_vector` (out,); or the tensors of another form (`finetune.adapters.forms`).
    metadata: header texts as found; of a stranger's file nothing in it is to be believed.
    text_encoders: "text_encoder", "text_encoder_2" ... -> the same kind of tensors, where a file trains them.
    layout, family: what the file was recognised as.  alternatives: other families whose layers it fits as well.  scales: module -> alpha / rank as the file said it, where it was not
    1; already in B.  notes: what was normalised or left out on reading, for the user.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    text_encoders: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    layout: str = "diffusers"
    family: str | None = None
    alternatives: tuple[str, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def modules(self) -> list[str]:
        """Names of the adapted modules, sorted."""
        return sorted({found[0] for key in self.tensors if (found := split_key(key))})

    @property
    def form(self) -> Form:
        """LoRA, LoHa, LoKr or OFT, told by the tensors."""
        return form_of(self.tensors)

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> rank, read off the tensors."""
        return {module: rank_of(self.form, self.parts(module)) for module in self.modules}

    def parts(self, module: str) -> dict[str, Tensor]:
        """suffix -> tensor of one module."""
        return {suffix: self.tensors[module + suffix] for suffix in self.form.suffixes if module + suffix in self.tensors}

    def layer_shape(self, module: str) -> tuple[int | None, ...]:
        """Shape of the weight that one module's tensors belong to; None for the outputs of OFT, which has none of its own."""
        return layer_shape(self.form, self.parts(module))

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """(A, B) of one module of a LoRA."""
        return self.tensors[module + A_SUFFIX], self.tensors[module + B_SUFFIX]

    @property
    def uses_dora(self) -> bool:
        """Whether the file also carries magnitudes, so that delta W depends on the base weight."""
        return any(key.endswith(MAGNITUDE_SUFFIX) for key in self.tensors)

    def part(self, name: str) -> AdapterFile:
        """The tensors of one text encoder as an adapter of their own."""
        return replace(self, tensors=self.text_encoders[name], text_encoders={})

    @property
    def provenance(self) -> dict[str, Any]:
        """What our own trainer wrote about the run, or {}. Untrusted when the file is a stranger's."""
        try:
            found = json.loads(self.metadata.get(PROVENANCE_KEY, "{}"))
            json.dumps(found, ensure_ascii=False).encode()  # an escape may stand for half of a character, which no file takes
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def with_provenance(self, **facts: Any) -> AdapterFile:
        """A copy whose header also says `facts` (JSON values; no paths, no captions, no names of people)."""
        text = json.dumps({**self.provenance, **facts}, sort_keys=True, ensure_ascii=False)
        return replace(self, metadata={**self.metadata, PROVENANCE_KEY: text})


def map_tensors(adapter: AdapterFile, change: Callable[[Tensor], Tensor]) -> AdapterFile:
    """A copy with `change` applied to every tensor."""
    parts = {name: {key: change(value) for key, value in part.items()} for name, part in adapter.text_encoders.items()}
    return replace(adapter, tensors={key: change(value) for key, value in adapter.tensors.items()}, text_encoders=parts)


def to_dtype(adapter: AdapterFile, dtype: str) -> AdapterFile:
    """A copy in "float32", "bfloat16" or "float16". Raises AdapterError when a value does not fit into float16."""
    import torch

    target = getattr(torch, dtype)

    def cast(tensor: Tensor) -> Tensor:
        changed = tensor.to(target)
        if not torch.isfinite(changed).all():
            raise AdapterError(f"a value is too large for {dtype}", fix="use bfloat16 or float32")
        return changed

    return map_tensors(adapter, cast)


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Every canonical pair is whole, of one rank, of floating type and finite. Returns notes worth telling.

    Raises AdapterError that names the first tensor at fault.
    """
    import torch

    notes: list[str] = []
    adapter = AdapterFile(tensors)
    modules = adapter.modules
    if not modules:
        raise AdapterError("there is no LoRA tensor in the file", where=where, fix="is this a full checkpoint? `brushwork adapter extract` makes a LoRA of one")
    if adapter.form is not LORA:
        return _check_other_form(adapter, where)
    silent, high = [], []
    for module in modules:
        a, b = tensors.get(module + A_SUFFIX), tensors.get(module + B_SUFFIX)
        if a is None or b is None:
            raise AdapterError(f"{module}: lora_{'A' if a is None else 'B'} is missing", where=where, fix="the file is incomplete")
        _check_pair(module, a, b, where)
        magnitude = tensors.get(module + MAGNITUDE_SUFFIX)
        if magnitude is not None and (tuple(magnitude.shape) != (b.shape[0],) or not torch.isfinite(magnitude).all()):
            raise AdapterError(f"{module}: its magnitudes are not {b.shape[0]} finite numbers", where=where)
        if not b.any() and magnitude is None:
            silent.append(module)
        if a.shape[0] > min(b.shape[0], a[0].numel()):
            high.append(module)
    magnitudes = sum(key.endswith(MAGNITUDE_SUFFIX) for key in tensors)
    if magnitudes not in (0, len(modules)):
        raise AdapterError(f"only {magnitudes} of {len(modules)} modules carry DoRA magnitudes", where=where)
    if silent:
        whole = "the adapter has no effect: lora_B is zero in all" if len(silent) == len(modules) else f"lora_B is zero in {len(silent)} of"
        notes.append(f"{whole} {len(modules)} modules")
    if high:
        notes.append(f"the rank is larger than the layer in {len(high)} modules, first {high[0]}")
    return notes


def _check_other_form(adapter: AdapterFile, where: str) -> list[str]:
    for module in adapter.modules:
        check_parts(adapter.form, module, {suffix: adapter.tensors[module + suffix] for suffix in SUFFIXES if module + suffix in adapter.tensors}, where)
    moved = any(adapter.tensors[module + adapter.form.zero].any() for module in adapter.modules)
    return [] if moved else [f"the adapter has no effect: {adapter.form.zero[1:]} is zero in all {len(adapter.modules)} modules"]


def _check_pair(module: str, a: Tensor, b: Tensor, where: str) -> None:
    import torch

    for letter, tensor in (("A", a), ("B", b)):
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise AdapterError(f"{module}: lora_{letter} holds {str(tensor.dtype).removeprefix('torch.')}, not 16- or 32-bit floats", where=where)
        if tensor.ndim not in (2, 4):
            raise AdapterError(f"{module}: lora_{letter} has {tensor.ndim} axes; a linear layer has 2, a convolution 4", where=where)
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{module}: lora_{letter} contains NaN or infinity", where=where, fix="the training that made it blew up")
    if a.shape[0] != b.shape[1]:
        turned = " (A and B look swapped or transposed)" if a.shape[1] == b.shape[0] or a.shape[0] == b.shape[0] else ""
        raise AdapterError(f"{module}: rank {a.shape[0]} in lora_A but {b.shape[1]} in lora_B{turned}", where=where)
    if a.shape[0] == 0:
        raise AdapterError(f"{module}: rank 0", where=where)
    if a.ndim != b.ndim or (b.ndim == 4 and tuple(b.shape[2:]) != (1, 1)):
        raise AdapterError(f"{module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not belong to one layer", where=where)


def peft_settings(tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """The fields of peft's configuration (of LoRA or of the tensors' own form) that describe canonical tensors; alpha equals
    rank in every module.

    Patterns start with ^ because peft matches them as suffixes: a bare `proj_out` would also hit `blocks.0.proj_out`.
    """
    import re

    adapter = AdapterFile(tensors)
    form, ranks = adapter.form, adapter.ranks
    usual = Counter(ranks.values()).most_common(1)[0][0]
    odd = {"^" + re.escape(module): rank for module, rank in sorted(ranks.items()) if rank != usual}
    settings: dict[str, Any] = {"target_modules": sorted(ranks)}
    if form is OFT:
        if odd:
            raise AdapterError(f"OFT blocks of different sizes ({usual} and {next(iter(odd.values()))}), which peft cannot hold in one adapter")
        settings |= {"r": 0, "oft_block_size": usual, "bias": "none"}
    else:
        settings |= {"r": usual, form.alpha: usual, "rank_pattern": odd, "alpha_pattern": dict(odd)}
    if form is LORA:
        settings |= {"bias": "none", "use_dora": adapter.uses_dora, "use_rslora": False}
    return {prefix + key: value for key, value in settings.items()}


def write_adapter(path: Path | str, adapter: AdapterFile) -> Path:
    """Write `adapter` to a `.safetensors` path in the canonical layout that diffusers and peft read; return the path.

    Forms other than LoRA go into PEFT's layout, which is the only one that is loaded; under PEFT's own file name its
    `adapter_config.json` comes beside it. Atomic; the header is sorted, so that the same tensors and metadata give the
    same bytes. Raises AdapterError for tensors that `check_tensors` refuses, OSError when the disk does.
    """
    from finetune.adapters.tensor_files import dtype_name, write_tensors

    path = Path(path)
    for part in (adapter.tensors, *adapter.text_encoders.values()):
        if part or not adapter.text_encoders:
            check_tensors(part, str(path))
    if adapter.form is not LORA:
        return _write_peft_form(path, adapter)
    tensors = {FILE_PREFIX + key: value for key, value in adapter.tensors.items()}
    settings = peft_settings(adapter.tensors, FILE_PREFIX) if adapter.tensors else {}
    for part, values in adapter.text_encoders.items():
        tensors |= {f"{part}.{key}": value for key, value in values.items()}
        # Newer transformers have no `text_model` in some encoders; without it peft's suffixes fit both.
        settings |= peft_settings({key.removeprefix("text_model."): value for key, value in values.items()}, f"{part}.")
    metadata = {**adapter.metadata, "format": "pt", PEFT_KEY: json.dumps(settings, sort_keys=True)}
    shapes = {key: (dtype_name(value), tuple(value.shape)) for key, value in tensors.items()}
    write_tensors(path, shapes, metadata, tensors.__getitem__)
    return path


def _write_peft_form(path: Path, adapter: AdapterFile) -> Path:
    from data_tools.atomic_files import write_text
    from finetune.adapters.tensor_files import dtype_name, write_tensors

    if path.name == PEFT_FILE:
        write_text(path.with_name(PEFT_CONFIG), peft_config_text(adapter))
    tensors = {PEFT_PREFIX + key: value for key, value in adapter.tensors.items()}
    shapes = {key: (dtype_name(value), tuple(value.shape)) for key, value in tensors.items()}
    write_tensors(path, shapes, {**adapter.metadata, "format": "pt"}, tensors.__getitem__)
    return path


def peft_config_text(adapter: AdapterFile) -> str:
    """The `adapter_config.json` that `PeftModel.from_pretrained` reads."""
    settings = {"peft_type": adapter.form.peft_type, "base_model_name_or_path": adapter.provenance.get("base"), "inference_mode": True}
    return json.dumps({**settings, **peft_settings(adapter.tensors)}, indent=2, sort_keys=True) + "\n"


def usual_name(adapter: AdapterFile) -> str:
    """The file name under which other tools look for an adapter of this form."""
    return FILE_NAME if adapter.form is LORA else PEFT_FILE


def read_adapter(path: Path | str, key_maps: Mapping[str, KeyMap] | None = None, *, family: str | None = None,
                 split_qkv_as_trained: bool = False) -> AdapterFile:
    """Read an adapter file, a PEFT folder, or a folder with one adapter file, in any layout of `key_maps`.

    key_maps: family name -> KeyMap (`finetune.families.key_layouts.KEY_MAPS`); without them only layouts that use the
    model's own module names are understood.  family: decides where keys and shapes alone leave a doubt.
    split_qkv_as_trained: kohya's `split_qkv` files act weaker than trained in every reader; True restores the strength.
    Everything is checked before it is returned; raises AdapterError with the file, the key and what to do.
    """
    from finetune.adapters.strict_reading import read_strictly

    return read_strictly(Path(path), key_maps or {}, family, split_qkv_as_trained)
