"""A comparison as a user makes it: numbers with intervals, resumed without mixing, and a page that a browser shows."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from finetune.adapters.adapter_file import read_adapter
from finetune.cli import main
from finetune.cli.evaluate import _notes, _table
from finetune.errors import BadInput
from finetune.evaluation.compare import Comparison, compare
from finetune.evaluation.prompts import EvaluationPrompt, read_prompts
from finetune.evaluation.subjects import split_weight, subjects_of
from finetune.families import registry
from finetune.families.base_models import locate_base
from finetune.families.key_layouts import KEY_MAPS
from finetune.generation import LoadedAdapter, draw_from_files
from finetune.preference.candidates import AdapterUse
from finetune.sampling import PictureRequest
from tests.adapters.made_files import R, pair, write
from tests.tiny_models import sd3
from tests.tiny_models.text_adapters import write_text_adapter

SETTINGS = {"seeds": (0, 1), "steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def done(base, adapters, style_folder, prompt_file, tmp_path_factory):
    """(comparison, folder, result) of a finished evaluation with references and training pictures."""
    out = tmp_path_factory.mktemp("evaluation")
    comparison = Comparison(read_prompts(prompt_file), subjects_of([str(path) for path in adapters]), references=style_folder, training=style_folder, **SETTINGS)
    return comparison, out, compare(base, comparison, out)


def rows_of(result, adapter):
    return {row["measure"]: row for row in result["rows"] if row["adapter"] == adapter}


def test_an_adapter_without_effect_has_no_difference_and_one_with_effect_has(done):
    nothing, strong = rows_of(done[2], "nothing"), rows_of(done[2], "strong")
    assert all(row["delta"] == 0 and row["verdict"] == "unclear" for row in nothing.values())
    assert strong["structure_kept"]["delta"] < 0 and strong["structure_kept"]["verdict"] == "worse"
    assert strong["structure_kept"]["low"] <= strong["structure_kept"]["delta"] <= strong["structure_kept"]["high"] < 0
    assert strong["drift"]["value"] > 0 and strong["drift"]["prompts"] == 2 and strong["drift"]["low"] is None
    assert {"adapter", "measure", "value", "delta", "low", "high", "prompts", "seeds"} <= set(strong["palette"])
    assert "kid" in strong and "alignment" in strong


def test_the_terminal_says_how_many_verdicts_stand_side_by_side(done):
    """The page said it, the table of the command said "better" and "worse" without it."""
    caution, copies = _notes(done[2])
    assert caution.startswith("note: ") and "intervals are shown side by side" in caution and copies.startswith("near-copies of training pictures: ")


def test_style_measures_against_the_training_pictures_say_so(done, base, style_folder, tmp_path):
    """Without --references they are the training pictures, of which a copy scores best, and nothing said it."""
    comparison, _, result = done
    assert "palette" in result["caution"] and "with the training pictures themselves" in result["caution"]
    shutil.copytree(style_folder, tmp_path / "unseen")
    short = replace(comparison, prompts=comparison.prompts[:1], subjects=comparison.subjects[:1], seeds=(0,), measures=("palette",))
    assert "themselves" in compare(base, short, tmp_path / "same")["caution"]
    assert "themselves" not in compare(base, replace(short, references=tmp_path / "unseen"), tmp_path / "other")["caution"]


def test_the_result_is_on_disk_without_paths_of_the_machine(done):
    _, out, result = done
    text = (out / "evaluation.json").read_text("utf-8")
    assert json.loads(text)["rows"] == json.loads(json.dumps(result["rows"]))
    assert "/tmp" not in text and str(out) not in text
    assert {row["benchmark"] for row in result["imported"]} >= {"GenEval", "DPG-Bench"}
    assert result["ranked"][1]["best"][0]["delta"] >= result["ranked"][1]["worst"][0]["delta"]


def test_going_on_draws_and_measures_only_what_is_missing(done, base):
    comparison, out, result = done
    values = (out / "values.jsonl").read_text()
    pictures = sorted((out / "pictures").rglob("*.png"))
    pictures[0].unlink()
    pictures[-1].write_bytes(pictures[-1].read_bytes()[:100])
    again = compare(base, comparison, out)
    assert again["drawn"] == 2
    assert again["rows"] == result["rows"]
    assert (out / "values.jsonl").read_text() == values


def test_a_torn_line_is_measured_again(done, base):
    comparison, out, result = done
    whole = (out / "values.jsonl").read_text()
    (out / "values.jsonl").write_text(whole[: len(whole) // 2])
    again = compare(base, comparison, out)
    # Two pictures were drawn again above, in a smaller batch, whose rounding differs.
    assert [row["value"] for row in again["rows"]] == pytest.approx([row["value"] for row in result["rows"]], rel=1e-2, abs=1e-4)
    assert len((out / "values.jsonl").read_text().splitlines()) > len(whole.splitlines()) // 2


def test_other_settings_are_refused_by_name_and_leave_everything_as_it_was(done, base):
    comparison, out, _ = done
    before = (out / "settings.json").read_text()
    with pytest.raises(BadInput, match="other settings: steps, guidance"):
        compare(base, Comparison(comparison.prompts, comparison.subjects, (0, 1), 3, 4.0), out)
    assert (out / "settings.json").read_text() == before


def test_a_folder_of_something_else_is_refused(base, tmp_path, done):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="neither empty nor an evaluation"):
        compare(base, done[0], tmp_path)


def test_changed_words_under_the_same_id_are_drawn_and_measured_again(base, tmp_path, tmp_path_factory, prompt_file):
    prompts = read_prompts(prompt_file)[:1]
    compare(base, Comparison(prompts, subjects_of([]), measures=["sharpness"], **SETTINGS), tmp_path)
    other = Comparison([replace(prompts[0], prompt="a bird")], subjects_of([]), measures=["sharpness"], **SETTINGS)
    changed, fresh = compare(base, other, tmp_path), compare(base, other, tmp_path_factory.mktemp("fresh"))
    assert changed["drawn"] == 2 and changed["rows"] == fresh["rows"]


def test_what_a_measure_does_not_speak_of_has_no_value_after_its_split_was_changed(base, tmp_path, prompt_file):
    prompt = replace(read_prompts(prompt_file)[0], split="style")
    for split, measured in (("style", 1), ("unrelated", 0), ("style", 1)):
        told = compare(base, Comparison([replace(prompt, split=split)], subjects_of([]), measures=["structure_kept"], **SETTINGS), tmp_path)
        assert told["rows"][0]["prompts"] == measured
        said = "too few prompts" if measured else "no prompt of its kind"
        assert _table(told["rows"])[1].endswith(f"  {said}") and f'<td class="n">{said}</td>' in (tmp_path / "report.html").read_text()


def test_same_prompt_and_seed_give_the_same_picture_whoever_draws_beside_it(done, base, adapters, tmp_path):
    comparison, out, _ = done
    compare(base, Comparison(comparison.prompts[2:3], subjects_of([str(adapters[1])]), (1,), 2, 2.0, measures=["sharpness"]), tmp_path)
    one, other = (np.asarray(Image.open(next(folder.rglob("strong*/cow-1.png")))).astype(int) for folder in (out, tmp_path))
    # Rounding differs with the batch by a unit at most.
    assert np.abs(one - other).max() <= 1


def test_a_copied_training_picture_is_shown_as_a_pair(done, base, tmp_path):
    comparison, out, _ = done
    (tmp_path / "training").mkdir()
    shutil.copy(next(out.rglob("strong*/car-0.png")), tmp_path / "training" / "stolen.png")
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "training" / "other.png")
    from dataclasses import replace

    result = compare(base, replace(comparison, training=tmp_path / "training", references=None, measures=["near_copies"]), out)
    pair = next(copy for copy in result["near_copies"] if (copy["adapter"], copy["prompt_id"], copy["seed"]) == ("strong", "car", 0))
    assert pair["training"] == "stolen.png" and pair["hash_bits"] == 0
    assert "stolen.png" in (out / "report.html").read_text("utf-8")


def test_adapters_get_names_of_their_own_and_strengths(adapters):
    subjects = subjects_of([str(adapters[1]), f"{adapters[1]}:0.5"])
    assert [(subject.name, subject.weight) for subject in subjects] == [("base", 1.0), ("strong", 1.0), ("strong-2", 0.5)]
    assert subjects[1].folder != subjects[2].folder
    with pytest.raises(BadInput):
        split_weight("x.safetensors:strong")
    with pytest.raises(BadInput):
        subjects_of(["nothing-here.safetensors"])


def test_a_real_browser_shows_the_page_and_hostile_prompts_stay_text(base, adapters, style_folder, tmp_path, chromium):
    hostile = ['<script>document.title="broken"</script>', "\u202ereversed <img src=x onerror=alert(1)>", "w" * 2000, "{{ 7 * 7 }} \x1b[31m", "红色的狗"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "prompt_id": f"h{index}"}) for index, prompt in enumerate(hostile)), encoding="utf-8")
    comparison = Comparison(read_prompts(path), subjects_of([str(adapters[1])]), (0,), 1, 1.0, training=style_folder, references=style_folder)
    compare(base, comparison, tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    browser = [*chromium, "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run([*browser, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=600).stdout
    assert "<title>Evaluation of" in shown and "broken</title>" not in shown
    assert "<script" not in shown and "<img src=\"x\"" not in shown and "{{ 7 * 7 }}" in shown
    assert "<svg" in shown and 'id="numbers"' in shown and "红色的狗" in shown and "style_gain" in shown
    assert "http" not in page.read_text("utf-8").replace("http-equiv", "")
    subprocess.run([*browser, "--window-size=1100,3000", f"--screenshot={tmp_path / 'page.png'}", page.as_uri()], capture_output=True, timeout=600)
    with Image.open(tmp_path / "page.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert picture.width == 1100 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
    # The longest word is broken: the page is no wider than the window.
    assert (pixels[:, -8:] == pixels[0, -1]).all()


@pytest.fixture
def evaluate(capfd):
    """Call the verb in this process: exit code and both streams."""

    def call(*arguments):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["evaluate", *map(str, arguments)])
        return stopped.value.code, *capfd.readouterr()

    return call


def test_the_command_prints_rows_as_one_object(evaluate, base_folder, adapters, prompt_file, tmp_path):
    code, out, err = evaluate("compare", "--base", base_folder, "--adapters", adapters[0], adapters[1], "--prompts", prompt_file, "--out", tmp_path / "out",
                              "--seeds", "3", "--steps", "1", "--measures", "structure_kept,sharpness", "--limit", "2", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert {(row["adapter"], row["measure"]) for row in told["rows"]} == {(name, measure) for name in ("base", "nothing", "strong") for measure in ("structure_kept", "sharpness")}
    assert told["rows"][0]["seeds"] == 1


@pytest.mark.parametrize("arguments, said", [
    (["compare", "--prompts", "nothing.txt"], "no such file"), (["import", "nothing", "--form", "fid", "--into", "."], "no form called"),
    (["compare", "--prompts", "PROMPTS", "--weights", "clip"], "names no weights"), (["compare", "--prompts", "PROMPTS"], "base model is not named")])
def test_bad_input_is_one_line_and_exit_code_2(arguments, said, evaluate, prompt_file):
    code, _, err = evaluate(*[prompt_file if argument == "PROMPTS" else argument for argument in arguments])
    assert code == 2 and said in err and "Traceback" not in err


def test_an_adapter_that_trains_text_encoders_is_drawn_with_them_as_generate_draws_it(tmp_path):
    folder = tmp_path / "base"
    pipeline, family = sd3.build(), registry.family("sd3")
    pipeline.save_pretrained(folder)
    adapter = write_text_adapter(pipeline, family, tmp_path / "style")
    base, (prompt,) = locate_base(str(folder)), [EvaluationPrompt("cat", "a red cat", "style")]
    comparison = Comparison([prompt], subjects_of([str(adapter), f"{adapter}:0.5"]), (0,), 2, 2.0, height=32, width=32, measures=["sharpness"])
    compare(base, comparison, tmp_path / "out")
    request = PictureRequest(prompt.prompt, 0, 32, 32, 2, 2.0)
    whole = {"style": LoadedAdapter(read_adapter(adapter, KEY_MAPS), adapter)}
    wanted = [drawn.image.tobytes() for drawn in draw_from_files(base, whole, [{"style": 1.0}, {"style": 0.5}, {}], [request])]
    without = {"style": LoadedAdapter(replace(whole["style"].file, text_encoders={}), adapter)}
    wanted += [drawn.image.tobytes() for drawn in draw_from_files(base, without, [{"style": 1.0}], [request])]
    pictures = [Image.open(next((tmp_path / "out").rglob(f"{subject.folder}/cat-0.png"))).tobytes() for subject in comparison.subjects]
    assert pictures == [wanted[2], wanted[0], wanted[1]] and len(set(wanted)) == 4


def test_a_peft_folder_of_another_alpha_is_another_adapter(tmp_path):
    """The same weights at twice the alpha got the pictures and values of the first."""
    tensors = pair("base_model.model.blocks.0.attn1.to_q", suffix="peft", alpha=None)
    write(tmp_path, tensors, name="adapter_model.safetensors")
    known = set()
    for settings in ({"r": R, "lora_alpha": R}, {"r": R, "lora_alpha": 2 * R}, {"r": R, "lora_alpha": 2 * R, "use_rslora": True}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
        known |= {subjects_of([str(tmp_path)])[1].folder, AdapterUse(tmp_path).sha256[:8]}
    assert len(known) == 6
    single = write(tmp_path, tensors, name="single.safetensors")
    assert subjects_of([str(single)])[1].sha256 == hashlib.sha256(single.read_bytes()).hexdigest() == AdapterUse(single).sha256
