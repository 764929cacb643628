"""HunyuanImage-3.0 (Tencent, 80 billion parameters): what can be done with its adapters, and why it is not trained here.

It is not a diffusers model, and no single card holds it. Adapters made elsewhere can be mapped and merged: that is tensor
work. Layout read in Tencent-Hunyuan/HunyuanImage-3.0 `hunyuan_image_3/hunyuan.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import AdapterError, BaseModelError

if TYPE_CHECKING:
    from torch import Tensor

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
        fix="train HunyuanImage-2.1 or HunyuanDiT; adapters made elsewhere for 3.0 can be converted and merged")


@dataclass(frozen=True)
class AttentionLayout:
    """Rows of `qkv_proj`: for each key/value head its `group` query heads, then the key, then the value, `head_dim` rows each."""

    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128

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


def adapter_deltas(tensors: Mapping[str, Tensor], layout: AttentionLayout, scale: float = 1.0) -> dict[str, Tensor]:
    """Weight changes by base module, from `<module>.lora_A.weight` and `.lora_B.weight`.

    Split names are joined into the fused weights of the base: `q_proj`, `k_proj`, `v_proj` (absent ones change nothing), and
    `up_proj`, `gate_proj` into `gate_and_up_proj`, whose first half is "up" here, against the usual order.
    """
    import torch

    changes: dict[str, Tensor] = {}
    for name in sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")):
        pair = tensors[f"{name}.lora_A.weight"], tensors.get(f"{name}.lora_B.weight")
        if pair[1] is None:
            raise AdapterError(f"{name} has lora_A but no lora_B")
        changes[name.removeprefix("base_model.model.")] = scale * (pair[1].float() @ pair[0].float())
    fused: dict[str, Tensor] = {}
    for module, change in changes.items():
        parent, _, leaf = module.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj"):
            width = change.shape[1]
            counts = {"q_proj": layout.group, "k_proj": 1, "v_proj": 1}
            parts = [changes.get(f"{parent}.{own}", torch.zeros(layout.kv_heads * count * layout.head_dim, width)) for own, count in counts.items()]
            fused[f"{parent}.qkv_proj"] = join_qkv(*parts, layout)
        elif leaf in ("up_proj", "gate_proj"):
            parts = [changes.get(f"{parent}.{own}", torch.zeros_like(change)) for own in ("up_proj", "gate_proj")]
            fused[f"{parent}.gate_and_up_proj"] = torch.cat(parts)
        else:
            fused[module] = change
    return fused


def merge(weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], layout: AttentionLayout, scale: float = 1.0) -> dict[str, Tensor]:
    """The base's weights `<module>.weight` with an adapter added, computed in float32 and kept in their own dtype.

    Raises AdapterError for a module that the base lacks or whose shape differs.
    """
    merged = dict(weights)
    for module, change in adapter_deltas(tensors, layout, scale).items():
        name = f"{module}.weight"
        if name not in merged or merged[name].shape != change.shape:
            raise AdapterError(f"the adapter changes {module} {list(change.shape)}, which this base does not have",
                               fix="give the adapter's own base, or the layout of its attention heads")
        merged[name] = (merged[name].float() + change).to(merged[name].dtype)
    return merged
