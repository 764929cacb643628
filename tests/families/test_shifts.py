"""The noise levels of training are those of the base's scheduler, and have the shift with which the family's own pipeline draws a picture of that size."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch

from finetune.objectives import DDPMObjective, LossWeighting, resolution_shift
from tests.families.battery import Specimen
from tests.tiny_models.all import TINY


class Scheduled(Exception):
    """Ends a pipeline's call where its steps are laid out."""


def shift_of_the_pipeline(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> float:
    """What s in s u / (1 + (s - 1) u) is when the pipeline draws its usual tiny picture."""
    pipeline, told = specimen.drawer, {}
    scheduler, config = pipeline.scheduler, pipeline.scheduler.config

    def laid_out(num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None, timesteps: Any = None) -> None:
        told["mu"] = mu
        raise Scheduled

    monkeypatch.setattr(scheduler, "set_timesteps", laid_out)
    height, width = specimen.tiny.picture
    with pytest.raises(Scheduled):
        pipeline(height=height, width=width, num_inference_steps=2, **specimen.family.pipeline_inputs(
            pipeline, specimen.conditionings[:1], [specimen.empty], torch.zeros(1, *specimen.latent_shape), 1.0))
    if not config.get("use_dynamic_shifting"):
        return config.get("shift") or config.flow_shift
    return told["mu"] if config.time_shift_type == "linear" else math.exp(told["mu"])


@pytest.mark.parametrize("name", TINY)
def test_training_is_shifted_as_the_pipeline_draws(name, tmp_path, monkeypatch):
    specimen = Specimen(name, tmp_path)
    objective = specimen.family.objective(specimen.drawer, None, LossWeighting())
    if isinstance(objective, DDPMObjective):
        steps = diffusers.DDPMScheduler.from_config(specimen.drawer.scheduler.config)
        assert torch.equal(objective.alphas_cumprod, steps.alphas_cumprod) and objective.prediction == steps.config.prediction_type
        assert objective.sampling.kind == "uniform"
        return
    assert objective.sampling.kind == "logit_normal_shifted"
    median = objective.level(torch.tensor([0.5]), torch.zeros(1, *specimen.latent_shape)).sigma.item()
    if name.startswith("flux2"):  # the pipeline's own depends on the number of steps, which training does not have
        expected = resolution_shift(specimen.latent_shape[1] * specimen.latent_shape[2])
    else:
        expected = shift_of_the_pipeline(specimen, monkeypatch)
    assert name == "flux_schnell" or abs(expected - 1) > 0.01, "the tiny model's scheduler would hide a mistake"
    assert median / (1 - median) == pytest.approx(expected, rel=1e-5)
