"""What each verb does with thinking tokens: proves and uses them, or says that they stay behind; never silently another adapter."""

import json
import shutil

import pytest
import torch

from finetune.adapters.adapter_file import AdapterFile, read_adapter, write_adapter
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.families.registry import family
from finetune.preference.candidate_requests import AdapterUse, Prompt
from finetune.preference.candidates import CandidateSettings, make_candidates
from finetune.preference.loaded_base import LoadedBase
from finetune.thinking.tokens import FILE_NAME, KEY, ThinkingTokens, tokens_of, write_tokens
from tests.tiny_models import hunyuan_dit


def small_adapter(transformer) -> AdapterFile:
    """A LoRA of rank 2 that does something."""
    inject_lora(transformer, family("hunyuan_dit").facts.targets["attention"], 2, seed=0)
    for name, parameter in lora_parameters(transformer):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    return collect_lora(transformer)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base folder, folder of an adapter with strong tokens)."""
    folder = tmp_path_factory.mktemp("tokens")
    pipeline = hunyuan_dit.build(layers=2)
    pipeline.save_pretrained(folder / "base")
    stream = family("hunyuan_dit").facts.text_stream
    conditioning = family("hunyuan_dit").encode_prompts(pipeline, ["a cat"])[0]
    states = conditioning.tensors[stream.states]
    stated = write_tokens(folder / "adapter", ThinkingTokens(10 * torch.randn(2, states.shape[-1], generator=torch.Generator().manual_seed(0)), stream))
    write_adapter(folder / "adapter" / "pytorch_lora_weights.safetensors", small_adapter(pipeline.transformer).with_provenance(family="hunyuan_dit", **{KEY: stated}))
    return folder / "base", folder / "adapter"


@pytest.fixture
def alone(made, tmp_path):
    """The same adapter without its tokens."""
    return shutil.copy(made[1] / "pytorch_lora_weights.safetensors", tmp_path / "alone.safetensors")


def test_verify_uses_the_tokens_and_refuses_an_adapter_that_lost_them(made, alone, brushwork):
    base, adapter = made
    said = brushwork("adapter", "verify", adapter, "--base", base, "--json")
    assert said.code == 0 and json.loads(said.out)["thinking_tokens"] == 2
    assert "2 thinking tokens" in brushwork("adapter", "verify", adapter, "--base", base).out
    lost = brushwork("adapter", "verify", alone, "--base", base, "--json")
    assert lost.code == 2 and FILE_NAME in json.loads(lost.out)["error"]["what"]


@pytest.mark.parametrize("verb", ["bake", "merge", "resize", "rescale", "convert"])
def test_verbs_that_leave_the_tokens_behind_say_so(made, brushwork, tmp_path, verb):
    base, adapter = made
    out = tmp_path / ("out" if verb == "bake" else "out.safetensors")
    options = {"bake": ["--base", base], "merge": [adapter], "resize": ["--rank", 1], "rescale": ["--factor", 0.5], "convert": ["--to", "diffusers"]}[verb]
    file = adapter / "pytorch_lora_weights.safetensors" if verb == "convert" else adapter
    said = brushwork("adapter", verb, file, *options, "--out", out)
    assert said.code == 0 and "note: " in said.out and "thinking" in said.out, said


def test_a_run_folder_finds_the_tokens_in_its_adapter_folder(made, tmp_path):
    shutil.copytree(made[1], tmp_path / "run" / "adapter")
    assert len(tokens_of(read_adapter(tmp_path / "run"), tmp_path / "run", family("hunyuan_dit").facts.text_stream)) == 2


def test_candidates_are_drawn_with_the_tokens_of_their_adapter(made, alone, tmp_path):
    base, adapter = made
    without = write_adapter(tmp_path / "without.safetensors", read_adapter(alone).with_provenance(**{KEY: None}))
    settings = CandidateSettings(per_prompt=1, steps=2, guidance=2.0, height=32, width=32, variants=((AdapterUse(adapter),), (AdapterUse(without),)))
    with_tokens, plain = make_candidates(LoadedBase.named(str(base)), [Prompt("p", "a cat")], settings, tmp_path / "out").candidates
    pictures = [(tmp_path / "out" / one.path).read_bytes() for one in (with_tokens, plain)]
    assert pictures[0] != pictures[1]


def test_preference_training_does_not_start_from_an_adapter_whose_tokens_it_would_lose(made, tmp_path, brushwork):
    base, adapter = made
    settings = CandidateSettings(per_prompt=2, steps=1, guidance=1.0, height=32, width=32)
    make_candidates(LoadedBase.named(str(base)), [Prompt("p", "a cat"), Prompt("q", "a dog")], settings, tmp_path / "folder")
    said = brushwork("prefer", "train", "--data", tmp_path / "folder", "--method", "draft", "--reward", "measure:warmth", "--adapter", adapter, "--out", tmp_path / "run", "--json")
    assert said.code == 2 and "thinking tokens" in json.loads(said.out)["error"]["what"]
