"""What diffusers 0.42.1 and transformers 5 get wrong for training, and that the families are not touched by it.

Each test shows the library's own behaviour first: when that part fails, the library was mended and a workaround can go. The
experts of HiDream, which run without gradients, are in `test_official_formulas.py`; defects that only the comparison of
batches can show (captions beside each other, padding, half precision) are in `test_every_family.py`.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from finetune.adapters.adapter_file import AdapterFile
from finetune.adapters.weight_change import delta
from finetune.adapters.lora import collect_lora, inject_lora, lora_parameters
from finetune.adapters.loading_snippets import SnippetFacts, loading_snippet
from finetune.families import registry, schedules
from finetune.objectives import LossWeighting
from tests.families.battery import PROMPTS, Specimen, close, stock_pipeline
from tests.tiny_models import parts
from tests.tiny_models.all import TINY


@pytest.fixture(scope="module")
def chroma(tmp_path_factory):
    return Specimen("chroma", tmp_path_factory.mktemp("chroma"))


def test_the_librarys_checkpointing_forgets_the_mask_of_chromas_single_blocks_and_ours_does_not(chroma):
    noisy, timestep = chroma.noisy()
    model = chroma.fresh_transformer().train()
    plain = chroma.predict(model, noisy, timestep, chroma.conditionings)
    model.enable_gradient_checkpointing()
    assert not close(chroma.predict(model, noisy.requires_grad_(), timestep, chroma.conditionings), plain, 1e-3)
    model.disable_gradient_checkpointing()
    chroma.family.prepare(model, 99)
    assert close(chroma.predict(model, noisy, timestep, chroma.conditionings), plain)


def test_chromas_pipeline_adds_its_mask_to_the_logits_and_ours_takes_padding_out(chroma):
    mask = chroma.text.encode_prompt(prompt=PROMPTS[0], do_classifier_free_guidance=False)[2]
    assert mask.dtype == torch.float32  # attention adds a float mask: padding is lowered by one, not left out
    noisy, timestep = chroma.noisy()
    model = chroma.drawer.transformer
    together = chroma.predict(model, noisy, timestep, chroma.conditionings)  # the shorter caption is padded here
    alone = chroma.predict(model, noisy[:1], timestep[:1], chroma.conditionings[:1])
    assert close(together[:1].detach(), alone.detach(), 2e-6)


def test_where_a_caption_leaves_no_padding_chromas_pipeline_predicts_what_we_do(chroma):
    """From the same words, through the pipeline's own encoding: the mask is then the only thing in which the two differ."""
    long = "a cat in the rain " * 40
    conditioning, = chroma.family.encode_prompts(chroma.text, [long])
    assert len(conditioning.tensors["t5"]) == 512
    step = chroma.watched_step(stock_pipeline(chroma, chroma.tiny), prompt=long, generator=torch.Generator().manual_seed(0), **chroma.tiny.live)
    found = chroma.predict(chroma.drawer.transformer, step.sample, torch.tensor([step.timestep]), [conditioning])
    assert close(found.detach(), step.output)


def test_hunyuan_video_15s_autoencoder_takes_one_picture_at_a_time():
    pipeline = TINY["hunyuan_video_15"].build()
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.raises(RuntimeError):
        pipeline.vae.encode(pixels.unsqueeze(2))
    family = registry.family("hunyuan_video_15")
    assert close(family.encode_images(pipeline, pixels).mean[1:], family.encode_images(pipeline, pixels[1:]).mean, 1e-5)


def test_hunyuan_images_autoencoder_takes_a_picture_in_tiles_for_a_video(tmp_path):
    """Its usual edge is 2048 pixels, which are encoded in tiles."""
    built = TINY["hunyuan_image_2"].build()
    pixels = torch.rand(1, 3, 320, 448, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="unpack"):
        built.vae.tiled_encode(pixels)
    built.save_pretrained(tmp_path)
    vae = registry.family("hunyuan_image_2").load(tmp_path, frozenset({"vae"}), torch.float32).vae
    vae.enable_tiling(tile_sample_min_size=128)
    vae.encoder = torch.nn.AvgPool2d(32)  # looks at nothing beyond its own place, so that tiles give the very same
    assert close(vae.tiled_encode(pixels), vae.encoder(pixels))


def test_z_images_pipeline_writes_into_the_callers_list():
    pipeline, prompts = TINY["z_image"].build(), list(PROMPTS)
    pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert prompts != list(PROMPTS)
    prompts = list(PROMPTS)
    registry.family("z_image").encode_prompts(pipeline, prompts)
    assert prompts == list(PROMPTS)


def test_a_model_looks_for_a_pickle_unless_told_the_files_name_which_the_card_does(tmp_path):
    model = TINY["hunyuan_video_15"].build().transformer
    with pytest.raises(OSError, match="bin"):
        model.load_lora_adapter(str(tmp_path))
    facts = SnippetFacts("me/style", "pytorch_lora_weights.safetensors", "base", "a cat", {"x": 4}, "transformer", {})
    assert "weight_name='pytorch_lora_weights.safetensors'" in loading_snippet(facts)


@pytest.mark.parametrize("name", ["hunyuan_dit", "pixart_sigma"])
def test_models_that_cannot_take_adapters_take_ours(name):
    model = TINY[name].build().transformer
    assert not hasattr(model, "add_adapter")
    assert inject_lora(model, registry.family(name).facts.targets["attention"], rank=2, seed=0)


def test_an_adapter_saved_by_the_library_loses_its_alpha_and_ours_does_not(tmp_path):
    pipeline = TINY["flux_dev"].build()
    inject_lora(pipeline.transformer, registry.family("flux_dev").facts.targets["attention"], rank=4, alpha=16, seed=0)
    for _, parameter in lora_parameters(pipeline.transformer):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    ours = collect_lora(pipeline.transformer)
    name = ours.modules[0]
    layer = pipeline.transformer.get_submodule(name)
    trained = delta(layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach(), 4.0)
    assert torch.allclose(delta(*ours.pair(name)), trained)
    bare = AdapterFile({key: parameter.detach() for key, parameter in lora_parameters(pipeline.transformer)})
    diffusers.FluxPipeline.save_lora_weights(tmp_path, transformer_lora_layers=dict(bare.tensors))
    other = TINY["flux_dev"].build()
    other.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights.safetensors")
    assert other.transformer.get_submodule(name).scaling == {"default_0": 1.0}


def test_lumina2s_pipeline_takes_channels_for_tokens_and_our_shift_counts_tokens():
    dynamic = parts.flow(shift=6.0, **parts.DYNAMIC)
    family = registry.family("lumina2")
    pipeline = TINY["lumina2"].build()
    pipeline.scheduler = dynamic
    objective = family.objective(pipeline, None, LossWeighting())
    small, large = (objective.level(torch.tensor([0.5]), torch.zeros(1, 4, edge, edge)).sigma for edge in (16, 128))
    assert large > small


def test_a_scheduler_that_has_drawn_forgets_its_first_table_and_training_does_not_ask_it():
    pipeline = TINY["sd3"].build()
    family = registry.family("sd3")
    levels = [family.objective(pipeline, None, LossWeighting()).level(torch.tensor([0.1, 0.9]), torch.zeros(2, 4, 16, 16)).sigma]
    first = pipeline.scheduler.sigmas.clone()
    pipeline.scheduler.set_timesteps(1000)
    assert not torch.allclose(pipeline.scheduler.sigmas[:1000], first, atol=1e-3)
    levels.append(family.objective(pipeline, None, LossWeighting()).level(torch.tensor([0.1, 0.9]), torch.zeros(2, 4, 16, 16)).sigma)
    assert torch.equal(*levels)


def test_sanas_shift_has_another_name_and_is_found_all_the_same():
    shipped = diffusers.DPMSolverMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_config(shipped.config).config.shift == 1.0
    assert schedules.scheduler_flow(shipped, None, LossWeighting(), patch=1).sampling.shift == 3.0


def test_qwen_image_refuses_the_guidance_that_its_configuration_announces(tmp_path):
    specimen = Specimen("qwen_image", tmp_path)
    noisy, timestep = specimen.noisy(1)
    guided = diffusers.QwenImageTransformer2DModel.from_config(specimen.drawer.transformer.config, guidance_embeds=True)
    arguments = {"hidden_states": torch.zeros(1, 64, 16), "encoder_hidden_states": torch.zeros(1, 4, 16), "encoder_hidden_states_mask": torch.ones(1, 4, dtype=torch.bool),
                 "timestep": timestep / 1000, "img_shapes": [[(1, 8, 8)]]}
    with pytest.raises(TypeError):
        guided(**arguments, guidance=torch.ones(1))
    assert specimen.predict(guided, noisy, timestep, specimen.conditionings[:1]).isfinite().all()


@pytest.mark.parametrize(("name", "slot"), [("hunyuan_video", "tokenizer"), ("hidream", "tokenizer_4")])
def test_llamas_tokenizer_pads_on_the_left_now_and_on_the_right_for_us(name, slot, tmp_path):
    pipeline = TINY[name].build()
    getattr(pipeline, slot).padding_side = "left"
    pipeline.save_pretrained(tmp_path)
    assert getattr(getattr(diffusers, type(pipeline).__name__).from_pretrained(tmp_path), slot).padding_side == "left"
    assert getattr(registry.family(name).load(tmp_path, frozenset({"text"}), torch.float32), slot).padding_side == "right"
