"""CLIP-type models through transformers: unit vectors of pictures and texts, prepared as their makers prepare them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_tools.pickle_refusal import refuse_pickles
from finetune.errors import BadInput
from finetune.evaluation.evidence import Evidence, Pixels

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 16
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_model(folder: Path, kind: str = "AutoModel") -> Any:
    """A frozen transformers model from a folder. Raises BadInput when it is not one; pickles and code are never read."""
    import transformers

    refuse_pickles(folder)
    try:
        model = getattr(transformers, kind).from_pretrained(folder, use_safetensors=True, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadInput(f"cannot be loaded as a {kind}: {' '.join(str(error).split())[:160]}", where=str(folder), fix="give a folder with config.json and .safetensors weights") from None
    return model.eval().requires_grad_(False)


def normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of the folder's preprocessor, else CLIP's."""
    try:
        settings = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        return tuple(settings["image_mean"]), tuple(settings["image_std"])
    except (OSError, ValueError, KeyError):
        return CLIP_MEAN, CLIP_STD


def prepared(pictures: Sequence[Pixels], size: int, mean: Sequence[float], std: Sequence[float], shorter: int | None = None) -> Tensor:
    """(n, 3, size, size) float32: shorter edge to `shorter` (or size), bicubic; centre crop; normalised."""
    import torch

    rows = []
    for pixels in pictures:
        image = Image.fromarray(pixels)
        edge, short = shorter or size, min(image.size)
        # Rounded down, as transformers does.
        image = image.resize((image.width * edge // short, image.height * edge // short), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        rows.append(np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255)
    normal = (np.stack(rows) - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return torch.from_numpy(normal).permute(0, 3, 1, 2).contiguous()


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


class PictureTextModel:
    """A CLIP-type model from a folder with its tokenizer. `scale` is exp(logit_scale)."""

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        self.model = load_model(folder)
        if not hasattr(self.model, "get_text_features"):
            raise BadInput(f"a {type(self.model).__name__} does not compare pictures and text", where=str(folder), fix="give a CLIP-type model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.mean, self.std = normalisation(folder)
        self.size = self.model.config.vision_config.image_size
        self.scale = float(self.model.logit_scale.exp())

    def pictures(self, pictures: Sequence[Pixels]) -> np.ndarray:
        """(n, D) unit vectors."""
        import torch

        rows = []
        for start in range(0, len(pictures), AT_ONCE):
            with torch.no_grad():
                rows.append(_features(self.model.get_image_features(pixel_values=prepared(pictures[start : start + AT_ONCE], self.size, self.mean, self.std))))
        return unit(np.concatenate(rows))

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(n, D) unit vectors; what is longer than the model's text is cut, as its makers do."""
        import torch

        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            return unit(_features(self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)))


def _features(output: Any) -> np.ndarray:
    tensor = output if hasattr(output, "numpy") else output.pooler_output
    return tensor.float().numpy().astype(np.float64)


def loaded(evidence: Evidence, name: str) -> PictureTextModel:
    """The model of that name, loaded once for an evaluation."""
    return evidence.once(("model", name), lambda: PictureTextModel(evidence.weights[name]))


def text_likeness(evidence: Evidence, name: str) -> np.ndarray:
    """(n,) cosine of each picture and its prompt."""
    model = loaded(evidence, name)
    texts = evidence.once(("texts", name), lambda: model.texts([prompt.prompt for prompt in evidence.prompts]))
    return (model.pictures(evidence.pictures) * texts).sum(1)


def reference_vectors(evidence: Evidence, name: str) -> np.ndarray:
    """(m, D) unit vectors of the references."""
    return evidence.once(("references", name), lambda: loaded(evidence, name).pictures(evidence.reference_pixels()))
