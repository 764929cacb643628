"""The part of an adapter that sits on a pipeline's text encoders: its names, beside the transformer's or apart from them, and
putting it into encoders that are loaded.

Files name CLIP's layers `text_model.encoder.layers...`, as every reader expects. Newer transformers have dropped
`text_model` from some of their models, so names are fitted to the encoder at hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.attach import attach, detach
from finetune.adapters.lora import adapter_names
from finetune.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor, nn

FLAT = "encoder.layers."
NESTED = "text_model."
OF_ENCODER = re.compile(r"(text_encoder(?:_\d+)?)\.(.+)")


def canonical_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names that files have."""
    return {NESTED + key if key.startswith(FLAT) else key: value for key, value in tensors.items()}


def joined(adapter: AdapterFile) -> AdapterFile:
    """The adapter with all its tensors in `tensors`, those of encoders under their names in a file, `text_encoder.text_model...`."""
    encoders = {f"{slot}.{key}": value for slot, part in adapter.text_encoders.items() for key, value in canonical_names(part).items()}
    return replace(adapter, tensors={**adapter.tensors, **encoders}, text_encoders={})


def parted(adapter: AdapterFile) -> AdapterFile:
    """What `joined` was made of."""
    encoders: dict[str, dict[str, Tensor]] = {}
    for key, value in adapter.tensors.items():
        if found := OF_ENCODER.fullmatch(key):
            encoders.setdefault(found[1], {})[found[2]] = value
    return replace(adapter, tensors={key: value for key, value in adapter.tensors.items() if not OF_ENCODER.fullmatch(key)}, text_encoders=encoders)


def is_nested(encoder: nn.Module) -> bool:
    """Whether the encoder's own names have `text_model` in them."""
    return hasattr(encoder, NESTED.removesuffix("."))


def fitted(adapter: AdapterFile, slot: str, nested: bool) -> AdapterFile:
    """The part of `adapter` for the component `slot`, under the names of an encoder that is `nested` or not."""
    part = adapter.part(slot)
    if nested:
        return part
    return replace(part, tensors={key.removeprefix(NESTED): value for key, value in part.tensors.items()})


def attach_encoders(pipeline: Any, adapter: AdapterFile, name: str, weight: float = 1.0) -> int:
    """Add the adapter's text-encoder parts to the encoders of `pipeline`; returns the number of tensors placed.

    Raises AdapterError for a component that the pipeline does not have, and as `attach` does.
    """
    placed = 0
    for slot in adapter.text_encoders:
        encoder = getattr(pipeline, slot, None)
        if encoder is None:
            raise AdapterError(f"the adapter trains {slot}, which this base does not have", fix="the adapter was made for another model")
        part = fitted(adapter, slot, is_nested(encoder))
        attach(encoder, part, name, weight)
        placed += len(part.tensors)
    return placed


def detach_encoders(pipeline: Any) -> None:
    """Take all adapters off the text encoders of `pipeline`."""
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None and adapter_names(part):
            detach(part)
