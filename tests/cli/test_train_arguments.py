"""Which recipe and which run folder `train` takes for what was typed."""

from __future__ import annotations

import os

import pytest

from finetune.cli.run_arguments import run_folder, wanted_recipe
from finetune.errors import BadInput, DataError, RecipeError
from finetune.recipe import dump_recipe, load_recipe
from finetune.training.run_folder import RunFolder


@pytest.fixture
def photos(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def test_a_folder_and_a_base_take_the_recipe_made_for_the_base(photos):
    wanted = wanted_recipe("photos", "mini", None, 'a "style"', ["training.steps=3", "training.warmup=0"])
    assert wanted.recipe.data.folder == photos and wanted.recipe.data.trigger == 'a "style"'
    assert wanted.recipe.training.steps == 3 and wanted.recipe.data.resolution == 64
    assert "mini/style" in wanted.notes[0]


def test_few_steps_shorten_the_warm_up_of_a_shipped_recipe_and_only_of_that(photos, tmp_path):
    for target, recipe in (("photos", None), ("photos", "mini/style")):
        wanted = wanted_recipe(target, "mini", recipe, None, ["training.steps=3"])
        assert wanted.recipe.training.warmup == 3 and "warmup = 3" in dump_recipe(wanted.recipe)
        assert "training.warmup=3" in wanted.notes[-1]
    unchanged = wanted_recipe("photos", "mini", None, None, ["training.steps=10"])
    assert unchanged.recipe.training.warmup == 10 and len(unchanged.notes) == 1
    with pytest.raises(RecipeError, match="longer than the whole training"):
        wanted_recipe("photos", "mini", None, None, ["training.steps=3", "training.warmup=4"])
    (tmp_path / "r.toml").write_text('[base]\nmodel = "mini"\n[training]\nwarmup = 10\n')
    with pytest.raises(RecipeError, match="longer than the whole training"):
        wanted_recipe("photos", None, "r.toml", None, ["training.steps=3"])
    with pytest.raises(RecipeError, match="steps"):
        wanted_recipe("photos", "mini", None, None, ["training.steps=few"])


def test_a_base_with_several_recipes_takes_defaults_and_says_which_there_are(photos):
    base = load_recipe({"base": {"model": "x"}}).base
    several = wanted_recipe("photos", "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers", None, None, None)
    assert "8gb" in several.notes[0] and several.recipe.base.hold == base.hold
    assert wanted_recipe("photos", "owner/unknown", None, None, None).notes == ()


def test_a_named_recipe_for_a_folder(photos):
    assert wanted_recipe("photos", None, "hunyuan_dit/style-8gb", None, None).recipe.adapter.rank == 32
    with pytest.raises(RecipeError, match="did you mean"):
        wanted_recipe("photos", None, "hunyuan_dit/style-8g", None, None)


def test_a_recipe_file_is_taken_with_its_own_folder(photos, tmp_path):
    (tmp_path / "r.toml").write_text('[base]\nmodel = "mini"\n[data]\nfolder = "photos"\n')
    assert wanted_recipe("r.toml", None, None, None, None).recipe.data.folder == photos
    with pytest.raises(DataError):
        wanted_recipe("r.toml", None, None, None, ["data.folder=gone"])


def test_a_run_folder_goes_on_in_itself(photos, tmp_path):
    run = tmp_path / "somewhere"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(load_recipe({"base": {"model": "mini"}, "data": {"folder": "photos"}})))
    wanted = wanted_recipe(str(run), None, None, None, None)
    assert run_folder(wanted, None, True) == run
    with pytest.raises(BadInput, match="run already"):
        run_folder(wanted, None, False)


def test_a_run_that_was_killed_before_it_wrote_anything_is_started_again(photos, tmp_path):
    RunFolder(tmp_path / "killed").claim()
    with pytest.raises(BadInput, match="before it began") as refusal:
        wanted_recipe(str(tmp_path / "killed"), None, None, None, None)
    assert f"--out {tmp_path / 'killed'}" in refusal.value.fix


def test_run_folders_are_never_taken_twice(photos, tmp_path, monkeypatch):
    wanted = wanted_recipe("photos", "mini", None, None, None)
    with pytest.raises(BadInput, match="no run to go on with"):
        run_folder(wanted, None, True)
    assert str(run_folder(wanted, None, False)) == "runs/photos"
    for name in ("photos", "photos-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.toml").touch()
    assert str(run_folder(wanted, None, False)) == "runs/photos-3"
    assert str(run_folder(wanted, None, True)) == "runs/photos-2"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="several processes"):
        run_folder(wanted, None, False)


def test_a_folder_that_a_recipe_cannot_name_is_refused_by_its_name(photos):
    renamed = photos.rename(photos.with_name("photos\udcff"))
    with pytest.raises(DataError, match="is not UTF-8"):
        wanted_recipe(str(renamed), "mini", None, None, None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(photos):
    photos.chmod(0)
    try:
        with pytest.raises(DataError, match="may not be read"):
            wanted_recipe("photos", "mini", None, None, None)
    finally:
        photos.chmod(0o755)


@pytest.mark.parametrize("name", ["pictures.zip", "list.csv"])
def test_a_set_in_a_file_is_told_from_a_broken_recipe(tmp_path, name):
    (tmp_path / name).write_text("image,caption\n")
    with pytest.raises(DataError, match="training takes a folder") as refused:
        wanted_recipe(str(tmp_path / name), "mini", None, None, None)
    assert f"brushwork data convert {tmp_path / name} --to sidecars" in refused.value.fix
