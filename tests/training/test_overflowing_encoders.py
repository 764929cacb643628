"""Text encoders that overflow in fp16, the format of cards without bf16, go on in float32; nothing that is not finite is kept."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from finetune.errors import TrainingError
from finetune import generation
from finetune.families.base_models import locate_base
from finetune.families.protocol import Conditioning
from finetune.generation import encode_texts
from finetune.sampling import PictureRequest
from finetune.training.encode import encode_prompts
from finetune.training.encoding_cache import EncodingCache
from tests.listening import Listening


def base_with(tiny_base, overflowing):
    """A base whose encoders give infinity for a caption with "loud" in it, in the formats `overflowing`."""
    loaded = []

    def encode(pipeline, prompts):
        return [Conditioning({"states": torch.full((2,), torch.inf if "loud" in prompt and pipeline.dtype in overflowing else 1.0), "mask": torch.ones(2, dtype=torch.long)}) for prompt in prompts]

    def load(folder, parts, dtype):
        loaded.append(dtype)
        return SimpleNamespace(dtype=dtype, components={}, to=lambda device: None)

    base = locate_base(str(tiny_base))
    return replace(base, family=SimpleNamespace(facts=base.family.facts, load=load, encode_prompts=encode)), loaded


def test_what_overflows_in_fp16_is_encoded_in_float32(tiny_base, tmp_path):
    base, loaded = base_with(tiny_base, {torch.float16})
    cache, told = EncodingCache(tmp_path), Listening()
    keys = encode_prompts(base, ["a cat", "a loud cat"], cache, torch.device("cpu"), torch.float16, told)
    assert all(cache.get(key)["states"].isfinite().all() for key in keys.values()) and loaded == [torch.float16, torch.float32]
    assert any("overflow in fp16" in line for line in told.said)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_what_is_never_finite_is_named_and_not_kept(tiny_base, tmp_path, dtype):
    base, _ = base_with(tiny_base, {torch.float16, torch.float32})
    with pytest.raises(TrainingError, match="'a loud cat'"):
        encode_prompts(base, ["a loud cat"], EncodingCache(tmp_path), torch.device("cpu"), dtype, Listening())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_prompts_to_draw_are_encoded_in_float32_too_where_fp16_overflows(tiny_base):
    base, loaded = base_with(tiny_base, {torch.float16})
    request, cpu = PictureRequest("a loud cat", 1, 32, 32), torch.device("cpu")
    of_texts = encode_texts(base, ["a loud cat"], torch.float16, cpu)
    _, of_requests = generation._encode(base, {}, [{}], [request], None, torch.float16, cpu, Listening())
    assert loaded == [torch.float16, torch.float32] * 2
    assert all(encoded["a loud cat"].tensors["states"].isfinite().all() for [encoded] in (of_texts, of_requests))
