"""From canonical tensors to other tools' files: kohya, ComfyUI, PEFT folders, OneTrainer, and Tencent's own layout.

What was written is read back with our own importer and compared before it counts. Where a layout fuses layers that were
adapted apart, the rank grows; the report says by how much, and a smaller rank can be asked for at a stated error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.atomic_files import write_text
from finetune.adapters import factors
from finetune.adapters.adapter_file import FILE_NAME, PEFT_CONFIG, PEFT_FILE, AdapterFile, peft_config_text, read_adapter, write_adapter
from finetune.adapters.arithmetic import resize
from finetune.adapters.forms import A_SUFFIX, B_SUFFIX, LORA, MAGNITUDE_SUFFIX, OFT, PEFT_PREFIX
from finetune.adapters.keys import CANONICAL, EQUAL, INPUT, KeyMap, Place
from finetune.adapters.layouts import OFFICIAL_LAYOUTS
from finetune.adapters.lycoris import as_lora
from finetune.adapters.tensor_files import dtype_name, write_tensors
from finetune.adapters.text_encoders import joined
from finetune.adapters.verify import same_tensors
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

LAYOUTS = ("diffusers", "peft", "kohya", "comfy", "onetrainer", "lycoris", *OFFICIAL_LAYOUTS)
FOLDERS = ("peft", *OFFICIAL_LAYOUTS)
LYCORIS_PREFIX = "lycoris_"
FLAT_PREFIX = {"kohya": "lora_unet_", "onetrainer": "lora_transformer_", "lycoris": LYCORIS_PREFIX}
ENCODER_PREFIX = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}


@dataclass
class Export:
    """path: the file or folder written.  keys: tensors in it.  rank_growth: foreign module -> (widest rank before, rank
    after) where fusing made it grow.  errors: foreign module -> relative error of delta W where a rank was asked for (of DoRA,
    of what is added to the weight before its rows are normed).  cut: the adapter's own names of the modules in `errors`."""

    path: Path
    keys: int = 0
    rank_growth: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)


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
    if layout in ("kohya", "comfy", "lycoris") and key_map is None:
        raise AdapterError(f"the {layout} layout needs the family's name table", fix="say which family the adapter belongs to with --family")
    result = Export(path)
    if adapter.form is not LORA and layout not in ("peft", "lycoris"):
        adapter = _as_lora_of_rank(adapter, layout, rank, result)
    if layout == "diffusers" or adapter.form is not LORA:
        return _write_own_form(path, layout, adapter, key_map, result)
    modules = _foreign_modules(adapter, naming, key_map, shapes or {}, rank, result)
    if layout in FOLDERS:
        _write_peft(path, adapter, modules, result)
    else:
        _write_flat(path, layout, adapter, modules, key_map.kohya_encoders if key_map and layout != "onetrainer" else {}, result)
    _prove(adapter, path, key_map, result)
    return result


def _as_lora_of_rank(adapter: AdapterFile, layout: str, rank: int | None, result: Export) -> AdapterFile:
    """A LoHa or LoKr for a layout of LoRAs: only where a rank is asked for, since the exact one is large."""
    written = as_lora(adapter)
    if rank is None:
        raise AdapterError(f"the {layout} layout cannot hold a {adapter.form.title}", where=str(result.path),
                           fix=f"take the layout peft or lycoris; or --rank N writes it out as a LoRA, exactly from rank {max(written.ranks.values())} on")
    cut = resize(written, rank=rank)
    result.errors |= cut.errors
    return cut.adapter


def _write_own_form(path: Path, layout: str, adapter: AdapterFile, key_map: KeyMap | None, result: Export) -> Export:
    """The canonical file, and the two layouts of LoHa, LoKr and OFT: PEFT's folder, and LyCORIS names, which have no OFT."""
    import torch

    if layout == "diffusers":
        write_adapter(path, adapter)
    elif layout == "peft":
        _check_place(path, folder=True)
        write_adapter(path / PEFT_FILE, adapter)
    elif adapter.form is OFT:
        raise AdapterError("the lycoris layout cannot hold peft's OFT", where=str(path), fix="take the layout peft, or bake the adapter into its base")
    else:
        _check_place(path, folder=False)
        stems = {module: LYCORIS_PREFIX + module.replace(".", "_") for module in adapter.modules}
        tensors = {stems[module] + suffix: tensor for module in adapter.modules for suffix, tensor in adapter.parts(module).items()}
        tensors |= {stems[module] + ".alpha": torch.tensor(float(rank)) for module, rank in adapter.ranks.items()}
        _write(path, tensors, {**_own_metadata(adapter), "format": "pt", "ss_network_module": "lycoris.kohya"}, result)
        _prove(as_lora(adapter), path, key_map, result)
    if layout != "lycoris":
        wanted = joined(adapter)
        result.keys = len(wanted.tensors)
        same_tensors(joined(read_adapter(path)), wanted, str(path))
    return result


def _check_place(path: Path, folder: bool) -> None:
    if folder and path.suffix == ".safetensors":
        raise AdapterError("this layout is a folder, not a file", where=str(path))
    if not folder and path.suffix != ".safetensors":
        raise AdapterError("this layout is one file, whose name ends in .safetensors", where=str(path))


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
            result.cut.update(place.modules)
            # DoRA's magnitudes are the lengths of the finished rows and stay: a row that is off by an angle would be nearest at cos(angle)
            # of its length, which only the base could tell and which errs less by no more than an eighth of the angle's square.
            pair = FusedPair(a, b, pair.magnitude)
        modules[place.foreign] = pair
    return modules


def _fuse(adapter: AdapterFile, place: Place, shapes: Mapping[str, tuple[int, ...]]) -> FusedPair:
    present = set(adapter.modules)
    parts = [adapter.pair(module) if module in present else None for module in place.modules]
    if len(parts) == 1:
        a, b = adapter.pair(place.modules[0])
        magnitude = adapter.tensors.get(place.modules[0] + MAGNITUDE_SUFFIX)
        if place.rule.swap_halves and b.shape[0] == 2 * a.shape[1]:
            b, magnitude = factors.swap_row_halves(b), None if magnitude is None else factors.swap_row_halves(magnitude)
        return FusedPair(a, b, magnitude)
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
    _check_place(path, folder=True)
    canonical: dict[str, Tensor] = {}
    for module, pair in modules.items():
        canonical |= {module + A_SUFFIX: pair.a, module + B_SUFFIX: pair.b}
        if pair.magnitude is not None:
            canonical[module + MAGNITUDE_SUFFIX] = pair.magnitude
    tensors = {PEFT_PREFIX + key: value for key, value in canonical.items()}
    write_text(path / PEFT_CONFIG, peft_config_text(replace(adapter, tensors=canonical)))
    _write(path / PEFT_FILE, tensors, {**_own_metadata(adapter), "format": "pt"}, result)


def _own_metadata(adapter: AdapterFile) -> dict[str, str]:
    """What may travel on: everything but other layouts' private notes and texts that leak captions or folder names."""
    return {key: value for key, value in adapter.metadata.items() if not key.startswith(("ss_tag", "ss_dataset", "ss_bucket"))}


def _write_flat(path: Path, layout: str, adapter: AdapterFile, modules: Mapping[str, FusedPair], numbering: Mapping[str, str], result: Export) -> None:
    import torch

    _check_place(path, folder=False)
    dotted = layout == "comfy"
    tensors: dict[str, Tensor] = {}
    for module, pair in modules.items():
        stem = f"diffusion_model.{module}" if dotted else FLAT_PREFIX[layout] + module.replace(".", "_")
        tensors |= _flat_pair(stem, pair, dotted)
    for part, values in adapter.text_encoders.items():
        encoder = AdapterFile(values)
        for module in encoder.modules:
            tensors |= _flat_pair(ENCODER_PREFIX[numbering.get(part, part)] + module.replace(".", "_"), FusedPair(*encoder.pair(module), values.get(module + MAGNITUDE_SUFFIX)), dotted)
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
    """Read the written file with the importer: every module, text encoders' too, must come back with the same delta W (but where
    it was cut to a rank) and the same magnitudes."""
    maps = {key_map.family: key_map} if key_map else None
    adapter, again = joined(adapter), joined(read_adapter(path, maps, family=key_map.family if key_map else None))
    wanted, came = _acting(adapter), _acting(again)
    missing = sorted(wanted - set(again.modules))
    if missing:
        raise AdapterError(f"{len(missing)} modules did not come back from the written file, first {missing[0]}", where=str(path))
    for module in sorted(wanted):
        expected, found = factors.probe(*adapter.pair(module)), factors.probe(*again.pair(module))
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
        if error > 2e-6 and module not in result.cut:
            raise AdapterError(f"{module}: the written file differs by {error:.1e}", where=str(path))
        _same_magnitudes(module, adapter, again, path)
    strangers = sorted(came - set(adapter.modules) - result.cut)
    if strangers:
        raise AdapterError(f"{strangers[0]} is only in the written file", where=str(path))


def _acting(adapter: AdapterFile) -> set[str]:
    """Modules that change something: by B, or by magnitudes that need not be the base's."""
    return {module for module in adapter.modules if module + MAGNITUDE_SUFFIX in adapter.tensors or adapter.tensors[module + B_SUFFIX].any()}


def _same_magnitudes(module: str, adapter: AdapterFile, again: AdapterFile, path: Path) -> None:
    expected, found = adapter.tensors.get(module + MAGNITUDE_SUFFIX), again.tensors.get(module + MAGNITUDE_SUFFIX)
    if (expected is None) != (found is None) or (expected is not None and not found.float().equal(expected.float())):
        raise AdapterError(f"{module}: its magnitudes are others in the written file", where=str(path))


def default_name(layout: str, stem: str) -> str:
    """A file or folder name that other tools expect for a layout."""
    if layout == "diffusers":
        return FILE_NAME
    return f"{stem}_{layout}" + ("" if layout in FOLDERS else ".safetensors")
