"""Base weights held in other formats than they are computed with."""

import copy
import json

import pytest
import torch
from torch import nn

from data_tools.progress import Progress
from finetune.adapters.attach import attach, detach
from finetune.adapters.kinds import KINDS, AdapterSize, inject_adapter
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.adapters.shared_input import project
from finetune.errors import BadInput
from finetune.families.base_models import locate_base
from finetune.families.loading import compute_dtype, weight_files
from finetune.families.protocol import PictureGeometry
from finetune.objectives import NoiseLevel
from finetune.training.placement import Hold, check_suits, choose_hold, held_linears, load_held, may_quantise, memory_is_short, suits
from finetune.training.placement_linear import HeldLinear, Scratch
from finetune.training.placement_nf4 import PIECE, expand_nf4
from finetune.training.placement_quantised import quantise
from finetune.training.precision import PrecisionChoice
from tests.tiny_models.all import TINY

FAMILIES = ["hunyuan_dit", "flux_dev", "lumina2"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def half_base(request, tmp_path_factory):
    """A tiny base whose transformer is stored in bf16, what one forward needs, and a cache folder."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny = TINY[request.param]
    pipeline = tiny.build()
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(folder / "base")
    base = locate_base(str(folder / "base"))
    loaded = tiny.after_load(base.family.load(base.folder, frozenset({"text", "vae", "transformer"}), torch.float32))
    conditionings = base.family.encode_prompts(loaded, ["a cat"])
    shape = base.family.latent_shape(loaded, *tiny.picture)
    noisy = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    return base, noisy, conditionings, PictureGeometry(tiny.picture, tiny.picture), folder / "cache"


def step(half_base, hold):
    """(model, prediction, LoRA gradients) with every block checkpointed."""
    base, noisy, conditionings, geometry, cache = half_base
    model = load_held(base, Hold(hold, torch.float32, ""), CPU, cache, Progress()).transformer
    inject_lora(model, base.family.facts.targets["attention"], 4, seed=0)
    base.family.prepare(model, 99)
    level = NoiseLevel(sigma=torch.tensor([0.5]), timestep=torch.tensor([500.0]))
    prediction = base.family.predict(model, noisy, level, conditionings, [geometry])
    prediction.pow(2).mean().backward()
    return model, prediction.detach(), {name: parameter.grad for name, parameter in lora_parameters(model)}


@pytest.mark.parametrize("hold", ["streamed", "bf16"])
def test_weights_that_are_cast_when_used_give_the_bits_of_weights_that_were_cast_before(half_base, hold):
    _, expected, gradients = step(half_base, "fp32")
    model, prediction, held_gradients = step(half_base, hold)
    assert torch.equal(prediction, expected)
    assert all((gradients[name] is None and found is None) or torch.equal(found, gradients[name]) for name, found in held_gradients.items())
    held = [module for module in model.modules() if type(module).__name__ == "HeldLinear"]
    assert held and all(module.weight.dtype == torch.bfloat16 for module in held)
    assert compute_dtype(model) == torch.float32


@pytest.mark.parametrize("hold, layer, error", [("int8", "Int8Linear", 0.05), ("nf4", "Nf4Linear", 0.4)])
def test_quantised_weights_predict_nearly_the_same_and_train(half_base, hold, layer, error):
    _, expected, _ = step(half_base, "fp32")
    model, prediction, gradients = step(half_base, hold)
    base = half_base[0]
    quantised = [name for name, module in model.named_modules() if type(module).__name__ == layer]
    assert quantised and all(may_quantise(name.removesuffix(".base_layer"), base.family.facts) for name in quantised)
    assert 0 < (prediction - expected).norm() / expected.norm() < error
    assert any(found is not None and found.abs().max() > 0 for found in gradients.values())
    assert memory_is_short(Hold(hold, torch.float32, "")), "whoever quantises wants memory: its heap must not keep holes"
    again = step(half_base, hold)
    assert torch.equal(again[1], prediction)


def test_modules_that_the_family_keeps_whole_are_neither_held_nor_quantised(half_base):
    base = half_base[0]
    model = base.family.load(base.folder, frozenset({"transformer"}), None).transformer
    names = held_linears(model, base.family.facts)
    assert names and not [name for name in names if name.split(".")[0] in base.family.facts.never_quantise]


def test_quantising_is_done_once_and_a_damaged_cache_is_made_again(half_base, tmp_path):
    base = half_base[0]

    def load():
        load_held(base, Hold("nf4", torch.float32, ""), CPU, tmp_path, Progress())
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("quantised/**/*.safetensors")}

    first = load()
    assert first and load() == first
    damaged = next(iter(first))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert load() != first
    assert damaged.stat().st_size > 100


@pytest.mark.parametrize("hold, bits, worst", [("int8", 8, 0.005), ("nf4", 4, 0.06)])
def test_quantising_keeps_the_values_to_the_precision_of_its_format(hold, bits, worst):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    parts = quantise(weight, hold)
    if hold == "int8":
        restored = parts[""].float() * (parts["SCB"] / 127).unsqueeze(1)
    else:
        from bitsandbytes import functional

        restored = functional.dequantize_4bit(parts[""], functional.QuantState.from_dict({k: v for k, v in parts.items() if k}, CPU))
    assert ((restored - weight).pow(2).mean() / weight.pow(2).mean()) < worst ** 2 * 4
    assert parts[""].nbytes * 8 == weight.numel() * bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_has_the_bits_of_the_library(dtype):
    from bitsandbytes import functional

    weight = torch.randn(96, 3584, generator=torch.Generator().manual_seed(1)).mul_(0.02).to(dtype)
    weight[3] = 0
    weight[4, ::7] *= 1000
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    expected = {"": packed, **state.as_dict(packed=True)}
    found = quantise(weight, "nf4")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in expected.items())


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
def test_an_expanded_nf4_weight_has_the_bits_of_the_library(compute, nested):
    from bitsandbytes import functional

    # More than one piece, the last of them short.
    weight = torch.randn(700, 448, generator=torch.Generator().manual_seed(2)).to(compute)
    packed, state = functional.quantize_4bit(weight, compress_statistics=nested, quant_type="nf4")
    assert weight.numel() > PIECE and weight.numel() % PIECE
    target = torch.full(weight.shape, 7.0, dtype=compute)
    assert torch.equal(expand_nf4(packed, state, target), functional.dequantize_4bit(packed, state)) and target.max() < 7


@pytest.mark.parametrize("hold", ["int8", "nf4"])
def test_queries_keys_and_values_of_a_quantised_model_are_one_product_with_their_lora(half_base, hold, monkeypatch):
    base, *_, cache = half_base
    model = load_held(base, Hold(hold, torch.float32, ""), CPU, cache, Progress()).transformer
    inject_lora(model, base.family.facts.targets["attention"], 4, seed=0)
    attention = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith(".to_q")).rpartition(".")[0])
    layers, x = (attention.to_q, attention.to_k, attention.to_v), torch.randn(1, 5, attention.to_q.in_features)
    for layer in layers:
        layer.lora_B["default"].weight.data.normal_()
    apart = [layer(x) for layer in layers]
    for layer in layers:
        monkeypatch.setattr(layer, "forward", None)
    together = project(x, *layers)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(together, apart, strict=True))


def test_auto_holds_the_base_dtype_and_computes_in_the_precision():
    fp32, bf16 = PrecisionChoice("fp32", "no GPU"), PrecisionChoice("bf16", "asked for")
    assert choose_hold("auto", fp32, fp32).name == "fp32"
    assert choose_hold("auto", bf16, fp32) == Hold("bf16", torch.float32, "asked for")
    assert choose_hold("nf4", fp32, bf16).compute == torch.bfloat16
    assert choose_hold("fp32", bf16, bf16).compute == torch.float32


@pytest.mark.parametrize("kind", ["lora", "oft", "lokr"])
def test_an_adapter_lies_where_its_layer_computes_though_the_weight_waits_elsewhere(kind):
    """As on a GPU, for which `meta` stands in here, when it is trained and when the file is loaded back."""
    model = nn.Sequential(nn.Linear(8, 8), HeldLinear(nn.Linear(8, 8), torch.ones(8, 8), Scratch())).requires_grad_(False)
    inject_adapter(model, ["1"], AdapterSize(kind, rank=4), seed=0)
    adapter = collect_lora(model)
    detach(model)
    moved = copy.deepcopy(model).to("meta")
    inject_adapter(moved, ["1"], AdapterSize(kind, rank=4), seed=0)
    assert all(parameter.is_meta for _, parameter in lora_parameters(moved))
    detach(moved)
    attach(moved, adapter, "loaded")
    assert moved[1].base_layer.weight.device.type == "cpu"
    assert all(parameter.is_meta for _, parameter in lora_parameters(moved, "loaded"))
    assert all(buffer.is_meta for buffer in moved.buffers())


def test_kinds_that_look_at_weights_go_with_those_they_can_look_at():
    gpu = torch.device("cuda")
    refused = {(kind, hold, device.type) for kind in KINDS for hold in ("fp32", "bf16", "int8", "nf4", "streamed") for device in (CPU, gpu) if not suits(kind, hold, device)}
    assert refused == {("dora", "streamed", "cuda"), *((kind, "nf4", device) for kind in ("loha", "lokr") for device in ("cpu", "cuda"))}
    with pytest.raises(BadInput, match="kind dora does not go with a base that is streamed on a cuda device"):
        check_suits("dora", Hold("streamed", torch.bfloat16, "asked for"), gpu)


def test_files_of_a_base_are_left_as_they_are(half_base):
    base = half_base[0]
    before = {path: path.read_bytes() for path in weight_files(base.folder / "transformer")}
    for hold in ("streamed", "nf4", "int8"):
        step(half_base, hold)
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((base.folder / "model_index.json").read_text())
