"""What a plan stands on: whether encoders will be loaded depends on what the cache holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from data_tools.progress import Progress
from finetune.families.base_models import locate_base
from finetune.training.encode import encode_everything
from finetune.training.encoding_cache import EncodingCache
from finetune.training.plan import plan
from finetune.training.plan_ground import available_bytes
from finetune.training.run import train
from finetune.training.samples import plan_samples
from finetune.training.training_set import build_training_set
from tests.training.small_job import small_recipe

ENCODING = {"encoding pictures", "encoding captions"}


def test_what_is_encoded_already_needs_no_encoder(tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    recipe, cache = small_recipe(tiny_base, pictures), EncodingCache(tmp_path / "encodings")
    assert ENCODING <= plan(recipe, cache_folder=cache.folder).phases_bytes.keys()
    base = locate_base(str(tiny_base))
    training_set = build_training_set(recipe, base.family.facts, Progress())
    prompts = plan_samples(recipe, base.family.facts, training_set).every_prompt()
    encode_everything(base, training_set.with_held_out(), prompts, recipe.data, cache, torch.device("cpu"), torch.float32, 0, Progress())
    assert not ENCODING & plan(recipe, cache_folder=cache.folder).phases_bytes.keys()
    other = small_recipe(tiny_base, pictures, samples__prompts=["another prompt"])
    assert ENCODING <= plan(other, cache_folder=cache.folder).phases_bytes.keys(), "one caption is missing"
    next(path for path in cache.folder.glob("??/*.safetensors")).unlink()
    assert ENCODING <= plan(recipe, cache_folder=cache.folder).phases_bytes.keys()


def test_the_same_plan_is_not_traced_twice(tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    recipe = small_recipe(tiny_base, pictures)
    first = plan(recipe, cache_folder=tmp_path / "encodings")
    monkeypatch.setattr("finetune.training.plan_model.one_step", None)
    again = plan(recipe, cache_folder=tmp_path / "encodings")
    assert again.flops_per_step == first.flops_per_step and again.memory_bytes["activations"] == first.memory_bytes["activations"]


def test_encodings_that_a_run_holds_in_memory_count_once(tiny_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "scan"))
    monkeypatch.setattr("finetune.training.plan_phases._library_bytes", lambda: 1 << 30)
    train(small_recipe(tiny_base, pictures, training__steps=1), tmp_path / "run", cache_folder=tmp_path / "encodings")
    cache = EncodingCache(tmp_path / "encodings")
    assert not cache.missing([path.stem for path in cache.folder.glob("??/*.safetensors")])
    parts = json.loads((tmp_path / "run" / "plan.json").read_text())["estimate"]["memory_bytes"]
    assert parts["encodings"] and parts["libraries"] == (1 << 30) - cache.held_bytes < 1 << 30


def test_what_encoders_took_of_a_gpu_counts_as_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps freed memory for the next tensors, and the driver takes it for used: a plan after encoding would see a smaller card."""
    free, kept = [3 << 30], [9 << 30]

    def empty_cache() -> None:
        free[0], kept[0] = free[0] + kept[0], 0

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 12 << 30))
    assert available_bytes(torch.device("cuda")) == 12 << 30
