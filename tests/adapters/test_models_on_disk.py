"""Baking into and extracting from model folders, shard by shard, with stock diffusers as the judge."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.arithmetic import Weighted
from finetune.adapters.attach import attach, attach_together
from finetune.adapters.bake_files import bake_pipeline
from finetune.adapters.base_weights import BaseWeights
from finetune.adapters.extraction import extract
from finetune.errors import AdapterError, BaseModelError
from tests.adapters.made_files import delta_of
from tests.adapters.small_model import run, tiny_transformer, trained_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline folder whose transformer lies in several shards."""
    from tests.tiny_models.hunyuan_dit import build

    folder = tmp_path_factory.mktemp("base") / "pipeline"
    pipeline = build()
    pipeline.save_pretrained(folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    return folder


def opened(folder):
    from diffusers import HunyuanDiT2DModel

    return HunyuanDiT2DModel.from_pretrained(folder / "transformer").eval()


def test_a_baked_folder_opens_in_stock_diffusers_and_does_what_the_adapters_did(base, tmp_path):
    from diffusers import HunyuanDiTPipeline

    first, second = trained_adapter(seed=1), trained_adapter(seed=2)
    assert bake_pipeline(base, tmp_path / "baked", [Weighted(first, 0.7), Weighted(second, -0.5)]) == 32
    model = tiny_transformer()
    attach(model, first, "first", 0.7)
    attach(model, second, "second", -0.5)
    pipeline = HunyuanDiTPipeline.from_pretrained(tmp_path / "baked", safety_checker=None, requires_safety_checker=False)
    torch.testing.assert_close(run(pipeline.transformer.eval()), run(model), atol=1e-5, rtol=1e-5)
    assert sorted(path.name for path in (tmp_path / "baked" / "transformer").iterdir()) == sorted(path.name for path in (base / "transformer").iterdir())


def test_an_oft_is_baked_with_others_as_it_acts_under_them(base, tmp_path):
    tensors = {f"blocks.{number}.attn1.to_q.oft_R.weight": torch.randn(8, 6, generator=torch.Generator().manual_seed(number)) * 0.2 for number in range(2)}
    lora, oft = trained_adapter(), AdapterFile(tensors)
    assert bake_pipeline(base, tmp_path / "baked", [Weighted(lora, 0.7), Weighted(oft, 1.0)]) == 32
    model = tiny_transformer()
    attach_together(model, {"style": (lora, 0.7), "turn": (oft, 1.0)})
    torch.testing.assert_close(run(opened(tmp_path / "baked")), run(model), atol=1e-5, rtol=1e-5)
    for refused, said in (([Weighted(oft, 1.0), Weighted(oft, 1.0)], "do not add up"), ([Weighted(lora, 1.0), Weighted(oft, 0.5)], "weight of 0.5")):
        with pytest.raises(AdapterError, match=said):
            bake_pipeline(base, tmp_path / "refused", refused)


def test_other_weights_are_copied_bit_for_bit(base, tmp_path):
    bake_pipeline(base, tmp_path / "baked", [Weighted(trained_adapter(targets=r"blocks\.0\.attn1\.to_q"), 1.0)])
    with BaseWeights(base) as before, BaseWeights(tmp_path / "baked") as after:
        assert [key for key in before.keys if not before.read(key).equal(after.read(key))] == ["blocks.0.attn1.to_q.weight"]


def test_a_half_precision_base_is_summed_in_float32_and_rounded_once(tmp_path):
    weight = torch.randn(8, 8).bfloat16()
    (tmp_path / "model" / "transformer").mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    save_file({"layer.weight": weight}, tmp_path / "model" / "transformer" / "w.safetensors")
    adapter = AdapterFile({"layer.lora_A.weight": torch.randn(2, 8) * 0.01, "layer.lora_B.weight": torch.randn(8, 2) * 0.01})
    bake_pipeline(tmp_path / "model", tmp_path / "baked", [Weighted(adapter, 0.5)])
    expected = (weight.float() + 0.5 * delta_of(adapter, "layer")).bfloat16()
    assert load_file(tmp_path / "baked" / "transformer" / "w.safetensors")["layer.weight"].equal(expected)


@pytest.mark.parametrize("sign", ["config", "absmax", "int8"])
def test_a_quantised_base_is_refused(tmp_path, sign):
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"load_in_4bit": True}} if sign == "config" else {}))
    tensors = {"layer.weight": torch.zeros(8, 8, dtype=torch.int8 if sign == "int8" else torch.float32)}
    save_file(tensors | ({"layer.weight.absmax": torch.ones(2)} if sign == "absmax" else {}), folder / "w.safetensors")
    adapter = AdapterFile({"layer.lora_A.weight": torch.ones(2, 8), "layer.lora_B.weight": torch.ones(8, 2)})
    with pytest.raises(AdapterError, match="quantised"):
        bake_pipeline(tmp_path / "model", tmp_path / "baked", [Weighted(adapter, 1.0)])
    assert not (tmp_path / "baked").exists()


def test_nothing_is_left_behind_when_baking_fails(base, tmp_path):
    loud = trained_adapter(targets=r"blocks\.0\.attn1\.to_q")
    loud = AdapterFile({key: value * 1e30 for key, value in loud.tensors.items()})
    with pytest.raises(AdapterError, match="not finite"):
        bake_pipeline(base, tmp_path / "baked", [Weighted(loud, 1.0)])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BaseModelError, match="exists already"):
        bake_pipeline(base, base, [Weighted(trained_adapter(), 1.0)])
    with pytest.raises(AdapterError, match="not layers of this model"):
        bake_pipeline(base, tmp_path / "baked", [Weighted(AdapterFile({"x.lora_A.weight": torch.ones(2, 8), "x.lora_B.weight": torch.ones(8, 2)}), 1.0)])


def test_memory_stays_at_one_layer_however_large_the_base_is(tmp_path):
    folder = tmp_path / "model" / "transformer"
    folder.mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text("{}")
    layers = 48
    save_file({f"blocks.{number}.weight": torch.zeros(1024, 1024) for number in range(layers)}, folder / "w.safetensors")
    tensors = {}
    for number in range(layers):
        tensors |= {f"blocks.{number}.lora_A.weight": torch.full((1, 1024), 0.1), f"blocks.{number}.lora_B.weight": torch.full((1024, 1), 0.1)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bake_pipeline(tmp_path / "model", tmp_path / "baked", [Weighted(AdapterFile(tensors), 1.0)])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 64  # MiB; the base has 192, a layer 4


def test_what_was_baked_is_extracted_again(base, tmp_path):
    adapter = trained_adapter(rank=4, targets=r"blocks\.\d+\.attn1\.to_[qv]")
    bake_pipeline(base, tmp_path / "tuned", [Weighted(adapter, 1.0)])
    found = extract(base, tmp_path / "tuned", rank=4)
    assert found.adapter.modules == adapter.modules
    assert found.carried_not == {} and "proj_out" in found.unchanged
    for module in adapter.modules:
        torch.testing.assert_close(delta_of(found.adapter, module), delta_of(adapter, module), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_that_were_only_stored_in_fewer_bits_are_unchanged(tmp_path, dtype):
    """A float32 base beside a tuned model in bfloat16: the rounding of every layer was extracted as if it had been learned."""
    weights = {f"blocks.{number}.to_q.weight": torch.randn(32, 32) for number in range(4)}
    learned = {"blocks.2.to_q.weight": 0.1 * torch.randn(32, 2) @ torch.randn(2, 32)}
    steps = {"blocks.table": torch.arange(5)}
    save_file(weights | steps, tmp_path / "base.safetensors")
    save_file({key: (value + learned.get(key, 0)).to(dtype) for key, value in weights.items()} | steps, tmp_path / "tuned.safetensors")
    for before, after in (("base", "tuned"), ("tuned", "base")):
        found = extract(tmp_path / f"{before}.safetensors", tmp_path / f"{after}.safetensors", rank=2)
        assert found.adapter.modules == ["blocks.2.to_q"] and found.unchanged == ["blocks.0.to_q", "blocks.1.to_q", "blocks.3.to_q"] and not found.carried_not


def test_the_error_of_an_extraction_is_the_true_one_and_energy_saves_ranks(base, tmp_path):
    adapter = trained_adapter(rank=8, targets=r"blocks\.0\.attn1\.to_q")
    bake_pipeline(base, tmp_path / "tuned", [Weighted(adapter, 1.0)])
    truth = delta_of(adapter, "blocks.0.attn1.to_q")
    found = extract(base, tmp_path / "tuned", rank=3)
    difference = delta_of(found.adapter, "blocks.0.attn1.to_q") - truth
    assert found.errors["blocks.0.attn1.to_q"] == pytest.approx(float(difference.norm() / truth.norm()), abs=1e-3)
    small = extract(base, tmp_path / "tuned", rank=8, energy=0.5)
    assert small.adapter.ranks["blocks.0.attn1.to_q"] < 8
    assert small.errors["blocks.0.attn1.to_q"] ** 2 <= 0.5 + 1e-3


def test_what_a_lora_cannot_carry_is_listed(base, tmp_path):
    model = opened(base)
    with torch.no_grad():
        model.blocks[0].attn1.to_q.weight += 0.1
        model.blocks[0].attn1.to_q.bias += 0.1
    model.save_pretrained(tmp_path / "tuned")
    found = extract(base, tmp_path / "tuned", rank=2)
    assert set(found.carried_not) == {"blocks.0.attn1.to_q.bias"} and found.adapter.modules == ["blocks.0.attn1.to_q"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_weight_that_is_no_number_is_refused(base, tmp_path, value):
    """Its layer counted as unchanged, and the rest was extracted as if nothing were wrong."""
    tensors = {key: tensor.clone() for key, tensor in opened(base).state_dict().items()}
    tensors["blocks.0.attn1.to_q.weight"] += torch.randn_like(tensors["blocks.0.attn1.to_q.weight"])
    tensors["blocks.0.attn1.to_k.weight"][0, 0] = value
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match="attn1.to_k.weight contains NaN or infinity"):
        extract(base, tmp_path / "other.safetensors", rank=2)


def test_models_that_do_not_match_are_refused(base, tmp_path):
    tensors = tiny_transformer().state_dict()
    tensors.pop("proj_out.bias")
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match="in one model only"):
        extract(base, tmp_path / "other.safetensors", rank=2)
    with pytest.raises(AdapterError, match="no layer differs"):
        extract(base, base, rank=2)
    with pytest.raises(AdapterError, match="not a regular expression"):
        extract(base, base, rank=2, targets="(")
    with pytest.raises(BaseModelError, match="no weights"):
        extract(tmp_path / "nothing", base, rank=2)
