"""Runs with every kind of adapter: proven at the end, the same bits after an interruption, ranks by module kept."""

import shutil

import pytest

from finetune.adapters.adapter_file import read_adapter
from finetune.adapters.kinds import KINDS
from finetune.errors import AdapterError, RecipeError
from finetune.training.run import train
from tests.training.small_job import small_recipe

OTHERS = [kind for kind in KINDS if kind != "lora"]
SHORT = {"training__steps": 4, "training__checkpoint_every": 2, "training__optimizer": "adamw", "samples__steps": 1}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "pissa" else pytest.mark.thorough) for kind in OTHERS])
def test_a_run_of_every_kind_is_proven_and_resumes_to_the_same_bits(kind, tiny_base, pictures, encodings_folder, tmp_path):
    recipe = small_recipe(tiny_base, pictures, adapter__kind=kind, **SHORT)
    result = train(recipe, tmp_path / "run", cache_folder=encodings_folder)
    assert result.verified.placed == result.verified.keys and result.verified.changed and result.verified.baked_equals_attached
    adapter = read_adapter(tmp_path / "run")
    assert adapter.form is KINDS[kind].form and adapter.provenance["kind"] == kind
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists() == (KINDS[kind].form.name != "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run" / "adapter").iterdir()}
    for leftover in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(tmp_path / "run" / leftover)
    (tmp_path / "run" / "result.json").unlink()
    assert train(recipe, tmp_path / "run", resume=True, cache_folder=encodings_folder).resumed_from == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "run" / "adapter").iterdir()} == before


def test_ranks_by_module_come_from_the_recipe_and_a_pattern_without_layers_stops_the_run(tiny_base, pictures, encodings_folder, tmp_path):
    patterns = {r".*attn2.*": 2}
    train(small_recipe(tiny_base, pictures, adapter__rank_pattern=patterns, adapter__alpha_pattern={r".*attn2\.to_k": 1.0}, **SHORT), tmp_path / "run", cache_folder=encodings_folder)
    adapter = read_adapter(tmp_path / "run")
    assert {module: rank for module, rank in adapter.ranks.items() if rank == 2}.keys() == {module for module in adapter.modules if "attn2" in module}
    with pytest.raises(AdapterError, match="fits none") as caught:
        train(small_recipe(tiny_base, pictures, adapter__rank_pattern={"attn9": 2}, **SHORT), tmp_path / "other", cache_folder=encodings_folder)
    assert caught.value.where == "adapter.rank_pattern" and caught.value.exit_code == 2


@pytest.mark.parametrize(("changes", "said"), [
    ({"adapter__kind": "oft", "adapter__alpha": 4.0}, "no alpha and no dropout"),
    ({"adapter__kind": "loha", "base__hold": "nf4"}, "whole weights"),
    ({"adapter__rank_pattern": {"(": 4}}, "not a regular expression"),
    ({"adapter__rank_pattern": {"a": 0}}, "a table, at most 64, of expression = a whole number from 1 up to 1024"),
    ({"adapter__alpha_pattern": {"a": -1.0}}, "of expression = a number above 0 and up to 4096"),
    ({"adapter__kind": "lokrr"}, 'did you mean "lokr"'),
])
def test_settings_that_do_not_go_together_are_one_line_before_anything_is_loaded(changes, said, pictures):
    with pytest.raises(RecipeError) as caught:
        small_recipe("mini", pictures, **changes)
    assert said in str(caught.value)


@pytest.mark.parametrize("hold", ["int8", "nf4", "streamed"])
def test_kinds_that_look_at_weights_work_where_these_are_held_otherwise(hold, tiny_base):
    import torch

    from data_tools.progress import Progress
    from finetune.adapters.kinds import AdapterSize, inject_adapter
    from finetune.adapters.lora import lora_parameters
    from finetune.families.base_models import locate_base
    from finetune.training.placement import Hold, load_held

    base = locate_base(str(tiny_base))
    targets = base.family.facts.targets["attention"]
    for kind in ("dora", "pissa", "oft", "lokr"):
        model = load_held(base, Hold(hold, torch.float32, ""), torch.device("cpu"), tiny_base.parent / "held", Progress()).transformer
        if hold == "nf4" and kind == "lokr":
            with pytest.raises(AdapterError, match="held in 4 bits"):
                inject_adapter(model, targets, AdapterSize(kind, rank=4), seed=0)
            continue
        layer = model.get_submodule("blocks.0.attn1.to_q")
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        expected = layer(x)
        inject_adapter(model, targets, AdapterSize(kind, rank=4), seed=0)
        found = model.get_submodule("blocks.0.attn1.to_q")(x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        found.square().sum().backward()
        assert any(parameter.grad is not None for _, parameter in lora_parameters(model))


def test_the_plan_counts_what_the_kind_trains(tiny_base, pictures):
    from finetune.training.plan import plan

    plain, double = (plan(small_recipe(tiny_base, pictures, adapter__kind=kind)) for kind in ("lora", "loha"))
    assert double.trainable == 2 * plain.trainable and double.settings["kind"] == "loha"
