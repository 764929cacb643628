"""What an adapter file is: family, layout, rank, alpha and norm of every module, dead or exploding ones, and metadata."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_file import AdapterFile, read_adapter
from finetune.adapters.arithmetic import inner
from finetune.adapters.forms import OFT
from finetune.adapters.lycoris import as_lora
from finetune.adapters.strict_reading import locate, recognise
from finetune.adapters.tensor_files import TensorFile
from finetune.adapters.weight_change import rotations

if TYPE_CHECKING:
    from finetune.adapters.keys import KeyMap

# A module whose norm is this many times the middle one of its file is worth a look.
EXPLODING = 20.0
LONGEST_TEXT = 2000


def inspect_adapter(path: Path | str, key_maps: Mapping[str, KeyMap], family: str | None = None) -> dict[str, Any]:
    """Everything that a file tells, as plain values. Raises AdapterError as `read_adapter` does."""
    file = locate(Path(path))
    with TensorFile(file) as opened:
        detection = recognise(file, opened.header, key_maps, family)
        dtypes = Counter(entry.dtype for entry in opened.header.entries.values())
        tensors = len(opened.header.entries)
    adapter = read_adapter(path, key_maps, family=family)
    modules = module_rows(adapter)
    provenance = {key: shown(value) for key, value in adapter.provenance.items()}
    return {
        "path": str(file), "bytes": file.stat().st_size, "tensors": tensors, "dtypes": dict(dtypes),
        "family": adapter.family, "may_also_be": list(detection.alternatives), "layout": adapter.layout,
        "form": adapter.form.title, "dora": adapter.uses_dora,
        "modules": modules, "ranks": dict(Counter(row["rank"] for row in modules)), "text_encoders": {name: len(adapter.part(name).modules) for name in adapter.text_encoders},
        "norm": math.sqrt(sum(row["norm"] ** 2 for row in modules)),
        "dead": [row["name"] for row in modules if row["state"] == "dead"], "exploding": [row["name"] for row in modules if row["state"] == "exploding"],
        "trigger": provenance.get("trigger") or _said(adapter, "modelspec.trigger_phrase"),
        "licence": provenance.get("licence") or _said(adapter, "modelspec.license"),
        "provenance": provenance, "metadata": {shown(key): shown(value) for key, value in adapter.metadata.items()}, "notes": list(adapter.notes),
    }


def module_rows(adapter: AdapterFile) -> list[dict[str, Any]]:
    """name, rank, alpha (as the file had it), Frobenius norm of delta W (of OFT: of R - I) and state ("ok", "dead",
    "exploding") of each module."""
    norms = _norms(adapter)
    middle = statistics.median(norms.values()) if norms else 0.0
    rows = []
    for module, rank in adapter.ranks.items():
        norm = norms[module]
        state = "dead" if norm == 0 else "exploding" if norm > EXPLODING * middle > 0 else "ok"
        rows.append({"name": module, "rank": rank, "alpha": rank * adapter.scales.get(module, 1.0), "norm": norm, "state": state})
    return rows


def _norms(adapter: AdapterFile) -> dict[str, float]:
    if adapter.form is OFT:
        import torch

        turns = {module: rotations(adapter.parts(module)[".oft_R.weight"]) for module in adapter.modules}
        return {module: float((turn - torch.eye(turn.shape[-1])).norm()) for module, turn in turns.items()}
    pairs = as_lora(adapter)
    return {module: math.sqrt(max(0.0, inner(pairs.pair(module), pairs.pair(module)))) for module in adapter.modules}


def _said(adapter: AdapterFile, key: str) -> str | None:
    value = adapter.metadata.get(key)
    return shown(value) if value else None


def shown(value: Any) -> Any:
    """A stranger's text for a terminal: no control or direction characters, not longer than a page."""
    if not isinstance(value, str):
        return value
    clean = "".join(character if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else " " for character in value)
    return clean if len(clean) <= LONGEST_TEXT else clean[:LONGEST_TEXT] + " ..."
