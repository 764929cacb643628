"""Our files in other people's hands: stock diffusers and peft load them whole, at the right strength, for every family."""

from __future__ import annotations

import re

import pytest
import torch
from torch.testing import assert_close

from finetune.adapters.adapter_file import FILE_NAME, AdapterFile, write_adapter
from finetune.adapters.exporting import export
from finetune.adapters.kinds import KINDS
from finetune.adapters.layers import adapter_layers
from finetune.adapters.lora import weight_shapes
from finetune.adapters.weight_change import delta
from finetune.families.key_layouts import KEY_MAPS, key_map_of
from tests.tiny_models.all import TINY


def attention_adapter(family: str, transformer: torch.nn.Module) -> AdapterFile:
    """Random LoRA on the family's attention layers, rank 2 here and 3 there, as training would leave it."""
    from finetune.families import registry

    tensors, generator = {}, torch.Generator().manual_seed(0)
    pattern = registry.family(family).facts.targets["attention"]
    for number, (name, shape) in enumerate(weight_shapes(transformer).items()):
        if re.fullmatch(pattern, name):
            rank = 2 + number % 2
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(shape[0], rank, generator=generator)
    return AdapterFile(tensors)


def assert_loaded_whole(transformer: torch.nn.Module, adapter: AdapterFile) -> None:
    layers = dict(adapter_layers(transformer))
    layers = {name.removeprefix("base_model.model."): layer for name, layer in layers.items()}
    assert sorted(layers) == adapter.modules
    for module, layer in layers.items():
        name = layer.active_adapters[0]
        found = delta(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        assert_close(found, delta(*adapter.pair(module)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_the_loader_that_the_card_names_loads_every_module_at_its_strength(family, tmp_path):
    pipeline = TINY[family].build()
    adapter = attention_adapter(family, pipeline.transformer)
    write_adapter(tmp_path / FILE_NAME, adapter)
    loader = key_map_of(family).loads_with
    assert (loader == "pipeline") == hasattr(pipeline, "load_lora_weights")
    if loader == "pipeline":
        pipeline.load_lora_weights(str(tmp_path), weight_name=FILE_NAME)
    elif loader == "transformer":
        pipeline.transformer.load_lora_adapter(str(tmp_path), weight_name=FILE_NAME, prefix="transformer")
    else:
        assert not hasattr(pipeline.transformer, "load_lora_adapter")
        export(adapter, "peft", tmp_path / "peft", KEY_MAPS.get(key_map_of(family).family))
        from peft import PeftModel

        assert_loaded_whole(PeftModel.from_pretrained(pipeline.transformer, tmp_path / "peft"), adapter)
        return
    assert_loaded_whole(pipeline.transformer, adapter)


def test_a_kohya_file_of_ours_is_read_by_diffusers_own_converter(tmp_path):
    pipeline = TINY["flux_dev"].build()
    adapter = attention_adapter("flux_dev", pipeline.transformer)
    keep = {key: value for key, value in adapter.tensors.items() if "single" not in key}
    export(AdapterFile(keep), "kohya", tmp_path / "kohya.safetensors", KEY_MAPS["flux"])
    pipeline.load_lora_weights(str(tmp_path), weight_name="kohya.safetensors")
    layers = dict(adapter_layers(pipeline.transformer))
    for module in AdapterFile(keep).modules:
        layer = layers[module]
        name = layer.active_adapters[0]
        assert_close(delta(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]), delta(keep[f"{module}.lora_A.weight"], keep[f"{module}.lora_B.weight"]), atol=1e-5, rtol=1e-5)


def test_the_card_of_a_family_whose_pipeline_loads_adapters_shows_that_call(tmp_path, monkeypatch):
    from finetune.adapters.loading_snippets import SnippetFacts, loading_snippet

    monkeypatch.chdir(tmp_path)
    pipeline = TINY["flux_dev"].build()
    pipeline.save_pretrained("base")
    adapter = attention_adapter("flux_dev", pipeline.transformer)
    write_adapter(tmp_path / "me" / "style" / FILE_NAME, adapter)
    live = {"height": 32, "width": 32, "num_inference_steps": 1, "max_sequence_length": 16}
    lines = loading_snippet(SnippetFacts("me/style", FILE_NAME, "base", "a cat", adapter.ranks, "pipeline", live))
    assert "load_lora_weights('me/style'" in lines
    names: dict = {}
    exec(compile(lines, "card", "exec"), names)
    assert (tmp_path / "picture.png").stat().st_size > 0
    assert_loaded_whole(names["pipeline"].transformer, adapter)


def test_mixed_ranks_are_spelled_out_exactly_in_the_peft_lines(tmp_path, monkeypatch):
    from finetune.adapters.loading_snippets import SnippetFacts, loading_snippet

    lines = loading_snippet(SnippetFacts("me/style", FILE_NAME, "base", "a cat", {"proj_out": 2, "blocks.0.proj_out": 3}, "peft", {}))
    assert 'f"^{module}$"' in lines and "rank_pattern=exact" in lines


@pytest.fixture(scope="module")
def dit_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    TINY["hunyuan_dit"].build().save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr", "oft"])
def test_the_lines_of_the_card_load_every_kind_of_adapter_without_us(kind, dit_base, monkeypatch):
    from finetune.adapters.adapter_file import usual_name
    from finetune.adapters.attach import attach
    from finetune.adapters.kinds import AdapterSize, inject_adapter
    from finetune.adapters.loading_snippets import SnippetFacts, loading_snippet
    from finetune.adapters.lora import collect_lora, lora_parameters, remove
    from tests.adapters.small_model import ATTENTION, run, tiny_transformer

    monkeypatch.chdir(dit_base)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: f"{repo}/{file}")
    model = tiny_transformer()
    inject_adapter(model, ATTENTION, AdapterSize(kind, rank=4), seed=0)
    with torch.no_grad():
        for _, parameter in lora_parameters(model):
            parameter += 0.05
    adapter = collect_lora(model)
    remove(model)
    attach(model, adapter, "style")
    write_adapter(dit_base / kind / usual_name(adapter), adapter)
    live = {"height": 64, "width": 64, "num_inference_steps": 1, "use_resolution_binning": False}
    lines = loading_snippet(SnippetFacts(kind, usual_name(adapter), "base", "a cat", adapter.ranks, "peft", live, adapter.uses_dora, adapter.form.name != "lora"))
    assert "brushwork" not in lines and "finetune" not in lines
    names: dict = {}
    exec(compile(lines, "card", "exec"), names)
    assert_close(run(names["pipeline"].transformer.eval()), run(model), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["rslora", "dora", "pissa"])
def test_a_pipeline_with_a_loader_loads_every_kind_of_lora(kind, tmp_path):
    from finetune.adapters.kinds import AdapterSize, inject_adapter
    from finetune.adapters.lora import collect_lora, lora_parameters, remove
    from finetune.adapters.weight_change import weight_change
    from finetune.families import registry

    pipeline = TINY["flux_dev"].build()
    inject_adapter(pipeline.transformer, registry.family("flux_dev").facts.targets["attention"], AdapterSize(kind, rank=2, alpha=3.0), seed=0)
    with torch.no_grad():
        for _, parameter in lora_parameters(pipeline.transformer):
            parameter += 0.05
    adapter = collect_lora(pipeline.transformer)
    remove(pipeline.transformer)
    weights = {module: pipeline.transformer.get_submodule(module).weight.detach().clone() for module in adapter.modules}
    write_adapter(tmp_path / FILE_NAME, adapter)
    pipeline.load_lora_weights(str(tmp_path), weight_name=FILE_NAME)
    layers = dict(adapter_layers(pipeline.transformer))
    assert sorted(layers) == adapter.modules and KINDS[kind].form is adapter.form
    for module, layer in layers.items():
        layer.merge()
        assert_close(layer.get_base_layer().weight - weights[module], weight_change(adapter.parts(module), weights[module]), atol=1e-5, rtol=1e-4)
