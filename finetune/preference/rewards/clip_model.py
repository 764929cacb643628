"""A CLIP or SigLIP model through transformers, with picture preparation on tensors so that gradients flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_tools.pickle_refusal import refuse_pickles
from finetune.errors import BaseModelError


@dataclass
class ClipModel:
    """mean, std: of the normalisation.  size: edge in pixels that the model sees."""

    identifier: str
    revision: str | None
    model: Any
    tokenizer: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int

    @classmethod
    def load(cls, identifier: str, revision: str | None = None, processor: str | None = None) -> ClipModel:
        """From a folder or the Hub; only safetensors are read and no code of the repository is run. Raises BaseModelError.

        processor: where tokenizer and normalisation lie when not beside the weights.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        refuse_pickles(identifier)
        try:
            model = AutoModel.from_pretrained(identifier, revision=revision, use_safetensors=True, trust_remote_code=False).eval().requires_grad_(False)
            images = AutoImageProcessor.from_pretrained(processor or identifier, revision=None if processor else revision)
            tokenizer = AutoTokenizer.from_pretrained(processor or identifier, revision=None if processor else revision)
        except Exception as error:  # transformers raises OSError, ValueError, KeyError, EnvironmentError for unusable repositories
            raise BaseModelError(f"cannot be loaded as a CLIP or SigLIP model ({str(error).strip().splitlines()[0][:160]})", where=identifier, fix="give a folder or Hub id with safetensors weights, a tokenizer and a preprocessor") from None
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise BaseModelError(f"a {type(model).__name__} does not compare pictures and text", where=identifier, fix="use a CLIP or SigLIP model")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(identifier, revision, model.to(device), tokenizer, tuple(images.image_mean), tuple(images.image_std), model.config.vision_config.image_size)

    def prepare(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) normalised: shorter edge to `size`, centre crop."""
        return prepare_pixels(pixels, self.size, self.mean, self.std)

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, D), unit length."""
        return F.normalize(_tensor(self.model.get_image_features(pixel_values=self.prepare(pixels.to(self.model.device)))).float(), dim=1).to(pixels.device)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """(B, D), unit length; no gradients. Text beyond the model's length is cut, as the model's makers do."""
        length = getattr(self.model.config.text_config, "max_position_embeddings", 77)
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt").to(self.model.device)
        tokens.pop("token_type_ids", None)
        with torch.no_grad():
            return F.normalize(_tensor(self.model.get_text_features(**tokens)).float(), dim=1).cpu()


def prepare_pixels(pixels: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (B, 3, size, size): shorter edge to `size`, bicubic; centre crop; normalised. Carries gradients."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    resized = F.interpolate(pixels, (max(size, round(height * scale)), max(size, round(width * scale))), mode="bicubic", antialias=True)
    top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
    cropped = resized[..., top:top + size, left:left + size].clamp(0, 1)
    return (cropped - cropped.new_tensor(mean).view(1, 3, 1, 1)) / cropped.new_tensor(std).view(1, 3, 1, 1)


def _tensor(output: Any) -> Tensor:
    """transformers 5 wraps features in an output object for some models."""
    return output if isinstance(output, Tensor) else output.pooler_output
