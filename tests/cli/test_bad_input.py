"""Bad input to `train`, through the real command: a clear line, the right exit code, and nothing that was there is lost."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from pathlib import Path

import pytest

from finetune.training.run_folder import RunFolder
from tests.training.small_job import write_pictures

QUICK = ["--set", "training.steps=2", "--set", "data.resolution=64", "--set", "samples.steps=1", "--set", "adapter.rank=2", "--set", "training.workers=0"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("BRUSHWORK_CACHE", str(tmp_path_factory.getbasetemp() / "encodings"))


def content_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(said, *texts: str, code: int = 2) -> None:
    assert said.code == code, said.err
    assert said.err.count("error: ") == 1 and "hint: " in said.err, said.err
    assert "Traceback" not in said.err and "defect" not in said.err
    for text in texts:
        assert text in said.err, said.err


def test_an_empty_folder(brushwork, tiny_base, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(brushwork("train", tmp_path / "empty", "--base", tiny_base, "--out", tmp_path / "run"), "no usable picture", "empty")


def test_a_folder_that_is_not_there(brushwork, tmp_path):
    refused(brushwork("train", tmp_path / "photoes", "--base", "mini"), "neither a folder nor a recipe", "photoes")


def test_pictures_without_captions_are_named(brushwork, tiny_base, tmp_path):
    folder = write_pictures(tmp_path / "bare", captions=False)
    refused(brushwork("train", folder, "--base", tiny_base, "--out", tmp_path / "run"), "6 of 6 pictures have no caption", "picture0.png", "missing_caption")


def test_no_base_and_an_unknown_base(brushwork, pictures, tmp_path):
    refused(brushwork("train", pictures), "base model is not named", "--base mini")
    refused(brushwork("train", pictures, "--base", "minni", "--out", tmp_path / "run"), "there is no base called minni")


def test_a_base_of_another_kind(brushwork, pictures, tiny_base, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "AudioLDMPipeline", "vae": ["diffusers", "AutoencoderKL"]}))
    refused(brushwork("train", pictures, "--base", other, "--out", tmp_path / "run"), "AudioLDMPipeline", "not a base that can be trained here")
    half = shutil.copytree(tiny_base, tmp_path / "half")
    shutil.rmtree(half / "vae")
    refused(brushwork("train", pictures, "--base", half, "--out", tmp_path / "run"), "incomplete", "vae")


def test_a_recipe_with_ten_mistakes_says_all_of_them(brushwork, tmp_path):
    path = tmp_path / "ten.toml"
    path.write_text('[bas]\nmodel = "mini"\n[data]\nfolder = 7\nresolution = 4\nbuckets = "8"\n[adapter]\nrnak = 8\nalpha = -1\n[training]\nsteps = 0\noptimizer = "adam"\nlearning_rate = true\nlr = 1\n')
    said = brushwork("train", path)
    assert said.code == 2 and said.err.count("error: ") >= 10
    assert len(brushwork("train", path, "--json").data["error"]["problems"]) >= 10


def test_a_recipe_without_pictures_or_with_missing_ones(brushwork, tmp_path):
    refused(brushwork("train", "mini/style"), "does not name a folder of pictures")
    refused(brushwork("train", "mini/style", "--set", f"data.folder={tmp_path / 'gone'}"), "does not exist", "gone")


def test_an_out_folder_that_cannot_be_made(brushwork, pictures, tiny_base, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(brushwork("train", pictures, "--base", tiny_base, "--out", tmp_path / "file" / "run", *QUICK), "cannot write here")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_into_one_folder(brushwork, pictures, tiny_base, tmp_path):
    first = RunFolder(tmp_path / "run")
    first.claim()
    refused(brushwork("train", pictures, "--base", tiny_base, "--out", tmp_path / "run", *QUICK), "in use by process")
    first.release()


def test_a_broken_picture_among_good_ones_is_left_out_and_named_and_a_finished_run_is_kept(brushwork, tiny_base, tmp_path):
    folder = write_pictures(tmp_path / "photos")
    (folder / "broken.png").write_bytes((folder / "picture0.png").read_bytes()[:100])
    (folder / "broken.txt").write_text("a broken thing")
    before = content_of(folder)
    out = tmp_path / "run"
    said = brushwork("train", folder, "--base", tiny_base, "--out", out, "--trigger", "sks", "--json", *QUICK)
    assert said.code == 0, said.err
    result = said.data
    assert [Path(left["path"]).name for left in result["left_out"]] == ["broken.png"] and result["left_out"][0]["reason"]
    assert result["verified"]["placed"] == result["verified"]["keys"] > 0 and result["verified"]["changed"]
    assert "broken.png" in (out / "report.html").read_text() and Path(result["sheet"]).exists()
    assert content_of(folder) == before, "the picture folder was changed"

    made = content_of(out)
    refused(brushwork("train", folder, "--base", tiny_base, "--out", out, *QUICK), "holds a run already", "--resume")
    assert {name: digest for name, digest in content_of(out).items() if name != "lock"} == {name: digest for name, digest in made.items() if name != "lock"}


def test_one_picture_is_enough(brushwork, tiny_base, tmp_path):
    folder = write_pictures(tmp_path / "one", count=1)
    said = brushwork("train", folder, "--base", tiny_base, "--out", tmp_path / "run", "--json", *QUICK)
    assert said.code == 0, said.err
    assert said.data["verified"]["changed"]


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_the_last_checkpoint(brushwork, pictures, tiny_base, tmp_path):
    out = tmp_path / "run"
    options = ["--base", tiny_base, "--out", out, *QUICK, "--set", "training.checkpoint_every=1"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file above 40 kB: the run's small files can be written, a checkpoint's tensors cannot.
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        said = brushwork("train", pictures, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.code == 1, said.err
    assert said.err.count("error: ") == 1 and "Traceback" not in said.err and "defect" not in said.err, said.err
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
    went_on = brushwork("train", pictures, *options, "--resume")
    assert went_on.code == 0, went_on.err


def test_a_memory_that_nothing_fits_is_refused_after_the_smallest_plan(brushwork, pictures, tiny_base):
    settled = [word for setting in ("data.resolution=64", "base.hold=fp32", "base.dtype=fp32", "training.optimizer=adamw", "training.checkpointed_blocks=1")
               for word in ("--set", setting)]
    said = brushwork("plan", pictures, "--base", tiny_base, "--fit", "1MB", *settled)
    refused(said, "--fit 1MB: nothing fits", code=1)
    assert "DOES NOT FIT" in said.out and "1 of 4 blocks checkpointed" in said.out
    said = brushwork("plan", pictures, "--base", tiny_base, "--fit", "1MB", "--json", *settled)
    assert said.code == 1 and said.data["fits"] is False


@pytest.mark.parametrize("out", ["", "run", "inner/run"])
def test_a_run_folder_inside_the_pictures(brushwork, tiny_base, tmp_path, out):
    """Its samples would be trained by the next run, and would keep this one from being resumed."""
    photos = write_pictures(tmp_path / "photos", 2)
    before = content_of(photos)
    refused(brushwork("train", photos, "--base", tiny_base, "--out", photos / out, *QUICK), "the run folder must not lie inside the picture folder", "--out")
    assert content_of(photos) == before


def test_a_cache_folder_that_cannot_be_made(brushwork, pictures, tiny_base, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BRUSHWORK_CACHE", str(tmp_path / "file" / "cache"))
    refused(brushwork("train", pictures, "--base", tiny_base, "--out", tmp_path / "run", *QUICK), "encodings cannot be kept here", "BRUSHWORK_CACHE")
