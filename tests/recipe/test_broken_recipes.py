"""Every broken recipe ends with exit code 2 and says file, line, key and what to do; nothing else escapes."""

from __future__ import annotations

import pytest

from finetune.cli import main

GOOD = '[base]\nmodel = "mini"\n'

# name: (content of the file, line that must be named or None, texts that the message must contain)
BROKEN: dict[str, tuple[bytes | str, int | None, tuple[str, ...]]] = {
    "unknown_key": (GOOD + "[adapter]\nrnak = 8\n", 4, ("adapter.rnak", "did you mean `adapter.rank`?")),
    "unknown_key_of_another_trainer": (GOOD + "[training]\nmax_train_steps = 8\n", 4, ("did you mean `training.steps`?",)),
    "key_in_the_wrong_section": (GOOD + "[adapter]\nlearning_rate = 1e-4\n", 4, ("did you mean `training.learning_rate`?",)),
    "unknown_section": (GOOD + "[trainig]\nsteps = 8\n", 3, ("did you mean [training]?",)),
    "unknown_section_like_nothing": (GOOD + "[zzz]\n", 3, ("the sections are base, data",)),
    "unknown_nested_section": (GOOD + "[adapter.lora]\nrank = 8\n", 3, ("adapter.lora",)),
    "key_without_section": ("rank = 8\n" + GOOD, 1, ("`rank` belongs into [adapter]",)),
    "misspelt_key_without_section": ("learnig_rate = 8\n" + GOOD, 1, ("did you mean `training.learning_rate`?",)),
    "empty_file": ("", None, ("`base.model` is missing",)),
    "only_a_comment": ("# nothing\n", None, ("`base.model` is missing",)),
    "base_without_model": ('[base]\ndtype = "fp32"\n', 1, ("`base.model` is missing",)),
    "empty_model": ('[base]\nmodel = ""\n', 2, ("base.model",)),
    "model_with_line_break": ('[base]\nmodel = "a\\nb"\n', 2, ("base.model",)),
    "model_with_nul": ('[base]\nmodel = "a\\u0000b"\n', 2, ("base.model",)),
    "model_far_too_long": (f'[base]\nmodel = "{"m" * 5000}"\n', 2, ("base.model",)),
    "number_as_text": (GOOD + '[training]\nsteps = "100"\n', 4, ('"100"', "without quotes")),
    "rate_as_text": (GOOD + '[training]\nlearning_rate = "1e-4"\n', 4, ("without quotes",)),
    "boolean_as_number": (GOOD + "[training]\nsteps = true\n", 4, ("`steps` cannot be true",)),
    "boolean_as_rate": (GOOD + "[training]\nlearning_rate = false\n", 4, ("cannot be false",)),
    "number_as_boolean": (GOOD + "[data]\nupscale = 1\n", 4, ("true or false",)),
    "text_as_boolean": (GOOD + '[publish]\nprivate = "no"\n', 4, ("true or false",)),
    "number_as_text_setting": (GOOD + "[data]\ntrigger = 7\n", 4, ("data.trigger", "text")),
    "fraction_as_count": (GOOD + "[training]\nsteps = 10.5\n", 4, ("a whole number",)),
    "whole_fraction_as_count": (GOOD + "[training]\nsteps = 10.0\n", 4, ("a whole number",)),
    "infinite_rate": (GOOD + "[training]\nlearning_rate = inf\n", 4, ("cannot be inf",)),
    "rate_is_nan": (GOOD + "[training]\nlearning_rate = nan\n", 4, ("cannot be nan",)),
    "minus_infinite_mean": (GOOD + "[objective]\nmean = -inf\n", 4, ("cannot be -inf",)),
    "date": (GOOD + "[training]\nsteps = 2024-01-01\n", 4, ("2024-01-01",)),
    "time_as_seed": (GOOD + "[training]\nseed = 12:30:00\n", 4, ("12:30:00",)),
    "date_as_model": ("[base]\nmodel = 1979-05-27T07:32:00Z\n", 2, ("base.model",)),
    "negative_steps": (GOOD + "[training]\nsteps = -1\n", 4, ("from 1 up to",)),
    "zero_rank": (GOOD + "[adapter]\nrank = 0\n", 4, ("from 1 up to 1024",)),
    "huge_rank": (GOOD + "[adapter]\nrank = 99999\n", 4, ("from 1 up to 1024",)),
    "zero_rate": (GOOD + "[training]\nlearning_rate = 0\n", 4, ("above 0",)),
    "rate_above_one": (GOOD + "[training]\nlearning_rate = 2.0\n", 4, ("up to 1",)),
    "dropout_of_one": (GOOD + "[adapter]\ndropout = 1.0\n", 4, ("below 1",)),
    "caption_dropout_above_one": (GOOD + "[data]\ncaption_dropout = 1.5\n", 4, ("from 0 up to 1",)),
    "seed_beyond_64_bits": (GOOD + f"[training]\nseed = {2**80}\n", 4, ("2^63 - 1",)),
    "number_of_5000_digits": (GOOD + f"[training]\nseed = {'9' * 5000}\n", None, ("far too long",)),
    "unknown_choice": (GOOD + '[training]\noptimizer = "adamw_8bit"\n', 4, ('did you mean "adamw8bit"?',)),
    "choice_in_capitals": (GOOD + '[training]\nschedule = "Cosine"\n', 4, ('did you mean "cosine"?',)),
    "choice_as_list": (GOOD + '[training]\nschedule = ["cosine"]\n', 4, ("training.schedule",)),
    "list_as_number": (GOOD + "[adapter]\nrank = [8]\n", 4, ("adapter.rank",)),
    "table_as_number": (GOOD + "[adapter]\nrank = {low = 1, high = 2}\n", 4, ("a table",)),
    "number_among_prompts": (GOOD + '[samples]\nprompts = ["a dog", 7]\n', 4, ("samples.prompts", "list of texts")),
    "prompt_not_in_a_list": (GOOD + '[samples]\nprompts = "a dog"\n', 4, ("list of texts",)),
    "section_as_value": ("base = 3\n", 1, ("`base` is a section", "write [base]")),
    "section_as_list": ('[[base]]\nmodel = "mini"\n', 1, ("`base` is a section",)),
    "bad_colour": (GOOD + '[data]\nbackground = "white"\n', 4, ('a colour such as "#ffffff"',)),
    "bad_expression": (GOOD + '[adapter]\ntargets = "blocks.(*"\n', 4, ("not a regular expression",)),
    "folder_with_nul": (GOOD + '[data]\nfolder = "a\\u0000b"\n', 4, ("data.folder",)),
    "warm_up_longer_than_training": (GOOD + "[training]\nsteps = 10\nwarmup = 20\n", 5, ("longer than the whole training",)),
    "trigger_missing": (GOOD + '[data]\nmissing_caption = "trigger"\n', 4, ("data.trigger",)),
    "height_without_width": (GOOD + "[samples]\nheight = 64\n", 4, ("go together",)),
    "resolution_twice": (GOOD + "[data]\nresolution = [512, 512]\n", 4, ("names a size twice",)),
    "resolution_too_small_in_a_list": (GOOD + "[data]\nresolution = [512, 8]\n", 4, ("a list of whole numbers from 16 up to 8192",)),
    "no_resolution_in_a_list": (GOOD + "[data]\nresolution = []\n", 4, ("data.resolution",)),
    "further_folders_as_text": (GOOD + '[data]\nalso = "more"\n', 4, ("a list of tables with folder, repeats, weight",)),
    "further_folder_without_folder": (GOOD + "[[data.also]]\nrepeats = 2\n", 3, ("`data.also[0].folder` is missing",)),
    "misspelt_key_of_the_second_further_folder": (GOOD + '[[data.also]]\nfolder = "a"\n[[data.also]]\nfolder = "b"\nrepeat = 2\n', 7, ("data.also[1].repeat", "did you mean `repeats`?")),
    "repeats_as_text_in_a_further_folder": (GOOD + '[[data.also]]\nfolder = "a"\nrepeats = "2"\n', 5, ("without quotes", "from 1 up to 10000")),
    "regularisation_folder_and_prompt": (GOOD + '[data]\nregularisation_folder = "a"\nregularisation_prompt = "b"\n', 5, ("exclude each other",)),
    "name_of_another_trainer_for_masks": (GOOD + "[training]\nmasked_training = true\n", 4, ("did you mean `data.masked_loss`?",)),
    "noise_offset_of_two": (GOOD + "[objective]\nnoise_offset = 2.0\n", 4, ("from 0 up to 1",)),
    "duplicate_key": (GOOD + "[training]\nsteps = 5\nsteps = 6\n", 5, ("steps", "keep one")),
    "duplicate_section": (GOOD + "[training]\nsteps = 5\n[training]\nseed = 1\n", 5, ("twice",)),
    "duplicate_dotted_key": ('base.model = "mini"\nbase.model = "mini"\n', 2, ("base.model", "keep one")),
    "text_without_quotes": ("[base]\nmodel = mini\n", 2, ('model = "mini"',)),
    "yes_instead_of_true": (GOOD + "[data]\nupscale = yes\n", 4, ("upscale",)),
    "true_in_capitals": (GOOD + "[data]\nupscale = True\n", 4, ("upscale",)),
    "unclosed_text": ('[base]\nmodel = "mini\n', 2, ("model",)),
    "unclosed_list": (GOOD + '[samples]\nprompts = ["a",\n', None, ("broken.toml",)),
    "unclosed_section": ("[base\nmodel = 1\n", 1, ("[base",)),
    "missing_value": (GOOD + "[training]\nsteps =\n", 4, ("steps",)),
    "missing_equals": (GOOD + "[training]\nsteps 100\n", 4, ("steps 100",)),
    "windows_path_in_double_quotes": (GOOD + '[data]\nfolder = "C:\\Users\\me"\n', 4, ("folder",)),
    "yaml": ("base:\n  model: mini\ntraining:\n  steps: 100\n", 1, ("looks like YAML",)),
    "yaml_list": ("config:\n  - name: a\n  - lr: 1e-4\n", 1, ("looks like YAML",)),
    "json": ('{"base": {"model": "mini"}}\n', 1, ("looks like JSON",)),
    "crlf_with_a_mistake": ('[base]\r\nmodel = "mini"\r\n\r\n[training]\r\nstep = 1\r\n', 5, ("did you mean `training.steps`?",)),
    "bare_carriage_returns": (b'[base]\rmodel = "mini"\r', 1, ("TOML",)),
    "byte_order_mark": (b'\xef\xbb\xbf[base]\nmodel = "mini"\n', 1, ("byte order mark",)),
    "utf_16": ('[base]\nmodel = "mini"\n'.encode("utf-16"), 1, ("byte order mark",)),
    "latin_1": ('[base]\nmodel = "mini"\n# caf\xe9\n'.encode("latin-1"), 3, ("not UTF-8",)),
    "nul_bytes": (b"\x00" * 64, 1, ("TOML",)),
    "random_bytes": (bytes(range(128, 256)), 1, ("not UTF-8",)),
    "ten_megabytes": (GOOD + "# " + "x" * 10_000_000, None, ("10,000,0", "at most 262,144")),
    "thousand_nested_tables": (GOOD + "[" + ".".join(["a"] * 1000) + "]\n", 3, ("nested too deeply",)),
    "thousand_nested_lists": (GOOD + "x = " + "[" * 1000 + "]" * 1000 + "\n", 3, ("nested too deeply",)),
    "thousand_nested_lists_over_lines": (GOOD + "x = " + "[\n" * 1000 + "]" * 1000 + "\n", None, ("brackets",)),
    "thousand_inline_tables": (GOOD + "x = " + "{a=" * 1000 + "1" + "}" * 1000 + "\n", 3, ("nested too deeply",)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_refused_with_its_place_and_a_hint(name, tmp_path, capsys):
    content, line, texts = BROKEN[name]
    path = tmp_path / "broken.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)

    with pytest.raises(SystemExit) as stopped:
        main(["recipe", "check", str(path)])

    said = capsys.readouterr()
    assert stopped.value.code == 2, said.err
    assert said.out == ""
    assert str(path) in said.err
    assert "hint: " in said.err
    assert "Traceback" not in said.err and "defect of the program" not in said.err
    if line is not None:
        assert f"line {line}" in said.err, said.err
    for text in texts:
        assert text in said.err, said.err


def test_there_are_sixty_broken_recipes():
    assert len(BROKEN) >= 60
