"""Adapters of several forms in one model: each acts as it does alone, and together they are the sum of their changes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from finetune.adapters.arithmetic import Weighted, merge
from finetune.adapters.attach import attach, attach_together, bake, bypassed, detach, set_weights, weights
from finetune.adapters.kinds import AdapterSize, inject_adapter
from finetune.adapters.lycoris import in_one_form
from finetune.adapters.verify import fingerprints
from finetune.adapters.weight_change import weight_change
from finetune.errors import AdapterError
from tests.adapters.small_model import ATTENTION, run, tiny_transformer

FIRST = "blocks.0.attn1.to_q"


def test_a_loha_beside_a_lora_acts_as_the_lora_that_it_equals(results):
    model = tiny_transformer()
    attach(model, results["lora"][1], "first")
    attach(model, results["loha"][1], "second")
    set_weights(model, {"first": 0.0})
    assert_close(run(model), results["loha"][2], atol=2e-5, rtol=1e-4)
    with pytest.raises(AdapterError, match="attach the LoRA first") as caught:
        other = tiny_transformer()
        attach(other, results["loha"][1], "first")
        attach(other, results["lora"][1], "second")
    assert caught.value and list(weights(other)) == ["first"]


@pytest.mark.parametrize("order", [("loha", "lokr"), ("lokr", "lora", "loha")])
def test_adapters_of_several_forms_act_together_as_the_sum_of_their_changes(results, order):
    model = tiny_transformer()
    for name, adapter in zip(order, in_one_form([results[kind][1] for kind in order]), strict=True):
        attach(model, adapter, f"worn_{name}", 0.5)
    baked = tiny_transformer()
    attach(baked, merge([Weighted(results[kind][1], 0.5) for kind in order]).adapter, "sum")
    assert_close(run(model), run(baked), atol=2e-5, rtol=1e-4)
    assert in_one_form([results["loha"][1], results["oft"][1]])[1] is results["oft"][1] and in_one_form([results["loha"][1]])[0] is results["loha"][1]


@pytest.mark.parametrize("others", [("lora",), ("loha",), ("lokr", "lora"), ("oft",)])
def test_an_oft_lies_under_other_adapters_which_act_as_they_do_alone(results, others):
    """What acts in the model is what is baked into it; what is off takes no part; the model comes back untouched."""
    model, plain = tiny_transformer(), run(tiny_transformer())
    names = {f"other{number}": (results[kind][1], 1.0) for number, kind in enumerate(others)}
    before = fingerprints(model)
    attach_together(model, {**names, "turn": (results["oft"][1], 1.0)})
    assert weights(model) == {"turn": 1.0} | dict.fromkeys(names, 1.0)
    together = run(model)
    for name, alone in {"turn": "oft", **dict(zip(names, others, strict=True))}.items():
        set_weights(model, dict.fromkeys(weights(model), 0.0) | {name: 1.0})
        assert_close(run(model), results[alone][2], atol=2e-5, rtol=1e-4)
        assert not torch.allclose(run(model), together, atol=1e-3)
    set_weights(model, dict.fromkeys(weights(model), 0.0))
    assert run(model).equal(plain)
    set_weights(model, dict.fromkeys(weights(model), 1.0))
    with bypassed(model):
        assert run(model).equal(plain)
    detach(model, "turn")
    assert not torch.allclose(run(model), together, atol=1e-3) and list(weights(model)) == list(names)
    detach(model)
    assert fingerprints(model) == before and run(model).equal(plain)
    attach_together(model, {**names, "turn": (results["oft"][1], 1.0)})
    bake(model)
    assert_close(run(model), together, atol=2e-5, rtol=1e-4)


def test_an_oft_under_a_lora_changes_each_weight_by_the_sum_of_both_changes(results):
    model, oft, lora = tiny_transformer(), results["oft"][1], results["lora"][1]
    weight = model.get_submodule(FIRST).weight.clone()
    attach_together(model, {"style": (lora, 0.5), "turn": (oft, 1.0)})
    bake(model)
    assert_close(model.get_submodule(FIRST).weight, weight + weight_change(oft.parts(FIRST), weight) + weight_change(lora.parts(FIRST), weight, 0.5), atol=1e-5, rtol=1e-4)


def test_an_oft_comes_first_and_acts_whole(results):
    model = tiny_transformer()
    attach(model, results["lora"][1], "first")
    with pytest.raises(AdapterError, match="also turn what the LoRA") as caught:
        attach(model, results["oft"][1], "turn")
    assert "attach the OFT first" in caught.value.fix and list(weights(model)) == ["first"]
    detach(model)
    attach(model, results["oft"][1], "turn")
    with pytest.raises(AdapterError, match="weight of 0.5"):
        set_weights(model, {"turn": 0.5})
    with pytest.raises(AdapterError, match="blocks of 5 do not divide"):
        inject_adapter(tiny_transformer(), ATTENTION, AdapterSize("oft", rank=5), seed=0)
