"""Base weights held in other formats than they are computed with."""

import json
from pathlib import Path

import pytest
import torch

from data_tools.progress import Progress
from finetune.adapters.attach import bake
from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.adapters.shared_input import project
from finetune.families.base_models import locate_base
from finetune.families.loading import compute_dtype, iterate_tensors, weight_files
from finetune.families.mapped_pages import mapped_range
from finetune.families.protocol import PictureGeometry
from finetune.objectives import NoiseLevel
from finetune.training.placement import Hold, choose_hold, held_linears, load_held, may_quantise, memory_is_short
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


def test_pages_that_were_cast_are_given_back(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    save_file({f"w{number}": torch.full((1 << 20,), number, dtype=torch.bfloat16) for number in range(16)}, path)

    def mapped_bytes():
        lines = Path("/proc/self/smaps").read_text().split(str(path.resolve()))
        return sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in lines[1:])

    kept = []
    for name, tensor in iterate_tensors([path]):
        assert tensor.float().unique().item() == int(name[1:])
        kept.append(tensor)
    assert len(mapped_range(path)) > 0
    assert mapped_bytes() < 4 << 20
    assert [tensor[5].item() for tensor in kept] == sorted(tensor[5].item() for tensor in kept) or len(kept) == 16


def test_streamed_weights_do_not_stay_in_memory(tmp_path):
    from torch import nn

    from finetune.families.mapped_pages import mapped_range
    from finetune.training.placement_linear import HeldLinear, Scratch
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    values = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"w": values}, path)
    with safe_open(path, "pt") as opened:
        weight = opened.get_tensor("w")
    layer = HeldLinear(nn.Linear(2048, 2048, bias=False), weight, Scratch(), mapped_range(path))
    x = torch.ones(4, 2048, requires_grad=True)
    for _ in range(2):
        layer(x).sum().backward()
    assert torch.equal(layer(x), torch.nn.functional.linear(x, values.float()))
    resident = Path("/proc/self/smaps").read_text().split(str(path.resolve()))[1].split("Rss:")[1].split()[0]
    assert int(resident) * 1024 < values.nbytes / 8


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """A base in bf16 whose layers that are not quantised weigh more than a page: 6 MiB of modulation."""
    from diffusers import HunyuanDiT2DModel

    folder = tmp_path_factory.mktemp("wide") / "base"
    pipeline = TINY["hunyuan_dit"].build()
    config = dict(pipeline.transformer.config) | {"num_attention_heads": 8, "attention_head_dim": 64, "hidden_size": 512, "num_layers": 6, "mlp_ratio": 0.25}
    pipeline.transformer = HunyuanDiT2DModel(**{key: value for key, value in config.items() if not key.startswith("_")}).to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    return locate_base(str(folder))


def resident(path):
    """Bytes of the mapped file that lie in this process's memory."""
    parts = Path("/proc/self/smaps").read_text().split(str(path.resolve()))[1:]
    return sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in parts)


@pytest.mark.parametrize("hold", ["fp32", "fp16", "nf4"])
def test_weights_that_were_cast_or_used_do_not_stay_a_second_time(wide_base, hold, tmp_path):
    """Loading and a forward pass leave none of the file's own pages behind, whichever weights were cast, held or quantised."""
    (path,) = weight_files(wide_base.folder / "transformer")
    model = load_held(wide_base, Hold(hold, torch.float32, ""), CPU, tmp_path, Progress()).transformer
    layers = [module for module in model.modules() if type(module).__name__ == "HeldLinear"]
    assert layers or hold == "fp32"
    with torch.no_grad():
        for layer in layers:
            layer(torch.ones(1, layer.in_features))
    assert resident(path) < path.stat().st_size / 5


def test_files_of_a_base_are_left_as_they_are(half_base):
    base = half_base[0]
    before = {path: path.read_bytes() for path in weight_files(base.folder / "transformer")}
    for hold in ("streamed", "nf4", "int8"):
        step(half_base, hold)
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((base.folder / "model_index.json").read_text())


@pytest.mark.parametrize("hold", ["streamed", "fp32"])
def test_a_base_that_is_baked_into_stays_baked_after_its_pages_were_let_go(wide_base, hold, tmp_path):
    model = load_held(wide_base, Hold(hold, torch.float32, ""), CPU, tmp_path, Progress()).transformer.eval()
    pipeline = wide_base.family.load(wide_base.folder, frozenset({"text", "vae"}), torch.float32)
    pipeline.transformer = model
    conditionings = wide_base.family.encode_prompts(pipeline, ["a cat"])
    noisy = torch.randn(1, *wide_base.family.latent_shape(pipeline, 32, 32), generator=torch.Generator().manual_seed(0))
    level = NoiseLevel(sigma=torch.tensor([0.5]), timestep=torch.tensor([500.0]))

    def predict():
        with torch.no_grad():
            return wide_base.family.predict(model, noisy, level, conditionings, [PictureGeometry((32, 32), (32, 32))])

    base = predict()
    inject_lora(model, wide_base.family.facts.targets["attention"], 4, seed=0)
    with torch.no_grad():
        for name, parameter in lora_parameters(model):
            if ".lora_B." in name:
                parameter.fill_(0.5)
    attached = predict()
    bake(model)
    assert (attached - base).norm() > 0.1 * base.norm()
    # The weights are rounded to the base's own format, which moves the output a little; that of the bare base is far away.
    for _ in range(3):
        assert (predict() - attached).norm() < 0.1 * (attached - base).norm()
