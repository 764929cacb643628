"""Noise to add, target to hit, weight of the loss."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finetune.objectives import DDPMObjective, FlowObjective, LossWeighting, TimestepSampling, resolution_shift

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction")
GENERATOR = torch.Generator().manual_seed(0)
LATENTS, NOISE = torch.randn(6, 4, 5, 3, generator=GENERATOR), torch.randn(6, 4, 5, 3, generator=GENERATOR)
UNIFORM = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 0.999999])


def ddpm(prediction="v_prediction", **changes):
    return DDPMObjective(SCHEDULER.alphas_cumprod, prediction, **changes)


def test_ddpm_noise_and_velocity_are_those_of_the_library():
    objective = ddpm()
    level = objective.level(UNIFORM, LATENTS)
    timesteps = level.timestep.long()
    assert timesteps.tolist() == [0, 200, 400, 600, 800, 999]
    assert torch.allclose(objective.add_noise(LATENTS, NOISE, level), SCHEDULER.add_noise(LATENTS, NOISE, timesteps), atol=1e-6)
    assert torch.allclose(objective.target(LATENTS, NOISE, level), SCHEDULER.get_velocity(LATENTS, NOISE, timesteps), atol=1e-6)
    assert torch.equal(ddpm("epsilon").target(LATENTS, NOISE, level), NOISE)


@pytest.mark.parametrize("objective", [ddpm(), FlowObjective()], ids=["v", "flow"])
def test_the_clean_latent_follows_from_noisy_latent_and_target(objective):
    level = objective.level(UNIFORM.clamp(min=0.01), LATENTS)
    noisy, target = objective.add_noise(LATENTS, NOISE, level), objective.target(LATENTS, NOISE, level)
    sigma = level.sigma.view(-1, 1, 1, 1)
    if isinstance(objective, FlowObjective):
        recovered = noisy - sigma * target
    else:
        recovered = (1 - sigma**2).sqrt() * noisy - sigma * target
    assert torch.allclose(recovered, LATENTS, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_the_x0_error_by_the_capped_snr(prediction):
    """The weight on the model's own output, carried over to the x0 error, must be min(snr, gamma)."""
    objective = ddpm(prediction, weighting=LossWeighting("min_snr", 5.0))
    level = objective.level(UNIFORM, LATENTS)
    signal, sigma = (1 - level.sigma**2).sqrt(), level.sigma
    # d x0 / d output: -sigma / signal for epsilon, -sigma for v.
    slope = sigma / signal if prediction == "epsilon" else sigma
    snr = (signal / sigma) ** 2
    assert torch.allclose(objective.weight(level), snr.clamp(max=5.0) * slope**2, rtol=1e-4)


def test_min_snr_weighs_the_x0_error_by_the_capped_snr_for_a_velocity_too():
    objective = FlowObjective(weighting=LossWeighting("min_snr", 5.0))
    level = objective.level(UNIFORM.clamp(min=0.01), LATENTS)
    snr = ((1 - level.sigma) / level.sigma) ** 2
    assert torch.allclose(objective.weight(level), snr.clamp(max=5.0) * level.sigma**2, rtol=1e-4)


def test_no_weighting_is_one_everywhere():
    level = ddpm().level(UNIFORM, LATENTS)
    assert torch.equal(ddpm().weight(level), torch.ones(6))


@pytest.mark.parametrize("kind", ["uniform", "logit_normal", "shifted", "logit_normal_shifted"])
@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True), st.floats(0.2, 8))
@example(0.0, 0.9999999999999998, 0.2)
@settings(deadline=None, max_examples=60)
def test_every_density_is_a_rising_map_of_the_unit_interval(kind, low, high, shift):
    sampling = TimestepSampling(kind, shift=shift)
    values = sampling(torch.tensor([min(low, high), max(low, high)]))
    assert 0 <= values[0] <= values[1] <= 1


def test_densities_differ_as_their_names_say():
    u = torch.linspace(0.0005, 0.9995, 2001)
    assert TimestepSampling("uniform")(u).mean() == pytest.approx(0.5, abs=1e-3)
    assert TimestepSampling("shifted", shift=3.0)(u).mean() > 0.6
    assert TimestepSampling("logit_normal")(u).std() < TimestepSampling("uniform")(u).std()
    assert torch.allclose(TimestepSampling("shifted", shift=3.0)(torch.tensor([0.5])), torch.tensor([0.75]))


def test_flow_uses_the_shift_of_the_resolution_where_the_family_has_one():
    objective = FlowObjective(TimestepSampling("shifted"), dynamic_shift=lambda shape: resolution_shift(shape[-1] * shape[-2]))
    small = objective.level(torch.tensor([0.5]), torch.zeros(1, 4, 16, 16)).sigma
    large = objective.level(torch.tensor([0.5]), torch.zeros(1, 4, 64, 64)).sigma
    assert large > small > 0.5


def test_resolution_shift_meets_the_published_end_points():
    import math

    assert resolution_shift(256) == pytest.approx(math.exp(0.5))
    assert resolution_shift(4096) == pytest.approx(math.exp(1.15))
