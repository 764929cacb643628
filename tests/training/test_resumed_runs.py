"""Runs that stop, however they stop, and go on: the end is that of an unbroken run, or a refusal that says why."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.cli.train import result_lines
from finetune.errors import Interrupted, RunFolderError
from finetune.training.run import train
from tests.training.small_job import SignallingProgress, log_of, newest_step, small_recipe, write_pictures

ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_the_resumed_run_ends_bit_identical(unbroken, tiny_base, pictures, encodings_folder, tmp_path, number, code):
    recipe, run = small_recipe(tiny_base, pictures), tmp_path / "run"
    with pytest.raises(Interrupted, match="stopped at step 5 of 12; everything is saved") as stopped:
        train(recipe, run, cache_folder=encodings_folder, progress=SignallingProgress(5, number))
    assert stopped.value.exit_code == code and "--resume" in stopped.value.fix
    assert not (run / ADAPTER).exists()
    assert newest_step(run) == len(log_of(run)) == 5
    result = train(recipe, run, resume=True, cache_folder=encodings_folder)
    assert result.resumed_from == 5 and result_lines(result)[4].split(", ")[1].endswith(" s since step 5")
    page = (run / "report.html").read_text()
    assert "Time since then" in page and "Whole time" not in page
    assert (run / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()
    assert [row["step"] for row in log_of(run)] == list(range(1, 13))
    assert [row["loss"] for row in log_of(run)] == [row["loss"] for row in log_of(unbroken[0])]


@pytest.mark.parametrize("moment, stopped_at", [("while the base is drawn with", 1), ("while the pictures of step 2 are looked at", 2)])
def test_a_signal_while_sample_pictures_are_made_stops_with_the_next_step_that_ends(tiny_base, pictures, encodings_folder, tmp_path, moment, stopped_at):
    def watch(step, *_):
        os.kill(os.getpid(), signal.SIGINT)
        return {}

    how = {"progress": SignallingProgress(1, signal.SIGINT, phase="drawing")} if stopped_at == 1 else {"watch_samples": watch}
    with pytest.raises(Interrupted, match=f"stopped at step {stopped_at} of 12; everything is saved"):
        train(small_recipe(tiny_base, pictures, samples__every=2), tmp_path / "run", cache_folder=encodings_folder, **how)
    assert newest_step(tmp_path / "run") == stopped_at


def test_the_peak_of_a_resumed_run_is_that_of_all_its_parts(tiny_base, pictures, encodings_folder, tmp_path):
    recipe, run = small_recipe(tiny_base, pictures), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe, run, cache_folder=encodings_folder, progress=SignallingProgress(5, signal.SIGINT))
    rows = log_of(run)
    rows[2]["peak_memory_bytes"] = 1 << 40  # as if the first part had encoded with large encoders
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(recipe, run, resume=True, cache_folder=encodings_folder).peak_memory_bytes == 1 << 40


def kill_and_resume(tiny_base, pictures, tmp_path, kills):
    command = [sys.executable, "-m", "tests.training.killed_runs", str(tiny_base), str(pictures), str(tmp_path), str(kills), "0"]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["broken"] == []
    assert result["kills"] >= kills and result["equal"] == result["runs"]


def test_a_run_killed_at_any_moment_resumes_bit_identical(tiny_base, pictures, tmp_path):
    kill_and_resume(tiny_base, pictures, tmp_path, 9)


@pytest.mark.thorough
def test_three_hundred_kills(tiny_base, pictures, tmp_path):
    kill_and_resume(tiny_base, pictures, tmp_path, 300)


def fail_and_resume(tiny_base, pictures, tmp_path, most):
    command = [sys.executable, "-m", "tests.training.failed_writes", str(tiny_base), str(pictures), str(tmp_path), str(most)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stderr[-2000:]
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["leaked"] == result["unequal"] == []
    assert result["tried"] == (most or result["flushes"]) == result["equal"]
    assert result["failed_clearly"] > result["tried"] / 2


def test_a_write_that_fails_is_a_clear_error_and_the_resumed_run_ends_bit_identical(tiny_base, pictures, tmp_path):
    fail_and_resume(tiny_base, pictures, tmp_path, 5)


@pytest.mark.thorough
def test_every_write_of_a_run_may_fail(tiny_base, pictures, tmp_path):
    fail_and_resume(tiny_base, pictures, tmp_path, 0)


def test_a_damaged_newest_checkpoint_is_passed_over_aloud_and_the_end_is_the_same(unbroken, tiny_base, pictures, encodings_folder, tmp_path):
    from data_tools.progress import PlainProgress

    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    for name in ("result.json", str(ADAPTER)):
        (run / name).unlink()
    (run / "checkpoints" / "step-000012" / "optimizer.safetensors").write_bytes(b"")
    with open(tmp_path / "said", "w+") as said:
        result = train(small_recipe(tiny_base, pictures), run, resume=True, cache_folder=encodings_folder, progress=PlainProgress(said))
        said.seek(0)
        assert "step-000012 is not whole" in said.read()
    assert result.resumed_from == 8
    assert (run / ADAPTER).read_bytes() == (unbroken[0] / ADAPTER).read_bytes()


def test_a_complete_run_is_not_taken_up_again_unless_it_gets_more_steps(unbroken, tiny_base, pictures, encodings_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    with pytest.raises(RunFolderError, match="complete: 12 steps") as refusal:
        train(small_recipe(tiny_base, pictures), run, resume=True, cache_folder=encodings_folder)
    assert "training.steps" in refusal.value.fix
    result = train(small_recipe(tiny_base, pictures, training__steps=14), run, resume=True, cache_folder=encodings_folder)
    assert result.resumed_from == 12 and len(log_of(run)) == 14


def test_fewer_steps_than_are_done_are_a_conflict_and_leave_the_run_as_it_was(unbroken, tiny_base, pictures, encodings_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    before = (run / "recipe.toml").read_bytes()
    with pytest.raises(RunFolderError, match="training.steps is 5, and this run has done 12 steps already") as refusal:
        train(small_recipe(tiny_base, pictures, training__steps=5), run, resume=True, cache_folder=encodings_folder)
    assert "more than 12" in refusal.value.fix and "--out" in refusal.value.fix
    assert (run / "recipe.toml").read_bytes() == before


def test_a_folder_with_a_run_in_it_is_refused_without_resume_and_nothing_in_it_changes(unbroken, tiny_base, pictures):
    out, _ = unbroken
    before = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock")).hexdigest()
    with pytest.raises(RunFolderError, match="holds a run already"):
        train(small_recipe(tiny_base, pictures), out)
    after = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != "lock")).hexdigest()
    assert before == after


def test_changed_settings_are_named_on_resume_and_go_on_only_when_accepted(unbroken, tiny_base, pictures, encodings_folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    recipe = small_recipe(tiny_base, pictures, training__steps=13, training__learning_rate=5e-3, data__caption_dropout=0.2)
    with pytest.raises(RunFolderError, match="training.learning_rate: 0.01 -> 0.005") as refusal:
        train(recipe, run, resume=True, cache_folder=encodings_folder)
    assert "data.caption_dropout" in str(refusal.value) and "--accept-change" in refusal.value.fix
    result = train(recipe, run, resume=True, cache_folder=encodings_folder, accept_changes=("training.learning_rate", "data.caption_dropout"))
    assert result.resumed_from == 12


def test_changed_pictures_are_named_on_resume(tiny_base, tmp_path):
    folder = write_pictures(tmp_path / "data", 3)
    recipe = small_recipe(tiny_base, folder, training__steps=2)
    train(recipe, tmp_path / "run", cache_folder=tmp_path / "cache")
    (folder / "picture0.txt").write_text("another caption")
    with pytest.raises(RunFolderError, match="data: pictures, captions or sizes"):
        train(small_recipe(tiny_base, folder, training__steps=4), tmp_path / "run", resume=True, cache_folder=tmp_path / "cache")
