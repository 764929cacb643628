"""Thinking tokens as a part of a run: made before the first step, trained with the LoRA, written and proven with it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from finetune.adapters.adapter_file import B_SUFFIX
from finetune.thinking.tokens import KEY, LEARNING_RATE_FACTOR, EncodingsWithTokens, ThinkingTokens, initial_tokens, read_tokens, write_tokens
from finetune.training.checkpoints import Checkpoint
from finetune.training.run_folder import RunFolder

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.families.base_models import BaseModel
    from finetune.recipe import Recipe
    from finetune.training.training_set import TrainingSet

NamedParameters = list[tuple[str, torch.nn.Parameter]]


def with_tokens(encodings: Any, recipe: Recipe, base: BaseModel, training_set: TrainingSet, device: torch.device) -> Any:
    """The encodings, joined by new tokens where the recipe wants some. Raises BadInput where the family or a caption has no place for them."""
    count = recipe.adapter.thinking_tokens
    if not count:
        return encodings
    captions = [caption for caption in training_set.captions.every_caption() if caption]
    tokens = initial_tokens(count, base.family.facts.text_stream, [encodings.conditioning(caption) for caption in captions], recipe.training.seed)
    tokens = replace(tokens, states=torch.nn.Parameter(tokens.states.detach().to(device)))
    return EncodingsWithTokens(encodings, tokens, [recipe.samples.negative])


def tokens_in(encodings: Any) -> ThinkingTokens | None:
    return encodings.tokens if isinstance(encodings, EncodingsWithTokens) else None


def without_tokens(encodings: Any) -> Any:
    """What the bare base is drawn with."""
    return encodings.bare if isinstance(encodings, EncodingsWithTokens) else encodings


def named_parameters(lora: NamedParameters, encodings: Any) -> NamedParameters:
    """The LoRA's parameters and, last, the tokens."""
    tokens = tokens_in(encodings)
    return [*lora, (KEY, tokens.states)] if tokens is not None else lora


def parameter_groups(named: NamedParameters, lora_plus_ratio: float = 1.0) -> list[Any]:
    """For the optimizer: B matrices take `lora_plus_ratio` times the steps of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354);
    tokens take larger steps than the LoRA and no decay. A ratio is only
    given where there are B matrices: the rules of a recipe refuse it for the kinds that have none."""
    lora = [parameter for name, parameter in named if name != KEY]
    tokens = [parameter for name, parameter in named if name == KEY]
    if not tokens and lora_plus_ratio == 1:
        return lora
    groups: list[dict[str, Any]] = [{"params": lora, "rate_factor": 1.0}]
    if lora_plus_ratio != 1:
        second = [parameter for name, parameter in named if name.endswith(B_SUFFIX)]
        first = [parameter for name, parameter in named if name != KEY and not name.endswith(B_SUFFIX)]
        groups = [{"params": first, "rate_factor": 1.0}, {"params": second, "rate_factor": lora_plus_ratio}]
    return [*groups, {"params": tokens, "rate_factor": LEARNING_RATE_FACTOR, "weight_decay": 0.0}] if tokens else groups


def export_tokens(checkpoint: Checkpoint, adapter: AdapterFile, run: RunFolder, base: BaseModel) -> AdapterFile:
    """Write a checkpoint's tokens beside the adapter; the returned adapter's header says that they belong to it."""
    states = checkpoint.tensors.get(f"{checkpoint.state.get('exports', 'parameter')}/{KEY}")
    stream = base.family.facts.text_stream
    if states is None or stream is None:
        return adapter
    return adapter.with_provenance(**{KEY: write_tokens(run.adapter, ThinkingTokens(states, stream))})


def with_tokens_from_file(encodings: Any, run: RunFolder, device: torch.device) -> Any:
    """The encodings joined by the tokens as they lie in the adapter's folder, for the proof. Raises AdapterError."""
    if tokens_in(encodings) is None:
        return encodings
    found = read_tokens(run.adapter)
    return encodings.with_other(replace(found, states=found.states.to(device)))
