"""What a loaded base gives preference work: candidates, drawn once and named with all that made them, and pictures encoded for rewards."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.errors import BrushworkError
from finetune.adapters.adapter_file import FILE_NAME, read_adapter, write_adapter
from finetune.adapters.exporting import export
from finetune.adapters.lora import inject_lora
from finetune.families.key_layouts import KEY_MAPS
from finetune.generation import usual_size
from finetune.preference import latent_codec
from finetune.preference.candidate_folder import CandidateFolder
from finetune.preference.candidate_requests import AdapterUse, Prompt, parse_variants, read_prompts
from finetune.preference.candidates import CandidateSettings, make_candidates
from finetune.preference.loaded_base import LoadedBase
from finetune.preference.rewards.features import build_features
from tests.preference.conftest import SIZE
from tests.tiny_models.all import TINY
from tests.tiny_models.text_adapters import drawn_lora


def test_features_do_not_move_with_the_policy(bases):
    loaded = LoadedBase.named(str(bases["hunyuan_dit"]))
    features, pixels = build_features("dit", base=loaded), torch.rand(1, 3, 32, 32)
    before = features.extract(pixels, ["a dog"])
    inject_lora(loaded.transformer, loaded.family.facts.targets["attention"], 4, seed=0)
    for parameter in loaded.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    assert torch.equal(before, features.extract(pixels, ["a dog"]))


@pytest.mark.parametrize("name", SIZE)
def test_encoding_agrees_with_the_family_and_both_ways_carry_gradients(bases, name):
    loaded = LoadedBase.named(str(bases[name]))
    pixels = torch.rand(1, 3, SIZE[name], SIZE[name]).requires_grad_()
    latents = loaded.encode_pictures(pixels)
    assert torch.allclose(latents.detach(), loaded.family.encode_images(loaded.pipeline, pixels.detach() * 2 - 1).mean, atol=1e-5)
    decoded = latent_codec.decode(loaded.pipeline.vae, latents)
    decoded.sum().backward()
    assert decoded.shape == pixels.shape and pixels.grad.abs().sum() > 0


def test_candidates_are_drawn_once_and_can_be_made_again(bases, tmp_path):
    base = LoadedBase.named(str(bases["hunyuan_dit"]))
    prompts, settings = [Prompt("p", "a dog"), Prompt("q", "一只猫", "blurry")], CandidateSettings(per_prompt=2, steps=2, guidance=2.0, height=32, width=32)
    first = make_candidates(base, prompts, settings, tmp_path / "one")
    assert first.drawn == 4 and len(first.sheets) == 2
    assert make_candidates(base, prompts, settings, tmp_path / "one").drawn == 0
    lost = CandidateFolder(tmp_path / "one").picture(first.candidates[0].id)
    content = lost.read_bytes()
    lost.unlink()
    assert make_candidates(base, prompts, settings, tmp_path / "one").drawn == 1 and lost.read_bytes() == content
    more = make_candidates(base, prompts, CandidateSettings(per_prompt=3, steps=2, guidance=2.0, height=32, width=32), tmp_path / "one")
    assert more.drawn == 2 and {candidate.seed for candidate in more.candidates} == {0, 1, 2}
    record = json.loads((tmp_path / "one" / "candidates.jsonl").read_text().splitlines()[2])
    assert record["negative"] == "blurry" and record["base"] == str(bases["hunyuan_dit"]) and record["scheduler"]["class"] and record["image_sha256"]


def test_candidates_take_the_size_that_the_base_draws_by_itself(bases, tmp_path):
    """Not the family's usual one: a base for 64 pixels draws nothing but slow nonsense at 1024."""
    base = LoadedBase.named(str(bases["hunyuan_dit"]))
    [drawn] = make_candidates(base, [Prompt("p", "a dog")], CandidateSettings(per_prompt=1, steps=1, guidance=1.0), tmp_path / "out").candidates
    assert drawn.height == drawn.width == usual_size(base.base) < base.family.facts.resolution


def test_adapters_are_variants_and_are_named_in_the_record(bases, tmp_path):
    (tmp_path / "warm" / "adapter").mkdir(parents=True)
    adapter = write_adapter(tmp_path / "warm" / "adapter" / FILE_NAME, drawn_lora(TINY["hunyuan_dit"].build().transformer, r".*\.attn1\.to_q"))
    # Under the names of Tencent's own code, as a file from elsewhere would come.
    elsewhere = export(read_adapter(adapter), "tencent", tmp_path / "foreign", KEY_MAPS["hunyuan_dit"]).path
    variants = parse_variants(["base", f"{adapter}:0.5", f"{adapter}+{adapter}:0.5"])
    assert variants == ((), (AdapterUse(adapter, 0.5),), (AdapterUse(adapter, 1.0), AdapterUse(adapter, 0.5)))
    base = LoadedBase.named(str(bases["hunyuan_dit"]))
    report = make_candidates(base, [Prompt("p", "a dog")], CandidateSettings(per_prompt=1, steps=2, guidance=1.0, height=32, width=32, variants=(*variants[:2], *parse_variants([f"{elsewhere}:0.5"]))), tmp_path / "out")
    plain, warm, foreign = report.candidates
    assert plain.adapters == () and warm.adapters[0]["name"] == "warm" and warm.adapters[0]["weight"] == 0.5
    folder = CandidateFolder(tmp_path / "out")
    assert folder.picture(plain).read_bytes() != folder.picture(warm).read_bytes()
    warm_pixels, foreign_pixels = (np.asarray(Image.open(folder.picture(candidate)), dtype=int) for candidate in (warm, foreign))
    assert abs(warm_pixels - foreign_pixels).max() <= 1


@pytest.mark.parametrize(("content", "named"), [("", "no prompt"), ("{\n", "JSON"), ('{"prompt": 3}\n', "prompt"), ('{"prompt_id":"a","prompt":"x"}\n{"prompt_id":"a","prompt":"y"}\n', "two prompts")])
def test_strange_prompt_files_are_named(tmp_path, content, named):
    (tmp_path / "prompts").write_text(content)
    with pytest.raises(BrushworkError, match=named):
        read_prompts(tmp_path / "prompts")
    with pytest.raises(BrushworkError, match="no such file"):
        read_prompts(tmp_path / "absent")
