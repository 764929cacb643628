"""HunyuanDiT's traps, each as the statement that the family does not fall into it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from hypothesis import given
from hypothesis import strategies as st

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.errors import BaseModelError
from finetune.families import hunyuan_dit, hunyuan_dit_forward
from finetune.families.protocol import PictureGeometry
from finetune.objectives import LossWeighting, NoiseLevel
from tests.tiny_models import hunyuan_dit as tiny

FAMILY = hunyuan_dit.FAMILY
GEOMETRY = PictureGeometry((1024, 1024), (64, 64))
PROMPTS = ["a cat", "a dog in rain, style"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """version and padding -> folder of a saved tiny pipeline."""
    folders = {}
    for version, equal in (("1.1", False), ("1.2", False), ("1.2", True)):
        folders[version, equal] = tmp_path_factory.mktemp(f"v{version}-{equal}")
        tiny.build(version=version, equal_padding=equal).save_pretrained(folders[version, equal])
    return folders


@pytest.fixture(scope="module")
def texts(saved):
    pipeline = FAMILY.load(saved["1.2", False], frozenset({"text"}), torch.float32)
    return FAMILY.encode_prompts(pipeline, PROMPTS)


def transformer(folder):
    return FAMILY.load(folder, frozenset({"transformer"}), torch.float32).transformer


def predict(model, conditionings, latents=None, timesteps=(312.0, 705.0), geometry=GEOMETRY):
    if latents is None:
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    level = NoiseLevel(sigma=torch.zeros(2), timestep=torch.tensor(timesteps))
    return FAMILY.predict(model, latents, level, conditionings, [geometry] * 2)


@pytest.mark.parametrize(("version", "last_signal"), [("1.1", 0.00238), ("1.2", 0.02203)])
def test_the_noise_schedule_comes_from_the_scheduler_file(saved, version, last_signal):
    pipeline = FAMILY.load(saved[version, False], frozenset({"transformer"}), torch.float32)
    objective = FAMILY.objective(pipeline, None, LossWeighting())
    assert objective.prediction == "v_prediction"
    assert objective.alphas_cumprod[-1].sqrt().item() == pytest.approx(last_signal, rel=1e-3)


def test_a_swapped_sampler_does_not_change_the_schedule(saved):
    from diffusers import DPMSolverMultistepScheduler

    pipeline = FAMILY.load(saved["1.2", False], frozenset({"transformer"}), torch.float32)
    shipped = FAMILY.objective(pipeline, None, LossWeighting())
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.set_timesteps(5)
    assert torch.equal(FAMILY.objective(pipeline, None, LossWeighting()).alphas_cumprod, shipped.alphas_cumprod)


def test_a_prediction_type_that_is_not_trained_is_refused(saved):
    pipeline = FAMILY.load(saved["1.2", False], frozenset({"transformer"}), torch.float32)
    pipeline.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(BaseModelError, match="predicts sample"):
        FAMILY.objective(pipeline, None, LossWeighting())


def test_version_1_1_is_told_sizes_and_1_2_is_not(saved, texts):
    other = PictureGeometry((500, 700), (64, 64), (3, 4))
    old, new = transformer(saved["1.1", False]), transformer(saved["1.2", False])
    assert (predict(old, texts) - predict(old, texts, geometry=other)).abs().max() > 1e-4
    assert torch.equal(predict(new, texts), predict(new, texts, geometry=other))


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_the_lean_forward_is_the_librarys_forward(saved, texts, version):
    from diffusers import HunyuanDiT2DModel

    stock = HunyuanDiT2DModel.from_pretrained(saved[version, False] / "transformer")
    ours = transformer(saved[version, False])
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    table = hunyuan_dit.rotary_table(16, 4, 6, 32)
    text = FAMILY._text(texts, "cpu", torch.float32)
    extra = FAMILY._picture_conditions(stock.config, [GEOMETRY] * 2, "cpu")
    with torch.no_grad():
        expected = stock(latents, torch.tensor([3.0, 900.0]), **text, **extra, image_rotary_emb=table, return_dict=False)[0].chunk(2, dim=1)[0]
        found = predict(ours, texts, latents, (3.0, 900.0))
    assert (found - expected).abs().max() <= 5e-7 * expected.abs().max().clamp(min=1)


def with_lora(model):
    inject_lora(model, FAMILY.facts.targets["all"], rank=4, seed=0)
    for name, parameter in lora_parameters(model):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_packed_padding_equals_333_slots_in_output_and_gradients(saved, texts, monkeypatch):
    packed, full = with_lora(transformer(saved["1.2", True])), with_lora(transformer(saved["1.2", True]))
    assert packed._padding_rows_equal
    outputs, gradients = [], []
    for model in (packed, full):
        if model is full:
            monkeypatch.setattr(hunyuan_dit_forward, "padding_rows_equal", lambda padding: False)
        FAMILY.prepare(model, 0)
        output = predict(model, texts)
        output.square().mean().backward()
        outputs.append(output.detach())
        gradients.append({name: p.grad for name, p in lora_parameters(model)})
    assert (outputs[0] - outputs[1]).abs().max() < 5e-6
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 2e-4 * gradient.abs().max().clamp(min=1e-3), name


def test_packing_shortens_the_text_only_where_padding_rows_are_equal(saved, texts):
    lengths = []
    for equal in (True, False):
        model = transformer(saved["1.2", equal])
        model.blocks[0].attn2.to_k.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
        predict(model, texts)
    assert lengths[0] < 77 and lengths[1] == 77 + 256


def test_one_different_padding_row_switches_packing_off(saved, texts):
    model = transformer(saved["1.2", True])
    model.text_embedding_padding.data[200, 0] += 1e-3
    predict(model, texts)
    assert not model._padding_rows_equal


def test_masks_with_holes_are_not_packed():
    assert hunyuan_dit_forward.right_padded(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    assert not hunyuan_dit_forward.right_padded(torch.tensor([[1, 0, 1]]))


def test_clip_padding_is_left_out_and_all_t5_rows_are_kept(texts):
    assert len(texts[0].tensors["clip"]) < 77
    assert texts[0].tensors["t5"].shape[0] == texts[0].tensors["t5_mask"].shape[0] == 256
    assert texts[0].tensors["t5_mask"].sum() < 256


def test_masked_t5_rows_still_matter(saved, texts):
    """The pooler has no mask: a cache that left padding out would change the prediction."""
    model = transformer(saved["1.2", False])
    changed = [type(c)({**c.tensors, "t5": c.tensors["t5"] * c.tensors["t5_mask"][:, None]}) for c in texts]
    assert (predict(model, texts) - predict(model, changed)).abs().max() > 1e-5


def test_neighbouring_timesteps_stay_apart_in_bfloat16(saved, texts):
    model = FAMILY.load(saved["1.2", False], frozenset({"transformer"}), torch.bfloat16).transformer
    seen = []
    model.time_extra_emb.timestep_embedder.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].float()))
    for timestep in (980.0, 981.0, 982.0):
        predict(model, texts, timesteps=(timestep, timestep))
    assert (seen[0] - seen[1]).abs().max() > 0.01 and (seen[1] - seen[2]).abs().max() > 0.01


@given(height=st.integers(1, 300), width=st.integers(1, 300), square=st.integers(1, 128))
def test_the_region_of_a_grid_is_the_pipelines(height, width, square):
    assert hunyuan_dit.centred_region((height, width), square) == get_resize_crop_region_for_grid((height, width), square)


def test_a_first_step_loads_neither_the_pipeline_nor_the_models_of_transformers():
    made = "import sys; from finetune.families.hunyuan_dit import rotary_table; rotary_table(16, 4, 6, 32); print([name for name in %r if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", made % (["diffusers.models.embeddings", "diffusers.pipelines.hunyuandit", "transformers.modeling_utils"],)], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == "['diffusers.models.embeddings']"


def test_rotary_tables_are_made_once_a_bucket_and_follow_the_aspect():
    assert hunyuan_dit.rotary_table(16, 4, 6, 32)[0] is hunyuan_dit.rotary_table(16, 4, 6, 32)[0]
    assert not torch.equal(hunyuan_dit.rotary_table(16, 4, 6, 32)[0], hunyuan_dit.rotary_table(16, 6, 4, 32)[0])


def test_drawing_keeps_our_size():
    pipeline = tiny.build()
    texts = FAMILY.encode_prompts(pipeline, ["a cat"])
    inputs = FAMILY.pipeline_inputs(pipeline, texts, texts, torch.zeros(1, 4, 8, 8), 5.0)
    assert inputs["use_resolution_binning"] is False


def test_the_pooler_is_no_target():
    import re

    for targets in FAMILY.facts.targets.values():
        assert not re.fullmatch(targets, "time_extra_emb.pooler.q_proj")


def test_the_released_configuration_has_the_released_size():
    shape = FAMILY.shape(dict(
        num_attention_heads=16, attention_head_dim=88, hidden_size=1408, num_layers=40, mlp_ratio=4.3637, in_channels=4, patch_size=2,
        sample_size=128, learn_sigma=True, cross_attention_dim=1024, cross_attention_dim_t5=2048, pooled_projection_dim=1024, text_len=77,
        text_len_t5=256, use_style_cond_and_image_meta_size=False))
    assert shape.parameters == 1_499_952_032
    assert shape.feed_forward_size == 6144 and shape.tokens_per_pixel * 1024 * 1024 == 4096
