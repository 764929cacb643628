"""The one loop trains every family: encode, train, stop, go on, prove, draw, and the result is that of an unbroken run."""

from __future__ import annotations

import signal

import numpy as np
import pytest
from PIL import Image

from finetune.errors import Interrupted
from finetune.recipe import load_recipe
from finetune.training.run import train
from tests.tiny_models.all import TINY
from tests.training.small_job import SignallingProgress

ALWAYS = "sd3"  # one family in the ordinary suite; all of them with `pytest -m thorough`
NAMES = [name if name == ALWAYS else pytest.param(name, marks=pytest.mark.thorough) for name in TINY]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for index in range(3):
        noise = np.random.default_rng(index).normal(128, 40 + 30 * index, (64, 64))
        Image.fromarray(noise.clip(0, 255).astype(np.uint8)).convert("RGB").save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a noise number {index}")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_to_the_adapter_of_an_unbroken_one(name, pictures, tmp_path):
    base = tmp_path / "base"
    TINY[name].build().save_pretrained(base)
    recipe = load_recipe({
        "base": {"model": str(base)}, "data": {"folder": str(pictures), "resolution": 64}, "training": {"steps": 3, "workers": 1},
        "samples": {"height": 64, "width": 64, "steps": 2, "prompts": ["a noise"]}}, [])
    whole = train(recipe, tmp_path / "whole", cache_folder=tmp_path / "cache")
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "stopped", cache_folder=tmp_path / "cache", progress=SignallingProgress(2, signal.SIGINT))
    resumed = train(recipe, tmp_path / "stopped", cache_folder=tmp_path / "cache", resume=True)
    assert 0 < resumed.resumed_from < 3 == resumed.steps == whole.steps
    assert resumed.verified.keys == resumed.verified.placed > 0
    files = [result.adapter / "pytorch_lora_weights.safetensors" for result in (whole, resumed)]
    from safetensors.torch import load_file

    first, second = map(load_file, files)
    assert first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)
    assert (tmp_path / "whole" / "before_after.png").is_file()
