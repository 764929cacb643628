"""Published reward models through transformers, on tiny random models of the same classes; pickles are refused with the way out."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data_tools.errors import BadInput, BrushworkError
from finetune.evaluation.evidence import Evidence
from finetune.evaluation.measure import load_measure
from finetune.evaluation.picture_text_model import load_model
from finetune.evaluation.prompts import EvaluationPrompt
from finetune.preference.rewards.preference_head import pixels_of
from finetune.preference.rewards.reward_files import load_reward
from tests.tiny_models import tokenizers

PART = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PROMPTS = ["a dog", "a red cat"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("clip"), tokenizers.bert()
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=PART | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.sep_token_id},
                                     vision_config=PART | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.CLIPImageProcessor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("imagereward"), tokenizers.bert()
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=PART | {"vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 40},
                                     vision_config=PART | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    transformers.BlipForImageTextRetrieval(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = [16, 8, 4, 4, 4, 1]
    head = {f"mlp.layers.{layer}.weight": torch.randn(sizes[place + 1], sizes[place]) for place, layer in enumerate((0, 2, 4, 6, 7))}
    save_file(head | {f"mlp.layers.{layer}.bias": torch.randn(sizes[place + 1]) for place, layer in enumerate((0, 2, 4, 6, 7))}, folder / "reward_head.safetensors")
    return folder


def pictures():
    """Two pictures that the models take as they are, so that two ways of resizing cannot differ."""
    return [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8) for seed in range(2)]


def measured(name, folder):
    prompts = [EvaluationPrompt(f"p{number}", text) for number, text in enumerate(PROMPTS)]
    return load_measure(name).values(Evidence(prompts, [0, 0], pictures(), pictures(), (), weights={name: folder}))


@pytest.mark.parametrize("kind", ["clip", "imagereward"])
def test_pictures_are_brought_to_the_model_and_scores_back_from_it(kind, clip, image_reward):
    """As on a GPU, for which `meta` stands in: nothing is wrong there but that it has no numbers to look at or to bring back."""
    reward = load_reward(f"{kind}:{clip if kind == 'clip' else image_reward}")
    (reward.clip if kind == "clip" else reward).model.to("meta")
    with pytest.raises((NotImplementedError, RuntimeError), match="(item\\(\\) cannot be called on|Cannot copy out of) meta tensor"):
        reward.score(pixels(), PROMPTS)


def pixels():
    from PIL import Image

    return pixels_of([Image.fromarray(picture) for picture in pictures()])


def test_image_reward_scores_as_the_evaluation_does_and_carries_gradients(image_reward):
    given = pixels().requires_grad_()
    scores = load_reward(f"imagereward:{image_reward}").score(given, PROMPTS)
    assert scores.tolist() == pytest.approx(measured("image_reward", image_reward).tolist(), abs=1e-4)
    scores.sum().backward()
    assert given.grad.abs().sum() > 0


def test_clip_type_rewards_take_a_folder_and_score_as_the_evaluation_does(clip):
    hps = load_reward(f"hpsv2:{clip}").score(pixels(), PROMPTS)
    assert (100 * hps).tolist() == pytest.approx(measured("hps", clip).tolist(), abs=1e-3)
    assert load_reward(f"pickscore:{clip}").score(pixels(), PROMPTS).tolist() == pytest.approx(measured("pick_score", clip).tolist(), abs=1e-3)


def test_a_ready_made_reward_can_be_part_of_a_sum(clip, tmp_path):
    (tmp_path / "mix.json").write_text(f'{{"v": 1, "kind": "sum", "parts": [{{"reward": "hpsv2:{clip}", "weight": 2}}, {{"reward": "measure:warmth", "weight": 1}}]}}')
    parts = 2 * load_reward(f"hpsv2:{clip}").score(pixels(), PROMPTS) + load_reward("measure:warmth").score(pixels(), PROMPTS)
    assert torch.allclose(load_reward(tmp_path / "mix.json").score(pixels(), PROMPTS), parts)


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_models_that_are_published_as_pickles_say_how_to_get_safetensors(name, tmp_path):
    with pytest.raises(BadInput, match="pickle") as asked:
        load_reward(name)
    assert f"--reward {name}:FOLDER" in asked.value.fix and "save_file" in asked.value.fix
    (tmp_path / "HPS_v2.1_compressed.pt").write_bytes(b"\x80\x02 never opened")
    for place in (tmp_path, tmp_path / "HPS_v2.1_compressed.pt"):
        with pytest.raises(BadInput, match="pickle") as found:
            load_reward(f"{name}:{place}")
        assert "HPS_v2.1_compressed.pt" in found.value.where and "save_file" in found.value.fix
    with pytest.raises(BadInput, match="pickle"):
        load_model(tmp_path)


def test_a_head_that_is_gone_or_incomplete_is_named(image_reward, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(image_reward, folder)
    head = load_file(folder / "reward_head.safetensors")
    save_file({name: tensor for name, tensor in head.items() if name != "mlp.layers.6.bias"}, folder / "reward_head.safetensors")
    with pytest.raises(BrushworkError, match=r"layers\.6\.bias is missing"):
        load_reward(f"imagereward:{folder}")
    (folder / "reward_head.safetensors").unlink()
    with pytest.raises(BrushworkError, match="cannot be read"):
        load_reward(f"imagereward:{folder}")
