"""One step of ours gives the loss and the LoRA gradients of the formulas in the library's own training scripts.

The formulas are those of huggingface/diffusers `examples/dreambooth/train_dreambooth_lora_<family>.py` (0.40.0.dev0): each
`script_*` below is the part of its loop from the noisy latents to the prediction, written anew; texts are encoded by the
pipeline for the whole batch, padded and masked as the scripts do, and latents are packed by the pipelines' own methods.
All end in `target = noise - model_input` and
`loss = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()`.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from finetune.adapters.lora import inject_lora, lora_parameters
from finetune.objectives import FlowObjective, NoiseLevel
from tests.families.battery import NEVER_TRAINED, PROMPTS, Specimen

SIGMA = torch.tensor([0.3, 0.85])


def script_flux(specimen, model, noisy, sigma):
    text = specimen.text.encode_prompt(list(PROMPTS), None, max_sequence_length=512)
    height, width = noisy.shape[-2:]
    packed = diffusers.FluxPipeline._pack_latents(noisy, *noisy.shape)
    ids = diffusers.FluxPipeline._prepare_latent_image_ids(len(noisy), height // 2, width // 2, noisy.device, noisy.dtype)
    prediction = model(hidden_states=packed, timestep=sigma * 1000 / 1000, guidance=torch.tensor([1.0]).expand(len(noisy)), pooled_projections=text[1],
                       encoder_hidden_states=text[0], txt_ids=text[2], img_ids=ids, return_dict=False)[0]
    factor = specimen.drawer.vae_scale_factor
    return diffusers.FluxPipeline._unpack_latents(prediction, height=height * factor, width=width * factor, vae_scale_factor=factor)


def script_flux2(specimen, model, noisy, sigma):
    text, text_ids = specimen.text.encode_prompt(prompt=list(PROMPTS), max_sequence_length=512)
    ids = diffusers.Flux2KleinPipeline._prepare_latent_ids(noisy)
    packed = diffusers.Flux2KleinPipeline._pack_latents(noisy)
    prediction = model(hidden_states=packed, timestep=sigma * 1000 / 1000, guidance=None, encoder_hidden_states=text, txt_ids=text_ids, img_ids=ids,
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


SCRIPTS = {"flux_dev": script_flux, "flux2_klein": script_flux2, "sd3": script_sd3, "sana": script_sana, "lumina2": script_lumina2,
           "qwen_image": script_qwen, "z_image": script_z_image}


@pytest.fixture(scope="module", params=list(SCRIPTS))
def specimen(request, tmp_path_factory):
    return Specimen(request.param, tmp_path_factory.mktemp(request.param))


def trained(specimen):
    model = specimen.fresh_transformer()
    inject_lora(model, specimen.family.facts.targets["attention"], rank=2, seed=0)
    for name, parameter in lora_parameters(model):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    specimen.family.prepare(model, 0)
    return model


def test_loss_and_gradients_are_those_of_the_official_script(specimen):
    drawn = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(2, *specimen.latent_shape, generator=drawn) for _ in range(2))
    objective, level = FlowObjective(), NoiseLevel(SIGMA, SIGMA * 1000)

    ours = trained(specimen)
    noisy = objective.add_noise(latents, noise, level)
    predicted = specimen.predict(ours, noisy, level.timestep, specimen.conditionings)
    loss = (objective.weight(level) * (predicted - objective.target(latents, noise, level)).square().flatten(1).mean(1)).mean()
    loss.backward()

    theirs = trained(specimen)
    sigmas = SIGMA.view(-1, 1, 1, 1)
    noisy_model_input = (1.0 - sigmas) * latents + sigmas * noise
    model_pred = SCRIPTS[specimen.name](specimen, theirs, noisy_model_input, SIGMA)
    weighting, target = torch.ones_like(sigmas), noise - latents
    script_loss = torch.mean((weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()
    script_loss.backward()

    assert loss.item() == pytest.approx(script_loss.item(), rel=1e-6)
    expected = dict(lora_parameters(theirs))
    for name, parameter in lora_parameters(ours):
        if parameter.grad is None:
            assert specimen.name in NEVER_TRAINED and expected[name].grad is None
            continue
        size = expected[name].grad.abs().max()
        assert (parameter.grad - expected[name].grad).abs().max() <= 1e-4 * size + 1e-8, name


def test_preconditioned_outputs_of_the_sd3_script_are_our_loss_weighted_by_sigma_squared():
    """`--precondition_outputs` predicts `model_pred * (-sigmas) + noisy_model_input` and aims at `model_input`."""
    drawn = torch.Generator().manual_seed(4)
    latents, noise, prediction = (torch.randn(2, 4, 8, 8, generator=drawn) for _ in range(3))
    sigmas = SIGMA.view(-1, 1, 1, 1)
    noisy = (1 - sigmas) * latents + sigmas * noise
    theirs = (prediction * (-sigmas) + noisy - latents).square().flatten(1).mean(1)
    ours = (prediction - (noise - latents)).square().flatten(1).mean(1)
    assert torch.allclose(theirs, SIGMA**2 * ours, rtol=1e-4)
