"""Guidance-distilled models are told a scale in training, the one that the recipe names, as their pipelines tell it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from finetune.families import registry
from finetune.objectives import DDPMObjective, FlowObjective, NoiseLevel, with_guidance
from tests.families.battery import Specimen, close, stock_pipeline
from tests.tiny_models.all import TINY

TOLD = [name for name in TINY if registry.family(name).facts.told_guidance]
SCALE = 3.5


@pytest.fixture(scope="module", params=TOLD)
def specimen(request, tmp_path_factory) -> Specimen:
    return Specimen(request.param, tmp_path_factory.mktemp(request.param))


def test_the_model_predicts_what_the_pipeline_predicts_at_this_scale(specimen: Specimen) -> None:
    pipeline = stock_pipeline(specimen, specimen.tiny)
    step = specimen.watched_step(pipeline, prompt="a cat", generator=torch.Generator().manual_seed(0), **(dict(specimen.tiny.live) | {"guidance_scale": SCALE}))
    timestep = torch.tensor([step.timestep])
    conditioning = specimen.family.encode_prompts(specimen.text, ["a cat"])
    with torch.no_grad():
        at, at_one = (specimen.family.predict(specimen.drawer.transformer, step.sample, NoiseLevel(timestep / 1000, timestep, scale), conditioning, [specimen.geometry])
                      for scale in (SCALE, 1.0))
    if not specimen.drawer.transformer.config.guidance_embeds:
        assert torch.equal(at, at_one), "it is told none"
        return
    assert close(at, step.output), (at - step.output).abs().max()
    assert not close(at_one, step.output, 1e-5), "the scale changes nothing"


def test_some_families_are_told_and_no_other_has_a_model_that_asks() -> None:
    asking = {name for name in TINY if getattr(TINY[name].build().transformer.config, "guidance_embeds", False)}
    assert {"flux_dev", "hunyuan_video"} <= asking and asking <= {*TOLD, "hunyuan_image_2"}


def test_levels_carry_the_scale_of_a_flow_objective() -> None:
    told = with_guidance(FlowObjective(), SCALE)
    assert told.level(torch.tensor([0.3]), torch.zeros(1, 4, 2, 2)).guidance == SCALE
    assert FlowObjective().level(torch.tensor([0.3]), torch.zeros(1, 4, 2, 2)).guidance == 1.0
    ddpm = DDPMObjective(torch.linspace(0.99, 0.01, 1000), "epsilon")
    assert with_guidance(ddpm, SCALE) is ddpm and "guidance" not in {field.name for field in dataclasses.fields(ddpm)}
