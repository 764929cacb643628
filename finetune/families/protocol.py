"""What a model family must offer. Ten members and its facts, no base class with behaviour: a family is data and plain functions.

Everything above this file (sampling, training, preference, evaluation) speaks to a family only through `ModelFamily`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from finetune.objectives import LossWeighting, NoiseLevel, Objective, TimestepSampling


@dataclass(frozen=True)
class LicenceTerms:
    """The base's licence as a Hub card needs it.

    identifier: Hub licence id, or "other".  name, link: shown when the id is "other".
    publishable: whether derived adapters may be published at all.  notice: text that must accompany one, or "".
    naming: a name that the derived model's name must contain, or "".  territory: places left out, or "".
    """

    identifier: str
    name: str
    link: str
    publishable: bool = True
    notice: str = ""
    naming: str = ""
    territory: str = ""


@dataclass(frozen=True)
class TextStream:
    """Where learned thinking tokens (`finetune.thinking.tokens`) go among the text states of a Conditioning.

    states: name of the tensor (tokens, width) that they join.  mask: name of its mask (tokens,), or None.
    placement: "last_slots" where the text length is fixed (written over the last slots, which must be free), or
    "append" where it is free.  per_token: names of further tensors with one row a token, lengthened by repeating their last row.
    """

    states: str
    mask: str | None
    placement: str
    per_token: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureLimits:
    """The largest picture whose positions a base knows, in pixels. side: of any picture.  pixels: in all, of one that
    is not square. None for no limit."""

    side: int | None = None
    pixels: int | None = None


@dataclass(frozen=True)
class FamilyFacts:
    """What is constant for a family and needed without loading anything.

    pipeline_classes: diffusers class names in `model_index.json` that this family serves.
    size_multiple: training sizes are multiples of this many pixels.  resolution: usual training edge in pixels.
    limits: from the transformer's configuration, where its positions are a table; None where they are computed for any size.
    targets: preset name -> regular expression over full module names (PEFT full match); "attention" is always there. Where a
    block's number stands it says \\d+, and nowhere else, so that a preset can be narrowed to a range of blocks.
    never_quantise: modules to keep in full precision with all below them, as full names from the top or as patterns with *
    (`finetune.families.targets.keeps_full_precision` reads them).
    equal_text_lengths: pictures drawn in one call must have texts of one length.
    text_stream: where thinking tokens go, or None where the family takes none.
    trainable_encoders: text encoder -> expression over its layers that take LoRA, where the pipeline's own loader reads
    LoRA for it; such a family also has `encode_live`.
    told_guidance: whether `predict` tells the model `level.guidance` where its configuration says `guidance_embeds`.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    size_multiple: int
    resolution: int
    targets: Mapping[str, str]
    licence: LicenceTerms
    never_quantise: tuple[str, ...] = ()
    equal_text_lengths: bool = False
    text_stream: TextStream | None = None
    trainable_encoders: Mapping[str, str] = field(default_factory=dict)
    limits: Callable[[Mapping[str, Any]], PictureLimits] | None = None
    told_guidance: bool = False


@dataclass(frozen=True)
class Conditioning:
    """What one caption became: named tensors and masks without a batch dimension, independent of its neighbours."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class LatentDistribution:
    """Encoded pictures, already scaled as the transformer sees them. mean, std: (B, C, h, w) float32; std is 0 where
    the encoder is deterministic. A latent is drawn as mean + std * noise at every step."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class PictureGeometry:
    """Sizes in pixels as (height, width), and the crop's (top, left) in the resized picture; some models are told."""

    original: tuple[int, int]
    target: tuple[int, int]
    crop: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ModelShape:
    """Sizes that the plan computes with; one entry in `blocks` per kind of transformer block.

    parameters: number of the transformer.  tokens_per_pixel: image tokens / (height * width).
    text_tokens: length of the text that takes part in attention.
    """

    parameters: int
    hidden_size: int
    heads: int
    blocks: Mapping[str, int]
    feed_forward_size: int
    tokens_per_pixel: float
    text_tokens: int
    latent_channels: int
    latent_factor: int
    extra: Mapping[str, Any] = field(default_factory=dict)


class ModelFamily(Protocol):
    """How one family loads, encodes pictures and prompts, predicts, and draws."""

    facts: FamilyFacts

    def load(self, folder: Path, parts: frozenset[str], dtype: torch.dtype) -> Any:
        """The family's diffusers pipeline with only `parts` in memory, every other component None.

        parts: of {"text", "vae", "transformer"}; the scheduler is always there. Weights arrive without a second copy.
        """
        ...

    def objective(self, pipeline: Any, sampling: TimestepSampling | None, weighting: LossWeighting) -> Objective:
        """From the base's own scheduler configuration; `sampling` None takes what the family's makers use."""
        ...

    def encode_images(self, pipeline: Any, pixels: Tensor) -> LatentDistribution:
        """pixels: (B, 3, H, W) float32 in [-1, 1]. Needs the part "vae"."""
        ...

    def encode_prompts(self, pipeline: Any, prompts: Sequence[str]) -> list[Conditioning]:
        """One Conditioning a prompt, equal for any batch it is encoded in. Needs the part "text"."""
        ...

    def predict(self, transformer: Any, noisy: Tensor, level: NoiseLevel, conditionings: Sequence[Conditioning],
                geometries: Sequence[PictureGeometry]) -> Tensor:
        """noisy: (B, C, h, w) float32 -> prediction of the same shape, float32, in the space of `Objective.target`."""
        ...

    def latent_shape(self, pipeline: Any, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latent as `predict` sees it. Needs the parts "transformer" and "vae"."""
        ...

    def pipeline_inputs(self, pipeline: Any, conditionings: Sequence[Conditioning], negatives: Sequence[Conditioning],
                        latents: Tensor, guidance: float) -> dict[str, Any]:
        """Keyword arguments of the pipeline's own call: what replaces the prompts, the initial noise `latents`
        (B, C, h, w) in the pipeline's own packing, the guidance under the name and scale this pipeline gives it (1 is
        none), and what this family always needs. Needs the part "transformer", and no text encoder."""
        ...

    def shape(self, config: Mapping[str, Any]) -> ModelShape:
        """From the transformer's `config.json` alone; loads nothing."""
        ...

    def prepare(self, transformer: Any, checkpointed_blocks: int) -> None:
        """Train mode, gradient checkpointing of that many blocks (0: none), workarounds for library defects.
        Called after LoRA is injected."""
        ...

    def token_counts(self, pipeline: Any, prompt: str) -> dict[str, tuple[int, int]]:
        """Encoder name -> (tokens of this prompt, limit). Needs the part "text" (tokenizers suffice)."""
        ...


class TrainsText(ModelFamily, Protocol):
    """A family with `facts.trainable_encoders`."""

    def encode_live(self, pipeline: Any, prompts: Sequence[str], cached: Sequence[Conditioning]) -> list[Conditioning]:
        """`cached`, with what the trainable encoders give now in its place, on their device and with gradients.

        Needs those encoders and their tokenizers alone; equal to `encode_prompts` while they are what they were.
        """
        ...
