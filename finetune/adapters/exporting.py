"""From canonical tensors to other tools' files: kohya, ComfyUI, PEFT folders, OneTrainer, and Tencent's own layout.

What was written is read back with our own importer and compared before it counts. Where a layout fuses layers that were
adapted apart, the rank grows; the report says by how much, and a smaller rank can be asked for at a stated error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.atomic_files import write_text
from finetune.adapters import factors
from finetune.adapters.adapter_file import (
    A_SUFFIX,
    B_SUFFIX,
    FILE_NAME,
    MAGNITUDE_SUFFIX,
    AdapterFile,
    peft_settings,
    read_adapter,
    write_adapter,
)
from finetune.adapters.keys import CANONICAL, EQUAL, INPUT, KeyMap, Place
from finetune.adapters.layouts import OFFICIAL_LAYOUTS
from finetune.adapters.strict_reading import PEFT_CONFIG, PEFT_FILE
from finetune.adapters.tensor_files import dtype_name, write_tensors
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("diffusers", "peft", "kohya", "comfy", "onetrainer", *OFFICIAL_LAYOUTS)
FOLDERS = ("peft", *OFFICIAL_LAYOUTS)
ENCODER_PREFIX = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}


@dataclass
class Export:
    """path: the file or folder written.  keys: tensors in it.  rank_growth: foreign module -> (widest rank before, rank
    after) where fusing made it grow.  errors: foreign module -> relative error of delta W where a rank was asked for."""

    path: Path
    keys: int = 0
    rank_growth: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FusedPair:
    """One module of the foreign layout. delta W = B @ A."""

    a: Tensor
    b: Tensor
    magnitude: Tensor | None


def export(adapter: AdapterFile, layout: str, path: Path | str, key_map: KeyMap | None = None, *, rank: int | None = None,
           shapes: Mapping[str, tuple[int, ...]] | None = None) -> Export:
    """Write `adapter` in `layout` to `path` (a folder for "peft" and "tencent") and prove it by reading it back.

    key_map: of the adapter's family; needed wherever names change.  rank: truncate fused modules to this rank.
    shapes: weight shapes of the base (`lora.weight_shapes`), for fused layers of which only some parts are adapted.
    Raises AdapterError for a layout that this family does not have, or that cannot hold the adapter.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise AdapterError(f"no layout is called {layout!r}", fix=f"one of {', '.join(LAYOUTS)}")
    naming = key_map.layouts.get(layout, CANONICAL) if key_map else CANONICAL
    if layout in OFFICIAL_LAYOUTS and naming == CANONICAL:
        raise AdapterError(f"{key_map.family if key_map else 'a family that was not recognised'} has no official {layout.title()} layout")
    if layout in ("kohya", "comfy") and key_map is None:
        raise AdapterError(f"the {layout} layout needs the family's name table", fix="say which family the adapter belongs to with --family")
    if layout == "diffusers":
        write_adapter(path, adapter)
        return Export(path, len(adapter.tensors))
    result = Export(path)
    modules = _foreign_modules(adapter, naming, key_map, shapes or {}, rank, result)
    if layout in FOLDERS:
        _write_peft(path, adapter, modules, result)
    else:
        _write_flat(path, layout, adapter, modules, result)
    _prove(adapter, path, key_map, result)
    return result


def _foreign_modules(adapter: AdapterFile, naming: str, key_map: KeyMap | None, shapes: Mapping[str, tuple[int, ...]],
                     rank: int | None, result: Export) -> dict[str, FusedPair]:
    if key_map is None or naming == CANONICAL:
        return {module: FusedPair(*adapter.pair(module), adapter.tensors.get(module + MAGNITUDE_SUFFIX)) for module in adapter.modules}
    modules: dict[str, FusedPair] = {}
    for place in key_map.places_for(adapter.modules, naming):
        pair = _fuse(adapter, place, shapes)
        before = max(adapter.ranks[module] for module in place.modules if module in adapter.ranks)
        if pair.a.shape[0] > before:
            result.rank_growth[place.foreign] = (before, pair.a.shape[0])
        if rank is not None and pair.a.shape[0] > rank:
            a, b, result.errors[place.foreign] = factors.truncate(pair.a, pair.b, rank)
            pair = FusedPair(a, b, pair.magnitude)
        modules[place.foreign] = pair
    return modules


def _fuse(adapter: AdapterFile, place: Place, shapes: Mapping[str, tuple[int, ...]]) -> FusedPair:
    present = set(adapter.modules)
    parts = [adapter.pair(module) if module in present else None for module in place.modules]
    if len(parts) == 1:
        a, b = adapter.pair(place.modules[0])
        if place.rule.swap_halves and b.shape[0] == 2 * a.shape[1]:
            b = factors.swap_row_halves(b)
        return FusedPair(a, b, adapter.tensors.get(place.modules[0] + MAGNITUDE_SUFFIX))
    a, b = factors.join_rows(parts, _part_rows(place, parts, shapes))
    magnitudes = [adapter.tensors.get(module + MAGNITUDE_SUFFIX) for module in place.modules]
    if all(item is None for item in magnitudes):
        return FusedPair(a, b, None)
    import torch

    if any(item is None for item in magnitudes):
        raise AdapterError(f"{place.foreign}: DoRA on some parts of a fused layer only, which this layout cannot say")
    return FusedPair(a, b, torch.cat([item for item in magnitudes if item is not None]))


def _part_rows(place: Place, parts: list[tuple[Tensor, Tensor] | None], shapes: Mapping[str, tuple[int, ...]]) -> list[int]:
    """Rows of every part of a fused layer: of the adapter, of the base's shapes, or by the family's proportions."""
    inputs = next(part[0].shape[1] for part in parts if part is not None)
    found = [part[1].shape[0] if part is not None else shapes[module][0] if module in shapes else 0
             for module, part in zip(place.modules, parts, strict=True)]
    for index, row in enumerate(place.rule.rows):
        if found[index]:
            continue
        alike = [rows for rows, other in zip(found, place.rule.rows, strict=True) if rows and other == row]
        if row == INPUT:
            found[index] = inputs
        elif row == EQUAL or alike:
            found[index] = alike[0]
        else:
            found[index] = round(inputs * place.rule.rest_over_input)
    return found


def _write_peft(path: Path, adapter: AdapterFile, modules: Mapping[str, FusedPair], result: Export) -> None:
    if adapter.text_encoders:
        raise AdapterError("a PEFT folder holds one model; this adapter also trains a text encoder", fix="use the diffusers or kohya layout")
    if path.suffix == ".safetensors":
        raise AdapterError("this layout is a folder, not a file", where=str(path))
    canonical: dict[str, Tensor] = {}
    for module, pair in modules.items():
        canonical |= {module + A_SUFFIX: pair.a, module + B_SUFFIX: pair.b}
        if pair.magnitude is not None:
            canonical[module + MAGNITUDE_SUFFIX] = pair.magnitude
    tensors = {f"base_model.model.{key}": value for key, value in canonical.items()}
    settings = {"peft_type": "LORA", "base_model_name_or_path": adapter.provenance.get("base"), "inference_mode": True, **peft_settings(canonical)}
    write_text(path / PEFT_CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    _write(path / PEFT_FILE, tensors, {**_own_metadata(adapter), "format": "pt"}, result)


def _own_metadata(adapter: AdapterFile) -> dict[str, str]:
    """What may travel on: everything but other layouts' private notes and texts that leak captions or folder names."""
    return {key: value for key, value in adapter.metadata.items() if not key.startswith(("ss_tag", "ss_dataset", "ss_bucket"))}


def _write_flat(path: Path, layout: str, adapter: AdapterFile, modules: Mapping[str, FusedPair], result: Export) -> None:
    import torch

    if path.suffix != ".safetensors":
        raise AdapterError("this layout is one file, whose name ends in .safetensors", where=str(path))
    dotted = layout == "comfy"
    tensors: dict[str, Tensor] = {}
    for module, pair in modules.items():
        stem = f"diffusion_model.{module}" if dotted else ("lora_unet_" if layout == "kohya" else "lora_transformer_") + module.replace(".", "_")
        tensors |= _flat_pair(stem, pair, dotted)
    for part, values in adapter.text_encoders.items():
        encoder = AdapterFile(values)
        for module in encoder.modules:
            tensors |= _flat_pair(ENCODER_PREFIX[part] + module.replace(".", "_"), FusedPair(*encoder.pair(module), values.get(module + MAGNITUDE_SUFFIX)), dotted)
    metadata = {**_own_metadata(adapter), "format": "pt"}
    if not dotted:
        ranks = {int(pair.a.shape[0]) for pair in modules.values()}
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks, default=0)), "ss_network_alpha": str(float(max(ranks, default=0)))}
        metadata.pop("ss_network_args", None)
        for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
            tensors[key.removesuffix(".lora_down.weight") + ".alpha"] = torch.tensor(float(tensors[key].shape[0]))
    _write(path, tensors, metadata, result)


def _flat_pair(stem: str, pair: FusedPair, dotted: bool) -> dict[str, Tensor]:
    down, up = (".lora_A.weight", ".lora_B.weight") if dotted else (".lora_down.weight", ".lora_up.weight")
    tensors = {stem + down: pair.a, stem + up: pair.b}
    if pair.magnitude is not None:
        tensors[stem + ".dora_scale"] = pair.magnitude[:, None]
    return tensors


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], result: Export) -> None:
    write_tensors(path, {key: (dtype_name(value), tuple(value.shape)) for key, value in tensors.items()}, metadata, tensors.__getitem__)
    result.keys = len(tensors)


def _prove(adapter: AdapterFile, path: Path, key_map: KeyMap | None, result: Export) -> None:
    """Read the written file with the importer: every module must come back with the same delta W."""
    maps = {key_map.family: key_map} if key_map else None
    again = read_adapter(path, maps, family=key_map.family if key_map else None)
    wanted = {module for module in adapter.modules if adapter.tensors[module + B_SUFFIX].any()}
    missing = sorted(wanted - set(again.modules))
    if missing:
        raise AdapterError(f"{len(missing)} modules did not come back from the written file, first {missing[0]}", where=str(path))
    for module in sorted(wanted):
        expected, found = factors.probe(*adapter.pair(module)), factors.probe(*again.pair(module))
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
        if error > 2e-6 and not result.errors:
            raise AdapterError(f"{module}: the written file differs by {error:.1e}", where=str(path))
    strangers = [module for module in again.modules if module not in adapter.ranks and again.tensors[module + B_SUFFIX].any()]
    if strangers and not result.errors:
        raise AdapterError(f"{strangers[0]} is only in the written file", where=str(path))


def default_name(layout: str, stem: str) -> str:
    """A file or folder name that other tools expect for a layout."""
    if layout == "diffusers":
        return FILE_NAME
    return f"{stem}_{layout}" + ("" if layout in FOLDERS else ".safetensors")
