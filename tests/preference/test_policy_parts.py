"""The mathematics of policy optimisation, without a model: paths, advantages, the guard, settings."""

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_tools.errors import BrushworkError
from finetune.errors import RecipeError
from finetune.objectives import DDPMObjective, FlowObjective
from finetune.preference.pairs import Pair
from finetune.preference.policy.denoiser import Denoiser, Draw
from finetune.preference.policy.dpo import DiffusionDPO
from finetune.preference.policy.drift import Check
from finetune.preference.policy.finish import Finished, paired_interval, reported_prompts
from finetune.preference.policy.grpo import group_advantages
from finetune.preference.policy.guard import Guard
from finetune.preference.policy.methods import dealt
from finetune.preference.policy.paths import divergence, log_probability, path_for
from finetune.preference.policy.settings import build_settings, dump_settings, read_settings

BETAS = torch.linspace(0.00085**0.5, 0.018**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = torch.cumprod(1 - BETAS, 0).float()
OBJECTIVES = {"epsilon": DDPMObjective(ALPHAS, "epsilon"), "v": DDPMObjective(ALPHAS, "v_prediction"), "flow": FlowObjective()}
SHAPE = torch.Size((4, 2, 6, 6))


def oracle(objective, clean, x, level):
    """What a perfect model predicts for x when every picture is `clean`."""
    if isinstance(objective, FlowObjective):
        return (x - clean) / level.sigma.view(-1, 1, 1, 1)
    alpha = (1 - level.sigma**2).view(-1, 1, 1, 1)
    noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    return noise if objective.prediction == "epsilon" else objective.target(clean, noise, level)


@pytest.mark.parametrize(("name", "noise"), list(itertools.product(OBJECTIVES, (0.0, 0.7))))
def test_a_perfect_model_is_followed_to_its_picture(name, noise):
    torch.manual_seed(0)
    path, clean, x = path_for(OBJECTIVES[name], 10, SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    for i in range(path.steps):
        output = oracle(OBJECTIVES[name], clean, x, path.level(i, len(x)))
        assert torch.allclose(path.clean(x, output, i), clean, atol=1e-3)
        mean, std = path.transition(x, output, i, noise)
        assert (std > 0) == (noise > 0 and i < path.steps - 1)
        x = mean + std * torch.randn(SHAPE)
    assert torch.allclose(x, clean, atol=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_random_steps_keep_the_right_amount_of_noise(name):
    """After any step the latents are as noisy as the next level says, random or not."""
    torch.manual_seed(0)
    path, clean = path_for(OBJECTIVES[name], 50, SHAPE), torch.zeros(64, 2, 6, 6)
    for noise in (0.0, 0.5):
        x = torch.randn(clean.shape)
        for i in range(30):
            mean, std = path.transition(x, oracle(OBJECTIVES[name], clean, x, path.level(i, len(x))), i, noise)
            x = mean + std * torch.randn(clean.shape)
        expected = path.level(30, 1).sigma.item()
        assert float(x.std()) == pytest.approx(expected, rel=0.05)


def test_log_probability_and_divergence_are_those_of_gaussians():
    torch.manual_seed(0)
    x, mean, other = (torch.randn(SHAPE) for _ in range(3))
    normal = torch.distributions.Normal(mean, 0.3)
    constant = -math.log(0.3) - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(log_probability(x, mean, 0.3) + constant, normal.log_prob(x).flatten(1).mean(1), atol=1e-5)
    exact = torch.distributions.kl_divergence(normal, torch.distributions.Normal(other, 0.3)).flatten(1).sum(1)
    assert torch.allclose(divergence(mean, other, 0.3), exact, rtol=1e-5)


def test_flow_levels_are_shifted_like_the_family_shifts_them():
    path = path_for(FlowObjective(dynamic_shift=lambda shape: 3.0), 4, SHAPE)
    assert path.sigmas == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))


def test_advantages_compare_within_a_prompt():
    advantages, flat = group_advantages(torch.tensor([1.0, 3.0, 101.0, 103.0, 7.0, 7.0]), 2)
    one = float(advantages[1])
    assert one > 0 and advantages[:4].tolist() == pytest.approx([-one, one, -one, one])
    assert advantages[4:].tolist() == [0, 0] and flat == pytest.approx(1 / 3)
    spike, _ = group_advantages(torch.cat([torch.zeros(99), torch.tensor([1e6])]), 100)
    assert spike.max() == 5


def test_dealing_uses_everything_before_anything_comes_twice():
    dealt_out = [item for step in range(5) for item in dealt(list("abcde"), 3, 0, "x", step)]
    assert all(sorted(dealt_out[start:start + 5]) == list("abcde") for start in (0, 5, 10))
    assert dealt(list("abcde"), 3, 0, "x", 2) == dealt_out[6:9]


HEALTHY = Check(step=0, reward=1.0, witness=1.0, reward_by_prompt=[1.0] * 4, witness_by_prompt=[0.8, 0.9, 1.1, 1.2], kl=0.0, kl_steps=[0.0], diversity=1.0, out_of_range=0.0, drift=1.0,
                looks={"brightness": 0.5})
SETTINGS = build_settings({"method": "grpo", "data": "d", "base": "b", "reward": "r"})


def guard(**more):
    found = Guard(SETTINGS, {"brightness": (0.4, 0.6)}, **more)
    found.judge(HEALTHY)
    return found


@pytest.mark.parametrize(("change", "sign"), [
    ({"kl": 31.0}, "divergence"), ({"diversity": 0.7}, "alike"), ({"drift": 1.3}, "forgotten"), ({"out_of_range": 0.06}, "colours"), ({"looks": {"brightness": 0.75}}, "brightness"),
    ({"kl": math.nan}, "numbers"), ({"kl": math.inf}, "numbers"), ({"reward": 1.5, "witness": 0.8, "witness_by_prompt": [0.6, 0.7, 0.9, 1.0]}, "hacking"),
])
def test_the_guard_stops_at_each_sign_and_names_it(change, sign):
    watching = guard()
    assert watching.judge(replace(HEALTHY, step=10, reward=1.2)) is None
    assert sign in watching.judge(replace(HEALTHY, step=20, **change))
    assert watching.best.step == 10


def test_the_guard_lets_honest_progress_and_noise_pass():
    watching = guard(witness_spread=1.0)
    for step, witness in ((10, 1.1), (20, 1.08), (30, 1.2)):
        values = [witness - 0.2, witness - 0.1, witness + 0.1, witness + 0.2]
        assert watching.judge(replace(HEALTHY, step=step, reward=1 + step / 10, witness=witness, witness_by_prompt=values, kl=step / 10)) is None
    assert watching.best.step == 30


def test_the_guard_remembers_over_a_restart():
    watching = guard()
    watching.judge(replace(HEALTHY, step=10, reward=1.2))
    again = Guard(SETTINGS, {"brightness": (0.4, 0.6)})
    again.restore(watching.to_state())
    assert again.first == HEALTHY and again.best.step == 10
    assert "alike" in again.judge(replace(HEALTHY, step=20, diversity=0.1))


def test_settings_go_through_a_file_unchanged(tmp_path):
    settings = build_settings({"method": "refl", "data": "d\"'\\ä", "base": "b", "reward": "r", "steps": None}, ["learning_rate=3e-4", "enough=0.4", "targets=all"])
    (tmp_path / "recipe.toml").write_text(dump_settings(settings), encoding="utf-8")
    assert read_settings(tmp_path / "recipe.toml") == settings and settings.learning_rate == 3e-4 and settings.targets == "all"


@pytest.mark.parametrize(("given", "changes", "named"), [
    ({}, ["lerning_rate=1"], "lerning_rate"), ({}, ["steps=0"], "steps"), ({}, ["steps=many"], "steps"), ({}, ["steps=true"], "steps"), ({}, ["learning_rate=nan"], "learning_rate"),
    ({}, ["steps"], "--set"), ({"method": "ppo"}, [], "method"), ({"method": "grpo"}, [], "--reward"), ({"method": "grpo", "reward": "r"}, ["window=10"], "window"),
    ({"method": "draft", "reward": "r"}, ["gradient_steps=11"], "gradient_steps"), ({"base": None}, [], "base"),
])
def test_wrong_settings_are_named(given, changes, named):
    with pytest.raises(BrushworkError) as caught:
        build_settings({"method": "dpo", "data": "d", "base": "b"} | given, changes)
    problems = caught.value.problems if isinstance(caught.value, RecipeError) else [caught.value]
    assert named in [problem.where for problem in problems] and caught.value.exit_code == 2


class HalfLearned:
    """A family whose reference returns its input and whose policy returns half of it; it keeps what it was asked."""

    def predict(self, transformer, noisy, level, conditionings, geometries):
        self.noisy, self.level = noisy, level
        return noisy * (0.5 if torch.is_grad_enabled() else 1.0)


def test_the_loss_of_comparisons_is_the_papers():
    """Diffusion-DPO, eq. 14, with means over latent elements: how much more the error of the better one has fallen than the worse one's."""
    torch.manual_seed(0)
    latents = {name: torch.randn(2, 4, 4) for name in ("a", "b", "c", "d")}
    pairs = [Pair("a", "b", "p", "a dog", "ada", 1.0, 1.0), Pair("c", "d", "p", "a dog", "ada", 0.5, 0.5)]
    loaded = SimpleNamespace(device=torch.device("cpu"), family=HalfLearned(), transformer=torch.nn.Module(), pipeline=SimpleNamespace(vae_scale_factor=8),
                             geometry=lambda height, width: (height, width), conditions=lambda prompts: prompts)
    method = DiffusionDPO(loaded, FlowObjective(), pairs, latents, beta=3.0, batch_size=2, micro_batch=4, seed=0)
    (update,) = method.updates(0)
    (batch,) = update.micro_batches
    found = update.losses(batch)
    chosen = [one.pair for one in batch]
    clean = torch.stack([latents[pair.better] for pair in chosen] + [latents[pair.worse] for pair in chosen])
    sigma = loaded.family.level.sigma.view(-1, 1, 1, 1)
    noise = (loaded.family.noisy - (1 - sigma) * clean) / sigma
    assert torch.allclose(noise[:2], noise[2:], atol=1e-4) and torch.equal(sigma[:2], sigma[2:]), "both of a pair are asked at the same noise"
    policy, reference = (((factor * loaded.family.noisy - (noise - clean)) ** 2).flatten(1).mean(1) for factor in (0.5, 1.0))
    better, worse = (policy - reference).chunk(2)
    probability, weight = (torch.tensor([getattr(pair, name) for pair in chosen]) for name in ("probability", "weight"))
    margin = -0.5 * 3.0 * (better - worse)
    assert torch.allclose(found, -weight * (probability * F.logsigmoid(margin) + (1 - probability) * F.logsigmoid(-margin)), atol=1e-4)


@pytest.mark.parametrize(("better", "told"), [((1.0,), {"pairs_right": 0.5}), ((1.0, 0.5), {"pairs_right": 0.5}), ((0.5,), {})])
def test_an_adapter_at_its_start_ranks_by_chance_and_ties_are_not_ranked(better, told):
    """The log began with a share of 0, and counted ties in the order in which they lay."""
    latents = {name: torch.ones(2, 4, 4) for name in "ab"}
    family = SimpleNamespace(predict=lambda transformer, noisy, *_: noisy)
    loaded = SimpleNamespace(device=torch.device("cpu"), family=family, transformer=torch.nn.Module(), pipeline=SimpleNamespace(vae_scale_factor=8),
                             geometry=lambda height, width: (height, width), conditions=lambda prompts: prompts)
    method = DiffusionDPO(loaded, FlowObjective(), [Pair("a", "b", "p", "a dog", "ada", 1.0, share) for share in better], latents, beta=3.0, batch_size=len(better), micro_batch=4, seed=0)
    for update in method.updates(0):
        for batch in update.micro_batches:
            update.losses(batch)
    assert method.numbers() == told | {"better_error": 0.0}


def test_every_picture_has_noise_of_its_own_and_a_group_begins_alike():
    loaded = SimpleNamespace(latent_shape=lambda height, width: (2, 4, 4), geometry=lambda height, width: (height, width))
    denoiser = Denoiser(loaded, FlowObjective(), path_for(FlowObjective(), 4, SHAPE), height=32, width=32, guidance=1.0, seed=0, micro_batch=2)
    draws = [Draw("a dog", 0, 0), Draw("a dog", 1, 0), Draw("a cat", 2, 1)]
    start = denoiser.start(draws, "round", 0)
    assert torch.equal(start[0], start[1]) and not torch.equal(start[0], start[2])
    steps = [denoiser.step_noise(draws, "round", step, i) for step in range(2) for i in range(2)]
    assert len({tuple(noise.flatten().tolist()) for part in steps for noise in part}) == 12


def test_the_reward_is_reported_on_prompts_that_chose_nothing_where_there_are_enough():
    settings = build_settings({"method": "draft", "data": "x", "base": "mini", "reward": "measure:warmth", "check_prompts": 3})
    many = [f"p{number}" for number in range(12)]
    assert list(reported_prompts(settings, many[:8])) == many[3:6] and list(reported_prompts(settings, many[:7])) == many[:3]


def test_a_gain_over_few_prompts_has_no_interval_and_says_so():
    """Two held-out prompts had an interval without width, at 95 %."""
    assert paired_interval(np.array([0.1, 0.1, 0.3, 0.3]), ["a", "a", "b", "b"]) is None
    low, high = paired_interval(np.arange(12.0), [f"p{number // 2}" for number in range(12)])
    assert low < 5.5 < high
    told = Finished(**dict.fromkeys(Finished.__dataclass_fields__) | {"reward_before": 0.1, "reward_after": 0.3}).gain_line()
    assert told == "0.100 before, 0.300 after (no interval: too few held-out prompts, or all gained alike)"
    told = Finished(**dict.fromkeys(Finished.__dataclass_fields__) | {"reward_before": 0.1, "reward_after": 0.3, "gain_interval": (0.1, 0.3), "best_step": 20, "chosen_from": 4}).gain_line()
    assert told == ("0.100 before, 0.300 after (gain +0.100 to +0.300, 95 %); the same prompts, on other seeds, chose step 20 of 4 checks, "
                    "so prompts that chose nothing may gain less")
    assert paired_interval(np.full(8, 0.1), list("abcdefgh")) is None
