"""The family that people copy does what the protocol says, and its file says how."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.families.protocol import PictureGeometry
from finetune.families.template import FAMILY, TemplateTransformer
from finetune.objectives import LossWeighting

GEOMETRY = PictureGeometry((32, 32), (32, 32))


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = TemplateTransformer()
    (tmp_path / "transformer").mkdir()
    save_file(model.state_dict(), tmp_path / "transformer" / "model.safetensors")
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(model.config))
    return tmp_path


def test_it_trains_a_lora_through_the_protocol_alone(folder):
    encoders = FAMILY.load(folder, frozenset({"text", "vae"}), torch.float32)
    texts = FAMILY.encode_prompts(encoders, ["red", "a blue square"])
    latents = FAMILY.encode_images(encoders, torch.rand(2, 3, 32, 32) * 2 - 1)
    pipeline = FAMILY.load(folder, frozenset({"transformer"}), torch.float32)
    objective = FAMILY.objective(pipeline, None, LossWeighting())
    model = pipeline.transformer
    inject_lora(model, FAMILY.facts.targets["attention"], rank=4, seed=0)
    FAMILY.prepare(model, 1)
    optimizer = torch.optim.AdamW([p for _, p in lora_parameters(model)], lr=0.02)
    noise = torch.randn(latents.mean.shape, generator=torch.Generator().manual_seed(0))
    level = objective.level(torch.tensor([0.3, 0.8]), latents.mean)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        predicted = FAMILY.predict(model, objective.add_noise(latents.mean, noise, level), level, texts, [GEOMETRY] * 2)
        losses.append((predicted - objective.target(latents.mean, noise, level)).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for _, p in lora_parameters(model))


def test_a_batch_predicts_and_draws_what_each_picture_does_alone(folder):
    pipeline = FAMILY.load(folder, frozenset({"text", "vae", "transformer"}), torch.float32)
    texts = FAMILY.encode_prompts(pipeline, ["red", "a blue square", ""])
    shape = FAMILY.latent_shape(pipeline, 32, 32)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    drawn = []
    for part in (slice(0, 2), slice(1, 2)):
        inputs = FAMILY.pipeline_inputs(pipeline, texts[:2][part], [texts[2]] * len(noise[part]), noise[part], 3.0)
        drawn.append(pipeline(**inputs, steps=3))
    assert drawn[0].shape == (2, 3, 32, 32)
    assert torch.allclose(drawn[0][1:], drawn[1], atol=1e-5)


def test_its_shape_is_told_from_the_configuration(folder):
    config = json.loads((folder / "transformer" / "config.json").read_text())
    assert FAMILY.shape(config).parameters == sum(p.numel() for p in TemplateTransformer(**config).parameters())


def test_every_step_of_adding_a_family_is_numbered_in_the_file():
    import inspect

    from finetune.families import template

    source = inspect.getsource(template)
    assert all(f"# {number}. " in source for number in range(1, 10))
