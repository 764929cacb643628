"""With guidance, a picture drawn from cached text is the one that the pipeline draws from the words: the empty prompt included."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.families.protocol import Conditioning
from finetune.training.encoding_cache import EncodingCache
from tests.families.battery import PROMPTS, Specimen, close, stock_pipeline
from tests.tiny_models.all import TINY

GUIDANCE = 3.0
# Its own prompts come with an additive mask (see test_library_defects.py).
NAMES = [name for name in TINY if name != "chroma"]


def cached(conditioning: Conditioning, folder: Path, key: str) -> Conditioning:
    """What comes back of it from a run's cache."""
    EncodingCache(folder).put(key, dict(conditioning.tensors))
    return Conditioning(EncodingCache(folder).get(key))


def in_words(pipeline: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same call with a prompt and the empty negative prompt in place of what they became."""
    kept = {key: value for key, value in inputs.items() if "prompt" not in key}
    return kept | {"prompt": PROMPTS[1]} | ({"negative_prompt": ""} if "negative_prompt" in inspect.signature(pipeline.__call__).parameters else {})


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_draws_the_same_from_our_text_states_as_from_the_words(name, tmp_path):
    specimen = Specimen(name, tmp_path)
    pipeline = stock_pipeline(specimen, specimen.tiny)
    height, width = specimen.tiny.picture
    noise = torch.randn(1, *specimen.latent_shape, generator=torch.Generator().manual_seed(0))
    text, empty = (cached(conditioning, tmp_path / "cache", key) for conditioning, key in ((specimen.conditionings[1], "text"), (specimen.empty, "empty")))
    inputs = specimen.family.pipeline_inputs(pipeline, [text], [empty], noise, GUIDANCE)
    settings = {key: value for key, value in specimen.tiny.live.items() if key not in ("guidance_scale", "true_cfg_scale")}
    call = settings | {"height": height, "width": width, "num_inference_steps": 3, "output_type": "latent"}
    drawn = [pipeline(**(call | how), generator=torch.Generator().manual_seed(0))[0] for how in (inputs, in_words(pipeline, inputs))]
    assert close(*drawn, 1e-5), (drawn[0] - drawn[1]).abs().max()
