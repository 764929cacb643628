"""Thinking tokens: K trained vectors among the text states, learned together with a LoRA (prompt tuning, Lester et al. 2021).

They join the conditional branch only; with them on both branches classifier-free guidance would cancel them. Where they
go is the family's own data (`FamilyFacts.text_stream`). They lie in the adapter's folder in a file of their own, so
that loaders which know nothing of them read the LoRA as ever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import AdapterError, BadInput
from finetune.families.protocol import Conditioning, TextStream
from finetune.randomness import generator

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.adapters.adapter_file import AdapterFile

FILE_NAME = "thinking_tokens.safetensors"
KEY = "thinking_tokens"
MOST_TOKENS = 64
INITIAL_NOISE = 0.02
# Prompt tuning wants larger steps than LoRA; times the LoRA's learning rate.
LEARNING_RATE_FACTOR = 5.0


@dataclass(frozen=True)
class ThinkingTokens:
    """states: (K, width) float32, a parameter while training.  stream: where they go in a Conditioning."""

    states: Tensor
    stream: TextStream

    def __len__(self) -> int:
        return self.states.shape[0]

    def joined_to(self, conditioning: Conditioning) -> Conditioning:
        """The Conditioning with the tokens in it; gradients flow to `states`. Raises BadInput where there is no room."""
        import torch

        stream, count = self.stream, len(self)
        tensors = dict(conditioning.tensors)
        text = tensors[stream.states].to(self.states.device)
        if text.shape[-1] != self.states.shape[1]:
            raise AdapterError(f"the thinking tokens are {self.states.shape[1]} wide, this model's text states {text.shape[-1]}",
                               fix="the adapter was made for another model")
        tokens = self.states.to(text.dtype)
        mask = tensors.get(stream.mask) if stream.mask else None
        if stream.placement == "last_slots":
            if mask is not None and bool(mask[-count:].any()):
                taken = len(mask) - int((mask.flip(0) == 0).int().cumprod(0).sum())
                raise BadInput(f"the text takes {taken} of {len(mask)} slots; {count} must be free for the thinking tokens", fix="shorten it")
            tensors[stream.states] = torch.cat([text[:-count], tokens])
            if mask is not None:
                tensors[stream.mask] = torch.cat([mask[:-count], torch.ones_like(mask[-count:])])
            return Conditioning(tensors)
        tensors[stream.states] = torch.cat([text, tokens])
        for name in (*([stream.mask] if mask is not None else []), *stream.per_token):
            row = tensors[name][-1:]
            more = torch.ones_like(row) if name == stream.mask else row
            tensors[name] = torch.cat([tensors[name], more.expand(count, *row.shape[1:])])
        return Conditioning(tensors)


def initial_tokens(count: int, stream: TextStream | None, conditionings: Sequence[Conditioning], seed: int) -> ThinkingTokens:
    """Tokens to train: the mean of the captions' real states plus noise of `INITIAL_NOISE` times their spread.

    Raises BadInput when the family takes none, the number is out of range, or a caption leaves no room.
    """
    import torch

    if stream is None:
        raise BadInput("this model family takes no thinking tokens", where="adapter.thinking_tokens", fix="set it to 0")
    if not 1 <= count <= MOST_TOKENS:
        raise BadInput(f"{count} thinking tokens", where="adapter.thinking_tokens", fix=f"take 1 to {MOST_TOKENS}")
    rows = []
    for conditioning in conditionings:
        states = conditioning.tensors[stream.states].float()
        mask = conditioning.tensors.get(stream.mask) if stream.mask else None
        rows.append(states[mask.bool()] if mask is not None else states)
    real = torch.cat(rows)
    noise = torch.randn(count, real.shape[1], generator=generator(seed, "thinking tokens"))
    tokens = ThinkingTokens(torch.nn.Parameter(real.mean(0) + INITIAL_NOISE * real.std() * noise), stream)
    for conditioning in conditionings:
        tokens.joined_to(conditioning)
    return tokens


class EncodingsWithTokens:
    """Encodings whose captions carry the tokens, except the empty one and `unconditional` (negative prompts)."""

    def __init__(self, encodings: Any, tokens: ThinkingTokens, unconditional: Iterable[str] = ()):
        self._encodings, self.tokens = encodings, tokens
        self._bare = frozenset(["", *unconditional])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encodings, name)

    @property
    def bare(self) -> Any:
        """The encodings without tokens."""
        return self._encodings

    def with_other(self, tokens: ThinkingTokens) -> EncodingsWithTokens:
        """The same encodings with other tokens."""
        return EncodingsWithTokens(self._encodings, tokens, self._bare)

    def conditioning(self, prompt: str) -> Conditioning:
        """As trained: with the tokens unless the prompt is the unconditional one."""
        found = self._encodings.conditioning(prompt)
        return found if prompt in self._bare else self.tokens.joined_to(found)


def conditionings_with_tokens(conditionings: Mapping[str, Conditioning], tokens: ThinkingTokens | None, negatives: Collection[str]) -> dict[str, Conditioning]:
    """For `sampling.draw`: the tokens joined to every prompt that is not a negative one or empty."""
    if tokens is None:
        return dict(conditionings)
    return {prompt: found if not prompt or prompt in negatives else tokens.joined_to(found) for prompt, found in conditionings.items()}


def write_tokens(folder: Path | str, tokens: ThinkingTokens) -> dict[str, Any]:
    """Write `thinking_tokens.safetensors` into the adapter's folder, whole or not at all. Returns what the adapter's own
    provenance should say of it under "thinking_tokens": count and sha256 of the vectors."""
    from finetune.adapters.tensor_files import dtype_name, write_tensors

    states = tokens.states.detach().float().cpu().contiguous()
    stream = tokens.stream
    about = {"v": 1, "count": len(tokens), "states": stream.states, "mask": stream.mask, "placement": stream.placement, "per_token": list(stream.per_token)}
    write_tensors(Path(folder) / FILE_NAME, {KEY: (dtype_name(states), tuple(states.shape))}, {"format": "pt", KEY: json.dumps(about, sort_keys=True)},
                  {KEY: states}.__getitem__)
    return {"count": len(tokens), "sha256": _hash(states)}


def _hash(states: Tensor) -> str:
    return hashlib.sha256(states.float().numpy().tobytes()).hexdigest()


def read_tokens(folder: Path | str) -> ThinkingTokens:
    """Read and check the tokens of an adapter's folder. Raises AdapterError naming what is wrong."""
    from finetune.adapters.tensor_files import TensorFile

    path = Path(folder) / FILE_NAME
    with TensorFile(path) as file:
        if list(file.header.entries) != [KEY]:
            raise AdapterError(f"holds other tensors than `{KEY}`", where=str(path))
        states = file.read(KEY)
        text = file.header.metadata.get(KEY, "")
    if states.ndim != 2 or not 1 <= states.shape[0] <= MOST_TOKENS or not states.dtype.is_floating_point or not states.float().isfinite().all():
        raise AdapterError(f"the tokens are not 1 to {MOST_TOKENS} rows of finite numbers", where=str(path))
    try:
        about = json.loads(text)
        stream = TextStream(str(about["states"]), about["mask"], str(about["placement"]), tuple(map(str, about["per_token"])))
        count = about["count"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise AdapterError("does not say where its tokens go", where=str(path), fix="copy the file again from where it was trained") from None
    if stream.placement not in ("last_slots", "append") or not isinstance(stream.mask, str | None) or count != states.shape[0]:
        raise AdapterError("says things of its tokens that cannot be", where=str(path))
    return ThinkingTokens(states.float(), stream)


def tokens_of(adapter: AdapterFile, path: Path | str, stream: TextStream | None) -> ThinkingTokens | None:
    """The tokens that belong to a loaded adapter file, or None for one that was trained without.

    path: the adapter's file, folder or run.  stream: of the family that it is used with. An adapter without its tokens is a
    different adapter: AdapterError when they are missing, are not the ones it was trained with, or fit another family.
    """
    from finetune.adapters.strict_reading import locate

    stated = adapter.provenance.get(KEY)
    if not stated:
        return None
    folder = locate(Path(path)).parent
    if not isinstance(stated, dict) or "sha256" not in stated:
        raise AdapterError("its header speaks of thinking tokens in a way that cannot be read", where=str(path))
    if not (folder / FILE_NAME).exists():
        raise AdapterError(f"was trained with {stated.get('count')} thinking tokens, and {FILE_NAME} is not beside it", where=str(path),
                           fix="copy the adapter's whole folder; without its tokens it is a different adapter")
    tokens = read_tokens(folder)
    if _hash(tokens.states) != stated["sha256"]:
        raise AdapterError(f"{FILE_NAME} beside it belongs to another adapter", where=str(path), fix="copy the adapter's whole folder again")
    if tokens.stream != stream:
        raise AdapterError("its thinking tokens were made for another model family", where=str(folder / FILE_NAME))
    return tokens
