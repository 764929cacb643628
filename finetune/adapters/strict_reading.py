"""Read a stranger's adapter file: find it, recognise it, check it, and only then hand its tensors out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from finetune.adapters.adapter_file import FILE_NAME, PEFT_CONFIG, PEFT_FILE, PEFT_KEY, PROVENANCE_KEY, AdapterFile, check_tensors
from finetune.adapters.conversion import own_form, to_canonical
from finetune.adapters.foreign_scales import ForeignSettings, diffusers_settings, peft_folder_settings
from finetune.adapters.keys import KeyMap
from finetune.adapters.layouts import TRANSFORMER, Detection, detect_layout
from finetune.adapters.tensor_files import Header, TensorFile
from finetune.errors import AdapterError

DROPPED_METADATA = ("modelspec.thumbnail", PEFT_KEY)


def locate(path: Path) -> Path:
    """The one `.safetensors` file that a path means. Raises AdapterError when there is none, or a choice."""
    if not path.is_dir():
        return path
    for folder in (path, path / "adapter"):
        for name in (PEFT_FILE, FILE_NAME):
            if (folder / name).exists():
                return folder / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise AdapterError(f"{len(found)} adapter files in this folder", where=str(path), fix=f"name one: {', '.join(item.name for item in found[:5])}")
    pickles = sorted(item.name for item in path.glob("*.bin"))
    raise AdapterError(f"only a pickle file in this folder ({pickles[0]}), which is never read" if pickles else "no .safetensors file in this folder", where=str(path))


def identity_of(path: Path) -> str:
    """SHA-256, hex, of what decides an adapter's effect: its file, and of a PEFT folder also `adapter_config.json`, whose alpha
    and ranks scale the same weights. Raises AdapterError from `locate`, OSError."""
    file = locate(path)
    with open(file, "rb") as content:
        weights = hashlib.file_digest(content, "sha256")
    config = _config_beside(file)
    return weights.hexdigest() if config is None else hashlib.sha256(weights.digest() + config.read_bytes()).hexdigest()


def _config_beside(file: Path) -> Path | None:
    """The configuration that a PEFT folder's weights are read with."""
    config = file.with_name(PEFT_CONFIG)
    return config if file.name == PEFT_FILE and config.exists() else None


def family_hint(metadata: Mapping[str, str], key_maps: Mapping[str, KeyMap]) -> str | None:
    """The family that a header claims, by our own provenance or other tools' conventions; never trusted alone."""
    try:
        own = json.loads(metadata.get(PROVENANCE_KEY, "{}"))
    except (ValueError, RecursionError):
        own = {}
    said = own.get("family") if isinstance(own, dict) else None
    if isinstance(said, str):
        # A family of the registry may be a variant of the one that has the names: "<family>_dev".
        known = sorted((name for name in key_maps if said == name or said.startswith(name + "_")), key=len)
        return known[-1] if known else None
    claim = " ".join(metadata.get(key, "")[:200].lower() for key in ("modelspec.architecture", "ss_base_model_version"))
    fitting = [(len(mark), name) for name, key_map in key_maps.items() for mark in key_map.hints if mark in claim]
    return max(fitting)[1] if fitting else None


def recognise(path: Path, header: Header, key_maps: Mapping[str, KeyMap], family: str | None = None) -> Detection:
    """Layout and family of a file from its header."""
    return detect_layout(header.entries, key_maps, str(path), family, family_hint(header.metadata, key_maps))


def settings_of(path: Path, header: Header, part: str) -> ForeignSettings:
    """What the file, or the configuration beside it, says about strength."""
    config = _config_beside(path)
    if config is not None:
        return peft_folder_settings(config, str(config))
    return diffusers_settings(header.metadata, str(path), part)


def read_strictly(path: Path, key_maps: Mapping[str, KeyMap], family: str | None, split_qkv_as_trained: bool) -> AdapterFile:
    """As `adapter_file.read_adapter` says."""
    path = locate(path)
    with TensorFile(path) as file:
        detection = recognise(path, file.header, key_maps, family)
        key_map = key_maps.get(detection.family) if detection.family else None
        settings = {part: settings_of(path, file.header, part) for part in sorted({part for part, _ in detection.groups})}
        work = own_form(detection, file.header.entries, file.read, settings, str(path)) or to_canonical(
            detection, file.header.entries, file.read, settings, key_map, str(path), split_qkv_as_trained)
        metadata = {key: value for key, value in file.header.metadata.items() if key not in DROPPED_METADATA}
    tensors, encoders = work.parts.pop(TRANSFORMER, {}), work.parts
    notes = [*work.notes, *_split_qkv_note(work.kohya_blocks, metadata, split_qkv_as_trained)]
    for part in (tensors, *encoders.values()):
        if part or not encoders:
            notes += check_tensors(part, str(path))
    if encoders:
        notes.append(f"also trains {', '.join(sorted(encoders))}")
    return AdapterFile(tensors, metadata, encoders, detection.layout, detection.family, detection.alternatives, work.scales, tuple(notes))


def _split_qkv_note(modules: list[str], metadata: Mapping[str, str], as_trained: bool) -> list[str]:
    """kohya's `split_qkv` trains q, k and v at alpha / rank but stores one alpha beside the joint rank."""
    if not modules or not (as_trained or '"split_qkv": "True"' in metadata.get("ss_network_args", "")):
        return []
    strength = "restored to the trained strength" if as_trained else "kept as every reader reads them, weaker than trained"
    return [f"{len(modules)} fused modules were trained apart (kohya split_qkv): {strength}"]
