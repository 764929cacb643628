"""`generate`: a grid over weights and seeds, settings in each picture, thoughts, the best of N, and clear refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_tools.errors import BadInput
from finetune import generation, sampling
from finetune.adapters.adapter_file import AdapterFile, write_adapter
from finetune.cli.generate_arguments import parse_adapters, parse_seeds, parse_size, weight_sets
from finetune.sampling import read_settings

QUICK = ["--steps", "1", "--size", "64"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """A small LoRA for the tiny base, strong enough to be seen."""
    path = tmp_path_factory.mktemp("run") / "my-style.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for module in ("blocks.0.attn1.to_q", "blocks.0.attn1.to_v", "blocks.1.attn1.to_out.0"):
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    write_adapter(path, AdapterFile(tensors).with_provenance(trigger="sks", base_model="unused"))
    return path


def test_a_grid_of_weights_and_seeds_becomes_pictures_with_settings_and_one_sheet(brushwork, tiny_base, adapter, tmp_path, monkeypatch):
    out = tmp_path / "pictures"
    said = brushwork("generate", "--base", tiny_base, "-a", f"{adapter}:0,1", "-p", "sks, a cat", "-p", "猫 sks", "--seed", "3-4", "--out", out, "--json", *QUICK)
    assert said.code == 0, said.err
    pictures = said.data["pictures"]
    assert len(pictures) == 2 * 2 * 2 and all(set(each) >= {"path", "prompt", "seed", "adapters", "score"} for each in pictures)
    assert {(each["prompt"], each["seed"], each["adapters"][0]["weight"]) for each in pictures} == {(p, s, w) for p in ("sks, a cat", "猫 sks") for s in (3, 4) for w in (0.0, 1.0)}
    stored = read_settings(pictures[0]["path"])
    assert stored["prompt"] == "sks, a cat" and stored["seed"] == 3 and stored["adapters"] == [{"path": str(adapter), "weight": 0.0, "sha256": hashlib.sha256(adapter.read_bytes()).hexdigest()}]
    by_weight = {each["adapters"][0]["weight"]: Image.open(each["path"]).tobytes() for each in pictures if each["prompt"] == "sks, a cat" and each["seed"] == 3}
    assert by_weight[0.0] != by_weight[1.0], "the adapter did nothing"
    with Image.open(said.data["sheet"]) as sheet:
        assert sheet.width > 2 * 128 and sheet.height > 4 * 128

    # The same pictures side by side: a batch of another size rounds differently.
    turns, take_turns = [], generation.take_turns
    monkeypatch.setattr(generation, "take_turns", lambda *given: turns.append(take_turns(*given)))
    bare = brushwork("generate", "--base", tiny_base, "-p", "sks, a cat", "-p", "猫 sks", "--seed", "3-4", "--out", out, "--offload", "--json", *QUICK)
    assert len(turns) == 1
    assert Image.open(bare.data["pictures"][0]["path"]).tobytes() == by_weight[0.0], "weight 0 is not the base"
    assert bare.data["pictures"][0]["path"] not in {each["path"] for each in pictures} and len(list(out.glob("*.png"))) == 8 + 4 + 2


def test_a_prompt_that_asks_to_think_is_thought_about_and_the_thoughts_are_kept(brushwork, tiny_base, tmp_path):
    said = brushwork("generate", "--base", tiny_base, "-p", "<think> a red cat beside a dog", "--out", tmp_path, "--json", *QUICK)
    assert said.code == 0, said.err
    picture = said.data["pictures"][0]
    assert set(picture["thinking"]) >= {"elements", "relations", "style", "trace", "enhanced", "ok"}
    assert Path(picture["path"]).with_suffix(".thinking.json").exists()
    assert read_settings(picture["path"])["prompt"] == picture["thinking"]["enhanced"] or not picture["thinking"]["ok"]


def test_the_best_of_several_is_kept_with_its_score(brushwork, tiny_base, tmp_path):
    said = brushwork("generate", "--base", tiny_base, "-p", "a cat", "--best-of", "3", "--reward", "measure:warmth", "--out", tmp_path, "--json", *QUICK)
    assert said.code == 0, said.err
    assert len(said.data["pictures"]) == 1 and isinstance(said.data["pictures"][0]["score"], float)
    assert said.data["gain"]["n"] == 3 and said.data["gain"]["mean"] >= 0


def test_a_prompt_without_the_trigger_is_pointed_out(brushwork, tiny_base, adapter, tmp_path):
    said = brushwork("generate", "--base", tiny_base, "-a", adapter, "-p", "a cat", "--out", tmp_path, *QUICK)
    assert said.code == 0 and 'trigger "sks"' in said.err


@pytest.mark.parametrize(("guidance", "says"), [("1", True), ("3", False)])
def test_a_negative_prompt_that_has_no_effect_is_pointed_out(brushwork, tiny_base, tmp_path, guidance, says):
    said = brushwork("generate", "--base", tiny_base, "-p", "a cat", "--negative", "red", "--guidance", guidance, "--out", tmp_path, *QUICK)
    assert said.code == 0 and ("the negative prompt has no effect" in said.err) is says


def test_an_adapter_of_another_model_is_refused(brushwork, tiny_base, tmp_path):
    path = tmp_path / "other.safetensors"
    write_adapter(path, AdapterFile({"single_blocks.0.x.lora_A.weight": torch.ones(2, 8), "single_blocks.0.x.lora_B.weight": torch.ones(8, 2)}))
    said = brushwork("generate", "--base", tiny_base, "-a", path, "-p", "a cat", "--out", tmp_path, *QUICK)
    assert said.code == 2 and "not layers of this model" in said.err and not list(tmp_path.glob("*.png"))


def saved_oft(folder: Path) -> Path:
    """An OFT for the tiny base in PEFT's folder, far enough from the base to be seen."""
    generator = torch.Generator().manual_seed(1)
    modules = ("blocks.0.attn1.to_q", "blocks.1.attn1.to_out.0")
    oft = AdapterFile({f"{module}.oft_R.weight": torch.randn(8, 6, generator=generator) * 0.3 for module in modules})
    folder.mkdir(parents=True)
    write_adapter(folder / "adapter_model.safetensors", oft.with_provenance(base_model="unused"))
    return folder


def test_an_oft_draws_beside_another_adapter_in_every_combination(brushwork, tiny_base, adapter, tmp_path):
    lora, oft = tmp_path / "lora.safetensors", saved_oft(tmp_path / "oft")
    lora.write_bytes(adapter.read_bytes())
    given = ("--base", tiny_base, "-p", "sks, a cat", "--json", *QUICK)
    said = brushwork("generate", "-a", f"{lora}:0,1", "-a", f"{oft}:0,1", "--out", tmp_path / "pictures", *given)
    assert said.code == 0, said.err
    drawn = {tuple(each["weight"] for each in picture["adapters"]): Image.open(picture["path"]).tobytes() for picture in said.data["pictures"]}
    assert len(set(drawn.values())) == 4
    for weights, alone in {(0, 0): [], (1, 0): ["-a", str(lora)], (0, 1): ["-a", str(oft)]}.items():
        picture = brushwork("generate", *alone, "--out", tmp_path / "alone", *given).data["pictures"][0]
        assert Image.open(picture["path"]).tobytes() == drawn[weights]


def test_an_oft_at_half_strength_is_refused_by_its_name_before_anything_is_drawn(brushwork, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "draw", lambda *_, **__: pytest.fail("it drew"))
    oft = saved_oft(tmp_path / "turning")
    said = brushwork("generate", "--base", tiny_base, "-a", f"{oft}:0,1,0.5", "-p", "a cat", "--out", tmp_path / "pictures", *QUICK)
    assert said.code == 2 and str(oft) in said.err and "weight of 0.5" in said.err and "1 or 0" in said.err


@pytest.mark.parametrize(("arguments", "text"), [
    (["--seed", "x"], "not a seed"), (["--seed", "5-2"], "not a range of seeds"), (["--seed", "0-99999"], "at most"), (["--size", "big"], "not a size"), (["--adapter", "none.safetensors"], "no such adapter"),
    (["--best-of", "4"], "go together"), (["--seed", "0-9", "--best-of", "4", "--reward", "x"], "counts its own seeds"), (["--best-of", "2", "--reward", "x"], "no such reward"), (["--size", "65"], "multiples of"),
])
def test_what_cannot_be_drawn_is_refused(arguments, text, brushwork, tiny_base, tmp_path):
    said = brushwork("generate", "--base", tiny_base, "-p", "a cat", "--steps", "1", "--out", tmp_path, *arguments)
    assert said.code == 2 and text in said.err and "hint: " in said.err


def test_a_size_that_no_base_draws_is_refused_before_anything_is_loaded(brushwork, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "_encode", lambda *_, **__: pytest.fail("it encoded"))
    said = brushwork("generate", "--base", tiny_base, "-p", "a cat", "--size", "65", "--out", tmp_path)
    assert said.code == 2 and "multiples of" in said.err


def test_what_was_drawn_when_somebody_interrupts_is_there(brushwork, tiny_base, adapter, tmp_path, monkeypatch):
    out, given, draw_batch = tmp_path / "pictures", ["--base", tiny_base, "-a", f"{adapter}:0,1", "-p", "sks, a cat", "--seed", "1,2", "--out"], sampling._draw_batch
    whole = {Path(each["path"]).name: Image.open(each["path"]).tobytes() for each in brushwork("generate", *given, out, "--json", *QUICK).data["pictures"]}
    batches = []

    def interrupted(*arguments):
        batches.append(1)
        if len(batches) > 1:
            raise KeyboardInterrupt
        return draw_batch(*arguments)

    monkeypatch.setattr(sampling, "_draw_batch", interrupted)
    said = brushwork("generate", *given, tmp_path / "begun", *QUICK)
    assert said.code == 130 and len(batches) == 2
    assert {path.name: Image.open(path).tobytes() for path in (tmp_path / "begun").iterdir()} == {name: whole[name] for name in whole if name.endswith("-0.png")}


def test_a_refusal_leaves_no_empty_folder_and_what_was_there_stays(brushwork, tiny_base, tmp_path):
    given = ["generate", "--base", tiny_base, "-p", "a cat", "--think", "--enhancer", tmp_path / "no model", "--steps", "1", "--size", "64", "--out"]
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "new", tmp_path / "empty"):
        said = brushwork(*given, out)
        assert said.code == 2 and "hint: " in said.err
    assert not (tmp_path / "new").exists() and (tmp_path / "empty").is_dir()


def test_reading_adapters_weights_and_sizes(tmp_path):
    run = tmp_path / "runs" / "ink" / "adapter"
    run.mkdir(parents=True)
    (tmp_path / "a b.safetensors").touch()
    both = parse_adapters([f"{run}:0.5,1", f"{tmp_path / 'a b.safetensors'}", f"{run}"])
    assert [each.label for each in both] == ["ink", "a b", "ink"] and len({each.name for each in both}) == 3
    assert [each.weights for each in both] == [(0.5, 1.0), (1.0,), (1.0,)]
    assert len(weight_sets(both)) == 2 and weight_sets([]) == [{}]
    assert parse_seeds(["1,3", "3-5"]) == [1, 3, 4, 5]
    assert parse_size("80x48") == (48, 80) and parse_size("64") == (64, 64) and parse_size(None) is None
    with pytest.raises(BadInput, match="weights"):
        parse_adapters([f"{run}:1,,2"])
