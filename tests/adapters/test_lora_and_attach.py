"""LoRA goes into a model that has no adapter support of its own, trains, and comes out again without a trace."""

from __future__ import annotations


import pytest
import torch

from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.attach import attach, bake, bypassed, detach, set_weights, weights
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters, match_targets
from finetune.adapters.verify import fingerprints
from finetune.errors import AdapterError
from tests.adapters.small_model import ATTENTION, run, tiny_transformer, trained_adapter


def test_injection_is_drawn_from_the_seed_and_from_nothing_else():
    torch.manual_seed(1)
    first = tiny_transformer()
    names = inject_lora(first, ATTENTION, 4, seed=7)
    torch.manual_seed(2)
    second = tiny_transformer()
    state = torch.get_rng_state()
    inject_lora(second, ATTENTION, 4, seed=7)
    assert torch.get_rng_state().equal(state)
    assert len(names) == 32
    assert all(one.equal(other) for (_, one), (_, other) in zip(lora_parameters(first), lora_parameters(second), strict=True))
    third = tiny_transformer()
    inject_lora(third, ATTENTION, 4, seed=8)
    assert not lora_parameters(first)[0][1].equal(lora_parameters(third)[0][1])


def test_injection_changes_nothing_yet_trains_only_lora_and_in_float32():
    model = tiny_transformer().to(torch.bfloat16)
    before = run(model)
    inject_lora(model, ATTENTION, 4, 8, seed=0)
    assert run(model).equal(before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 64 and all(".lora_" in name for name in trained)
    assert all(parameter.dtype == torch.float32 for _, parameter in lora_parameters(model))


def test_detaching_gives_back_the_same_layer_objects_weights_and_gradients():
    model = tiny_transformer()
    model.proj_out.requires_grad_(False)
    modules, weights_before = {name: id(module) for name, module in model.named_modules()}, fingerprints(model)
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inject_lora(model, ATTENTION, 4, seed=0)
    attach(model, trained_adapter(seed=1), "style")
    detach(model)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert fingerprints(model) == weights_before
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    assert not hasattr(model, "peft_config")
    assert not any("base_layer" in key for key in model.state_dict())


@pytest.mark.parametrize("alpha", [4.0, 8.0, 3.0])
def test_the_file_holds_the_strength_and_acts_as_the_trained_model_did(tmp_path, alpha):
    model = tiny_transformer()
    inject_lora(model, ATTENTION, 4, alpha, seed=0)
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            parameter.add_(0.05)
    trained = run(model)
    path = write_adapter(tmp_path / "a.safetensors", collect_lora(model))
    fresh = tiny_transformer()
    attach(fresh, read_adapter(path), "style")
    torch.testing.assert_close(run(fresh), trained, atol=1e-5, rtol=1e-5)


def test_several_adapters_add_up_with_their_weights():
    first, second = trained_adapter(seed=1), trained_adapter(seed=2, targets=r"blocks\.[01]\.attn1\.to_[qv]")
    together = tiny_transformer()
    attach(together, first, "first", 0.7)
    attach(together, second, "second", -0.4)
    assert weights(together) == pytest.approx({"first": 0.7, "second": -0.4})
    by_hand = tiny_transformer()
    with torch.no_grad():
        for adapter, weight in ((first, 0.7), (second, -0.4)):
            for module in adapter.modules:
                a, b = adapter.pair(module)
                by_hand.get_submodule(module).weight += weight * b @ a
    torch.testing.assert_close(run(together), run(by_hand), atol=1e-5, rtol=1e-5)
    detach(together, "first")
    alone = tiny_transformer()
    attach(alone, second, "second", -0.4)
    assert run(together).equal(run(alone))


def test_at_weight_zero_and_bypassed_the_base_speaks_bit_for_bit():
    model, base = tiny_transformer(), run(tiny_transformer())
    attach(model, trained_adapter(), "style")
    changed = run(model)
    with bypassed(model):
        assert run(model).equal(base)
    assert run(model).equal(changed) and not changed.equal(base)
    set_weights(model, {"style": 0.0})
    assert run(model).equal(base)
    set_weights(model, {"style": 1.0})
    assert run(model).equal(changed)
    with pytest.raises(AdapterError, match="no adapter called"):
        set_weights(model, {"other": 1.0})


def test_a_weight_set_during_training_keeps_the_gradients_on():
    model = tiny_transformer()
    inject_lora(model, ATTENTION, 4, seed=0)
    set_weights(model, {"default": 0.5})
    assert all(parameter.requires_grad for _, parameter in lora_parameters(model))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_baking_says_the_same_as_attaching_and_leaves_a_plain_model(dtype, tolerance):
    model = tiny_transformer().to(dtype)
    attach(model, trained_adapter(seed=1), "first", 0.5)
    attach(model, trained_adapter(seed=2), "second", 0.3)
    attached = run(model).float()
    assert bake(model) == 32
    assert (run(model).float() - attached).norm() / attached.norm() < tolerance
    assert model.state_dict().keys() == tiny_transformer().state_dict().keys()


def test_magnitudes_act_as_peft_lets_them_and_bake():
    adapter = trained_adapter()
    model = tiny_transformer()
    tensors = dict(adapter.tensors)
    for module in adapter.modules:
        weight = model.get_submodule(module).weight
        tensors[f"{module}.lora_magnitude_vector"] = weight.norm(dim=1).detach() * 1.1
    dora = type(adapter)(tensors)
    attach(model, dora, "style")
    attached = run(model)
    bake(model)
    torch.testing.assert_close(run(model), attached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantised_base_takes_adapters_and_refuses_to_be_baked(kind):
    import bitsandbytes as bnb

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            layer = getattr(bnb.nn, kind)(64, 64) if kind == "Linear4bit" else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            self.layer = layer.to("cpu")

    model = Model()
    adapter = type(trained_adapter())({"layer.lora_A.weight": torch.randn(2, 64), "layer.lora_B.weight": torch.randn(64, 2)})
    attach(model, adapter, "style")
    with pytest.raises(AdapterError, match="quantised"):
        bake(model)
    detach(model)
    assert type(model.layer).__name__ == kind


@pytest.mark.parametrize(("targets", "said"), [("(", "not a regular expression"), (r"nothing\..*", "matches no layer"), (["blocks.9.attn1.to_q"], "no linear or convolution")])
def test_targets_that_mean_nothing_are_named(targets, said):
    with pytest.raises(AdapterError, match=said):
        match_targets(tiny_transformer(), targets)
