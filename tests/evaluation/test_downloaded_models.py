"""Measures with downloaded models, on tiny random models of the same classes: the formula is right whatever the weights."""

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from finetune.errors import BadInput
from finetune.evaluation.downloaded import USUAL, at_hand, parse_weights
from finetune.evaluation.evidence import Evidence, NamedPicture
from finetune.evaluation.measure import load_measure
from finetune.evaluation.measures import cmmd, lpips
from finetune.evaluation.picture_text_model import PictureTextModel, prepared
from finetune.evaluation.prompts import EvaluationPrompt
from tests.tiny_models import tokenizers

ONE, OTHER, THIRD = (np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8) for seed in range(3))


def evidence(name, folder, pictures=(ONE, OTHER), references=(THIRD,), base=None, texts=("a dog", "a red cat")):
    prompts = [EvaluationPrompt(f"p{index}", text) for index, text in enumerate(texts)]
    return Evidence(prompts, [0, 0], list(pictures), list(base or pictures), tuple(NamedPicture(f"{i}.png", pixels) for i, pixels in enumerate(references)), weights={name: folder})


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = tokenizers.bert()
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=part | {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.sep_token_id},
                                     vision_config=part | {"image_size": 32, "patch_size": 16}, projection_dim=8, logit_scale_init_value=1.0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_text_is_the_cosine_that_clip_itself_gives(clip_folder):
    found = load_measure("clip_text").values(evidence("clip", clip_folder))
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokens = tokenizers.bert()(["a dog", "a red cat"], padding="max_length", max_length=20, truncation=True, return_tensors="pt")
    mean, std = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
    with torch.no_grad():
        logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=prepared([ONE, OTHER], 32, mean, std)).logits_per_image
    assert found == pytest.approx((logits.diagonal() / model.logit_scale.exp()).tolist(), abs=1e-5)


def test_pictures_are_prepared_as_clips_own_processor_does():
    from PIL import Image

    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(Image.fromarray(ONE), return_tensors="pt").pixel_values
    assert (prepared([ONE], 32, processor.image_mean, processor.image_std) - theirs).abs().max() < 0.02


def test_pick_score_scales_the_cosine_and_hps_gives_hundreds(clip_folder):
    cosine = load_measure("clip_text").values(evidence("clip", clip_folder))
    scale = PictureTextModel(clip_folder).scale
    assert scale == pytest.approx(np.e, rel=1e-4)
    assert load_measure("pick_score").values(evidence("pick_score", clip_folder)) == pytest.approx(scale * cosine)
    assert load_measure("hps").values(evidence("hps", clip_folder)) == pytest.approx(100 * cosine)


def test_clip_image_is_1_for_the_reference_itself_and_the_mean_over_references(clip_folder):
    same = load_measure("clip_image").values(evidence("clip", clip_folder, references=(ONE,)))
    other = load_measure("clip_image").values(evidence("clip", clip_folder, references=(THIRD,)))
    both = load_measure("clip_image").values(evidence("clip", clip_folder, references=(ONE, THIRD)))
    assert same[0] == pytest.approx(1) and same[1] < 1
    assert both == pytest.approx((same + other) / 2)


def test_cmmd_is_0_for_the_same_pictures_and_the_published_formula_for_others(clip_folder):
    statistic = load_measure("cmmd").of_set(evidence("cmmd", clip_folder, references=(ONE, OTHER)))
    assert statistic(np.array([0, 1])) == pytest.approx(0, abs=1e-6)
    x, y = np.array([[0.0, 0.0]]), np.array([[3.0, 4.0]])
    kernels = [cmmd.gaussian_kernel(one, two) for one, two in ((x, x), (x, y), (y, y))]
    assert cmmd.cmmd(*kernels, np.arange(1)) == pytest.approx(1000 * (2 - 2 * np.exp(-25 / 200)))


def test_resampled_cmmd_stays_around_the_value():
    """A picture that met its own repeats made every resampled set look closer together than the pictures are."""
    random = np.random.default_rng(3)
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in random.normal(size=(2, 10, 16)))
    kernels = [cmmd.gaussian_kernel(one, two) for one, two in ((x, x), (x, y), (y, y))]
    drawn = np.mean([cmmd.cmmd(*kernels, np.arange(10), random.integers(0, 10, 10)) for _ in range(400)])
    assert drawn == pytest.approx(cmmd.cmmd(*kernels, np.arange(10)), abs=0.2)
    alike, apart = np.concatenate([x, x]), kernels[0][~np.eye(10, dtype=bool)].mean()  # seeds of a prompt that are one picture: only the diagonal's share changes
    twice = [cmmd.gaussian_kernel(one, two) for one, two in ((alike, alike), (alike, y))]
    assert cmmd.cmmd(*twice, kernels[2], np.tile(np.arange(10), 2)) == pytest.approx(cmmd.cmmd(*kernels, np.arange(10)) - 1000 * (1 - apart) * (1 / 10 - 1 / 20))
    assert cmmd.cmmd(*kernels, np.arange(10), np.array([4, 4])) == pytest.approx(1000 * (1 + kernels[2].mean() - 2 * kernels[1][4].mean()))


def test_dino_is_1_for_the_reference_itself(tmp_path):
    torch.manual_seed(0)
    transformers.Dinov2Model(transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56)).save_pretrained(tmp_path)
    found = load_measure("dino").values(evidence("dino", tmp_path, references=(ONE,)))
    assert found[0] == pytest.approx(1) and found[1] < 1


def test_csd_uses_the_style_head_on_the_pooled_state(tmp_path):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="csd_style_head.safetensors is not there"):
        load_measure("csd").values(evidence("csd", tmp_path))
    head = torch.zeros(16, 4)
    head[0, 0] = 1.0
    save_file({"last_layer_style": head}, tmp_path / "csd_style_head.safetensors")
    # A head that sees one number only: every style vector is plus or minus the same.
    assert np.abs(load_measure("csd").values(evidence("csd", tmp_path, references=(ONE,)))) == pytest.approx([1, 1])
    save_file({"last_layer_style": torch.eye(16)[:, :4].contiguous()}, tmp_path / "csd_style_head.safetensors")
    assert load_measure("csd").values(evidence("csd", tmp_path, references=(ONE,)))[0] == pytest.approx(1)


def lpips_weights(path):
    torch.manual_seed(0)
    shapes = {0: (4, 3, 11, 11), 3: (4, 4, 5, 5), 6: (4, 4, 3, 3), 8: (4, 4, 3, 3), 10: (4, 4, 3, 3)}
    tensors = {f"features.{number}.weight": torch.randn(shape) * 0.1 for number, shape in shapes.items()}
    tensors |= {f"features.{number}.bias": torch.zeros(4) for number in shapes} | {f"lin{index}": torch.full((4,), 0.25) for index in range(5)}
    save_file(tensors, path)
    return path


def test_lpips_is_0_for_the_same_symmetric_and_at_most_its_weights(tmp_path):
    path = lpips_weights(tmp_path / "lpips_alex.safetensors")
    big = [np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8) for seed in range(2)]
    weights = lpips.load_weights(path)
    assert lpips.distance(big[0], big[0], weights) == 0
    assert lpips.distance(*big, weights) == pytest.approx(lpips.distance(*big[::-1], weights))
    # Two unit vectors of numbers that are not negative differ by at most 2 squared; five layers, weight a quarter.
    assert 0 < lpips.distance(*big, weights) <= 5 * 2 * 0.25
    found = load_measure("lpips").values(evidence("lpips", tmp_path, pictures=big, base=[big[0], big[0]]))
    assert found[0] == 0 and found[1] > 0
    save_file({"x": torch.ones(1)}, tmp_path / "broken.safetensors")
    with pytest.raises(BadInput, match="features.0.weight is missing"):
        lpips.load_weights(tmp_path / "broken.safetensors")


def test_image_reward_is_the_heads_sum_in_the_published_units(tmp_path):
    torch.manual_seed(0)
    tokenizer = tokenizers.bert()
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BlipConfig(text_config=part | {"vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 40},
                                     vision_config=part | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    transformers.BlipForImageTextRetrieval(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sizes = [16, 4, 4, 4, 4, 1]
    head = {f"mlp.layers.{layer}.weight": torch.zeros(sizes[i + 1], sizes[i]) for i, layer in enumerate((0, 2, 4, 6, 7))}
    head |= {f"mlp.layers.{layer}.bias": torch.zeros(sizes[i + 1]) for i, layer in enumerate((0, 2, 4, 6, 7))}
    head["mlp.layers.7.bias"][0] = 1.5
    save_file(head, tmp_path / "reward_head.safetensors")
    # A head that ignores the picture says its bias, in standard units.
    assert load_measure("image_reward").values(evidence("image_reward", tmp_path)) == pytest.approx([(1.5 - 0.16717363) / 1.03333950] * 2, rel=1e-6)
    for name in head:
        head[name] = torch.randn_like(head[name])
    save_file(head, tmp_path / "reward_head.safetensors")
    found = load_measure("image_reward").values(evidence("image_reward", tmp_path))
    assert np.isfinite(found).all() and found[0] != found[1]


def test_only_complete_models_of_this_machine_are_at_hand(tmp_path, monkeypatch, clip_folder):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert at_hand(parse_weights([f"clip={clip_folder}"])) == {"clip": clip_folder}
    for wrong in ("clip", "fid=x", f"clip={tmp_path / 'nothing'}"):
        with pytest.raises(BadInput):
            parse_weights([wrong])
    assert set(USUAL) >= {"clip", "dino", "csd", "lpips", "cmmd", "pick_score", "hps", "image_reward"}


def test_a_folder_that_is_no_model_is_named(tmp_path):
    with pytest.raises(BadInput, match="cannot be loaded"):
        load_measure("clip_text").values(evidence("clip", tmp_path))
