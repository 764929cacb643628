"""Training text encoders with the transformer: they stay in memory, and what they give is computed anew at every step.

Only encoders whose LoRA the family's pipeline loads by itself (`FamilyFacts.trainable_encoders`); the states of all
others come from the cache as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.verify import VerifyResult
from finetune.errors import BadInput
from finetune.randomness import stable_seed

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.adapters.kinds import AdapterSize
    from finetune.families.base_models import BaseModel
    from finetune.families.protocol import Conditioning, ModelFamily, TrainsText

NamedParameters = list[tuple[str, torch.nn.Parameter]]


class LiveEncodings:
    """Encodings whose captions pass through the encoders in `pipeline` each time, with gradients where they are wanted."""

    def __init__(self, encodings: Any, family: TrainsText, pipeline: Any):
        self._encodings, self._family, self.pipeline = encodings, family, pipeline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encodings, name)

    def conditioning(self, prompt: str) -> Conditioning:
        """What is cached, and in it the trained encoders' part as they are now; their dropout acts when the transformer's does."""
        from finetune.adapters.layers import adapter_layers

        for encoder in encoders_of(self._family, self.pipeline).values():
            for _, layer in adapter_layers(encoder):
                layer.train(self.pipeline.transformer.training)
        return self._family.encode_live(self.pipeline, [prompt], [self._encodings.conditioning(prompt)])[0]


def cached_only(encodings: Any) -> Any:
    """What the base's own encoders gave."""
    return encodings._encodings if isinstance(encodings, LiveEncodings) else encodings


def check_trainable(family: ModelFamily) -> None:
    """Raises BadInput where the family's pipeline loads no LoRA into a text encoder."""
    if not family.facts.trainable_encoders:
        raise BadInput("the pipeline of this base loads no adapter into a text encoder", where="adapter.text_encoders", fix="set it to false: captions are then encoded once, by the base's encoders")


def add_trainable(base: BaseModel, pipeline: Any, dtype: torch.dtype) -> None:
    """Load the encoders that can be trained beside the transformer. Raises BadInput where there are none."""
    from finetune.families.loading import add_encoders

    check_trainable(base.family)
    add_encoders(pipeline, base.folder, base.family.facts.trainable_encoders, dtype)


def encoders_of(family: ModelFamily, pipeline: Any) -> dict[str, torch.nn.Module]:
    """Component name -> encoder."""
    return {slot: getattr(pipeline, slot) for slot in family.facts.trainable_encoders}


def inject_encoders(family: ModelFamily, pipeline: Any, size: AdapterSize, seed: int) -> NamedParameters:
    """Put LoRA into the encoders; returns its parameters as `<component>.<module>.lora_A.weight`."""
    from finetune.adapters.kinds import inject_adapter
    from finetune.adapters.lora import lora_parameters

    plain, named = replace(size, rank_pattern={}, alpha_pattern={}), []
    for slot, encoder in encoders_of(family, pipeline).items():
        inject_adapter(encoder, family.facts.trainable_encoders[slot], plain, seed=stable_seed(seed, slot))
        named += [(f"{slot}.{name}", parameter) for name, parameter in lora_parameters(encoder)]
    return named


def collect_encoders(family: ModelFamily, pipeline: Any) -> dict[str, Mapping[str, torch.Tensor]]:
    """Component name -> canonical tensors, for `AdapterFile.text_encoders`."""
    from finetune.adapters.lora import collect_lora
    from finetune.adapters.text_encoders import canonical_names

    return {slot: canonical_names(collect_lora(encoder).tensors) for slot, encoder in encoders_of(family, pipeline).items()}


def with_encoders(adapter: AdapterFile, encodings: Any, family: ModelFamily) -> AdapterFile:
    """The adapter with what the encoders have learned, where they are trained."""
    return replace(adapter, text_encoders=collect_encoders(family, encodings.pipeline)) if isinstance(encodings, LiveEncodings) else adapter


def prove_encoders(base: BaseModel, pipeline: Any, adapter: AdapterFile, encodings: Any, caption: str, dtype: torch.dtype, where: str) -> tuple[VerifyResult, Any]:
    """Load fresh encoders beside a fresh transformer, prove the adapter's parts on them and attach them.

    Returns the proof of all parts together, and encodings that pass through the encoders with the adapter on.
    """
    from finetune.adapters.text_encoders import attach_encoders, fitted, is_nested
    from finetune.adapters.verify import prove_on

    add_trainable(base, pipeline, dtype)
    live, proofs = LiveEncodings(encodings, base.family, pipeline), []
    for slot in adapter.text_encoders:
        encoder = getattr(pipeline, slot)
        proofs.append(prove_on(fitted(adapter, slot, is_nested(encoder)), encoder, lambda _: _joined(live.conditioning(caption)), f"{where}, {slot}"))
    attach_encoders(pipeline, adapter, "loaded")
    return together(proofs), live


def _joined(conditioning: Conditioning) -> torch.Tensor:
    # What the encoders gave is on their device, what is cached beside it in host memory.
    return torch.cat([tensor.float().cpu().flatten() for name, tensor in sorted(conditioning.tensors.items()) if tensor.is_floating_point()])


def together(proofs: Sequence[VerifyResult]) -> VerifyResult:
    """Several proofs as one: tensors added up, the smallest change, the largest error."""
    errors = [proof.bake_error for proof in proofs if proof.bake_error is not None]
    return VerifyResult(
        sum(proof.keys for proof in proofs), sum(proof.placed for proof in proofs), all(proof.changed for proof in proofs), min(proof.change for proof in proofs),
        True if errors else None, max(errors) if errors else None, all(proof.restored for proof in proofs))
