"""Adapter files as other tools write them, with random tensors, and the delta W they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.weight_change import delta

R, D = 4, 24  # rank and width unless a case says otherwise; 24 divides by 2, 3, 4 and 6


def pair(stem: str, outputs: int = D, inputs: int = D, rank: int = R, *, suffix: str = "kohya", alpha: float | None = 2.0, seed: int = 0) -> dict[str, Tensor]:
    """down/up (suffix "kohya") or A/B ("peft") of one module, with an `.alpha` when given."""
    generator = torch.Generator().manual_seed(seed + sum(map(ord, stem)))
    down, up = (".lora_down.weight", ".lora_up.weight") if suffix == "kohya" else (".lora_A.weight", ".lora_B.weight")
    tensors = {stem + down: torch.randn(rank, inputs, generator=generator), stem + up: torch.randn(outputs, rank, generator=generator)}
    if alpha is not None:
        tensors[stem + ".alpha"] = torch.tensor(alpha)
    return tensors


def write(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, name: str = "adapter.safetensors") -> Path:
    """Save with the reference library."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata)
    return folder / name


def lora_metadata(prefix: str = "transformer.", **settings: object) -> dict[str, str]:
    """The header text that diffusers writes."""
    return {"format": "pt", "lora_adapter_metadata": json.dumps({prefix + key: value for key, value in settings.items()})}


def raw_header(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """Bytes of a safetensors file with any header, honest or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def delta_of(adapter: AdapterFile, module: str) -> Tensor:
    """delta W of one canonical module."""
    return delta(*adapter.pair(module))


def source_delta(tensors: Mapping[str, Tensor], stem: str, scale: float) -> Tensor:
    """scale * up @ down of one module as it stands in a file."""
    down = tensors.get(stem + ".lora_down.weight", tensors.get(stem + ".lora_A.weight"))
    up = tensors.get(stem + ".lora_up.weight", tensors.get(stem + ".lora_B.weight"))
    return scale * up.float() @ down.float()
