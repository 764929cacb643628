"""HunyuanImage-3.0 (Tencent, 80 billion parameters): what can be done with its adapters, and why it is not trained here.

It is not a diffusers model, and no single card holds it. Adapters made elsewhere can be mapped to the base's own modules and
baked into a copy of it, tensor by tensor. Layout read in Tencent-Hunyuan/HunyuanImage-3.0 `hunyuan_image_3/hunyuan.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_file import A_SUFFIX, B_SUFFIX, AdapterFile
from finetune.adapters.bake_files import bake_folder
from finetune.errors import AdapterError, BadInput, BaseModelError
from finetune.families.licences import tencent

if TYPE_CHECKING:
    from torch import Tensor

    from data_tools.progress import Progress
    from finetune.adapters.arithmetic import Weighted

LICENCE = tencent("https://huggingface.co/tencent/HunyuanImage-3.0/blob/main/LICENSE", 2025, "European Union, United Kingdom, South Korea")
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "up_proj": "gate_and_up_proj", "gate_proj": "gate_and_up_proj"}

PARAMETERS = 80.95e9
NOT_IN_EXPERTS = 3.64e9
# GiB of weights alone: linear weights in the named format (NF4: 4.5 bits), everything else in 16 bits.
WEIGHTS_GIB = {"bfloat16": 150.8, "int8": 76.4, "NF4": 43.9}
# One NF4 pass over the experts of all 32 layers, which 4096 image tokens touch without exception, forward and again back.
TRANSFER_GIB_PER_STEP = 2 * 40


def is_hunyuan_image_3(name_or_config: str | Mapping[str, Any]) -> bool:
    """By a Hub id, or by the contents of a `config.json`."""
    if isinstance(name_or_config, str):
        return "hunyuanimage-3" in name_or_config.lower()
    named = [str(name_or_config.get("model_type", "")), *map(str, name_or_config.get("architectures") or ())]
    return any("hunyuanimage3" in name.lower().replace("_", "") for name in named)


def refusal(where: str) -> BaseModelError:
    """Why this base cannot be trained on this machine, in numbers; to be raised before anything is downloaded."""
    import psutil
    import torch

    memory = psutil.virtual_memory().total / 2**30
    card = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
    here = f"this machine has {memory:.0f} GiB of memory and " + (f"a card of {card:.0f} GiB" if card else "no GPU")
    weights = ", ".join(f"{size} GiB in {name}" for name, size in WEIGHTS_GIB.items())
    return BaseModelError(
        f"HunyuanImage-3.0 is not trained here: its {PARAMETERS / 1e9:.0f} billion parameters take {weights} before any activation, "
        f"and {here}. With experts in memory and the rest ({NOT_IN_EXPERTS / 1e9:.1f} billion) on a card, every step would move about "
        f"{TRANSFER_GIB_PER_STEP} GiB over the bus. Training it needs at least three 80 GiB cards in bfloat16", where=where,
        fix="train HunyuanImage-2.1 or HunyuanDiT; an adapter made elsewhere is baked into a local copy of 3.0 with "
            "`brushwork adapter bake FILE --base FOLDER --out FOLDER`")


@dataclass(frozen=True)
class AttentionLayout:
    """Rows of `qkv_proj`: for each key/value head its `group` query heads, then the key, then the value, `head_dim` rows each."""

    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> AttentionLayout:
        """From the checkpoint's `config.json`. Raises BaseModelError where it lacks the numbers of heads."""
        try:
            heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
            head_dim = int(config.get("attention_head_dim") or config.get("head_dim") or config["hidden_size"] // heads)
        except (KeyError, TypeError, ValueError):
            raise BaseModelError("config.json does not say how many attention heads there are", where="config.json", fix="download the base again") from None
        return cls(kv_heads, heads // kv_heads, head_dim)

    @property
    def rows(self) -> int:
        return self.kv_heads * (self.group + 2) * self.head_dim


def split_qkv(rows: Tensor, layout: AttentionLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the interleaved projection (rows, n) as those of query, key and value; a split into thirds would be wrong."""
    if rows.shape[0] != layout.rows:
        raise AdapterError(f"a fused projection has {rows.shape[0]} rows, this layout {layout.rows}")
    heads = rows.view(layout.kv_heads, layout.group + 2, layout.head_dim, -1)
    width = rows.shape[1]
    return (heads[:, : layout.group].reshape(-1, width), heads[:, layout.group].reshape(-1, width), heads[:, layout.group + 1].reshape(-1, width))


def join_qkv(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout) -> Tensor:
    """The inverse of `split_qkv`."""
    import torch

    def heads(rows: Tensor, count: int) -> Tensor:
        return rows.reshape(layout.kv_heads, count, layout.head_dim, -1)

    return torch.cat([heads(query, layout.group), heads(key, 1), heads(value, 1)], dim=1).reshape(layout.rows, -1)


def fused(adapter: AdapterFile, layout: AttentionLayout) -> AdapterFile:
    """The adapter on the base's own modules: `q_proj`, `k_proj`, `v_proj` joined into `qkv_proj`, `up_proj` and `gate_proj` into
    `gate_and_up_proj`, whose first half is "up" here, against the usual order.

    Exact: pairs that share A stay at their rank, others add theirs up. Absent parts change nothing. Raises AdapterError where
    a module comes both ways, or with DoRA magnitudes, which cannot be joined.
    """
    groups: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    tensors: dict[str, Tensor] = {}
    for module in adapter.modules:
        parent, _, leaf = module.rpartition(".")
        if leaf in FUSED:
            groups.setdefault(f"{parent}.{FUSED[leaf]}", {})[leaf] = adapter.pair(module)
        else:
            tensors[module + A_SUFFIX], tensors[module + B_SUFFIX] = adapter.pair(module)
    if groups and adapter.uses_dora:
        raise AdapterError("DoRA magnitudes of split projections cannot be joined", fix="train without DoRA, or on the base's own fused modules")
    for module, pairs in groups.items():
        if module + A_SUFFIX in tensors:
            raise AdapterError(f"{module} comes whole and in parts")
        tensors[module + A_SUFFIX], tensors[module + B_SUFFIX] = _joined(module, pairs, layout)
    return replace(adapter, tensors=adapter.tensors if adapter.uses_dora else tensors)


def _joined(module: str, pairs: Mapping[str, tuple[Tensor, Tensor]], layout: AttentionLayout) -> tuple[Tensor, Tensor]:
    import torch

    shared = next(iter(pairs.values()))[0]
    one_a = all(a.equal(shared) for a, _ in pairs.values())
    total = len(shared) if one_a else sum(len(a) for a, _ in pairs.values())
    rows = {"q_proj": layout.group * layout.kv_heads * layout.head_dim, "k_proj": layout.kv_heads * layout.head_dim, "v_proj": layout.kv_heads * layout.head_dim}
    width, start, columns = {len(b) for _, b in pairs.values()}, 0, {}
    names = ("q_proj", "k_proj", "v_proj") if "qkv" in module else ("up_proj", "gate_proj")
    for name in names:
        a, b = pairs.get(name, (shared[:0], shared.new_zeros(rows.get(name, max(width)), 0)))
        if len(b) != rows.get(name, max(width)):
            raise AdapterError(f"{name} of {module} has {len(b)} rows, this base {rows.get(name, max(width))}")
        columns[name] = b.new_zeros(len(b), total)
        columns[name][:, start:start + len(a)] = b
        start += 0 if one_a else len(a)
    b = join_qkv(*columns.values(), layout) if "qkv" in module else torch.cat(list(columns.values()))
    return shared if one_a else torch.cat([pairs[name][0] for name in names if name in pairs]), b


def checkpoint_folder(base: str) -> Path | None:
    """The folder when `base` is a local copy of HunyuanImage-3.0, else None."""
    folder = Path(base).expanduser()
    config = _config(folder)
    return folder if config is not None and is_hunyuan_image_3(config) else None


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def bake(folder: Path, out: Path, parts: Sequence[Weighted], progress: Progress) -> int:
    """Copy the checkpoint to `out` with adapters in its weights: tensor by tensor, never the model. Returns the changed layers.

    Raises AdapterError as `bake_files.bake_pipeline` does, and BadInput for a folder that the makers' code could not load from.
    """
    if "." in out.name:
        raise BadInput("HunyuanImage-3.0 is not loaded from a folder with a dot in its name", where=f"--out {out}", fix="choose a name without a dot")
    layout = AttentionLayout.of(_config(folder) or {})
    return bake_folder(folder, out, [replace(part, adapter=fused(part.adapter, layout)) for part in parts], component="", progress=progress)
