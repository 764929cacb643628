"""What can be added to a run: averaged weights, held-out loss, a search for the learning rate, LoRA+, noise statistics, trackers."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.adapters.adapter_file import read_adapter
from finetune.adapters.lora import lora_parameters
from finetune.errors import BadInput, DataError, RunFolderError
from finetune.training import looks, rate_finder
from finetune.training.held_out_loss import held_out_loss
from finetune.training.run import train
from tests.listening import Listening
from tests.tiny_models import hunyuan_dit
from tests.training.small_job import Crash, CrashingProgress, small_recipe, write_pictures

# Each feature in one of the runs; together they cost less than one by one.
FEATURES = {
    "averaged weights, judged on held-out pictures": {"training__ema_decay": 0.9, "validation__share": 0.34, "validation__every": 3, "adapter__thinking_tokens": 2},
    "LoRA+ and noise statistics": {"training__lora_plus_ratio": 8.0, "training__gradient_noise": True, "training__accumulation": 2},
    "found learning rate": {"training__learning_rate": "find", "training__optimizer": "adamw8bit"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extras")
    hunyuan_dit.build(layers=2).save_pretrained(folder / "base")
    write_pictures(folder / "pictures")
    return folder


def recipe_of(folder, **changes):
    return small_recipe(folder / "base", folder / "pictures", **{"training__steps": 8, "training__optimizer": "adamw"} | changes)


def run_of(folder, name, progress=None, resume=False, **changes):
    return train(recipe_of(folder, **changes), folder / name, resume=resume, progress=progress, cache_folder=folder / "cache")


def tensors_of(result):
    return load_file(result.adapter / "pytorch_lora_weights.safetensors")


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "peak_memory_bytes")} for row in rows]


def state_of(run, step=8):
    return json.loads((run / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())


def kept_of(run, kind, step=8):
    tensors = load_file(run / "checkpoints" / f"step-{step:06d}" / "optimizer.safetensors")
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}


@pytest.mark.parametrize("name", FEATURES)
def test_a_run_that_crashed_goes_on_to_the_bytes_of_an_unbroken_one(folder, name, monkeypatch):
    monkeypatch.setattr(rate_finder, "STEPS", 24)  # of 72: what is asked here is not how fine the search is
    changes, run = FEATURES[name], f"crashed, {name}"
    unbroken = run_of(folder, name, **changes)
    with pytest.raises(Crash):
        run_of(folder, run, CrashingProgress(6), **changes)
    resumed = run_of(folder, run, resume=True, **changes)
    assert resumed.resumed_from == 4
    for path in unbroken.adapter.glob("*.safetensors"):
        assert (resumed.adapter / path.name).read_bytes() == path.read_bytes()
    assert rows_of(folder / run / "log.jsonl") == rows_of(folder / name / "log.jsonl")
    assert state_of(folder / run)["best"] == state_of(folder / name)["best"]
    if changes.get("training__learning_rate") == "find":
        check_found(folder, name, unbroken)
    if "validation__share" in changes:
        assert rows_of(folder / run / "validation.jsonl") == rows_of(folder / name / "validation.jsonl")


def check_found(folder, name, found):
    """The search is shown, it left nothing behind in parameters and optimizer, and a run that lost its result says so."""
    search = json.loads((folder / name / "learning_rate.json").read_text())
    assert 1e-6 < search["chosen"] < search["rates"][search["losses"].index(min(search["losses"]))]
    assert found.reasons["learning rate"].startswith(f"{search['chosen']:g}")
    assert f"taken: {search['chosen']:.2g}" in (folder / name / "report.html").read_text()
    given = run_of(folder, "given", training__learning_rate=search["chosen"], training__optimizer="adamw8bit")
    assert all(torch.equal(tensor, tensors_of(given)[key]) for key, tensor in tensors_of(found).items())
    assert rows_of(folder / name / "log.jsonl") == rows_of(folder / "given" / "log.jsonl")
    (folder / name / "learning_rate.json").write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read") as refusal:
        run_of(folder, name, resume=True, training__learning_rate="find", training__optimizer="adamw8bit", training__steps=9)
    assert "training.learning_rate" in refusal.value.fix


def test_the_exported_adapter_is_the_moving_average_of_the_steps_and_says_so(folder):
    result = run_of(folder, "averaged", training__ema_decay=0.5, training__checkpoint_every=1, training__keep_checkpoints=8, training__steps=5)
    run = folder / "averaged"
    average = kept_of(run, "average", 1)
    for step in range(2, 6):
        # n updates were made before this one.
        decay = min(0.5, (1 + step - 1) / (10 + step - 1))
        now = kept_of(run, "parameter", step)
        average = {name: decay * held + (1 - decay) * now[name] for name, held in average.items()}
    exported = tensors_of(result)
    for name, held in average.items():
        assert torch.allclose(exported[f"transformer.{name}"], held, rtol=1e-5, atol=1e-7)
        assert not torch.equal(exported[f"transformer.{name}"], kept_of(run, "parameter", 5)[name])
    assert read_adapter(result.adapter).provenance["ema_decay"] == 0.5
    assert "averaged with decay 0.5" in result.reasons["adapter"] and "averaged with decay 0.5" in (run / "report.html").read_text()


def test_with_averaged_weights_it_is_the_average_that_is_measured_kept_as_the_best_and_exported(folder, monkeypatch):
    measured = []

    def watched(job):
        measured.append({name: parameter.detach().clone() for name, parameter in lora_parameters(job.transformer)})
        return held_out_loss(job)

    monkeypatch.setattr(looks, "held_out_loss", watched)
    # A rate at which the average is worth less at the end than before.
    result = run_of(folder, "average, measured", training__ema_decay=0.5, training__learning_rate=0.1, training__checkpoint_every=1, training__keep_checkpoints=9, validation__share=0.34,
                    validation__every=1, training__steps=6)
    run, exported = folder / "average, measured", tensors_of(result)
    averages = [kept_of(run, "average", step) for step in range(1, 7)]
    assert len(measured) == 7
    for seen, average in zip(measured[1:], averages, strict=True):
        assert seen.keys() == average.keys() and all(torch.equal(seen[name], average[name]) for name in average)
    best = averages[result.exported_step - 1]
    assert all(torch.equal(exported[f"transformer.{name}"], best[name]) for name in best)
    assert any(not torch.equal(exported[f"transformer.{name}"], tensor) for name, tensor in kept_of(run, "parameter", result.exported_step).items())
    assert result.exported_step < 6


def test_held_out_pictures_are_named_and_never_trained(folder):
    progress = Listening()
    result = run_of(folder, "held", progress, validation__share=0.34, validation__every=1, validation__keep_best=False, training__learning_rate=0.2, training__steps=2)
    data = json.loads((folder / "held" / "data.json").read_text())
    held = [path.rpartition("/")[2] for path in data["held_out"]]
    assert len(held) == 2 and data["pictures"] == 4
    assert f"2 pictures are held out and not trained: {', '.join(held)}" in progress.said
    page = (folder / "held" / "report.html").read_text()
    assert f"2 were held out and never trained: {', '.join(held)}" in page and "Loss on held-out pictures" in page
    assert [row["step"] for row in rows_of(folder / "held" / "validation.jsonl")] == [0, 1, 2]
    # Where the best is not wanted, the last one is exported.
    assert result.exported_step == 2 and all(torch.equal(tensors_of(result)[f"transformer.{name}"], tensor) for name, tensor in kept_of(folder / "held", "parameter", 2).items())


def test_the_adapter_of_the_lowest_held_out_loss_is_exported_and_too_long_without_a_lower_one_ends_the_run(folder):
    # A rate far too high: the first steps may help, the later ones do harm.
    changes = {"validation__share": 0.34, "validation__every": 1, "validation__patience": 3, "training__steps": 30, "training__learning_rate": 0.05, "training__seed": 1}
    progress = Listening()
    result = run_of(folder, "best", progress, **changes)
    losses = {row["step"]: row["held_out_loss"] for row in rows_of(folder / "best" / "validation.jsonl") if row["step"]}
    best = min(losses, key=losses.get)
    assert result.steps == best + 3 < 30 and result.exported_step == best
    assert "has not fallen for 3 evaluations" in result.ended and f"training ends at step {result.steps}: {result.ended}" in progress.said
    assert f"exported: step {best} of {result.steps}: lowest held-out loss, {losses[best]:.4f}" in progress.said
    exported, kept = tensors_of(result), kept_of(folder / "best", "best", result.steps)
    assert kept and all(torch.equal(exported[f"transformer.{name}"], tensor) for name, tensor in kept.items())
    assert read_adapter(result.adapter).provenance["steps"] == best
    assert any(not torch.equal(kept[name], tensor) for name, tensor in kept_of(folder / "best", "parameter", result.steps).items())
    assert [row.get("held_out_loss") for row in rows_of(folder / "best" / "log.jsonl")] == list(losses.values())
    with pytest.raises(RunFolderError, match="it ended at step"):
        run_of(folder, "best", resume=True, **changes)
    # Killed after it ended and before the proof: the resumed run takes no further step.
    (folder / "best" / "result.json").unlink()
    assert run_of(folder, "best", resume=True, **changes).steps == result.steps


def test_when_sample_pictures_end_a_run_the_last_one_in_order_is_exported(folder):
    recipe = recipe_of(folder, samples__every=2, samples__stop_on_copies=True)
    result = train(recipe, folder / "copies", cache_folder=folder / "cache",
                   watch_samples=lambda step, *_: {"near_copies": step / 8, "nearest": 0.5, "pairs": [], "drift": None, "stop": "it copies" if step >= 6 else None})
    assert (result.steps, result.exported_step, result.ended) == (6, 4, "it copies")
    assert [row.get("near_copies") for row in rows_of(folder / "copies" / "log.jsonl")] == [None, 0.25, None, 0.5, None, 0.75]


def test_patience_without_held_out_pictures_is_refused(folder):
    with pytest.raises(DataError, match="no picture is held out"):
        run_of(folder, "patient", validation__patience=2)


def test_b_matrices_take_steps_larger_by_the_ratio(folder):
    plain = run_of(folder, "plain", training__steps=1)
    plus = run_of(folder, "plus", training__steps=1, training__lora_plus_ratio=8.0)
    one, other = tensors_of(plain), tensors_of(plus)
    moved = [name for name in one if name.endswith("lora_B.weight")]
    # B starts at zero, so that after one step it is the step; A has no gradient yet.
    assert moved and all(torch.allclose(other[name], 8 * one[name], rtol=1e-5) for name in moved)
    assert all(torch.equal(other[name], one[name]) for name in one if name not in moved)


def test_measuring_the_gradients_noise_changes_nothing_else_and_is_reported(folder):
    watched = run_of(folder, "watched", training__gradient_noise=True, training__accumulation=2, training__steps=3)
    plain = run_of(folder, "unwatched", training__accumulation=2, training__steps=3)
    assert all(torch.equal(tensor, tensors_of(plain)[name]) for name, tensor in tensors_of(watched).items())
    rows = rows_of(folder / "watched" / "log.jsonl")
    assert all(math.isfinite(row["gradient_signal"]) and math.isfinite(row["gradient_noise"]) for row in rows)
    assert [row["loss"] for row in rows] == [row["loss"] for row in rows_of(folder / "unwatched" / "log.jsonl")]
    assert "noise_scale" not in rows_of(folder / "unwatched" / "log.jsonl")[-1]


def test_noise_cannot_be_measured_with_one_micro_batch(folder):
    with pytest.raises(BadInput, match="only one"):
        run_of(folder, "one micro-batch", training__gradient_noise=True)


LAUNCHED = """
import json, sys
from pathlib import Path
from finetune.training import looks
from finetune.training.held_out_loss import held_out_loss
from finetune.training.run import train
from tests.training.small_job import small_recipe
train(small_recipe(sys.argv[1], Path(sys.argv[2]), **json.loads(sys.argv[5])), Path(sys.argv[3]), cache_folder=Path(sys.argv[4]))
"""


@pytest.mark.thorough
def test_two_processes_measure_and_judge_as_one_with_twice_the_accumulation(folder, tmp_path):
    changes = {"training__steps": 6, "training__optimizer": "adamw", "training__gradient_noise": True, "training__ema_decay": 0.9, "validation__share": 0.34, "validation__every": 2,
               "validation__patience": 1, "training__learning_rate": "find"}
    program = tmp_path / "launched.py"
    program.write_text(LAUNCHED)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              str(program), str(folder / "base"), str(folder / "pictures"), str(folder / "two"), str(folder / "cache"), json.dumps(changes)]
    finished = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    one = run_of(folder, "one", **changes | {"training__accumulation": 2})
    assert one.steps == len(rows_of(folder / "two" / "log.jsonl"))
    for key in ("loss", "lr", "held_out_loss", "gradient_signal", "gradient_noise"):
        expected = [row.get(key) for row in rows_of(folder / "one" / "log.jsonl")]
        assert [row.get(key) for row in rows_of(folder / "two" / "log.jsonl")] == [None if value is None else pytest.approx(value, rel=1e-3, abs=1e-6) for value in expected]
