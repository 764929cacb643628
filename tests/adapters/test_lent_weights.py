"""Other weights for the time of one product each."""

import weakref

import pytest
import torch
from torch import nn

from finetune.adapters.lent_weights import lent_weights


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))).requires_grad_(False)


def test_a_model_computes_with_what_it_is_lent_and_keeps_what_it_has(model):
    inputs, before = torch.randn(2, 8), [layer.weight.clone() for layer in model]
    places, alone = [layer.weight.data_ptr() for layer in model], model(inputs)
    alive: list[weakref.ref] = []

    def other(number):
        assert not any(lent() is not None for lent in alive), "two lent weights at a time"
        weight = before[number] * (number + 2)
        alive.append(weakref.ref(weight))
        return weight

    with lent_weights(list(model), other):
        lent = model(inputs)
    wanted = inputs
    for number, layer in enumerate(model):
        wanted = nn.functional.linear(wanted, before[number] * (number + 2), layer.bias)
    assert torch.equal(lent, wanted) and len(alive) == 3
    assert [layer.weight.data_ptr() for layer in model] == places and torch.equal(model(inputs), alone)


def test_a_model_that_reads_weights_past_their_layers_gives_itself_away(model):
    with lent_weights([model[0]], lambda number: model[0].weight.clone()):
        assert torch.nn.functional.linear(torch.randn(2, 8), model[0].weight).isnan().all()
        assert model(torch.randn(2, 8)).isfinite().all()


@pytest.mark.parametrize("broken", ["the weight", "the product"])
def test_the_own_weights_come_back_after_an_error(model, broken):
    inputs = torch.randn(2, 8)
    alone, places = model(inputs), [layer.weight.data_ptr() for layer in model]

    def other(number):
        if number == 1 and broken == "the weight":
            raise ValueError
        return torch.zeros(8, 8 + (number == 1))

    with pytest.raises((ValueError, RuntimeError)), lent_weights(list(model), other):
        model(inputs)
    assert [layer.weight.data_ptr() for layer in model] == places and torch.equal(model(inputs), alone)
