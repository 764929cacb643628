"""Quantised base weights, made once from the mapped files and kept in the cache folder under a hash of what made them.

Quantising 17 billion parameters takes minutes; reading them back takes none, since they are mapped from the file.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_tools.atomic_files import whole_file, write_text
from data_tools.progress import Progress
from finetune.errors import TrainingError
from finetune.families.loading import iterate_tensors, weight_files
from finetune.families.mapped_pages import trim_heap
from finetune.training.encoding_cache import component_fingerprint, key_of
from finetune.training.placement_nf4 import quantise_nf4

# Raised when the same weights would be quantised to other numbers than before.
QUANTISING_VERSION = "1"
INVENTORY = "complete.json"
# Quantised tensors are written to disk whenever this many bytes have come together.
FILE_BYTES = 1 << 30


def quantise(weight: Tensor, hold: str) -> dict[str, Tensor]:
    """(out, in) floating point -> named parts: "" is the packed weight, the others go with it.

    hold: "int8" (one scale a row, LLM.int8) or "nf4" (blocks of 64, their scales quantised again, QLoRA).
    """
    if hold == "int8":
        # float32 throughout: bitsandbytes' own rounding, without its detour over float16.
        scales = weight.float().abs().amax(dim=1)
        packed = torch.round(weight.float() * (127 / scales.clamp_min(1e-30)).unsqueeze(1)).to(torch.int8)
        return {"": packed, "SCB": scales}
    return quantise_nf4(weight)


def _parts(tensors: Iterator[tuple[str, Tensor]], wanted: Collection[str], hold: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in wanted:
            for part, value in quantise(tensor, hold).items():
                yield f"{module}|{part}", value


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    path = folder / f"{number:05d}.safetensors"
    with whole_file(path) as temporary:
        save_file(tensors, temporary)
    tensors.clear()
    trim_heap()
    return {path.name: path.stat().st_size}


def _make(source: Path, folder: Path, wanted: Collection[str], hold: str, progress: Progress) -> None:
    """Quantise tensor by tensor; the inventory is written last and makes the folder count as whole."""
    files, collected, size = {}, {}, 0
    with progress.phase(f"quantising the base to {hold}, once", len(wanted)) as advance:
        for name, value in _parts(iterate_tensors(weight_files(source)), wanted, hold):
            collected[name] = value
            size += value.nbytes
            if name.endswith("|"):
                advance()
            elif size >= FILE_BYTES:
                files |= _write(folder, len(files), collected)
                size = 0
        if collected:
            files |= _write(folder, len(files), collected)
    write_text(folder / INVENTORY, json.dumps(files))


def _is_whole(folder: Path) -> bool:
    try:
        files = json.loads((folder / INVENTORY).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, AttributeError):
        return False


def quantised_weights(source: Path, wanted: Collection[str], hold: str, cache_folder: Path, progress: Progress) -> dict[str, dict[str, Tensor]]:
    """Module name -> its quantised parts, mapped from the cache; made there first when they are missing or damaged.

    source: the component's folder.  wanted: full names of linear modules.  Raises TrainingError when the disk refuses.
    """
    key = key_of("quantised", QUANTISING_VERSION, hold, component_fingerprint([source], cache_folder), sorted(wanted))
    folder = Path(cache_folder) / "quantised" / key
    if not _is_whole(folder):
        try:
            _make(source, folder, wanted, hold, progress)
        except (OSError, SafetensorError) as problem:
            raise TrainingError(f"cannot keep the quantised base: {getattr(problem, 'strerror', None) or problem}", where=str(folder),
                                fix="free disk space, or set BRUSHWORK_CACHE to another folder") from problem
    found: dict[str, dict[str, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt", device="cpu") as opened:
            for name in opened.keys():
                module, _, part = name.partition("|")
                found.setdefault(module, {})[part] = opened.get_tensor(name)
    return found
