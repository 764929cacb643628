"""Base weights held in other formats than they are computed with."""

import copy
import json
import weakref
from dataclasses import replace

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
from finetune.training.placement import QUANTISED, Hold, PinnedMemory, check_suits, choose_hold, held_linears, hold_weights, load_held, may_quantise, memory_is_short, pinned_bytes, suits
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


@pytest.fixture
def gpu(monkeypatch):
    """The device `meta` stands in for a GPU: torch refuses to mix it with the CPU just the same."""
    monkeypatch.setattr(PinnedMemory, "_new_block", staticmethod(lambda size: torch.empty(size, dtype=torch.uint8)))
    return torch.device("cuda")


def on_gpu(half_base, hold, compute, gpu):
    """The transformer as it is held for a GPU, moved to its stand-in."""
    base, *_, cache = half_base
    model = base.family.load(base.folder, frozenset({"transformer"}), None).transformer
    if hold in QUANTISED:
        load_held(base, Hold(hold, compute, ""), CPU, cache, Progress())  # the cache's entry
    hold_weights(model, base, Hold(hold, compute, ""), gpu, cache, Progress())
    return model.to("meta")


@pytest.mark.parametrize("hold", ["int8", "nf4"])
def test_a_quantised_layer_keeps_no_input_for_the_way_back_on_a_gpu_either(hold, monkeypatch):
    """Checkpointing frees what autograd sees; the library's 8-bit product keeps its inputs elsewhere, and its 4-bit one gives float32
    where autocast asks for 16 bits."""
    from finetune.training.placement_quantised_linear import Int8Linear, Nf4Linear, bitsandbytes

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", None)

    parts, linear = quantise(torch.randn(128, 64), hold), nn.Linear(64, 128)
    packed = parts.pop("")
    layer = Int8Linear(linear, packed.to("meta"), parts["SCB"].to("meta"), Scratch()) if hold == "int8" else Nf4Linear(linear, packed, parts, torch.float32, torch.device("meta"), Scratch())
    layer.train().to("meta")
    x = torch.empty(2, 5, 64, device="meta", requires_grad=True)
    made = x * 2
    gone = weakref.finalize(made.untyped_storage(), lambda: None)
    result = layer(made)
    del made
    assert not gone.alive and result.shape == (2, 5, 128)
    result.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("hold", ["int8", "nf4"])
def test_a_quantised_layer_gives_what_autocast_asks_for(hold):
    """A norm under autocast gives float32; the products behind it are 16 bits wide all the same, and so is what is kept of them."""
    from finetune.training.placement_quantised_linear import Int8Linear, Nf4Linear

    weight, linear = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)), nn.Linear(64, 128, bias=False)
    parts = quantise(weight, hold)
    packed = parts.pop("")
    layer = Int8Linear(linear, packed, parts["SCB"], Scratch()) if hold == "int8" else Nf4Linear(linear, packed, parts, torch.bfloat16, CPU, Scratch())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(3, 64)).dtype == torch.bfloat16
    if hold == "int8":
        exact = packed.double() * (parts["SCB"].double() / 127).unsqueeze(1)
        expanded = layer.expanded(torch.bfloat16, CPU)
        assert torch.equal(expanded, exact.float().bfloat16()), "rounded once, and not by way of a rounded scale"


def test_weights_that_stream_to_a_gpu_are_cast_once_and_computed_there(half_base, gpu):
    model = on_gpu(half_base, "streamed", torch.float16, gpu)
    held = [module for module in model.modules() if isinstance(module, HeldLinear)]
    assert held and all(module.weight.device.type == "cpu" and module.weight.dtype == torch.float16 for module in held)
    assert len({module.weight.untyped_storage().data_ptr() for module in held}) == 1, "pieces of one block"
    source = half_base[0].family.load(half_base[0].folder, frozenset({"transformer"}), torch.float16).transformer
    assert all(torch.equal(module.weight, source.get_submodule(name).weight) for name, module in model.named_modules() if isinstance(module, HeldLinear))
    whole = on_gpu(half_base, "streamed", torch.float32, gpu)
    assert {module.weight.dtype for module in whole.modules() if isinstance(module, HeldLinear)} == {torch.bfloat16}, "it would only grow"


def test_pinned_memory_is_taken_in_blocks(monkeypatch):
    taken = []
    monkeypatch.setattr(PinnedMemory, "BLOCK_BYTES", 1 << 18)
    monkeypatch.setattr(PinnedMemory, "_new_block", staticmethod(lambda size: taken.append(size) or torch.empty(size, dtype=torch.uint8)))
    pinned = PinnedMemory()
    weights = [torch.randn(rows, 99, generator=torch.Generator().manual_seed(rows)).to(dtype) for rows, dtype in ((301, torch.float32), (300, torch.bfloat16), (302, torch.float16), (900, torch.float32))]
    held = [pinned.filled_with(weight) for weight in weights]
    assert all(torch.equal(one, weight) for one, weight in zip(held, weights, strict=True))
    assert taken == [1 << 18, weights[-1].nbytes], "three share a block, and one is larger than a block"


def test_a_weight_of_another_format_is_cast_where_it_is_computed_with(monkeypatch):
    """A copy between devices that also casts does the casting on the CPU, at every use."""
    layer = HeldLinear(nn.Linear(8, 8), torch.ones(8, 8, dtype=torch.bfloat16), Scratch())
    copied, copy_ = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, given, **options: copied.append((to.device.type, given.device.type)) or copy_(to, given, **options))
    assert layer.expanded(torch.float32, torch.device("meta")).dtype == torch.float32
    assert copied == [("meta", "meta")]


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


def test_the_pinned_memory_of_a_base_is_known_before_it_is_taken(half_base, gpu, monkeypatch):
    taken = []
    monkeypatch.setattr(PinnedMemory, "BLOCK_BYTES", 1 << 14)
    monkeypatch.setattr(PinnedMemory, "_new_block", staticmethod(lambda size: taken.append(size) or torch.empty(size, dtype=torch.uint8)))
    model = half_base[0].family.load(half_base[0].folder, frozenset({"transformer"}), None).transformer
    facts, hold = half_base[0].family.facts, Hold("streamed", torch.float16, "")
    expected = pinned_bytes(model, facts, hold, gpu, 2.0)
    on_gpu(half_base, "streamed", torch.float16, gpu)
    assert sum(taken) == expected > 1 << 14
    assert pinned_bytes(model, facts, hold, CPU, 2.0) == pinned_bytes(model, facts, replace(hold, name="bf16"), gpu, 2.0) == 0
