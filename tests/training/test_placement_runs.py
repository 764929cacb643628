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
