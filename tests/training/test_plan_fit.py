"""Settings that fit a given memory: which are changed, what each costs, and what is said where none fit."""


from dataclasses import replace

import pytest

from finetune.errors import BadInput
from finetune.training.plan import estimate, resolved_hold
from finetune.training.plan_ground import Ground
from finetune.training.byte_sizes import size_in_bytes
from finetune.training.plan_fit import WAYS_OUT, Choice, _groups, changes, fitted, refusal, too_large


def with_training(recipe, **values):
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=values)})


def test_fit_leaves_what_fits_alone(ground):
    surveyed, recipe = ground
    free = fitted(surveyed, with_training(recipe, batch_size=8), 1 << 40)
    assert free.fits and not free.savings and free.settings["batch_size"] == 8


def test_fit_takes_the_fastest_settings_that_give_the_same_result_and_says_what_each_costs(ground):
    surveyed, recipe = ground
    recipe = with_training(recipe, batch_size=4)
    hold = resolved_hold(recipe, surveyed.device)
    half = estimate(surveyed, with_training(recipe, batch_size=2, accumulation=2), hold, 1, 1 << 40)
    made = fitted(surveyed, recipe, half.memory_bytes["peak"])
    assert made.fits and made.savings and made.seconds_per_step <= half.seconds_per_step
    assert made.settings["hold"] in ("fp32", "bf16", "streamed")
    assert made.settings["batch_size"] * made.settings["accumulation"] == 4
    assert all(saving.saves_bytes > 0 and "time a step" in saving.costs for saving in made.savings)
    # What is said can be given to the next run, which then is this plan.
    sections = dict(change.split("=") for change in changes(made))
    assert sections.get("training.batch_size", "4") == str(made.settings["batch_size"])
    assert sections.get("training.checkpointed_blocks", "0") == str(made.settings["checkpointed_blocks"])


@pytest.mark.parametrize("kind, proposes", [("lora", True), ("loha", False)])
def test_weights_that_the_kind_of_adapter_cannot_look_at_are_not_proposed(ground, kind, proposes):
    surveyed, recipe = ground
    recipe = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"kind": kind})})
    groups = _groups(Choice(recipe, resolved_hold(recipe, surveyed.device)), surveyed.device, (), False)
    names = {choice.hold.name for group in groups for choice in group}
    assert "int8" in names and ("nf4" in names) is proposes


def test_weights_in_memory_with_blocks_computed_twice_are_not_taken_where_streaming_is_faster(ground, monkeypatch):
    """Or more memory would make a slower plan: one in which nothing but streamed weights fits computes no block twice."""
    surveyed, recipe = ground
    hold = resolved_hold(recipe, surveyed.device)
    whole, twice = (estimate(surveyed, recipe, replace(hold, name="streamed"), blocks, 1 << 40).memory_bytes["activations"] for blocks in (0, 8))
    monkeypatch.setattr(Ground, "weight_bytes", lambda self, hold: {"streamed": 0.0, "bf16": 0.7, "fp32": 1.4}[hold.name] * (whole - twice))
    monkeypatch.setattr(Ground, "step_seconds", lambda self, cost, hold, batch, checkpointed: 1.0 + checkpointed)
    streamed = estimate(surveyed, recipe, replace(hold, name="streamed"), 0, 1 << 40)
    in_memory = estimate(surveyed, recipe, replace(hold, name="bf16"), 8, 1 << 40)
    assert in_memory.memory_bytes["peak"] < streamed.memory_bytes["peak"]
    made = fitted(surveyed, recipe, streamed.memory_bytes["peak"])
    assert (made.settings["hold"], made.settings["checkpointed_blocks"]) == ("streamed", 0)


def test_fit_keeps_what_the_user_has_settled(ground):
    surveyed, recipe = ground
    recipe = with_training(recipe, batch_size=2, checkpointed_blocks=1)
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"hold": "fp32"})})
    nothing = fitted(surveyed, recipe, 1 << 20, fixed=("training.batch_size", "training.checkpointed_blocks", "base.hold"))
    assert not nothing.fits
    assert {key: nothing.settings[key] for key in ("batch_size", "checkpointed_blocks", "hold")} == {"batch_size": 2, "checkpointed_blocks": 1, "hold": "fp32"}
    # A number that stands in a recipe is where the search begins.
    assert fitted(surveyed, recipe, 1 << 20).settings["checkpointed_blocks"] >= 1


def test_what_cannot_be_fitted_is_refused_with_the_reason_and_a_way_out(ground):
    surveyed, recipe = ground
    nothing = fitted(surveyed, with_training(recipe, batch_size=2), 1 << 20)
    assert not nothing.fits and nothing.savings
    assert nothing.memory_bytes["peak"] < estimate(surveyed, with_training(recipe, batch_size=2), resolved_hold(recipe, surveyed.device), 0, 1 << 20).memory_bytes["peak"]
    what, way_out = refusal(nothing)
    assert "nothing fits 1 MiB: the program's libraries alone" in what and "no base is small enough" in way_out
    several = replace(nothing, budget_bytes=nothing.memory_bytes["libraries"] + 1)
    what, way_out = refusal(several, ["base.hold", "samples.steps"])
    assert all(f"GiB while {phase}" in what or f"MiB while {phase}" in what for phase in too_large(several)) and "every saving that --set leaves" in what
    assert "leave base.hold to --fit" in way_out and WAYS_OUT["training"] in way_out


def test_text_encoders_that_are_too_large_are_taken_in_16_bits(ground):
    surveyed, recipe = ground
    large = replace(surveyed, surroundings=replace(surveyed.surroundings, text_parameters=1 << 30))
    made = fitted(large, recipe, 3 << 30)
    assert made.fits and [(saving.setting, saving.value) for saving in made.savings] == [("base.dtype", "bf16")]


def test_where_captions_cannot_be_encoded_the_rest_is_fitted_as_if_they_were_encoded_elsewhere(ground):
    surveyed, recipe = ground
    large = replace(surveyed, surroundings=replace(surveyed.surroundings, text_parameters=1 << 32))
    recipe = with_training(recipe, batch_size=4)
    whole = estimate(large, recipe, resolved_hold(recipe, large.device), 0, 1 << 40, encoded=True).memory_bytes["peak"]
    made = fitted(large, recipe, whole - 1)
    assert list(too_large(made)) == ["encoding captions"] and made.savings
    what, way_out = refusal(made)
    assert "while encoding captions" in what and "BRUSHWORK_CACHE" in way_out
    assert all(f"--set {change}" in way_out for change in changes(made))
    # Whoever encodes elsewhere needs the less for it, and in the format that is looked for here.
    assert "base.dtype=bf16" in changes(made) and "base.dtype there too" in way_out
    # As far as the rest fits by itself, it is left as it is.
    settings = fitted(large, recipe, whole).settings
    assert (settings["checkpointed_blocks"], settings["batch_size"]) == (0, 4)


def test_every_phase_of_a_plan_has_a_way_out_when_it_is_too_large(ground):
    surveyed, recipe = ground
    assert set(estimate(surveyed, recipe, resolved_hold(recipe, surveyed.device), 0, 1 << 40).phases_bytes) == set(WAYS_OUT)


@pytest.mark.parametrize("text, size", [("12GB", 12 << 30), ("512 MiB", 512 << 20), ("1.5gb", 3 << 29), ("1000", 1000)])
def test_amounts_of_memory_are_read_as_people_write_them(text, size):
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-3GB", "0", "12 parsecs"])
def test_what_is_no_amount_of_memory_is_bad_input(text):
    with pytest.raises(BadInput):
        size_in_bytes(text)
