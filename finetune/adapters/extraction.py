"""Extract a LoRA from a fine-tuned checkpoint: the low-rank part of what changed, layer by layer, streaming."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.progress import Progress
from finetune.adapters.adapter_file import A_SUFFIX, B_SUFFIX, AdapterFile
from finetune.adapters.arithmetic import low_rank, rank_for_energy
from finetune.adapters.base_weights import BaseWeights
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

# Relative size of the rounding of a stored weight: below it, a difference is noise.
ROUNDING = {"F64": 1e-15, "F32": 1e-7, "BF16": 4e-3, "F16": 5e-4}


@dataclass
class Extraction:
    """adapter: the LoRA.  errors: module -> relative error of its delta W.  unchanged: modules that did not change.
    carried_not: changed tensors that a LoRA cannot carry (norms, biases, embeddings), name -> relative change."""

    adapter: AdapterFile
    errors: dict[str, float] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    carried_not: dict[str, float] = field(default_factory=dict)


def extract(base: Path | str, tuned: Path | str, *, rank: int, energy: float | None = None, targets: str = r".*", component: str = "transformer",
            seed: int = 0, progress: Progress | None = None) -> Extraction:
    """The LoRA of at most `rank` that best turns `base` into `tuned`; both as `BaseWeights` takes them.

    energy: (0, 1], keep a smaller rank where that much of the squared singular values is reached.
    targets: a full-match expression over module names.  Memory: two layers.
    Raises AdapterError when the two do not hold the same tensors of the same shapes, or nothing changed.
    """
    if rank < 1 or (energy is not None and not 0 < energy <= 1):
        raise AdapterError("a rank is at least 1, an energy above 0 and at most 1")
    try:
        pattern = re.compile(targets)
    except re.error as problem:
        raise AdapterError(f"not a regular expression: {problem}", where=f"--targets {targets}") from None
    result, tensors = Extraction(AdapterFile({})), {}
    with BaseWeights(base, component) as before, BaseWeights(tuned, component) as after:
        _same_architecture(before, after)
        layers = before.layer_shapes
        with (progress or Progress()).phase("extracting", len(before.keys)) as advance:
            for key in before.keys:
                advance(1, key)
                module = key.removesuffix(".weight")
                old, new = before.read(key), after.read(key)
                difference = new.float() - old.float()
                change = _change(old, new, before.entry(key).dtype, after.entry(key).dtype)
                if not math.isfinite(float(difference.norm())):
                    raise AdapterError(f"{key} contains NaN or infinity in one of the two models", where=str(tuned), fix="the training that made it blew up")
                if not _changed(change, before.entry(key).dtype, after.entry(key).dtype):
                    result.unchanged += [module] if module in layers else []
                elif not key.endswith(".weight") or module not in layers or not pattern.fullmatch(module):
                    result.carried_not[key] = change
                else:
                    a, b, error = _factors(difference, rank, energy, seed)
                    tensors |= {module + A_SUFFIX: a, module + B_SUFFIX: b}
                    result.errors[module] = error
    if not tensors:
        raise AdapterError("no layer differs between the two models by more than rounding", where=str(tuned))
    result.adapter = AdapterFile(tensors)
    return result


def _same_architecture(before: BaseWeights, after: BaseWeights) -> None:
    odd = sorted(set(before.keys) ^ set(after.keys))
    if odd:
        raise AdapterError(f"{len(odd)} tensors are in one model only, first {odd[0]}", fix="both must be the same model")
    for key in before.keys:
        if before.entry(key).shape != after.entry(key).shape:
            raise AdapterError(f"{key} is {list(before.entry(key).shape)} in the base and {list(after.entry(key).shape)} in the other model")
    for weights in (before, after):
        if weights.quantised:
            raise AdapterError(f"quantised weights ({weights.quantised}) hide what was trained", where=str(weights.folder), fix="take both models in bf16 or fp32")


def _change(old: Tensor, new: Tensor, *dtypes: str) -> float:
    """Relative change from old to new, both in the coarser of their two formats: a model that was only stored in fewer bits has not
    changed."""
    coarse = (old, new)[dtypes.index(max(dtypes, key=_rounding))].dtype
    return float((new.to(coarse).float() - old.to(coarse).float()).norm() / old.float().norm().clamp_min(1e-30))


def _changed(change: float, *dtypes: str) -> bool:
    return change > max(map(_rounding, dtypes)) / 10 if "BF16" in dtypes or "F16" in dtypes else change > ROUNDING["F32"]


def _rounding(dtype: str) -> float:
    """Of a format; whole numbers are looked at as float32."""
    return ROUNDING.get(dtype, ROUNDING["F32"])


def _factors(difference: Tensor, rank: int, energy: float | None, seed: int) -> tuple[Tensor, Tensor, float]:
    a, b, error = low_rank(difference, rank, seed)
    if energy is None:
        return a, b, error
    import torch

    # The factors carry the square roots of the singular values, so their norms give them back.
    singular = torch.stack([row.norm() ** 2 for row in a.flatten(1)])
    total = float(difference.norm()) ** 2
    reached = float(singular.square().sum()) / total if total else 1.0
    kept = rank_for_energy(singular, min(1.0, energy / max(reached, 1e-12)))
    left = float(singular[:kept].square().sum())
    return a[:kept].clone(), b[:, :kept].clone(), max(0.0, 1 - left / total) ** 0.5 if total else 0.0
