"""Bake adapters into a pipeline folder on disk, tensor by tensor: memory of one layer, whatever the size of the base."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.near_names import meant_path
from data_tools.progress import Progress
from finetune.adapters.arithmetic import Weighted
from finetune.adapters.attach import check_fit, check_strength
from finetune.adapters.base_weights import BaseWeights
from finetune.adapters.forms import OFT
from finetune.adapters.tensor_files import TensorFile, write_tensors
from finetune.adapters.text_encoders import NESTED, fitted
from finetune.adapters.weight_change import weight_change
from finetune.errors import AdapterError, BaseModelError

if TYPE_CHECKING:
    from torch import Tensor

PASSED_OVER = {".git", ".cache"}


def bake_pipeline(base: Path | str, out: Path | str, adapters: Sequence[Weighted], *, component: str = "transformer", progress: Progress | None = None) -> int:
    """Copy the diffusers pipeline folder `base` to `out` with `adapters` written into the weights of `component`, and their
    text-encoder parts into those encoders.

    Sums are made in float32 and rounded once to the base's dtype; the shards stay as they were cut. The folder appears
    under its final name only when it is whole. Returns the number of changed layers.
    Raises AdapterError when an adapter does not fit, a sum is not finite, or the base is quantised; BaseModelError when
    the base is not a pipeline folder or `out` is not free.
    """
    if not (Path(base) / "model_index.json").is_file():
        raise BaseModelError("not a pipeline folder (there is no model_index.json)", where=str(base), fix=meant_path(base, "give a base in diffusers layout"))
    return bake_folder(Path(base), Path(out), adapters, component=component, progress=progress)


def bake_folder(base: Path, out: Path, adapters: Sequence[Weighted], *, component: str, progress: Progress | None = None) -> int:
    """As `bake_pipeline`, for a folder of any kind; its weights lie in `component`, or in the folder itself when that is ""."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BaseModelError("exists already", where=str(out), fix="choose another --out")
    if base.resolve() == out.resolve() or base.resolve() in out.resolve().parents:
        raise BaseModelError("lies inside the base", where=str(out), fix="choose another --out")
    with ExitStack() as opened:
        weights = {slot: opened.enter_context(BaseWeights(base, slot)) for slot in (component, *sorted({slot for part in adapters for slot in part.adapter.text_encoders}))}
        parts = {slot: _parts_for(slot, weights[slot], adapters, slot == component) for slot in weights}
        _check_room(base, out)
        partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            _copy_rest(base, partial, {path.resolve() for each in weights.values() for path in each.files})
            changed = sum(_write_shards(weights[slot], base, partial, parts[slot], slot, progress or Progress()) for slot in weights)
            if out.exists():
                out.rmdir()
            os.replace(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return changed


def _parts_for(slot: str, weights: BaseWeights, adapters: Sequence[Weighted], is_main: bool) -> Sequence[Weighted]:
    """What of the adapters goes into the component `slot`, checked against its weights."""
    sign = weights.quantised
    if sign:
        raise AdapterError(f"the base is quantised ({sign}): baking into it would lose the adapter in the rounding", where=str(weights.folder),
                           fix="take the base in bf16 or fp32, bake, and quantise the result")
    parts = adapters if is_main else [
        Weighted(fitted(part.adapter, slot, any(name.startswith(NESTED) for name in weights.layer_shapes)), part.weight) for part in adapters if slot in part.adapter.text_encoders]
    for part in parts:
        check_fit(part.adapter, weights.layer_shapes)
    _check_turning(parts)
    return parts


def _check_turning(adapters: Sequence[Weighted]) -> None:
    turning = [part for part in adapters if part.adapter.form is OFT]
    if len(turning) > 1:
        raise AdapterError(f"{len(turning)} OFT adapters, whose turns do not add up", fix="bake one after the other")
    for part in turning:
        check_strength(part.adapter.form, part.weight)


def _check_room(base: Path, out: Path) -> None:
    needed = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise BaseModelError(f"{needed >> 20} MiB are needed and {free >> 20} MiB are free", where=str(existing), fix="free disk space or choose another --out")


def _copy_rest(base: Path, partial: Path, weight_files: set[Path]) -> None:
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        if PASSED_OVER & set(relative.parts) or not path.is_file() or path.resolve() in weight_files:
            continue
        (partial / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, partial / relative)


def _write_shards(weights: BaseWeights, base: Path, partial: Path, adapters: Sequence[Weighted], component: str, progress: Progress) -> int:
    touched = {module for part in adapters for module in part.adapter.modules}
    changed = 0
    with progress.phase("baking", len(weights.keys)) as advance:
        for path in weights.files:
            file = weights.opened[path]

            def tensor_of(key: str, file: TensorFile = file) -> Tensor:
                nonlocal changed
                module = key.removesuffix(".weight")
                advance(1, key)
                if not key.endswith(".weight") or module not in touched:
                    return file.read(key)
                changed += 1
                return baked_tensor(file.read(key), module, adapters)

            order = sorted(file.header.entries, key=lambda key: file.header.entries[key].start)
            shapes = {key: (entry.dtype, entry.shape) for key, entry in file.header.entries.items()}
            write_tensors(partial / component / path.name if (base / component).is_dir() else partial / path.name, shapes, file.header.metadata, tensor_of, order)
    return changed


def baked_tensor(weight: Tensor, module: str, adapters: Sequence[Weighted]) -> Tensor:
    """`weight` of one layer with every adapter's delta W added at its strength, in the dtype of `weight`.

    Raises AdapterError when the sum is not finite in that dtype.
    """
    import torch

    result = weight.float()
    for part in adapters:
        if tensors := part.adapter.parts(module):
            result = result + weight_change(tensors, weight, part.weight)
    baked = result.to(weight.dtype)
    if not torch.isfinite(baked).all():
        raise AdapterError(f"{module}: base and adapter together are not finite in {str(weight.dtype).removeprefix('torch.')}")
    return baked
