"""An adapter file is proven on a fresh model: what acts passes however little, what does not act never."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finetune.adapters.adapter_file import write_adapter
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.adapters.verify import BAKE_TOLERANCE, NOISE, fingerprints, verify_adapter
from finetune.errors import VerifyError
from tests.adapters.small_model import run, tiny_transformer, trained_adapter


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
