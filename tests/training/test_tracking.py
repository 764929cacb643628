"""Experiment trackers: a real TensorBoard file, stand-ins for the trackers that are not installed, and what is never told."""

import json
import sys
from types import SimpleNamespace

import accelerate.tracking
import pytest
from accelerate.utils import LoggerType

from finetune.errors import BadInput
from finetune.training.tracking import check_trackers
from finetune.training.run import train
from tests.training.small_job import Crash, CrashingProgress, small_recipe

STAND_IN = """
import json, pathlib

class Config(dict):
    def update(self, values, allow_val_change=False):
        write({"config": values})

def write(line):
    with open(pathlib.Path(__file__).with_name("NAME.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\\n")

class Run:
    def log(self, values, step=None):
        write({"step": step, "values": values})
    def finish(self):
        write({"finished": True})

config = Config()

def init(**arguments):
    write({"init": arguments})
    return Run()
"""


@pytest.fixture
def job(tiny_base, pictures, encodings_folder, tmp_path):
    def recipe(**changes):
        return small_recipe(tiny_base, pictures, **{"training__steps": 8, "training__optimizer": "adamw"} | changes)

    def run(progress=None, resume=False, **changes):
        return train(recipe(**changes), tmp_path / "run", resume=resume, progress=progress, cache_folder=encodings_folder)

    return SimpleNamespace(run=run, recipe=recipe, folder=tmp_path / "run", private=[str(tiny_base.parent), str(pictures)])


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Packages named wandb and trackio that write down what they are told."""
    for name in ("wandb", "trackio"):
        (tmp_path / f"{name}.py").write_text(STAND_IN.replace("NAME", name))
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.WANDB, LoggerType.TRACKIO])
    yield lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def test_tensorboard_has_every_step_once_also_after_a_crash(job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"tracking__trackers": ["tensorboard"], "tracking__project": "styles"}
    with pytest.raises(Crash):
        job.run(CrashingProgress(6), **changes)
    job.run(resume=True, **changes)
    events = EventAccumulator(str(job.folder / "tracking" / "styles"))
    events.Reload()
    log = [json.loads(line) for line in (job.folder / "log.jsonl").read_text().splitlines()]
    for key in ("loss", "lr", "grad_norm"):
        scalars = events.Scalars(key)
        assert [scalar.step for scalar in scalars] == list(range(1, 9))
        assert [scalar.value for scalar in scalars] == pytest.approx([row[key] for row in log], rel=1e-6)
    written = b"".join(path.read_bytes() for path in (job.folder / "tracking").rglob("*") if path.is_file())
    assert b"adapter.rank" in written and not any(path.encode() in written for path in job.private)


def test_other_trackers_get_project_name_and_steps_and_find_their_run_again(job, stand_ins):
    changes = {"tracking__trackers": ["wandb", "trackio"], "tracking__project": "styles", "tracking__run_name": "first try"}
    with pytest.raises(Crash):
        job.run(CrashingProgress(6), **changes)
    job.run(resume=True, **changes)
    for name in ("wandb", "trackio"):
        lines = stand_ins(name)
        begins = [line["init"] for line in lines if "init" in line]
        assert [begin["project"] for begin in begins] == ["styles"] * 2 and {begin["name"] for begin in begins} == {"first try"}
        assert begins[0] == begins[1] and begins[0]["resume"] == "allow"
        assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
        assert sum("finished" in line for line in lines) == 2
        told = next(line["config"] for line in lines if "config" in line)
        assert told["adapter.rank"] == 4 and not any(path in json.dumps(told) for path in job.private) and "data.trigger" not in told


def test_a_tracker_that_is_not_installed_is_named_with_what_to_install(job):
    with pytest.raises(BadInput, match="trackio is not installed") as refusal:
        check_trackers(job.recipe(tracking__trackers=["trackio"]))
    assert ".[trackio]" in refusal.value.fix


def test_a_tracker_that_refuses_to_start_is_one_clear_error(job, stand_ins, monkeypatch):
    import wandb

    def refuse(**_):
        raise RuntimeError("api key not configured\nmore")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(BadInput, match=r"RuntimeError: api key not configured\)") as refusal:
        job.run(tracking__trackers=["wandb"])
    assert "offline" in refusal.value.fix
