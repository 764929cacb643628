"""Every kind of adapter: starts at the base, learns, is written and loaded back by peft, baked, taken off, and refused
where a layout cannot hold it."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from finetune.adapters.adapter_file import PEFT_CONFIG, read_adapter, usual_name, write_adapter
from finetune.adapters.arithmetic import Weighted, compare, merge, rescale
from finetune.adapters.attach import attach, bake, bypassed, detach, weights
from finetune.adapters.bake_files import baked_tensor
from finetune.adapters.exporting import export
from finetune.adapters.forms import PEFT_PREFIX
from finetune.adapters.inspection import inspect_adapter
from finetune.adapters.kinds import KINDS, AdapterSize, inject_adapter, parameter_count, start_parameters
from finetune.adapters.lora import collect_lora, lora_parameters, remove, weight_shapes
from finetune.adapters.lycoris import as_lora
from finetune.adapters.verify import fingerprints, verify_adapter
from finetune.errors import AdapterError
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.small_model import ATTENTION, run, tiny_transformer, trained_kind

OWN_FORM = [kind for kind, facts in KINDS.items() if facts.form.name != "lora"]
FIRST = "blocks.0.attn1.to_q"


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_at_the_base_and_the_loss_falls(kind, results):
    model, expected = tiny_transformer(), run(tiny_transformer())
    inject_adapter(model, ATTENTION, AdapterSize(kind, rank=4), seed=3)
    assert_close(run(model), expected, atol=2e-6, rtol=1e-5)
    with bypassed(model):
        assert run(model).equal(expected)
    assert results[kind][3][-1] < results[kind][3][0]
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for _, parameter in lora_parameters(model))


@pytest.mark.parametrize("kind", KINDS)
def test_start_values_follow_from_the_seed_alone_and_leave_the_global_generator(kind):
    found = []
    for seed in (3, 3, 4):
        model, before = tiny_transformer(), torch.get_rng_state()
        inject_adapter(model, ATTENTION, AdapterSize(kind, rank=4), seed=seed)
        assert torch.get_rng_state().equal(before)
        found.append([parameter.detach().clone() for _, parameter in lora_parameters(model)])
        torch.rand(1)
    assert all(left.equal(right) for left, right in zip(found[0], found[1], strict=True))
    if kind not in ("oft", "pissa"):  # these two start from nothing and from the weights
        assert not all(left.equal(right) for left, right in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_does_what_the_trained_model_did_and_proves_itself(kind, results, tmp_path):
    _, adapter, expected, _ = results[kind]
    path = write_adapter(tmp_path / usual_name(adapter), adapter)
    model = tiny_transformer()
    attach(model, read_adapter(path), "style")
    assert_close(run(model), expected, atol=2e-5, rtol=1e-4)
    detach(model, "style")
    proof = verify_adapter(path, model, run, trained=adapter)
    assert proof.placed == proof.keys == len(adapter.tensors) and proof.changed and proof.baked_equals_attached and proof.restored


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pissa"])
def test_peft_alone_loads_the_folder_and_draws_the_same(kind, results, tmp_path):
    _, adapter, expected, _ = results[kind]
    export(adapter, "peft", tmp_path / "peft")
    settings = json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())
    assert settings["peft_type"] == KINDS[kind].form.peft_type
    model = PeftModel.from_pretrained(tiny_transformer(), tmp_path / "peft")
    assert_close(run(model), expected, atol=2e-5, rtol=1e-4)
    again = read_adapter(tmp_path / "peft")
    assert again.form is adapter.form and all(again.tensors[key].equal(value) for key, value in adapter.tensors.items())


def test_a_scale_of_peft_is_folded_in_when_its_folder_is_read(results, tmp_path):
    for kind in ("loha", "lokr"):
        export(results[kind][1], "peft", tmp_path / kind)
        config = tmp_path / kind / PEFT_CONFIG
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "alpha": settings["r"] * 3, "alpha_pattern": {}}))
        theirs = run(PeftModel.from_pretrained(tiny_transformer(), tmp_path / kind))
        model = tiny_transformer()
        attach(model, read_adapter(tmp_path / kind), "style")
        assert_close(run(model), theirs, atol=2e-5, rtol=1e-4)


def test_a_lokr_of_another_build_is_written_out_as_lora_at_its_own_strength(tmp_path):
    from peft import LoKrConfig, get_peft_model

    model = get_peft_model(tiny_transformer(), LoKrConfig(r=2, alpha=6, decompose_factor=4, target_modules=[FIRST], init_weights=False))
    expected = run(model)
    model.save_pretrained(tmp_path / "theirs")
    adapter = read_adapter(tmp_path / "theirs")
    fresh = tiny_transformer()
    attach(fresh, adapter, "style")
    assert adapter.form.name == "lora"
    assert_close(run(fresh), expected, atol=2e-5, rtol=1e-4)


def test_an_oft_of_another_build_is_refused_by_the_setting(results, tmp_path):
    export(results["oft"][1], "peft", tmp_path / "peft")
    config = tmp_path / "peft" / PEFT_CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_cayley_neumann": False}))
    with pytest.raises(AdapterError, match="use_cayley_neumann"):
        read_adapter(tmp_path / "peft")


@pytest.mark.parametrize("kind", KINDS)
def test_baking_a_weight_on_disk_equals_baking_the_attached_layer(kind, results):
    adapter = results[kind][1]
    model = tiny_transformer()
    weight = model.get_submodule(FIRST).weight.detach().clone()
    attach(model, adapter, "style")
    bake(model)
    assert_close(baked_tensor(weight, FIRST, [Weighted(adapter, 1.0)]), model.get_submodule(FIRST).weight.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_taking_it_off_leaves_the_base_bit_for_bit(kind, results):
    model, untouched = results[kind][0], fingerprints(tiny_transformer())
    remove(model)
    assert fingerprints(model) == untouched


def test_rslora_is_scaled_by_the_root_of_the_rank():
    model = tiny_transformer()
    inject_adapter(model, FIRST, AdapterSize("rslora", rank=9, alpha=6.0), seed=0)
    with torch.no_grad():
        lora_parameters(model)[1][1].fill_(1.0)
    assert_close(collect_lora(model).tensors[FIRST + ".lora_B.weight"], torch.full((32, 9), 2.0))
    assert weights(model) == {"default": 1.0}


def test_pissa_is_written_as_the_difference_to_its_start_at_twice_the_rank(results):
    adapter = results["pissa"][1]
    assert set(adapter.ranks.values()) == {8}
    model = tiny_transformer()
    inject_adapter(model, FIRST, AdapterSize("pissa", rank=4, alpha=8.0), seed=0)
    a, b = (parameter.detach() for _, parameter in lora_parameters(model))
    values = torch.linalg.svdvals(model.get_submodule(FIRST).get_base_layer().weight)
    assert_close(torch.linalg.svdvals(2 * b @ a)[:4], values[:4], atol=1e-5, rtol=1e-4)
    assert [name for name, parameter in start_parameters(model) if not parameter.requires_grad] == [f"start/{FIRST}.lora_A.weight", f"start/{FIRST}.lora_B.weight"]


def test_dora_learns_its_magnitudes(results):
    adapter = results["dora"][1]
    norms = tiny_transformer().get_submodule(FIRST).weight.norm(dim=1)
    learned = adapter.tensors[FIRST + ".lora_magnitude_vector"]
    assert adapter.uses_dora and not torch.allclose(learned, norms, atol=1e-4) and torch.allclose(learned, norms, rtol=0.5)


@pytest.mark.parametrize("kind", ["lora", "pissa", "lokr"])
def test_ranks_and_alphas_by_pattern_are_trained_and_kept_in_the_file(kind, tmp_path):
    patterns = {"rank_pattern": {r".*attn2.*": 2, r"blocks\.0\..*": 3}, "alpha_pattern": {r"blocks\.1\.attn1\.to_q": 1.0}}
    _, adapter, expected, _ = trained_kind(kind, **patterns)
    factor = 2 if kind == "pissa" else 1
    if kind != "lokr":  # a LoKr's factor may be whole at any rank
        assert adapter.ranks["blocks.0.attn2.to_k"] == 2 * factor and adapter.ranks[FIRST] == 3 * factor and adapter.ranks["blocks.1.attn1.to_v"] == 4 * factor
    model = tiny_transformer()
    attach(model, read_adapter(write_adapter(tmp_path / usual_name(adapter), adapter)), "style")
    assert_close(run(model), expected, atol=2e-5, rtol=1e-4)
    export(adapter, "peft", tmp_path / "peft")
    assert_close(run(PeftModel.from_pretrained(tiny_transformer(), tmp_path / "peft")), expected, atol=2e-5, rtol=1e-4)


def test_a_pattern_that_fits_no_layer_is_an_error_that_shows_the_names():
    for key in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(AdapterError, match="fits none of the 32") as caught:
            inject_adapter(tiny_transformer(), ATTENTION, AdapterSize(**{key: {"nothing": 2}}), seed=0)
        assert caught.value.where == f"adapter.{key}" and "blocks.0.attn1" in caught.value.fix


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_of_trainable_numbers_is_what_training_has(kind):
    model = tiny_transformer()
    shapes = weight_shapes(model)
    modules = inject_adapter(model, ATTENTION, AdapterSize(kind, rank=4), seed=0)
    assert sum(parameter_count(kind, 4, shapes[module]) for module in modules) == sum(parameter.numel() for _, parameter in lora_parameters(model))


@pytest.mark.parametrize("kind", OWN_FORM)
def test_lora_layouts_refuse_what_they_cannot_hold_and_name_the_way_out(kind, results, tmp_path):
    for layout in ("diffusers", "kohya", "comfy", "onetrainer", "tencent"):
        with pytest.raises(AdapterError, match="cannot hold|no low-rank form") as caught:
            export(results[kind][1], layout, tmp_path / "out", KEY_MAPS["hunyuan_dit"])
        assert "peft" in caught.value.fix or "bake" in caught.value.fix


def test_oft_is_refused_in_lycoris_names_and_in_arithmetic(results, tmp_path):
    oft = results["oft"][1]
    with pytest.raises(AdapterError, match="lycoris layout cannot hold"):
        export(oft, "lycoris", tmp_path / "out.safetensors", KEY_MAPS["hunyuan_dit"])
    for refused in (lambda: rescale(oft, 2.0), lambda: merge([Weighted(oft, 1.0)]), lambda: compare(oft, oft), lambda: as_lora(oft)):
        with pytest.raises(AdapterError, match="OFT"):
            refused()


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_lycoris_names_hold_it_exactly_and_a_rank_writes_it_out_as_lora(kind, results, tmp_path):
    _, adapter, expected, _ = results[kind]
    export(adapter, "lycoris", tmp_path / "lycoris.safetensors", KEY_MAPS["hunyuan_dit"])
    model = tiny_transformer()
    attach(model, read_adapter(tmp_path / "lycoris.safetensors", KEY_MAPS, family="hunyuan_dit"), "style")
    assert_close(run(model), expected, atol=2e-5, rtol=1e-4)
    exact = export(adapter, "diffusers", tmp_path / "exact.safetensors", rank=32)
    cut = export(adapter, "diffusers", tmp_path / "cut.safetensors", rank=1)
    assert not exact.errors and max(cut.errors.values()) > 0.01
    fresh = tiny_transformer()
    attach(fresh, read_adapter(tmp_path / "exact.safetensors"), "style")
    assert_close(run(fresh), expected, atol=2e-5, rtol=1e-4)


def test_a_dora_goes_into_lycoris_and_kohya_names_with_its_scale(results, tmp_path):
    _, adapter, expected, _ = results["dora"]
    export(adapter, "lycoris", tmp_path / "lycoris.safetensors", KEY_MAPS["hunyuan_dit"])
    model = tiny_transformer()
    attach(model, read_adapter(tmp_path / "lycoris.safetensors", KEY_MAPS, family="hunyuan_dit"), "style")
    assert_close(run(model), expected, atol=2e-5, rtol=1e-4)


def test_a_broken_loha_is_named(results, tmp_path):
    from safetensors.torch import save_file

    adapter = results["loha"][1]
    for broken, said in (({FIRST + ".hada_w1_b": None}, "hada_w1_b is missing"), ({FIRST + ".hada_w1_b": torch.full((4, 32), torch.nan)}, "NaN")):
        tensors = {PEFT_PREFIX + key: value.contiguous() for key, value in {**adapter.tensors, **broken}.items() if value is not None}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=said):
            read_adapter(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_inspection_tells_form_and_ranks(kind, results, tmp_path):
    adapter = results[kind][1]
    found = inspect_adapter(write_adapter(tmp_path / usual_name(adapter), adapter.with_provenance(kind=kind)), KEY_MAPS, "hunyuan_dit")
    assert found["form"] == KINDS[kind].form.title and len(found["modules"]) == 32 and not found["dead"]
    assert all(row["norm"] > 0 for row in found["modules"])
