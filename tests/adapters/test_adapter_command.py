"""The adapter verbs as a user types them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from finetune.adapters.adapter_file import read_adapter, write_adapter
from finetune.adapters.kinds import AdapterSize, inject_adapter
from finetune.adapters.lora import collect_lora, lora_parameters
from finetune.adapters.text_encoders import attach_encoders
from finetune.families import registry
from finetune.families.key_layouts import KEY_MAPS
from tests.adapters.made_files import delta_of, pair, write
from tests.adapters.small_model import trained_adapter
from tests.tiny_models.text_adapters import drawn_lora, write_text_adapter


@pytest.fixture
def brushwork(capfd):
    def call(*arguments):
        from finetune.cli import main

        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        return stop.value.code, capfd.readouterr().out

    return call


@pytest.fixture
def adapters(tmp_path):
    paths = []
    for seed in (1, 2):
        adapter = trained_adapter(rank=4, seed=seed).with_provenance(base_model="owner/base", family="hunyuan_dit", trigger=f"word{seed}", licence="other")
        paths.append(write_adapter(tmp_path / f"a{seed}.safetensors", adapter))
    return paths


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from tests.tiny_models.hunyuan_dit import build

    folder = tmp_path_factory.mktemp("base") / "pipeline"
    build().save_pretrained(folder)
    return folder


def test_inspect_tells_what_a_file_is(brushwork, adapters):
    code, out = brushwork("adapter", "inspect", adapters[0], "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["family"], told["layout"], told["trigger"], told["licence"]) == ("hunyuan_dit", "diffusers", "word1", "other")
    assert len(told["modules"]) == 32 and {"name", "rank", "alpha", "norm"} <= set(told["modules"][0])
    adapter = read_adapter(adapters[0])
    assert told["modules"][0]["norm"] == pytest.approx(float(delta_of(adapter, told["modules"][0]["name"]).norm()), rel=1e-5)
    code, out = brushwork("adapter", "inspect", adapters[0])
    assert "hunyuan_dit" in out and "word1" in out


def test_inspect_names_dead_and_exploding_modules_and_the_alpha_of_the_file(brushwork, tmp_path):
    tensors = {}
    for number in range(6):
        tensors |= pair(f"lora_unet_blocks_{number}_attn1_out_proj", 1408, 1408, alpha=1.0)
    tensors["lora_unet_blocks_0_attn1_out_proj.lora_up.weight"] *= 0
    tensors["lora_unet_blocks_1_attn1_out_proj.lora_up.weight"] *= 1000
    _, out = brushwork("adapter", "inspect", write(tmp_path, tensors), "--json")
    told = json.loads(out)
    assert told["dead"] == ["blocks.0.attn1.to_out.0"] and told["exploding"] == ["blocks.1.attn1.to_out.0"]
    assert {module["alpha"] for module in told["modules"]} == {1.0} and told["layout"] == "kohya"


def test_hostile_metadata_does_not_reach_the_terminal(brushwork, tmp_path):
    path = write(tmp_path, pair("lora_unet_blocks_0_attn1_out_proj"), {"modelspec.trigger_phrase": "a\x1b[31mred\u202e" + "x" * 9000})
    _, out = brushwork("adapter", "inspect", path)
    assert "\x1b" not in out and "\u202e" not in out and len(out) < 5000


def test_verify_proves_a_file_on_its_base(brushwork, adapters, base):
    code, out = brushwork("adapter", "verify", adapters[0], "--base", base, "--json")
    told = json.loads(out)
    assert code == 0
    assert (told["keys"], told["placed"], told["changed"], told["baked_equals_attached"], told["restored"]) == (64, 64, True, True, True)


def test_verify_names_what_does_not_fit(brushwork, tmp_path, base):
    path = write(tmp_path, pair("base_model.model.blocks.9.attn1.out_proj", suffix="peft", alpha=None))
    code, out = brushwork("adapter", "verify", path, "--base", base, "--json")
    assert code == 2 and "blocks.9.attn1.to_out.0" in json.loads(out)["error"]["what"]


@pytest.mark.parametrize("layout", ["kohya", "comfy", "tencent", "peft", "onetrainer", "diffusers"])
def test_convert_there_and_back(brushwork, adapters, tmp_path, layout):
    there = tmp_path / (layout if layout in ("tencent", "peft") else f"{layout}.safetensors")
    code, out = brushwork("adapter", "convert", adapters[0], "--to", layout, "--out", there, "--json")
    assert code == 0 and json.loads(out)["tensors"] > 0
    assert brushwork("adapter", "convert", there, "--to", "diffusers", "--out", tmp_path / "back.safetensors")[0] == 0
    before, after = read_adapter(adapters[0], KEY_MAPS), read_adapter(tmp_path / "back.safetensors", KEY_MAPS)
    assert all(after.tensors[key].equal(value) for key, value in before.tensors.items())


def test_convert_asks_for_the_family_where_several_fit(brushwork, tmp_path):
    path = write(tmp_path, pair("transformer.transformer_blocks.0.attn.to_q", suffix="peft", alpha=None))
    code, out = brushwork("adapter", "convert", path, "--to", "kohya", "--json")
    assert code == 2 and "--family" in json.loads(out)["error"]["fix"]
    code, out = brushwork("adapter", "convert", path, "--to", "kohya", "--family", "qwen_image", "--out", tmp_path / "k.safetensors", "--json")
    assert code == 0 and json.loads(out)["family"] == "qwen_image"


def test_merge_bake_extract_and_compare(brushwork, adapters, base, tmp_path):
    first, second = adapters
    code, out = brushwork("adapter", "merge", f"{first}:0.5", f"{second}:-0.25", "--out", tmp_path / "m.safetensors", "--json")
    assert code == 0 and json.loads(out)["rank_largest"] == 8
    merged = read_adapter(tmp_path / "m.safetensors")
    assert merged.provenance["trigger"] == "word1, word2" and merged.provenance["base_model"] == "owner/base"
    assert brushwork("adapter", "bake", tmp_path / "m.safetensors", "--base", base, "--out", tmp_path / "baked", "--json")[0] == 0
    code, out = brushwork("adapter", "extract", "--base", base, "--tuned", tmp_path / "baked", "--rank", "8", "--out", tmp_path / "x.safetensors", "--json")
    assert code == 0 and max(json.loads(out)["errors"].values(), default=0) < 1e-3
    code, out = brushwork("adapter", "compare", tmp_path / "m.safetensors", tmp_path / "x.safetensors", "--json")
    assert code == 0 and json.loads(out)["cosine"] == pytest.approx(1.0, abs=1e-4)


def test_adapters_with_text_encoders_are_merged_and_proven_on_their_base(brushwork, tmp_path):
    from tests.tiny_models.sd3 import build

    pipeline, family, base, merged = build(), registry.family("sd3"), tmp_path / "base", tmp_path / "merged.safetensors"
    pipeline.save_pretrained(base)
    both = write_text_adapter(pipeline, family, tmp_path / "both")
    transformer_only = write_adapter(tmp_path / "plain.safetensors", drawn_lora(pipeline.transformer, r".*\.attn\.to_k"))
    code, out = brushwork("adapter", "merge", f"{both}:0.5", f"{both}:0.25", transformer_only, "--out", merged, "--json")
    assert code == 0, out
    assert set(json.loads(out)["text_encoders"]) == set(family.facts.trainable_encoders)
    code, out = brushwork("adapter", "verify", merged, "--base", base, "--json")
    told = json.loads(out)
    assert code == 0 and told["keys"] == told["placed"] and told["changed"] and told["baked_equals_attached"] and told["restored"]
    attach_encoders(pipeline, read_adapter(both), "one", 0.75)
    wanted = family.encode_prompts(pipeline, ["a red cat"])[0].tensors
    stock = build()
    stock.load_lora_weights(str(tmp_path), weight_name=merged.name)
    for key, value in family.encode_prompts(stock, ["a red cat"])[0].tensors.items():
        torch.testing.assert_close(value, wanted[key], atol=1e-5, rtol=1e-5)


def test_an_adapter_of_text_encoders_alone_is_proven_and_drawn_with(brushwork, tmp_path):
    from tests.tiny_models.sd3 import build

    pipeline, base, alone = build(), tmp_path / "base", tmp_path / "alone.safetensors"
    pipeline.save_pretrained(base)
    write_adapter(alone, replace(read_adapter(write_text_adapter(pipeline, registry.family("sd3"), tmp_path / "both")), tensors={}))
    code, out = brushwork("adapter", "verify", alone, "--base", base, "--json")
    assert code == 0 and json.loads(out)["placed"] == json.loads(out)["keys"] == 32
    drawn = []
    for name, adapter in (("with", ["--adapter", alone]), ("without", [])):
        assert brushwork("generate", "--base", base, *adapter, "--prompt", "a cat", "--steps", 1, "--size", "32x32", "--out", tmp_path / name)[0] == 0
        drawn.append(Image.open(next((tmp_path / name).glob("*.png"))).tobytes())
    assert drawn[0] != drawn[1]


def test_a_loha_and_a_lokr_are_drawn_with_together_and_make_candidates_together(brushwork, base, tmp_path):
    from tests.tiny_models.hunyuan_dit import build

    files = []
    for kind in ("loha", "lokr"):
        model = build().transformer
        inject_adapter(model, r".*\.attn1\.to_q", AdapterSize(kind, rank=2), seed=1)
        with torch.no_grad():
            for _, parameter in lora_parameters(model):
                parameter.fill_(0.3)
        files.append(write_adapter(tmp_path / kind / "adapter_model.safetensors", collect_lora(model)))
    (tmp_path / "prompts.txt").write_text("a cat")
    assert brushwork("generate", "--base", base, "--adapter", files[0], "--adapter", f"{files[1]}:0.5", "--prompt", "a cat", "--steps", 1, "--size", "32x32", "--out", tmp_path / "p")[0] == 0
    candidates = ["prefer", "candidates", "--base", base, "--prompts", tmp_path / "prompts.txt", "--per-prompt", 1, "--steps", 1, "--height", 32, "--width", 32]
    assert brushwork(*candidates, "-a", f"{files[0]}+{files[1]}", "--out", tmp_path / "candidates")[0] == 0


def test_resize_rescale_subtract(brushwork, adapters, tmp_path):
    assert brushwork("adapter", "resize", adapters[0], "--rank", "2", "--out", tmp_path / "r.safetensors")[0] == 0
    assert set(read_adapter(tmp_path / "r.safetensors").ranks.values()) == {2}
    assert brushwork("adapter", "rescale", adapters[0], "--factor", "0.5", "--out", tmp_path / "s.safetensors")[0] == 0
    assert brushwork("adapter", "subtract", adapters[0], tmp_path / "s.safetensors", "--weight", "2", "--out", tmp_path / "d.safetensors")[0] == 0
    assert float(delta_of(read_adapter(tmp_path / "d.safetensors"), "blocks.0.attn1.to_q").norm()) < 1e-5


@pytest.mark.parametrize(("arguments", "said"), [
    (["inspect", "nothing.safetensors"], "no such file"),
    (["inspect", "runs/nothing/adapter"], "no such file or folder"),
    (["merge", "a1.safetensors", "--out", "a1.safetensors"], "exists already"),
    (["merge", "a1.safetensors:lots", "--out", "m.safetensors"], "not a strength"),
    (["resize", "a1.safetensors", "--out", "m.safetensors"], "needs a rank or an energy"),
    (["rescale", "a1.safetensors", "--factor", "nan", "--out", "m.safetensors"], "factor"),
    (["convert", "a1.safetensors", "--to", "a1111"], "no layout is called"),
    (["merge", "a1.safetensors", "a2.safetensors", "--method", "magic", "--out", "m.safetensors"], "no way of merging"),
])
def test_mistakes_are_one_line_and_exit_code_two(brushwork, adapters, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out = brushwork("adapter", *arguments, "--json")
    assert code == 2 and said in json.loads(out)["error"]["what"]
    assert not (tmp_path / "m.safetensors").exists()
