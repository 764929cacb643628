"""Watching a run: copies and drift are seen on schedule, and a run that copies can end early with a proven adapter."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from finetune.evaluation.validation import RunValidator
from finetune.training.run import train
from tests.tiny_models import hunyuan_dit
from tests.training.small_job import small_recipe, write_pictures


def saved(folder, name, seed):
    path = folder / f"{name}.png"
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return path


def test_copies_and_drift_are_told_apart(tmp_path):
    training = [saved(tmp_path, f"training{seed}", seed) for seed in range(4)]
    before = [saved(tmp_path, "before0", 10), saved(tmp_path, "before1", 11)]
    copy, same = tmp_path / "now0.png", tmp_path / "now1.png"
    shutil.copy(training[2], copy)
    shutil.copy(before[1], same)
    row = RunValidator()(100, [copy, same], before, training, [False, True])
    assert (row["near_copies"], row["nearest"], row["drift"], row["stop"]) == (0.5, 1.0, 0.0, None)
    assert row["pairs"] == [{"picture": "now0.png", "training": "training2.png", "similarity": 1.0}]
    assert RunValidator(stops=True)(100, [copy, same], before, training, [False, True])["stop"].startswith("50%")
    moved = RunValidator()(100, [before[0], before[0]], before, training, [False, True])
    assert moved["drift"] > 0.05 and moved["near_copies"] == 0
    assert RunValidator()(100, before, before, training, [False, False])["drift"] is None
    assert "drifted" in RunValidator(most_drift=0.05)(100, [before[0], before[0]], before, training, [False, True])["stop"]
    for limit, related in ((0.0, [False, True]), (2.0, [False, True]), (0.05, [False, False])):
        assert RunValidator(most_drift=limit)(100, [before[0], before[0]], before, training, related)["stop"] is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    hunyuan_dit.build(layers=2).save_pretrained(folder / "base")
    write_pictures(folder / "pictures")
    return folder


def recipe_of(folder, **changes):
    return small_recipe(folder / "base", folder / "pictures", training__steps=4, training__checkpoint_every=0, samples__every=2, samples__unrelated=["the sea"], **changes)


def test_a_run_writes_a_row_at_each_drawing_and_the_unrelated_prompt_has_no_trigger(folder):
    result = train(recipe_of(folder), folder / "run", cache_folder=folder / "cache", watch_samples=RunValidator())
    rows = [json.loads(line) for line in (folder / "run" / "validation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2] and rows[0]["drift"] > 0 and result.steps == 4
    page = (folder / "run" / "report.html").read_text()
    assert "Copies and drift on the way" in page and f"<td>{rows[0]['drift']:.3f}</td>" in page
    with Image.open(folder / "run" / "samples" / "step-000002-01.png") as picture:
        assert json.loads(picture.info["brushwork"])["prompt"] == "the sea"


def test_a_reason_to_stop_ends_the_run_early_with_a_proven_adapter(folder):
    result = train(recipe_of(folder), folder / "stopped", cache_folder=folder / "cache", watch_samples=lambda *_: {"stop": "it copies"})
    assert result.steps == 2 and result.verified.changed
    assert (result.adapter / "pytorch_lora_weights.safetensors").exists()
