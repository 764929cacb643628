"""LoRA on text encoders, where the pipeline loads one for them: trained live, saved beside the transformer's, loaded back
by diffusers itself; refused elsewhere."""

import shutil

import pytest
import torch

from finetune.adapters.adapter_file import FILE_NAME, read_adapter
from finetune.adapters.arithmetic import Weighted
from finetune.adapters.attach import attach
from finetune.adapters.bake_files import bake_pipeline
from finetune.adapters.kinds import AdapterSize
from finetune.adapters.text_encoders import attach_encoders
from finetune.errors import AdapterError, BadInput, RecipeError
from finetune.families import registry
from finetune.families.base_models import locate_base
from finetune.families.key_layouts import KEY_MAPS
from finetune.families.protocol import Conditioning
from finetune.generation import LoadedAdapter, draw_from_files
from finetune.sampling import PictureRequest
from finetune.training.run import train
from finetune.training.text_training import LiveEncodings, _joined, inject_encoders
from tests.tiny_models.all import TINY
from tests.training.small_job import small_recipe

FAMILIES = ["flux_dev", "sd3"]
SHORT = {"training__steps": 4, "training__checkpoint_every": 2, "training__optimizer": "adamw", "samples__steps": 1, "data__resolution": 32, "samples__guidance": 1.0,
         "adapter__text_encoders": True, "adapter__dropout": 0.3}


class CachedText:
    """What the untouched encoders gave."""

    def __init__(self, family, pipeline):
        self.found = family.encode_prompts(pipeline, ["a red cat"])[0]

    def conditioning(self, prompt):
        return self.found


@pytest.fixture(scope="module", params=[pytest.param("flux_dev", marks=pytest.mark.thorough), "sd3"])
def finished(request, pictures, tmp_path_factory):
    """(family, base folder, run folder, result) of a short run with the text encoders trained."""
    folder = tmp_path_factory.mktemp(request.param)
    TINY[request.param].build().save_pretrained(folder / "base")
    result = train(small_recipe(folder / "base", pictures, **SHORT), folder / "run", cache_folder=folder / "cache")
    return request.param, folder / "base", folder / "run", result


@pytest.mark.parametrize("name", FAMILIES)
def test_what_encoders_give_live_is_what_was_cached(name):
    pipeline, family = TINY[name].build(), registry.family(name)
    prompts = ["a red cat", ""]
    cached = family.encode_prompts(pipeline, prompts)
    for before, live in zip(cached, family.encode_live(pipeline, prompts, cached), strict=True):
        assert all(live.tensors[key].equal(before.tensors[key]) for key in before.tensors)


def test_only_families_whose_pipeline_loads_it_offer_it():
    for name in TINY:
        facts = registry.family(name).facts
        loadable = getattr(type(TINY[name].build()), "_lora_loadable_modules", ())
        assert set(facts.trainable_encoders) <= set(loadable)
        assert bool(facts.trainable_encoders) == (name in ("flux_dev", "flux_schnell", "sd3"))


def test_the_run_is_proven_with_its_encoders(finished):
    name, _, run, result = finished
    adapter = read_adapter(run, KEY_MAPS)
    assert set(adapter.text_encoders) == set(registry.family(name).facts.trainable_encoders)
    tensors = len(adapter.tensors) + sum(len(part) for part in adapter.text_encoders.values())
    assert result.verified.keys == result.verified.placed == tensors
    assert result.verified.changed and result.verified.baked_equals_attached and result.verified.restored
    for part in adapter.text_encoders.values():
        assert all(value.any() for key, value in part.items() if key.endswith("q_proj.lora_B.weight"))


def test_the_pipelines_own_loader_gives_the_same_text_states_and_prediction(finished):
    name, base, run, _ = finished
    pipeline, family = TINY[name].build(), registry.family(name)
    bare = family.encode_prompts(pipeline, ["a red cat"])[0].tensors
    pipeline.load_lora_weights(str(run / "adapter"), weight_name=FILE_NAME)
    theirs = family.encode_prompts(pipeline, ["a red cat"])[0].tensors
    ours = TINY[name].build()
    placed = attach_encoders(ours, read_adapter(run, KEY_MAPS), "style")
    found = family.encode_prompts(ours, ["a red cat"])[0].tensors
    assert placed == sum(len(part) for part in read_adapter(run, KEY_MAPS).text_encoders.values())
    for key in found:
        torch.testing.assert_close(found[key], theirs[key], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(bare["pooled"], theirs["pooled"], atol=1e-4)


def test_dropout_acts_while_training_and_at_no_other_time():
    pipeline, family = TINY["sd3"].build(), registry.family("sd3")
    live = LiveEncodings(CachedText(family, pipeline), family, pipeline)
    for _, parameter in inject_encoders(family, pipeline, AdapterSize(rank=4, dropout=0.5), seed=0):
        parameter.data.fill_(0.1)
    for training in (True, False):
        pipeline.transformer.train(training)
        first, second = (live.conditioning("a red cat").tensors["states"] for _ in range(2))
        assert first.equal(second) is not training


def test_cached_and_live_text_are_compared_though_they_lie_on_two_devices(monkeypatch):
    """As on a GPU; a tensor on `meta` has no numbers to compare, only a device to be brought from."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: torch.zeros(tensor.shape))
    assert _joined(Conditioning({"t5": torch.ones(3, 2), "pooled": torch.ones(2, device="meta")})).shape == (8,)


def test_baking_on_disk_writes_the_encoders_too(finished, tmp_path):
    name, base, run, _ = finished
    adapter, family = read_adapter(run, KEY_MAPS), registry.family(name)
    changed = bake_pipeline(base, tmp_path / "baked", [Weighted(adapter, 1.0)])
    assert changed == len(adapter.modules) + sum(len(adapter.part(slot).modules) for slot in adapter.text_encoders)
    attached, baked = family.load(base, frozenset({"text"}), torch.float32), family.load(tmp_path / "baked", frozenset({"text"}), torch.float32)
    attach_encoders(attached, adapter, "style")
    wanted, found = (family.encode_prompts(pipeline, ["a red cat"])[0].tensors for pipeline in (attached, baked))
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5, rtol=1e-5)


def test_an_interrupted_run_ends_with_the_same_bits(finished, pictures, tmp_path):
    _, base, run, _ = finished
    again = tmp_path / "run"
    shutil.copytree(run, again)
    for leftover in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(again / leftover)
    (again / "result.json").unlink()
    result = train(small_recipe(base, pictures, **SHORT), again, resume=True, cache_folder=base.parent / "cache")
    assert result.resumed_from == 2
    assert (again / "adapter" / FILE_NAME).read_bytes() == (run / "adapter" / FILE_NAME).read_bytes()


def test_dropout_on_the_encoders_is_for_training_alone_and_resumes_to_the_same_bits(finished, pictures, tmp_path):
    _, base, _, _ = finished
    recipe = small_recipe(base, pictures, **SHORT, validation__share=0.3, validation__every=2, validation__levels=1, validation__keep_best=False)
    run = tmp_path / "run"
    assert train(recipe, run, cache_folder=base.parent / "cache").verified.changed
    files = [run / "adapter" / FILE_NAME, run / "validation.jsonl"]
    before = [path.read_bytes() for path in files]
    for leftover in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(run / leftover)
    (run / "result.json").unlink()
    torch.manual_seed(7)  # as a process of its own has another state of torch's generator
    assert train(recipe, run, resume=True, cache_folder=base.parent / "cache").resumed_from == 2
    assert [path.read_bytes() for path in files] == before


def test_pictures_are_drawn_with_the_encoders_as_trained(finished):
    _, folder, run, result = finished
    base, adapter = locate_base(str(folder)), LoadedAdapter(read_adapter(run, KEY_MAPS), run / "adapter")
    request = PictureRequest("sks, a cat", 0, 32, 32, 1, 1.0, "")
    with_it, without = (drawn.image.tobytes() for drawn in draw_from_files(base, {"style": adapter}, [{"style": 1.0}, {}], [request]))
    assert with_it != without
    with pytest.raises(AdapterError, match="also trains text_encoder"):
        attach(TINY["sd3"].build().transformer, adapter.file, "style")


def test_a_base_without_such_a_loader_and_settings_that_do_not_go_with_it_are_refused(tiny_base, pictures, tmp_path):
    with pytest.raises(BadInput, match="loads no adapter into a text encoder"):
        train(small_recipe(tiny_base, pictures, adapter__text_encoders=True), tmp_path / "run")
    with pytest.raises(RecipeError, match="lora and rslora"):
        small_recipe(tiny_base, pictures, adapter__text_encoders=True, adapter__kind="dora")


def test_the_plan_keeps_the_encoders_in_memory_and_says_so(finished, pictures):
    from finetune.training.plan import plan

    _, base, _, _ = finished
    alone, both = (plan(small_recipe(base, pictures, **{**SHORT, "adapter__text_encoders": wanted})) for wanted in (False, True))
    assert both.trainable > alone.trainable and both.memory_bytes["text encoders"] > 0
    said = [any("text encoders stay in memory" in note for note in made.notes) for made in (alone, both)]
    assert said == [False, True]
