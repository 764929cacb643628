"""A recipe loads from TOML or a mapping, takes overrides, writes itself back equal, and knows its own hash."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune.errors import BrushworkError, RecipeError
from finetune.recipe import Recipe, all_keys, dump_recipe, load_recipe
from finetune.recipe_settings import SECTIONS

MINI = {"base": {"model": "mini"}}
plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
one_line = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"), min_size=1, max_size=40)


def fractions(low, high, **more):
    return st.floats(low, high, allow_nan=False, allow_infinity=False, **more)


contents = st.fixed_dictionaries({
    "base": st.fixed_dictionaries({"model": one_line}, optional={"revision": one_line, "hold": st.sampled_from(["auto", "nf4", "streamed"])}),
}, optional={
    "data": st.fixed_dictionaries({}, optional={
        "trigger": one_line, "resolution": st.integers(16, 8192) | st.lists(st.integers(16, 8192), min_size=1, max_size=4, unique=True),
        "also": st.lists(st.fixed_dictionaries({"folder": st.from_regex(r"[a-z]{1,9}", fullmatch=True)}, optional={"repeats": st.integers(1, 99), "weight": fractions(0.1, 9)}), max_size=2), "caption_dropout": fractions(0, 1), "upscale": st.booleans(),
        "background": st.from_regex(r"#[0-9a-f]{6}", fullmatch=True),
        "folder": st.text(st.characters(categories=["Ll", "Nd", "Lo"]), min_size=1, max_size=20),
    }),
    "adapter": st.fixed_dictionaries({}, optional={
        "rank": st.integers(1, 1024), "alpha": fractions(1e-300, 4096), "rank_pattern": st.dictionaries(one_line.map(re.escape), st.integers(1, 1024), max_size=3)}),
    "training": st.fixed_dictionaries({}, optional={
        "learning_rate": fractions(5e-324, 1), "seed": st.integers(0, 2**63 - 1), "checkpointed_blocks": st.just("auto") | st.integers(0, 99),
    }),
    "samples": st.fixed_dictionaries({}, optional={"prompts": st.lists(plain_text, max_size=5), "negative": plain_text}),
})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=contents)
def test_a_dumped_recipe_loads_back_equal(content, tmp_path):
    recipe = load_recipe(content)
    path = tmp_path / "recipe.toml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    again = load_recipe(path)
    assert again == recipe
    assert again.settings_hash() == recipe.settings_hash()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
       | st.lists(st.sampled_from(["[base]", "[", "]", "model", "=", '"', "'", '"""', "\n", "#", "{", "}", ",", ".", "1", "mini", "\\"]), max_size=40)
       .map(lambda parts: "".join(parts).encode()))
def test_no_file_makes_loading_fail_in_another_way_than_a_recipe_error(content, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    try:
        assert isinstance(load_recipe(path), Recipe)
    except RecipeError as error:
        assert error.problems and all(problem.where for problem in error.problems)


@settings(max_examples=200, deadline=None)
@given(override=st.text(max_size=60) | st.tuples(st.sampled_from(all_keys()), st.text(max_size=30)).map("=".join))
def test_no_override_makes_loading_fail_in_another_way_than_a_recipe_error(override):
    try:
        load_recipe(MINI, [override])
    except RecipeError as error:
        assert all("--set" in problem.where for problem in error.problems)


def test_all_mistakes_of_a_file_are_reported_at_once_each_with_its_line(tmp_path):
    path = tmp_path / "ten.toml"
    path.write_text(
        '[bas]\nmodel = "mini"\n[data]\nfolder = 7\nresolution = 4\nbuckets = "8"\n[adapter]\nrnak = 8\nalpha = -1\n'
        '[training]\nsteps = 0\noptimizer = "adam"\nlearning_rate = true\nlr = 1\n'
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["training.seed=-1"])
    places = [problem.where for problem in caught.value.problems]
    for line in (1, 4, 5, 6, 8, 9, 11, 12, 13, 14):
        assert any(f"{path}, line {line}, " in place for place in places), (line, places)
    assert "--set training.seed=-1" in places
    assert all(problem.fix for problem in caught.value.problems)
    assert caught.value.exit_code == 2


def test_overrides_win_over_the_file_and_read_like_toml(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[base]\nmodel = "mini"\n[training]\nsteps = 5\n')
    recipe = load_recipe(path, ["training.steps=7", "training.learning_rate=1e-3", "data.trigger=8bit style", "samples.prompts=['a', 'b']", "data.upscale=true"])
    assert recipe.training.steps == 7
    assert recipe.training.learning_rate == 1e-3
    assert recipe.data.trigger == "8bit style"
    assert recipe.samples.prompts == ("a", "b")
    assert recipe.data.upscale is True


def test_a_table_of_patterns_comes_from_its_own_section_or_an_override(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[base]\nmodel = "mini"\n[adapter.rank_pattern]\n".*attn2.*" = 4\n')
    assert load_recipe(path).adapter.rank_pattern == {".*attn2.*": 4}
    recipe = load_recipe(path, ['adapter.rank_pattern={"blocks.0.*" = 2}', 'adapter.alpha_pattern={"blocks.0.*" = 1.5}'])
    assert recipe.adapter.rank_pattern == {"blocks.0.*": 2} and recipe.adapter.alpha_pattern == {"blocks.0.*": 1.5}
    assert load_recipe(path, ["adapter.rank_pattern=none"]).adapter.rank_pattern is None


def test_a_text_setting_takes_a_number_or_date_as_text():
    assert load_recipe(MINI, ["data.trigger=1984"]).data.trigger == "1984"
    assert load_recipe(MINI, ["base.revision=2024-05-01"]).base.revision == "2024-05-01"


def test_none_takes_a_setting_back_to_left_out():
    assert load_recipe({**MINI, "data": {"resolution": 512}}, ["data.resolution=none"]).data.resolution is None
    with pytest.raises(RecipeError, match="steps"):
        load_recipe(MINI, ["training.steps=none"])


def test_the_same_setting_given_twice_with_different_values_is_refused():
    with pytest.raises(RecipeError, match="set twice"):
        load_recipe(MINI, ["training.steps=1", "training.steps=2"])
    assert load_recipe(MINI, ["training.steps=2", "training.steps=2"]).training.steps == 2


def test_relative_folders_count_from_the_file_or_from_the_working_directory(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "r.toml"
    path.parent.mkdir()
    path.write_text('[base]\nmodel = "mini"\n[data]\nfolder = "pictures"\n')
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path).data.folder == tmp_path / "deep" / "pictures"
    assert load_recipe(Path("deep/r.toml")).data.folder == tmp_path / "deep" / "pictures"
    assert load_recipe(path, ["data.folder=photos"]).data.folder == tmp_path / "photos"
    assert load_recipe({**MINI, "data": {"folder": "photos"}}).data.folder == tmp_path / "photos"
    path.write_text('[base]\nmodel = "mini"\n[data]\nregularisation_folder = "others"\n[[data.also]]\nfolder = "more"\n')
    assert load_recipe(path).data.regularisation_folder == tmp_path / "deep" / "others"
    assert load_recipe(path).data.also[0].folder == tmp_path / "deep" / "more"
    assert load_recipe(path, ['data.also=[{folder = "photos"}]']).data.also[0].folder == tmp_path / "photos"


def test_the_hash_names_the_settings_and_not_the_place(tmp_path):
    here = load_recipe(MINI, [f"data.folder={tmp_path}", "publish.repo=me/it"])
    assert load_recipe(MINI).settings_hash() == here.settings_hash()
    assert load_recipe(MINI, ['data.also=[{folder="a"}]']).settings_hash() == load_recipe(MINI, ['data.also=[{folder="b"}]']).settings_hash()
    assert load_recipe(MINI, ['data.also=[{folder="a"}]']).settings_hash() != load_recipe(MINI, ['data.also=[{folder="a", repeats=2}]']).settings_hash()
    changed = {load_recipe(MINI, [change]).settings_hash() for change in ("training.seed=1", "adapter.rank=17", "data.trigger=x")}
    assert len(changed | {here.settings_hash()}) == 4


def test_a_recipe_made_in_code_keeps_the_same_rules():
    with pytest.raises(ValueError, match="warmup"):
        Recipe.model_validate({**MINI, "training": {"steps": 1, "warmup": 2}})
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(MINI).training.steps = 3


@pytest.mark.parametrize(("given", "key", "fix"), [
    (["objective.shift=3.0"], "objective.shift", "logit_normal_shifted"),
    (["objective.shift=3.0", "objective.timesteps=logit_normal"], "objective.shift", "logit_normal_shifted"),
    (["objective.mean=0.5", "objective.timesteps=shifted"], "objective.mean", "logit_normal"),
    (["objective.std=0.5"], "objective.std", "logit_normal"),
    (["objective.gamma=1.0"], "objective.gamma", "min_snr"),
    (["data.keep_tokens=2"], "data.keep_tokens", "caption_shuffle"),
    (["data.regularisation_count=20"], "data.regularisation_count", "regularisation_prompt"),
    (["tracking.project=styles"], "tracking.project", "tracking.trackers"),
    (["tracking.run_name=first"], "tracking.run_name", "tracking.trackers"),
    (["training.lora_plus_ratio=16.0", "adapter.kind=lokr"], "training.lora_plus_ratio", "dora"),
])
def test_a_setting_that_others_keep_from_being_read_is_refused_instead_of_ignored(given, key, fix):
    with pytest.raises(RecipeError) as refusal:
        load_recipe(MINI, given)
    problem, = refusal.value.problems
    assert key in problem.where and fix in problem.fix


def test_what_a_run_wrote_down_may_hold_a_setting_that_nothing_reads(tmp_path):
    """Earlier versions let it pass; the run is to be resumed, compared and published all the same. What is asked for now is refused as ever."""
    file = tmp_path / "recipe.toml"
    file.write_text('[base]\nmodel = "mini"\n[data]\nkeep_tokens = 3\n[tracking]\nrun_name = "first"\n[objective]\ngamma = 2.0\n')
    with pytest.raises(RecipeError) as refusal:
        load_recipe(file)
    assert len(refusal.value.problems) == 3
    assert load_recipe(file, of_run=True) == load_recipe(MINI)
    with pytest.raises(RecipeError, match="keep_tokens=2"):
        load_recipe(file, ["data.keep_tokens=2"], of_run=True)
    file.write_text('[base]\nmodel = "mini"\n[training]\nsteps = 1\nwarmup = 2\n')
    with pytest.raises(RecipeError, match="warmup"):
        load_recipe(file, of_run=True)


def test_settings_of_what_is_turned_on_are_let_through():
    read = load_recipe(MINI, ["data.caption_shuffle=true", "data.keep_tokens=2", "data.regularisation_prompt=a dog", "data.regularisation_count=20",
                              'tracking.trackers=["tensorboard"]', "tracking.project=styles", "tracking.run_name=first"])
    assert (read.data.keep_tokens, read.data.regularisation_count, read.tracking.project, read.tracking.run_name) == (2, 20, "styles", "first")


def test_settings_that_are_read_are_let_through():
    for changes in (["objective.timesteps=logit_normal_shifted", "objective.shift=3.0", "objective.mean=0.5", "objective.std=0.5"],
                    ["objective.timesteps=shifted", "objective.shift=3.0", "objective.weighting=min_snr", "objective.gamma=1.0"],
                    ["objective.shift=1.0", "objective.gamma=5.0", "training.lora_plus_ratio=16.0", "adapter.kind=dora"]):
        recipe = load_recipe(MINI, changes)
        for setting in changes:
            key, _, value = setting.partition("=")
            section, _, name = key.partition(".")
            assert str(getattr(getattr(recipe, section), name)) == value, setting


def test_things_that_are_no_recipe_files_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    for path, text in ((tmp_path, "a folder"), (tmp_path / "none.toml", "no such recipe"), (tmp_path / "pipe.toml", "regular file"), (Path("a\0b.toml"), "cannot be read")):
        with pytest.raises(RecipeError, match=text):
            load_recipe(path)


def test_every_setting_says_what_it_means_what_it_takes_and_its_default():
    from finetune.recipe_problems import explain_setting

    for key in all_keys():
        told = explain_setting(key)
        assert len(told["meaning"]) > 15 and told["takes"] and told["default"], key
    assert explain_setting("training.learning_rate")["takes"] == 'a number above 0 and up to 1 or "find"'
    assert explain_setting("adapter.rank")["unit"] == "dimensions"


def test_each_default_is_allowed_by_its_own_limits():
    for name, section in SECTIONS.items():
        given = {key: field.default for key, field in section.model_fields.items() if not field.is_required()}
        section.model_validate({**given, **({"model": "mini"} if name == "base" else {})})


def test_every_problem_is_one_of_ours():
    with pytest.raises(RecipeError) as caught:
        load_recipe({"base": {"model": 1}})
    assert all(isinstance(problem, BrushworkError) for problem in caught.value.problems)


def test_a_trigger_of_two_lines_is_told_that_one_is_meant():
    with pytest.raises(RecipeError) as refusal:
        load_recipe({"base": {"model": "mini"}, "data": {"trigger": "two\nlines"}})
    assert "one line of text" in refusal.value.problems[0].fix
