"""A base model in memory for preference work: prompts encoded once, text encoders let go, then transformer and VAE."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.families.base_models import BaseModel, locate_base
from finetune.families.protocol import Conditioning, PictureGeometry
from finetune.generation import encode_texts
from finetune.preference import latent_codec
from finetune.sampling import PictureRequest, draw
from finetune.training.precision import choose_base_dtype, choose_precision

if TYPE_CHECKING:
    from finetune.adapters.adapter_file import AdapterFile
    from finetune.thinking.tokens import ThinkingTokens

# Latents decoded at a time; bounds the memory of the VAE.
DECODED_AT_A_TIME = 8


class LoadedBase:
    """Transformer and VAE of a base, and the conditionings of every prompt that was asked for.

    worn: adapters with strengths, whose parts for text encoders these carry whenever a prompt is encoded.
    """

    def __init__(self, base: BaseModel, *, dtype: str = "auto"):
        self.base, self.family = base, base.family
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = choose_precision("auto", self.device)
        self.dtype = choose_base_dtype(dtype, self.precision).dtype
        self.conditionings: dict[str, Conditioning] = {}
        self.worn: Sequence[tuple[AdapterFile, float]] = ()
        self._pipeline: Any = None

    @classmethod
    def named(cls, identifier: str, revision: str | None = None) -> LoadedBase:
        """Locate a base by folder, Hub id or "mini". Raises BaseModelError."""
        return cls(locate_base(identifier, revision))

    def encode(self, prompts: Iterable[str]) -> None:
        """Encode what is not encoded yet; the text encoders are in memory only for this."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.conditionings]
        if missing:
            self.conditionings |= encode_texts(self.base, missing, self.dtype, self.device, [self.worn])[0]

    def autocast(self) -> torch.autocast:
        """What training computes in, for predictions that must agree with those of a training step."""
        return torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.name != "fp32")

    @property
    def pipeline(self) -> Any:
        """Transformer and VAE on the device, frozen; loaded at first use."""
        if self._pipeline is None:
            self._pipeline = self.family.load(self.base.folder, frozenset({"transformer", "vae"}), self.dtype)
            self._pipeline.to(self.device)
            for part in (self._pipeline.transformer, self._pipeline.vae):
                part.requires_grad_(False).eval()
        return self._pipeline

    @property
    def transformer(self) -> torch.nn.Module:
        """The pipeline's transformer."""
        return self.pipeline.transformer

    def conditions(self, prompts: Sequence[str]) -> list[Conditioning]:
        """In the order of `prompts`; encodes what is missing."""
        self.encode(prompts)
        return [self.conditionings[prompt] for prompt in prompts]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture's latent."""
        return self.family.latent_shape(self.pipeline, height, width)

    def geometry(self, height: int, width: int) -> PictureGeometry:
        """A whole picture of this size, neither resized nor cropped."""
        return PictureGeometry(original=(height, width), target=(height, width))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> pixels (B, 3, H, W), about [0, 1], in portions; without gradients."""
        with torch.no_grad():
            return torch.cat([latent_codec.decode(self.pipeline.vae, part.to(self.device)) for part in latents.split(DECODED_AT_A_TIME)])

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> latents (B, C, h, w); carries gradients."""
        return latent_codec.encode(self.pipeline.vae, pixels.to(self.device))

    def draw(self, requests: Sequence[PictureRequest], *, tokens: ThinkingTokens | None = None, **options: Any) -> list[Any]:
        """Pictures by the pipeline's own sampler (see `finetune.sampling.draw`). tokens: of the attached adapter, if it has any."""
        from finetune.thinking.tokens import conditionings_with_tokens

        self.encode(text for request in requests for text in (request.prompt, request.negative))
        conditionings = conditionings_with_tokens(self.conditionings, tokens, {request.negative for request in requests})
        return draw(self.family, self.pipeline, requests, conditionings, **options)
