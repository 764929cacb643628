"""Adapters that do not fit the model they are put into, and names and strengths that make no sense."""

from __future__ import annotations

import pytest
import torch

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.attach import attach, bake, detach
from finetune.adapters.lora import check_name
from finetune.adapters.verify import fingerprints
from finetune.errors import AdapterError
from tests.adapters.made_files import D


@pytest.mark.parametrize("name", ["", "a", "lora", "lora_", "or", "A.b", "with space", "1abc", "x" * 65, "Ünï"])
def test_104_names_that_would_break_peft_are_refused(name):
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        check_name(name)


class Model(torch.nn.Module):
    """Two linear layers, a convolution and a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(D, D), torch.nn.Linear(D, 2 * D)
        self.conv, self.depthwise = torch.nn.Conv2d(4, 8, 3), torch.nn.Conv2d(8, 8, 3, groups=8)
        self.norm = torch.nn.LayerNorm(D)


def adapter_for(module: str, outputs: int, *inputs: int, rank: int = 2, value: float = 0.1) -> AdapterFile:
    tail = [1] * (len(inputs) - 1)
    return AdapterFile({f"{module}.lora_A.weight": torch.full((rank, *inputs), value), f"{module}.lora_B.weight": torch.full((outputs, rank, *tail), value)})


NOT_FITTING = [
    ("22 too few inputs", adapter_for("first", D, D - 1), "made for a layer"),
    ("23 too many inputs", adapter_for("first", D, D + 1), "made for a layer"),
    ("24 wrong outputs", adapter_for("second", D, D), "made for a layer"),
    ("37 38 unknown module", adapter_for("third", D, D), "not layers of this model"),
    ("39 block number past the end", adapter_for("blocks.99.first", D, D), "not layers of this model"),
    ("50 a norm", adapter_for("norm", D, D), "not layers of this model"),
    ("29 kernel of another size", adapter_for("conv", 8, 4, 1, 1), "made for a layer"),
    ("52 depthwise at a rank that does not divide", adapter_for("depthwise", 8, 1, 3, 3, rank=3), "peft cannot"),
    ("64 an attribute that is no layer", adapter_for("__class__", D, D), "not layers of this model"),
]


@pytest.mark.parametrize(("adapter", "said"), [case[1:] for case in NOT_FITTING], ids=[case[0] for case in NOT_FITTING])
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(adapter, said):
    model = Model()
    before, modules = fingerprints(model), {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(AdapterError, match=said):
        attach(model, adapter, "stranger")
    assert fingerprints(model) == before
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_failed_second_adapter_leaves_the_first_one_in_place():
    model = Model()
    attach(model, adapter_for("first", D, D), "good", 0.5)
    with_first = model.first(torch.ones(1, D))
    with pytest.raises(AdapterError):
        attach(model, adapter_for("depthwise", 8, 1, 3, 3, rank=3), "stranger")
    assert model.first(torch.ones(1, D)).equal(with_first)
    with pytest.raises(AdapterError, match="already has"):
        attach(model, adapter_for("first", D, D), "good")
    detach(model)


def test_9_baking_what_overflows_changes_nothing():
    model = Model().half()
    attach(model, adapter_for("first", D, D, value=300.0), "loud")
    before = model.first.base_layer.weight.clone()
    with pytest.raises(AdapterError, match="not finite"):
        bake(model)
    assert model.first.base_layer.weight.equal(before)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 1e6])
def test_a_strength_that_is_no_number_is_refused(weight):
    with pytest.raises(AdapterError, match="weight of"):
        attach(Model(), adapter_for("first", D, D), "style", weight)
