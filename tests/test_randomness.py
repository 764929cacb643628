"""Every draw is named by (seed, purpose, step, index) and by nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.randomness import generator, python_random, stable_seed

names = st.tuples(st.integers(0, 2**63 - 1), st.sampled_from(["noise", "noise level", "caption"]), st.integers(0, 10**7), st.integers(0, 10**5))


@given(names, names)
@settings(deadline=None, max_examples=200)
def test_two_draws_are_the_same_exactly_when_their_names_are(first, second):
    assert (stable_seed(*first) == stable_seed(*second)) == (first == second)


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    expected = torch.randn(8, generator=generator(3, "noise", 5, 2))
    torch.randn(100)
    generator(3, "noise", 5, 1).seed()
    assert torch.equal(torch.randn(8, generator=generator(3, "noise", 5, 2)), expected)


def test_seeds_are_the_same_on_every_machine():
    assert stable_seed(0, "noise") == 7718712624148518653
    assert stable_seed(7, "caption", 12, 3) == 7150148476180853710
    assert python_random(0, "x").random() == python_random(0, "x", 0, 0).random()
