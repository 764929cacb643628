"""Text comes from the cache in host memory, noise levels too: a family brings them to where the pictures are. The device `meta`
stands in for a GPU here: torch refuses to mix it with the CPU just the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.families.text_encoding import stack
from tests.families.battery import Specimen
from tests.tiny_models.all import TINY

# What these do depends on numbers of the text, which `meta` has not.
LOOK_AT_NUMBERS = {"hunyuan_image_2", "lumina2", "chroma", "hidream", "hunyuan_video_15"}


def on_meta(conditioning):
    return replace(conditioning, tensors={name: tensor.to("meta") for name, tensor in conditioning.tensors.items()})


@pytest.fixture(scope="module", params=[name for name in TINY if name not in LOOK_AT_NUMBERS])
def specimen(request, tmp_path_factory):
    return Specimen(request.param, tmp_path_factory.mktemp(request.param))


def test_a_step_is_taken_where_the_pictures_are(specimen):
    model = specimen.fresh_transformer()
    inject_lora(model, specimen.family.facts.targets["attention"], 4, seed=0)
    specimen.family.prepare(model, 1)
    noisy, timesteps = specimen.noisy()
    # A caption that carries trained tokens is where they are trained; one that was dropped beside it comes from the cache.
    texts = [on_meta(specimen.conditionings[0]), specimen.conditionings[1]]
    prediction = specimen.predict(model.to("meta"), noisy.to("meta"), timesteps, texts)
    assert prediction.shape == noisy.shape and prediction.is_meta
    prediction.sum().backward()
    assert any(factor.grad is not None for _, factor in lora_parameters(model))


def test_text_of_two_devices_is_stacked_and_keeps_its_format(specimen):
    cached = specimen.conditionings[0]
    for name, tensor in cached.tensors.items():
        found = stack([on_meta(cached), cached], name, "meta")
        assert found.is_meta and found.dtype == tensor.dtype and found.shape == (2, *tensor.shape)
        assert torch.equal(stack([cached, cached], name, "cpu")[1], tensor)
