"""One step of ours gives the loss and the LoRA gradients of the formulas in the library's own training scripts.

The formulas are those of huggingface/diffusers `examples/dreambooth/train_dreambooth_lora_<family>.py` (commit 58eb52c0): each
`script_*` below is the part of its loop from the noisy latents to the prediction, written anew; texts are encoded by the
pipeline for the whole batch, padded and masked as the scripts do, and latents are packed by the pipelines' own methods.
All end in `target = noise - model_input` and
`loss = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()`.

There are LoRA scripts for flux (dev and schnell), flux2, flux2_klein, hidream, lumina2, qwen_image, sana, sd3 and z_image. The
library trains three further families here without LoRA, or other models by the same objective, and those formulas are
checked too: `examples/cogview4-control/train_control_cogview4.py`, `examples/research_projects/pixart/
train_pixart_controlnet_hf.py`, and, for v-prediction, `examples/text_to_image/train_text_to_image_lora.py`.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.objectives import FlowObjective, LossWeighting, NoiseLevel
from tests.families.battery import NEVER_TRAINED, PROMPTS, Specimen

SIGMA = torch.tensor([0.3, 0.85])


def script_flux(specimen, model, noisy, sigma):
    # "handle guidance": `if unwrap_model(transformer).config.guidance_embeds: guidance = torch.tensor([args.guidance_scale])`
    distilled = model.config.guidance_embeds
    text = specimen.text.encode_prompt(list(PROMPTS), None, max_sequence_length=512 if distilled else 256)
    height, width = noisy.shape[-2:]
    packed = diffusers.FluxPipeline._pack_latents(noisy, *noisy.shape)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(len(noisy), height // 2, width // 2, noisy.device, noisy.dtype)
    prediction = model(hidden_states=packed, timestep=sigma * 1000 / 1000, guidance=torch.tensor([1.0]).expand(len(noisy)) if distilled else None, pooled_projections=text[1],
                       encoder_hidden_states=text[0], txt_ids=text[2], img_ids=ids, return_dict=False)[0]
    factor = specimen.drawer.vae_scale_factor
    return diffusers.FluxPipeline._unpack_latents(prediction, height=height * factor, width=width * factor, vae_scale_factor=factor)


def script_flux2(specimen, model, noisy, sigma):
    # dev: `guidance = torch.full([1], args.guidance_scale); guidance = guidance.expand(model_input.shape[0])`; Klein: None
    guidance = torch.full([1], 1.0).expand(len(noisy)) if model.config.guidance_embeds else None
    text, text_ids = specimen.text.encode_prompt(prompt=list(PROMPTS), max_sequence_length=512)
    ids = diffusers.Flux2KleinPipeline._prepare_latent_ids(noisy)
    packed = diffusers.Flux2KleinPipeline._pack_latents(noisy)
    prediction = model(hidden_states=packed, timestep=sigma * 1000 / 1000, guidance=guidance, encoder_hidden_states=text, txt_ids=text_ids, img_ids=ids,
                       return_dict=False)[0]
    return diffusers.Flux2KleinPipeline._unpack_latents_with_ids(prediction, ids, *noisy.shape[-2:])


def script_sd3(specimen, model, noisy, sigma):
    text, _, pooled, _ = specimen.text.encode_prompt(list(PROMPTS), None, None, do_classifier_free_guidance=False)
    return model(hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=text, pooled_projections=pooled, return_dict=False)[0]


def script_sana(specimen, model, noisy, sigma):
    import inspect

    instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default
    text, mask, *_ = specimen.text.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, complex_human_instruction=instruction)
    return model(hidden_states=noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=sigma * 1000, return_dict=False)[0]


def script_lumina2(specimen, model, noisy, sigma):
    # The script mixes `(1 - sigmas) * noise + sigmas * model_input` and aims at `model_input - noise`: sigmas is 1 - ours.
    text, mask, *_ = specimen.text.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    timesteps = (1 - sigma) * 1000
    return -model(hidden_states=noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timesteps / 1000, return_dict=False)[0]


def script_qwen(specimen, model, noisy, sigma):
    text, mask = specimen.text.encode_prompt(list(PROMPTS))
    height, width = noisy.shape[-2:]
    packed = diffusers.QwenImagePipeline._pack_latents(noisy, *noisy.shape)
    prediction = model(hidden_states=packed, timestep=sigma * 1000 / 1000, encoder_hidden_states=text, encoder_hidden_states_mask=mask,
                       img_shapes=[(1, height // 2, width // 2)] * len(noisy), return_dict=False)[0]
    factor = specimen.drawer.vae_scale_factor
    return diffusers.QwenImagePipeline._unpack_latents(prediction, height * factor, width * factor, factor)[:, :, 0]


def script_z_image(specimen, model, noisy, sigma):
    text, _ = specimen.text.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    output = model(list(noisy.unsqueeze(2).unbind(dim=0)), (1000 - sigma * 1000) / 1000, text, return_dict=False)[0]
    return -torch.stack(output, dim=0).squeeze(2)


def script_hidream(specimen, model, noisy, sigma):
    # `model_pred = transformer(...)[0]; model_pred = model_pred * -1`. The script loads with `force_inference_output=True` for
    # the layout of the output; that also cuts the experts out of the gradient, which no formula of it asks for (see below).
    model.register_to_config(force_inference_output=True)
    t5, _, llama, _, pooled, _ = specimen.text.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=128)
    return -model(hidden_states=noisy, encoder_hidden_states_t5=t5, encoder_hidden_states_llama3=llama, pooled_embeds=pooled,
                  timesteps=sigma * 1000, return_dict=False)[0]


def script_cogview4(specimen, model, noisy, sigma):
    # One caption at a time: the script encodes a batch, whose padding the text encoder attends to. It also tells the model the
    # step before the shift and adds noise after it; the pipeline, whose prediction ours equals, tells the shifted step.
    height, width = specimen.geometry.target
    size, crop = torch.tensor([[height, width]], dtype=noisy.dtype), torch.tensor([(0, 0)], dtype=noisy.dtype)
    texts = [specimen.text.encode_prompt([prompt], "", do_classifier_free_guidance=False)[0] for prompt in PROMPTS]
    return torch.cat([
        model(hidden_states=noisy[i : i + 1], encoder_hidden_states=text, timestep=sigma[i : i + 1] * 1000, original_size=size, target_size=size,
              crop_coords=crop, return_dict=False)[0] for i, text in enumerate(texts)])


SCRIPTS = {"flux_dev": script_flux, "flux_schnell": script_flux, "flux2_dev": script_flux2, "flux2_klein": script_flux2, "sd3": script_sd3,
           "sana": script_sana, "lumina2": script_lumina2, "qwen_image": script_qwen, "z_image": script_z_image, "hidream": script_hidream,
           "cogview4": script_cogview4}


@pytest.fixture(scope="module", params=list(SCRIPTS))
def specimen(request, tmp_path_factory):
    return Specimen(request.param, tmp_path_factory.mktemp(request.param))


def trained(specimen, targets="attention", stock=False):
    """A model with the same adapter every time. stock: as the library made it, without our forms of its parts."""
    model = specimen.fresh_transformer()
    inject_lora(model, specimen.family.facts.targets[targets], rank=2, seed=0)
    for name, parameter in lora_parameters(model):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if stock:
        model.train()
    else:
        specimen.family.prepare(model, 0)
    return model


def assert_same_step(name, loss, ours, script_loss, theirs):
    assert loss.item() == pytest.approx(script_loss.item(), rel=1e-6)
    expected = dict(lora_parameters(theirs))
    for module, parameter in lora_parameters(ours):
        if parameter.grad is None:
            assert name in NEVER_TRAINED and (expected[module].grad is None or not expected[module].grad.any())
            continue
        size = expected[module].grad.abs().max()
        assert (parameter.grad - expected[module].grad).abs().max() <= 1e-4 * size + 1e-8, module


def test_loss_and_gradients_are_those_of_the_official_script(specimen):
    drawn = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(2, *specimen.latent_shape, generator=drawn) for _ in range(2))
    objective, level = FlowObjective(), NoiseLevel(SIGMA, SIGMA * 1000)

    ours = trained(specimen)
    noisy = objective.add_noise(latents, noise, level)
    predicted = specimen.predict(ours, noisy, level.timestep, specimen.conditionings)
    loss = (objective.weight(level) * (predicted - objective.target(latents, noise, level)).square().flatten(1).mean(1)).mean()
    loss.backward()

    # Of its experts' gradients the stock HiDream has none, whatever the script asks for (see below).
    theirs = trained(specimen, stock=specimen.name != "hidream")
    sigmas = SIGMA.view(-1, 1, 1, 1)
    noisy_model_input = (1.0 - sigmas) * latents + sigmas * noise
    model_pred = SCRIPTS[specimen.name](specimen, theirs, noisy_model_input, SIGMA)
    weighting, target = torch.ones_like(sigmas), noise - latents
    script_loss = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()
    script_loss.backward()

    assert_same_step(specimen.name, loss, ours, script_loss, theirs)


@pytest.mark.parametrize("name", ["hunyuan_dit", "pixart_sigma"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_and_gradients_of_the_ddpm_families_are_those_of_the_librarys_loop(name, gamma, tmp_path):
    """`noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)`; the target is the noise or `get_velocity`;
    `model_pred.chunk(2, dim=1)[0]` where the variance is learned; `--snr_gamma` weighs by min(snr, gamma) over snr or snr + 1."""
    from diffusers.training_utils import compute_snr

    specimen = Specimen(name, tmp_path)
    drawn = torch.Generator().manual_seed(5)
    latents, noise = (torch.randn(2, *specimen.latent_shape, generator=drawn) for _ in range(2))
    timesteps = torch.tensor([211, 870])
    objective = specimen.family.objective(specimen.drawer, None, LossWeighting("min_snr", gamma) if gamma else LossWeighting())
    level = objective.level(timesteps / 1000 + 1e-4, latents)
    assert torch.equal(level.timestep.long(), timesteps)

    ours = trained(specimen)
    predicted = specimen.predict(ours, objective.add_noise(latents, noise, level), level.timestep, specimen.conditionings)
    loss = (objective.weight(level) * (predicted - objective.target(latents, noise, level)).square().flatten(1).mean(1)).mean()
    loss.backward()

    theirs, noise_scheduler = trained(specimen, stock=True), diffusers.DDPMScheduler.from_config(specimen.drawer.scheduler.config)
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    velocity = noise_scheduler.config.prediction_type == "v_prediction"
    target = noise_scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    model_pred = DDPM_CALLS[name](specimen, theirs, noisy_latents, timesteps).chunk(2, dim=1)[0]
    script_loss = torch.nn.functional.mse_loss(model_pred.float(), target.float(), reduction="none").mean(dim=[1, 2, 3])
    if gamma:
        snr = compute_snr(noise_scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0] / (snr + 1 if velocity else snr)
        script_loss = script_loss * weights
    script_loss.mean().backward()
    assert_same_step(name, loss, ours, script_loss.mean(), theirs)


def call_pixart(specimen, model, noisy, timesteps):
    text, mask, *_ = specimen.text.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=300)
    return model(noisy, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=timesteps,
                 added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False)[0]


def call_hunyuan_dit(specimen, model, noisy, timesteps):
    """The stock class's own forward, as its pipeline calls it; there is no training script for this model."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed
    from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

    stock = specimen.text
    clip, _, clip_mask, _ = stock.encode_prompt(list(PROMPTS), device="cpu", dtype=torch.float32, do_classifier_free_guidance=False, max_sequence_length=77, text_encoder_index=0)
    t5, _, t5_mask, _ = stock.encode_prompt(list(PROMPTS), device="cpu", dtype=torch.float32, do_classifier_free_guidance=False, max_sequence_length=256, text_encoder_index=1)
    height, width = (edge // model.config.patch_size for edge in noisy.shape[-2:])
    region = get_resize_crop_region_for_grid((height, width), 512 // 8 // model.config.patch_size)
    rotation = get_2d_rotary_pos_embed(model.inner_dim // model.num_heads, region, (height, width), output_type="pt")
    original, target = specimen.geometry.original, specimen.geometry.target
    sizes = torch.tensor([[*original, *target, 0, 0]] * len(noisy), dtype=torch.float32)
    return type(model).forward(
        model, noisy, timesteps.float(), encoder_hidden_states=clip, text_embedding_mask=clip_mask, encoder_hidden_states_t5=t5,
        text_embedding_mask_t5=t5_mask, image_meta_size=sizes, style=torch.zeros(len(noisy), dtype=torch.long), image_rotary_emb=rotation, return_dict=False)[0]


DDPM_CALLS = {"hunyuan_dit": call_hunyuan_dit, "pixart_sigma": call_pixart}


def test_loaded_as_its_script_loads_it_hidream_would_train_on_another_gradient(tmp_path):
    """diffusers 0.42.1: `force_inference_output=True` runs the experts without a graph, in training too."""
    specimen = Specimen("hidream", tmp_path)
    noisy, timestep = specimen.noisy()
    losses, gradients = [], []
    for forced in (False, True):
        model = trained(specimen, "all")
        for module in model.modules():
            if hasattr(module, "_force_inference_output"):
                module._force_inference_output = forced
        losses.append(specimen.predict(model, noisy, timestep, specimen.conditionings).square().mean())
        losses[-1].backward()
        gradients.append({name: parameter.grad for name, parameter in lora_parameters(model)})
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    right, forced = gradients
    experts = [name for name in right if ".experts." in name and right[name] is not None and right[name].any()]
    assert experts and all(forced[name] is None for name in experts)
    attention = [name for name in right if "attn1" in name]
    wrong = torch.cat([(right[name] - forced[name]).flatten() for name in attention]).norm() / torch.cat([right[name].flatten() for name in attention]).norm()
    assert wrong > 0.01  # a twenty-fifth in this model of two layers; more in deeper ones


def test_preconditioned_outputs_of_the_sd3_script_are_our_loss_weighted_by_sigma_squared():
    """`--precondition_outputs` predicts `model_pred * (-sigmas) + noisy_model_input` and aims at `model_input`."""
    drawn = torch.Generator().manual_seed(4)
    latents, noise, prediction = (torch.randn(2, 4, 8, 8, generator=drawn) for _ in range(3))
    sigmas = SIGMA.view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * latents + sigmas * noise
    theirs = (prediction * (-sigmas) + noisy - latents).square().flatten(1).mean(1)
    ours = (prediction - (noise - latents)).square().flatten(1).mean(1)
    assert torch.allclose(theirs, SIGMA**2 * ours, rtol=1e-4)
