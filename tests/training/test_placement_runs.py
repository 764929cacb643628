"""Whole runs on a base that is held quantised or streamed: proven, and resumed to the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from finetune.training.run import train
from tests.training.small_job import small_recipe

ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def half_base(tmp_path_factory):
    from tests.tiny_models import hunyuan_dit

    folder = tmp_path_factory.mktemp("base") / "half"
    pipeline = hunyuan_dit.build(layers=2)
    pipeline.transformer.to(torch.bfloat16)
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("hold", ["bf16", "int8", "nf4", "streamed"])
def test_a_run_is_proven_and_a_broken_one_resumes_to_the_same_bits(half_base, pictures, tmp_path, hold, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    recipe = small_recipe(half_base, pictures, base__hold=hold, training__steps=6, training__checkpoint_every=3, training__batch_size=1,
                          training__optimizer="adamw")
    result = train(recipe, tmp_path / "whole", cache_folder=tmp_path / "encodings")
    assert result.verified.restored and result.verified.placed == result.verified.keys
    assert hold in result.reasons["base weights"]

    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "whole", broken)
    shutil.rmtree(broken / "checkpoints" / "step-000006")
    shutil.rmtree(broken / "adapter")
    resumed = train(recipe, broken, resume=True, cache_folder=tmp_path / "encodings")
    assert resumed.resumed_from == 3
    assert (broken / ADAPTER).read_bytes() == (tmp_path / "whole" / ADAPTER).read_bytes()
    losses = [[json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()] for run in (broken, tmp_path / "whole")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("hold", ["bf16", "nf4"])
def test_an_adapter_that_has_learned_little_is_proven_where_small_weights_are_computed_with_in_full(half_base, pictures, tmp_path, hold, monkeypatch):
    """The output changes by less than a rounding to bfloat16, which products in float32 do not make."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    recipe = small_recipe(half_base, pictures, base__hold=hold, training__steps=2, training__learning_rate=1e-4, training__precision="fp32", training__optimizer="adamw")
    assert 1e-7 < train(recipe, tmp_path / "run", cache_folder=tmp_path / "encodings").verified.change < 4e-3


def test_a_base_that_does_not_fit_is_streamed_and_a_resumed_run_keeps_that(half_base, pictures, tmp_path, monkeypatch):
    from finetune.training import plan_run

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    recipe = small_recipe(half_base, pictures, training__steps=2, training__checkpoint_every=1, training__batch_size=1, training__optimizer="adamw")
    # The only thing that a test cannot make real is a machine with little memory.
    monkeypatch.setattr(plan_run, "available_bytes", lambda device: 1 << 20)
    result = train(recipe, tmp_path / "run", cache_folder=tmp_path / "encodings")
    assert result.reasons["base weights"].startswith("streamed: the weights as fp32 would need")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    first = (tmp_path / "run" / ADAPTER).read_bytes()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000002")
    shutil.rmtree(tmp_path / "run" / "adapter")
    train(recipe, tmp_path / "run", resume=True, cache_folder=tmp_path / "encodings")
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert written["estimate"]["settings"]["hold"] == "streamed"
    assert (tmp_path / "run" / ADAPTER).read_bytes() == first
