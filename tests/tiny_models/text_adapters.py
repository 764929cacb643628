"""Adapters for the tiny models that change text encoders too, by enough to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from finetune.adapters.adapter_file import FILE_NAME, AdapterFile, write_adapter
from finetune.adapters.attach import detach
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.adapters.text_encoders import canonical_names
from finetune.randomness import generator


def drawn_lora(model: torch.nn.Module, targets: str, strength: float = 0.5) -> AdapterFile:
    """LoRA of rank 2 with random numbers in both matrices; the model is as it was afterwards."""
    inject_lora(model, targets, 2, 2, seed=0)
    with torch.no_grad():
        for index, (key, parameter) in enumerate(lora_parameters(model)):
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator(1, "test", index)) * strength)
    adapter = collect_lora(model)
    detach(model)
    return adapter


def write_text_adapter(pipeline: Any, family: Any, folder: Path) -> Path:
    """An adapter of the pipeline's transformer and of every encoder that its family trains, as a folder of a run has it."""
    encoders = {slot: canonical_names(drawn_lora(getattr(pipeline, slot), targets).tensors) for slot, targets in family.facts.trainable_encoders.items()}
    adapter = drawn_lora(pipeline.transformer, r".*\.attn\.to_q")
    folder.mkdir(parents=True)
    write_adapter(folder / FILE_NAME, AdapterFile(adapter.tensors, text_encoders=encoders, family=family.facts.name))
    return folder
