"""Read a stranger's adapter file: find it, recognise it, check it, and only then hand its tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from finetune.adapters.adapter_file import FILE_NAME, FILE_PREFIX, AdapterFile, check_tensors
from finetune.adapters.keys import KeyMap
from finetune.adapters.tensor_files import TensorFile
from finetune.errors import AdapterError


def locate(path: Path) -> Path:
    """The one `.safetensors` file that a path means. Raises AdapterError when there is none, or a choice."""
    if not path.is_dir():
        return path
    for name in ("adapter_model.safetensors", FILE_NAME):
        if (path / name).exists():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise AdapterError("no .safetensors file in this folder", where=str(path))
    raise AdapterError(f"{len(found)} adapter files in this folder", where=str(path), fix=f"name one: {', '.join(item.name for item in found[:5])}")


def read_strictly(path: Path, key_maps: Mapping[str, KeyMap], family: str | None, split_qkv_as_trained: bool) -> AdapterFile:
    """As `adapter_file.read_adapter` says."""
    path = locate(path)
    with TensorFile(path) as file:
        odd = [key for key in file.header.entries if ".lora_" not in key]
        if odd:
            raise AdapterError(f"{odd[0]} is not a LoRA tensor", where=str(path))
        tensors = {key.removeprefix(FILE_PREFIX): file.read(key) for key in file.header.entries}
        metadata = dict(file.header.metadata)
    notes = check_tensors(tensors, str(path))
    return AdapterFile(tensors, metadata, notes=tuple(notes))
