"""`accelerate launch` with two processes over gloo: the same steps, one cache, one run folder; the base whole, or divided (the long
form: what dividing does to a family is in `test_sharding.py`), by DeepSpeed with `pytest -m deepspeed`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from finetune.errors import BadInput
from finetune.recipe_shelf import shelf_folder
from finetune.training import sharding
from finetune.training.run import train
from tests.training.several_processes import recipe_of
from tests.training.small_job import write_pictures

ADAPTER = Path("adapter") / "pytorch_lora_weights.safetensors"
ROOT = Path(__file__).parents[2]
# Without --multi_gpu accelerate starts a single process on a machine without GPUs, whatever --num_processes says.
PLAIN = ["--main_process_port", "0", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
HOW = {"whole": PLAIN} | {name: ["--main_process_port", "0", "--config_file", str(ROOT / "recipes" / "accelerate" / f"{name}.yaml")] for name in ("fsdp", "deepspeed")}


def launch(how, base, pictures, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "scan cache")}
    command = [sys.executable, "-m", "accelerate.commands.launch", *how, "-m", "tests.training.several_processes", str(base), str(pictures), str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def eight_pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("eight"), 8)


@pytest.fixture(scope="module")
def alone(tiny_base, eight_pictures, tmp_path_factory):
    """One process that takes the steps of two: the same micro-batches, one after the other."""
    folder = tmp_path_factory.mktemp("alone")
    train(recipe_of(tiny_base, eight_pictures, training__accumulation=2), folder / "run", cache_folder=folder / "cache")
    return folder


@pytest.fixture(scope="module", params=["whole", pytest.param("fsdp", marks=pytest.mark.thorough), pytest.param("deepspeed", marks=pytest.mark.deepspeed)])
def launched(request, tiny_base, eight_pictures, tmp_path_factory):
    if request.param == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install -c constraints.txt -e '.[test,deepspeed]'")
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, launch(HOW[request.param], tiny_base, eight_pictures, folder)


def test_two_processes_take_the_steps_of_one_with_twice_the_accumulation(launched, alone):
    _, folder, reports = launched
    assert [report["processes"] for report in reports] == [2, 2]
    one, two = log_of(alone / "run"), log_of(folder / "unbroken")
    assert [row["step"] for row in two] == list(range(1, 7))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert [row["held_out_loss"] for row in two if "held_out_loss" in row] == pytest.approx([row["held_out_loss"] for row in one if "held_out_loss" in row], rel=1e-5)
    assert sum("held_out_loss" in row for row in two) == 2
    assert [row["grad_norm"] for row in two] == pytest.approx([row["grad_norm"] for row in one], rel=1e-4)
    first, second = load_file(alone / "run" / ADAPTER), load_file(folder / "unbroken" / ADAPTER)
    assert first.keys() == second.keys() and all((first[key] - second[key]).abs().max() < 1e-4 for key in first)


def test_the_cache_is_made_once_by_both(launched, alone):
    _, folder, _ = launched
    entries = {path.name for path in (folder / "cache").rglob("*.safetensors")}
    assert entries == {path.name for path in (alone / "cache").rglob("*.safetensors")}
    assert not list((folder / "cache").rglob("*.claim"))


def test_only_the_main_process_draws_writes_and_proves(launched):
    how, folder, (main, other) = launched
    assert main["result"] and not other["result"]
    # A divided base computes only when both do.
    assert ("drawing" in other["phases"]) == (how != "whole")
    assert sorted(path.name for path in (folder / "unbroken" / "samples").iterdir()) == [f"step-{step:06d}-00.png" for step in (0, 3, 6)]
    assert (folder / "unbroken" / "before_after.png").is_file()
    assert json.loads((folder / "unbroken" / "result.json").read_text())["verified"]["baked_equals_attached"]
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_both_stop_when_one_is_told_to_and_the_resumed_run_ends_bit_identical(launched):
    _, folder, (main, other) = launched
    assert main["interrupted"] == other["interrupted"] == "stopped at step 3 of 6; everything is saved"
    assert main["resumed_from"] == 3
    assert (folder / "stopped" / ADAPTER).read_bytes() == (folder / "unbroken" / ADAPTER).read_bytes()
    assert [row["loss"] for row in log_of(folder / "stopped")] == [row["loss"] for row in log_of(folder / "unbroken")]


def test_each_process_keeps_its_piece_of_a_divided_base(launched, tiny_base):
    how, _, reports = launched
    kept = [int(found[1].replace(",", "")) for report in reports for line in report["said"] if (found := re.search(r"2 processes by \S+: ([\d,]+) numbers", line))]
    if how == "whole":
        assert kept == []
        return
    sizes = {name: tensor.numel() for name, tensor in load_file(next((tiny_base / "transformer").glob("*.safetensors"))).items()}
    # DeepSpeed is given the blocks alone.
    whole = sum(size for name, size in sizes.items() if how == "deepspeed" and not re.match(r"\w+\.\d+\.", name))
    divided = sum(sizes.values()) - whole
    assert sum(kept) >= divided + 2 * whole and max(kept) < 0.6 * divided + whole and divided > 0.5 * sum(sizes.values())
    assert any(f"by {'FSDP2' if how == 'fsdp' else 'ZeRO-3'}" in line for line in reports[0]["said"])


def test_the_shipped_configuration_is_where_the_messages_say():
    assert all((shelf_folder() / path).is_file() for path in (sharding.CONFIGURATION, sharding.DEEPSPEED_CONFIGURATION))


@pytest.mark.parametrize(("asked", "message", "configuration"), [("DEEPSPEED", "ZeRO-2", "deepspeed.yaml"), ("FSDP", "flattens", "fsdp.yaml")])
def test_ways_of_starting_that_would_not_do_what_they_promise_are_refused(monkeypatch, tiny_base, eight_pictures, tmp_path, asked, message, configuration):
    monkeypatch.setenv(f"ACCELERATE_USE_{asked}", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(BadInput, match=message) as refusal:
        train(recipe_of(tiny_base, eight_pictures), tmp_path / "run", cache_folder=tmp_path / "cache")
    assert configuration in refusal.value.fix and not (tmp_path / "run").exists()
