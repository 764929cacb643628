"""What is wrong with the input is said before torch is imported, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.conftest import ROOT
from tests.training.small_job import write_pictures

# The command as it is, and then whether it has imported what is heavy.
COMMAND = """
import sys
from finetune.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    print("imported:", *[name for name in ("torch", "diffusers", "transformers") if name in sys.modules], file=sys.stderr)
    raise
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """bare: without captions; photos: with them; empty; a finished run of the photos at step 6; a base of a kind that nobody trains."""
    place = tmp_path_factory.mktemp("early")
    write_pictures(place / "bare", 2, captions=False)
    write_pictures(place / "photos", 2)
    (place / "empty").mkdir()
    (place / "prompts.txt").write_text("a cat\n")
    (place / "odd").mkdir()
    (place / "odd" / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    checkpoint = place / "run" / "checkpoints" / "step-000006"
    checkpoint.mkdir(parents=True)
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        (checkpoint / name).write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (checkpoint / "state.json").write_text(f'{{"step": 6, "hashes": {{"adapter.safetensors": "{empty}", "optimizer.safetensors": "{empty}"}}}}')
    (place / "run" / "recipe.toml").write_text(f'[base]\nmodel = "mini"\n[data]\nfolder = "{place / "photos"}"\n[training]\nsteps = 6\n')
    (place / "run" / "result.json").write_text("{}")
    return place


@pytest.mark.parametrize(("line", "says"), [
    ("train bare --base mini", "2 of 2 pictures have no caption"),
    ("plan bare --base mini", "2 of 2 pictures have no caption"),
    ("train empty --base mini", "no usable picture"),
    ("plan photos --base mini --fit much", "not an amount of memory"),
    ("train photos --base minni", "there is no base called minni"),
    ("train photos --base odd", "not a base that can be trained here"),
    ("train photos --base mini --out run", "holds a run already"),
    ("train photos --base mini --out photos/run", "must not lie inside the picture folder"),
    ("train run --resume", "the run is complete: 6 steps are done"),
    ("train run --resume --set training.steps=4", "training.steps is 4, and this run has done 6 steps already"),
    ("train run --resume --set training.seed=4", "started with other settings: training.seed"),
    ("train photos --base mini --accept-change data", "there is no change to accept"),
    ("generate --base minni --prompt x", "there is no base called minni"),
    ("generate --base mini --prompt x --size wide", "not a size"),
    ("evaluate compare --base minni --prompts prompts.txt", "there is no base called minni"),
    ("prefer candidates --base mini --prompts none.txt --out drawn", "no such file"),
    ("prefer candidates --base minni --prompts prompts.txt --out drawn", "there is no base called minni"),
    ("prefer reward empty --out judge.safetensors", "no candidates.jsonl here"),
])
def test_an_error_that_needs_no_torch_does_not_wait_for_it(folder, tmp_path_factory, line, says):
    places = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "early cache"), "HF_HUB_OFFLINE": "1"}
    said = subprocess.run([sys.executable, "-c", COMMAND, *line.split()], cwd=folder, env=places, capture_output=True, text=True, timeout=300)
    assert said.returncode == 2 and says in said.stderr and said.stderr.count("error: ") == 1, said.stderr
    assert said.stderr.splitlines()[-1] == "imported:"
    assert not (folder / "runs").exists() and not (folder / "drawn").exists()
