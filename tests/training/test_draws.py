"""Random numbers of a step: each is named by what it is for, so that it depends on nothing that was drawn before."""

from types import SimpleNamespace

import pytest
import torch

from finetune.recipe import load_recipe
from finetune.training.loop import noise_positions, sample_noise

SHAPE = torch.Size((4, 6, 6))


def job(**objective):
    return SimpleNamespace(recipe=load_recipe({"base": {"model": "mini"}, "data": {"folder": "."}, "objective": objective}, []))


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_every_sample_of_every_step_has_noise_of_its_own(offset):
    drawn = {(step, index): sample_noise(job(noise_offset=offset), step, index, SHAPE) for step in range(3) for index in range(3)}
    assert len({tuple(noise.flatten().tolist()) for noise in drawn.values()}) == 9
    assert all(torch.equal(noise, sample_noise(job(noise_offset=offset), step, index, SHAPE)) for (step, index), noise in reversed(drawn.items()))


def test_an_offset_is_one_number_a_channel():
    offset = (sample_noise(job(noise_offset=0.5), 1, 2, SHAPE) - sample_noise(job(), 1, 2, SHAPE)).flatten(1)
    assert offset.std(1).max() < 1e-6 and len({round(number, 4) for number in offset.mean(1).tolist()}) == 4


def test_stratified_levels_cover_the_interval_evenly_and_reach_every_sample():
    """Without an order of its own the first sample of every step would always be the least noisy one."""
    steps = [noise_positions(job(stratified=True), step, 8) for step in range(64)]
    assert all(sorted((positions * 8).long().tolist()) == list(range(8)) for positions in steps)
    assert all(len({int(positions[sample] * 8) for positions in steps}) == 8 for sample in range(8))


def test_levels_that_are_not_stratified_are_drawn_apart():
    steps = [noise_positions(job(stratified=False), step, 8) for step in range(64)]
    assert any(len(set((positions * 8).long().tolist())) < 8 for positions in steps)
    assert float(torch.cat(steps).mean()) == pytest.approx(0.5, abs=0.05)
