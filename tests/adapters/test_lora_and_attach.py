"""LoRA goes into a model that has no adapter support of its own, trains, and comes out again without a trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.attach import attach, bake, bypassed, detach, set_weights, weights
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters, match_targets
from finetune.adapters.verify import BAKE_TOLERANCE, NOISE, fingerprints, verify_adapter
from finetune.errors import AdapterError, VerifyError
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


def test_verify_proves_a_file_and_returns_the_model_untouched(tmp_path):
    adapter = trained_adapter()
    path = write_adapter(tmp_path / "a.safetensors", adapter)
    model = tiny_transformer()
    before = fingerprints(model)
    result = verify_adapter(path, model, run, trained=adapter)
    assert (result.keys, result.placed, result.changed, result.baked_equals_attached, result.restored) == (64, 64, True, True, True)
    assert result.change > 0.01 and result.bake_error < 1e-5
    assert fingerprints(model) == before


def test_verify_finds_an_adapter_without_effect(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", trained_adapter(size=0.0))
    with pytest.raises(VerifyError, match="no effect"):
        verify_adapter(path, tiny_transformer(), run)


def test_verify_lets_an_adapter_pass_that_has_learned_less_than_bfloat16_can_tell(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", trained_adapter(size=3e-4, targets=r"blocks\.3\.attn2\.to_out\.0"))
    model = tiny_transformer().bfloat16()
    result = verify_adapter(path, model, run)
    assert 0 < result.change < NOISE["bfloat16"] and result.restored and result.baked_equals_attached
    dead = write_adapter(tmp_path / "dead.safetensors", trained_adapter(size=0.0))
    with pytest.raises(VerifyError, match="no effect"):
        verify_adapter(dead, model, run)


ONE_LAYER = r"blocks\.3\.attn2\.to_out\.0"


@pytest.mark.parametrize("size", [3e-5, 3e-6])
def test_verify_tells_a_tiny_change_from_none_in_bfloat16(tmp_path, size):
    """Four steps at an ordinary rate changed a small model by less than bfloat16 shows at the strengths that were tried."""
    adapter = trained_adapter(size=size, targets=ONE_LAYER)
    model = tiny_transformer().bfloat16()
    result = verify_adapter(write_adapter(tmp_path / "a.safetensors", adapter), model, run, trained=adapter)
    assert result.change < NOISE["bfloat16"] and result.baked_equals_attached and result.restored
    # What is broken in a tiny adapter is found as in any other: its scale, a missing layer, factors in each other's place.
    broken = {
        "scale": {key: tensor * 0.5 if "lora_B" in key else tensor for key, tensor in adapter.tensors.items()},
        "transposed": {key: adapter.tensors[key.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x", "lora_B")].T.contiguous() for key in adapter.tensors},
    }
    for name, tensors in broken.items():
        with pytest.raises(VerifyError, match="not what was trained"):
            verify_adapter(write_adapter(tmp_path / f"{name}.safetensors", replace(adapter, tensors=tensors)), model, run, trained=adapter)
    two = trained_adapter(size=size, targets=r"blocks\.[23]\.attn2\.to_out\.0")
    with pytest.raises(VerifyError, match="tensors differ"):
        verify_adapter(tmp_path / "a.safetensors", model, run, trained=two)


def test_verify_does_not_take_a_layer_that_is_not_used_for_one_that_learned_little(tmp_path):
    class Unused(torch.nn.Module):
        """Its layer is called, and what comes of it is dropped."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x):
            self.layer(x)
            return x * 2

    path = file_for(Unused(), tmp_path / "a.safetensors", 0.5)
    with pytest.raises(VerifyError, match="no effect"):
        verify_adapter(path, Unused().bfloat16().eval(), lambda model: model(torch.ones(4, 64, dtype=torch.bfloat16)))


def test_verify_does_not_take_what_overflows_for_an_effect(tmp_path):
    class Shut(torch.nn.Module):
        """What its layer says is multiplied by zero, which an infinity would turn into NaN."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 64, bias=False)
            self.register_buffer("gate", torch.zeros(1))

        def forward(self, x):
            return x * 2 + self.gate * self.layer(x)

    path = file_for(Shut(), tmp_path / "a.safetensors", 0.5)
    with pytest.raises(VerifyError, match="no effect"):
        verify_adapter(path, Shut().half().eval(), lambda model: model(torch.full((4, 64), 50.0, dtype=torch.float16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_does_not_take_rounding_for_learning(tmp_path, dtype):
    """As a PiSSA is written that has not learned: its start twice, with opposite signs. Loud enough, the rounding of that shows."""
    start = trained_adapter(size=1.0)
    tensors = {key: torch.cat([tensor, -tensor], 1) if "lora_B" in key else torch.cat([tensor, tensor]) for key, tensor in start.tensors.items()}
    path = write_adapter(tmp_path / "a.safetensors", replace(start, tensors=tensors))
    with pytest.raises(VerifyError, match="no effect"):
        verify_adapter(path, tiny_transformer().to(dtype), run)
    moved = {key: tensor * (1 + 1e-4) if "blocks.3.attn2.to_q.lora_A" in key else tensor for key, tensor in start.tensors.items()}
    tensors |= {key: torch.cat([moved[key], start.tensors[key]]) for key in tensors if "lora_A" in key}
    assert verify_adapter(write_adapter(tmp_path / "b.safetensors", replace(start, tensors=tensors)), tiny_transformer().to(dtype), run).changed


def test_verify_finds_a_file_that_is_not_what_was_trained(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", trained_adapter(seed=1))
    with pytest.raises(VerifyError, match="not what was trained"):
        verify_adapter(path, tiny_transformer(), run, trained=trained_adapter(seed=2))


def test_107_verify_notices_when_the_base_was_touched(tmp_path):
    path = write_adapter(tmp_path / "a.safetensors", trained_adapter())

    def meddling(model):
        with torch.no_grad():
            model.proj_out.bias += 1e-4
        return run(model)

    with pytest.raises(VerifyError):
        verify_adapter(path, tiny_transformer(), meddling)


class Chaotic(torch.nn.Module):
    """Layers that blow small differences up, as a deep model in bfloat16 does."""

    def __init__(self, gain: float = 4.0) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(12))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.randn(64, 64, generator=drawn) * gain / 8)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class OwnWeights(torch.nn.Module):
    """Computes with its own copy of the weights, so that what is baked into the layer is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(64, 64, bias=False)
        self.register_buffer("kept", self.layer.weight.detach().clone())

    def forward(self, x):
        weight = getattr(self.layer, "base_layer", self.layer).weight
        return torch.nn.functional.linear(x, self.kept) + (self.layer(x) - torch.nn.functional.linear(x, weight))


def file_for(model, path, size):
    """An adapter of rank 4 for every linear layer of `model`."""
    inject_lora(model, r".*(layers\.\d+|layer)", 4, seed=0)
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=drawn) * size)
    return write_adapter(path, collect_lora(model))


def test_verify_knows_what_a_deep_model_makes_of_rounding(tmp_path):
    path = file_for(Chaotic(), tmp_path / "a.safetensors", 1e-2)
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    model, looks = Chaotic().bfloat16().eval(), []
    places = {layer.weight.data_ptr() for layer in model.layers}
    result = verify_adapter(path, model, lambda model: model(inputs), seen=lambda tensor: looks.append(tensor.data_ptr()))
    assert result.bake_error > BAKE_TOLERANCE["bfloat16"] and result.baked_equals_attached
    # Hashed before, baked, moved to the neighbour, hashed after: whatever lies in a file can be given back each time.
    assert {place: looks.count(place) for place in places} == dict.fromkeys(places, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_verify_finds_a_model_in_which_baking_is_lost(tmp_path, dtype):
    path = file_for(OwnWeights(), tmp_path / "a.safetensors", 0.5)
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    with pytest.raises(VerifyError, match="baked and attached differ"):
        verify_adapter(path, OwnWeights().to(dtype).eval(), lambda model: model(inputs))
