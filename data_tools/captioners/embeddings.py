"""Near duplicates by what a vision model sees (CLIP, SigLIP, DINOv2): finds crops and edits that hashes do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.captioners.transformers_models import scaled_down
from data_tools.errors import BadInput
from data_tools.fingerprints import close_vectors
from data_tools.images import BadPicture, open_image
from data_tools.pickle_refusal import refuse_pickles
from data_tools.progress import Progress

BATCH = 16  # pictures through the model at once


def pairs_by_embedding(paths: Sequence[Path], model: str, least_cosine: float, progress: Progress = Progress()) -> np.ndarray:
    """Pairs of indices into `paths` whose embeddings have at least this cosine, int64 [n, 2]. Pictures that cannot be opened pair with none."""
    refuse_pickles(model)
    try:
        import transformers

        processor = transformers.AutoImageProcessor.from_pretrained(model, use_fast=False)
        network = transformers.AutoModel.from_pretrained(model, use_safetensors=True, trust_remote_code=False).eval()
    except ImportError as error:
        raise BadInput(f"embeddings need {error.name or error}", fix="pip install brushwork with its usual dependencies") from None
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(f"{model} cannot be loaded: {' '.join(str(error).split())[:200]}", fix="a folder or Hub identifier of a vision model") from None
    kept, vectors = [], []
    with progress.phase("embedding pictures", len(paths)) as advance:
        for start in range(0, len(paths), BATCH):
            images = []
            for index in range(start, min(start + BATCH, len(paths))):
                try:
                    images.append(scaled_down(open_image(paths[index])))
                    kept.append(index)
                except BadPicture:
                    continue
            if images:
                vectors.append(embed(network, processor, images))
            advance(min(BATCH, len(paths) - start))
    if not kept:
        return np.zeros((0, 2), dtype=np.int64)
    return np.array(kept)[close_vectors(np.concatenate(vectors), least_cosine)]


def embed(network: Any, processor: Any, images: Sequence[Any]) -> np.ndarray:
    """Unit vectors, float32 [pictures, width]."""
    import torch

    inputs = processor(images=list(images), return_tensors="pt")
    with torch.inference_mode():
        found = network.get_image_features(**inputs) if hasattr(network, "get_image_features") else network(**inputs)
    if not isinstance(found, torch.Tensor):
        found = found.pooler_output if getattr(found, "pooler_output", None) is not None else found.last_hidden_state[:, 0]
    return torch.nn.functional.normalize(found.float(), dim=-1).numpy()
