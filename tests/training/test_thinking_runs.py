"""Runs with thinking records and thinking tokens: trained with the LoRA, resumed exactly, proven from the adapter's folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from data_tools.progress import Progress
from data_tools.thinking import thinking_path, write_record
from data_tools.thinking_rules import think_by_rules
from finetune.adapters.adapter_file import read_adapter
from finetune.errors import AdapterError, BadInput
from finetune.families.registry import family
from finetune.thinking.tokens import FILE_NAME, read_tokens, tokens_of
from finetune.training.run import train
from finetune.training.training_set import build_training_set
from tests.tiny_models import hunyuan_dit
from tests.training.small_job import small_recipe, write_pictures


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    hunyuan_dit.build(layers=2).save_pretrained(folder / "base")
    write_pictures(folder / "pictures")
    recipe = small_recipe(folder / "base", folder / "pictures", adapter__thinking_tokens=3, training__steps=6, training__checkpoint_every=3)
    return folder, recipe, train(recipe, folder / "run", cache_folder=folder / "cache")


def test_tokens_are_trained_and_lie_beside_an_adapter_that_names_them(job):
    folder, recipe, result = job
    adapter = read_adapter(result.adapter)
    tokens = tokens_of(adapter, result.adapter, family("hunyuan_dit").facts.text_stream)
    assert tokens.states.shape == (3, 24)
    half_way = load_file(folder / "run" / "checkpoints" / "step-000003" / "optimizer.safetensors")["parameter/thinking_tokens"]
    assert not torch.allclose(half_way, tokens.states, atol=1e-3)
    assert result.verified.changed and result.verified.restored
    (result.adapter / FILE_NAME).rename(result.adapter / "hidden")
    with pytest.raises(AdapterError, match="different adapter"):
        tokens_of(adapter, result.adapter, family("hunyuan_dit").facts.text_stream)
    (result.adapter / "hidden").rename(result.adapter / FILE_NAME)


def test_a_resumed_run_ends_with_the_same_tokens_bit_for_bit(job):
    folder, recipe, result = job
    shutil.rmtree(folder / "run" / "checkpoints" / "step-000006")
    again = train(recipe, folder / "run", resume=True, cache_folder=folder / "cache")
    whole = train(recipe, folder / "whole", cache_folder=folder / "cache")
    assert again.resumed_from == 3
    assert torch.equal(read_tokens(again.adapter).states, read_tokens(whole.adapter).states)
    assert read_adapter(again.adapter).provenance["thinking_tokens"] == read_adapter(whole.adapter).provenance["thinking_tokens"]


def test_a_run_without_tokens_leaves_no_token_file(job):
    folder, _, _ = job
    result = train(small_recipe(folder / "base", folder / "pictures", training__steps=1), folder / "plain", cache_folder=folder / "cache")
    assert not (result.adapter / FILE_NAME).exists() and "thinking_tokens" not in read_adapter(result.adapter).provenance


def test_a_caption_that_leaves_no_room_is_named_before_training(job):
    folder, recipe, _ = job
    (folder / "pictures" / "picture0.txt").write_text("word " * 400)
    with pytest.raises(BadInput, match="must be free for the thinking tokens"):
        train(recipe, folder / "long", cache_folder=folder / "cache")
    (folder / "pictures" / "picture0.txt").write_text("a round thing number 0")


@pytest.mark.parametrize("choice, expected", [("plain", {"plain"}), ("trace", {"thought"}), ("mixed", {"plain", "thought"})])
def test_the_recipe_chooses_plain_captions_thought_ones_or_both(tmp_path, choice, expected):
    pictures = write_pictures(tmp_path / "pictures", count=1)
    record = think_by_rules("a round thing number 0")
    write_record(thinking_path(pictures / "picture0.png"), record)
    recipe = small_recipe("mini", pictures, data__thinking=choice, data__trigger="sks")
    captions = set(build_training_set(recipe, family("hunyuan_dit").facts, Progress()).captions.variants[0])
    words = {"plain": "sks, a round thing number 0", "thought": f"sks, {record.enhanced}"}
    assert captions == {words[name] for name in expected}
    assert not any(caption.startswith("sks, {") for caption in captions)


def test_a_record_that_gave_up_is_not_trained_on(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", count=1)
    thinking_path(pictures / "picture0.png").write_text(json.dumps(think_by_rules("x").given_up("lost").to_json()))
    recipe = small_recipe("mini", pictures, data__thinking="trace")
    assert build_training_set(recipe, family("hunyuan_dit").facts, Progress()).captions.variants[0] == ("sks, a round thing number 0",)


def test_publishing_takes_the_tokens_along_and_refuses_an_adapter_that_lost_them(job, tmp_path):
    from finetune.cli.publish_page import build_page, read_source

    _, _, result = job
    page = build_page(read_source(result.adapter), "someone/rounds", base_model="someone/base", licence=None, licence_name=None, licence_file=None, title=None, fetch=False)
    for file in page.files:
        (tmp_path / file.name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file.name).write_bytes(file.content)
    published = read_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(tokens_of(published, tmp_path, family("hunyuan_dit").facts.text_stream).states, read_tokens(result.adapter).states)
    shutil.copy(result.adapter / "pytorch_lora_weights.safetensors", tmp_path / "alone.safetensors")
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(AdapterError, match="is not beside it"):
        read_source(tmp_path / "alone.safetensors")


def test_the_report_shows_what_was_thought_about_the_pictures(job, tmp_path):
    folder, _, _ = job
    pictures = write_pictures(tmp_path / "pictures", count=2)
    record = think_by_rules("a red ball to the left of a <b>box</b>")
    write_record(thinking_path(pictures / "picture0.png"), record)
    recipe = small_recipe(folder / "base", pictures, data__thinking="trace", training__steps=1)
    train(recipe, tmp_path / "run", cache_folder=folder / "cache")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What was thought" in page and "picture0.png" in page and "&lt;b&gt;box" in page and "<b>box" not in page
    assert json.loads((tmp_path / "run" / "data.json").read_text())["thoughts"][0]["trace"] == record.trace
