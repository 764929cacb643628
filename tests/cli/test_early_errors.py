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
    (place / "rated").mkdir()
    (place / "rated" / "candidates.jsonl").write_text('{"v": 1, "event": "candidate", "id": "a", "prompt_id": "p", "prompt": "x", "path": "pictures/a.png"}\n')
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
    ("train photos --base minni", "did you mean mini?"),
    ("train photos --base odd", "not a base that can be trained here"),
    ("train photos --base mini --out run", "holds a run already"),
    ("train photos --base mini --out photos/run", "must not lie inside the picture folder"),
    ("train run --resume", "the run is complete: 6 steps are done"),
    ("train run --resume --set training.steps=4", "training.steps is 4, and this run has done 6 steps already"),
    ("train run --resume --set training.seed=4", "started with other settings: training.seed"),
    ("train photos --base mini --accept-change data", "there is no change to accept"),
    ("generate --base minni --prompt x", "did you mean mini?"),
    ("generate --base mini --prompt x --size wide", "not a size"),
    ("evaluate compare --base minni --prompts prompts.txt", "did you mean mini?"),
    ("prefer candidates --base mini --prompts none.txt --out drawn", "no such file"),
    ("prefer candidates --base minni --prompts prompts.txt --out drawn", "did you mean mini?"),
    ("prefer reward empty --out judge.safetensors", "no candidates.jsonl here"),
    ("prefer reward rated --features klip --out judge.safetensors", "features 'klip' are not one of"),
    ("prefer reward rated --features clip --clip owner/none --out judge.safetensors", "--clip owner/none: there is no owner/none here"),
    ("prefer train --data rated --out tuned --base minni", "did you mean mini?"),
    ("prefer train --data rated --out tuned --base mini --method grpo --reward measure:warmt", "did you mean measure:warmth?"),
    ("prefer train --data rated --out tuned --base mini --method grpo --reward none.safetensors", "no such reward file"),
    ("prefer train --data rated --out tuned --base mini --reward measure:warmth --witness pickscore", "--witness pickscore: there is no yuvalkirstain/PickScore_v1 here"),
    ("generate --base mini --prompt x --think --enhancer owner/none", "--enhancer owner/none: there is no owner/none here"),
    ("generate --base mini --prompt x --enhancer ./none/at/all", "--enhancer ./none/at/all: there is no ./none/at/all here"),
    ("generate --base mini --prompt x --think --enhancer http://localhost:1/v1", "the endpoint's model is not named"),
    ("generate --base mini --prompt x --best-of 2 --reward 1*measure:warmth+1*clip:owner/none", "there is no owner/none here"),
    ("generate --base mini --prompt x --best-of 2 --reward prompts.json", "did you mean prompts.txt?"),
    ("evaluate compare --base mini --prompts prompts.txt --measures palete", "did you mean palette?"),
    ("evaluate compare --base mini --prompts prompts.txt --measures palette", "no reference pictures of the style were given"),
    ("evaluate compare --base mini --prompts prompts.txt --references fotos", "did you mean photos?"),
    ("evaluate compare --base mini --prompts prompts.txt --adapters none", "no such adapter"),
    ("train fotos --base mini", "did you mean photos?"),
    ("train ./photo --base mini", "did you mean photos?"),
    ("train promts.toml", "there is no such recipe"),
    ("train empty --base mini --recipe mini/styl", "did you mean `mini/style`?"),
    ("data scan rated/candidate.jsonl", "did you mean rated/candidates.jsonl?"),
    ("data scan fotos", "did you mean photos?"),
    ("data scan rated/candidate", "is read with --layout datasets"),
    ("generate --base mini --prompt x --adapter photo", "did you mean photos?"),
    ("adapter inspect rum", "did you mean run?"),
    ("prefer candidates --base mini --prompts promts.txt --out drawn", "did you mean prompts.txt?"),
    ("prefer summary ratet", "did you mean rated?"),
    ("prefer import rated promts.txt", "did you mean prompts.txt?"),
    ("evaluate compare --base mini --prompts promts.txt", "did you mean prompts.txt?"),
    ("data caption bare --by nobody", "unknown captioner 'nobody'"),
    ("data caption bare --by blip-2 --model owner/none", "--model owner/none: there is no owner/none here"),
    ("data caption bare --by wd-tagger --model owner/none", "--model owner/none: there is no owner/none here"),
    ("data caption bare --by file-name --language de", "--language is 'de'"),
    ("data caption bare --by file-name --purpose fun", "--purpose is 'fun'"),
    ("data caption bare --by file-name --overwrite yes", "--overwrite is 'yes'"),
    ("data caption bare --by file-name --trigger x --placement behind", "the placement 'behind' is neither"),
    ("data caption bare --by file-name --price 1,2", "--price: does nothing without --by endpoint"),
    ("data caption bare --by file-name --model x", "--model: does nothing without a --by that has a model"),
    ("data caption bare --prepend x --url http://localhost:1/v1", "--url: does nothing without --by endpoint"),
    ("data caption bare --prepend x --trigger t", "--trigger: does nothing without --by"),
    ("data caption bare --prepend x --question who", "--question: does nothing without --by"),
    ("data caption bare --undo --thinking", "--thinking: does nothing without --by"),
    ("data caption bare --prepend x --regex", "--regex: does nothing without --replace"),
    ("data caption bare --prepend x --keep-tokens 2", "--keep-tokens: does nothing without --shuffle"),
    ("data caption bare --undo --dry-run", "--dry-run: does nothing without --by or an edit"),
    ("data duplicates bare --embeddings owner/none", "--embeddings owner/none: there is no owner/none here"),
    ("data buckets bare --base minni", "did you mean mini?"),
    ("data report bare --base minni", "did you mean mini?"),
])
def test_an_error_that_needs_no_torch_does_not_wait_for_it(folder, tmp_path_factory, line, says):
    places = {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "early cache"), "HF_HUB_OFFLINE": "1"}
    said = subprocess.run([sys.executable, "-c", COMMAND, *line.split()], cwd=folder, env=places, capture_output=True, text=True, timeout=300)
    assert said.returncode == 2 and says in said.stderr and said.stderr.count("error: ") == 1, said.stderr
    assert said.stderr.splitlines()[-1] == "imported:" and ("checking pictures" not in said.stderr or line.startswith(("train", "plan")))
    assert not any((folder / name).exists() for name in ("runs", "drawn", "tuned", "pictures", "evaluation"))
