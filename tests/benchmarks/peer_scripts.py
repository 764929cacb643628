"""A LoRA run in the way of diffusers' official scripts, for five families, to be measured beside ours.

    python -m tests.benchmarks.peer_scripts flux BASE PICTURES OUT --steps 20 [--encode-in-steps]

Written after `examples/dreambooth/train_dreambooth_lora_{flux,sd3,sana,qwen_image,z_image}.py` (diffusers at 58eb52c): what they import before they
parse, the order in which they load, encode, free, prepare and step. It runs as with `--cache_latents` (`--encode-in-steps`: without, as the commands
in README_{flux,sd3,sana,qwen}.md beside the scripts do: every step encodes its picture), one `--instance_prompt` for all pictures
(encoded once), no validation prompt and no tracker. Where it differs, the script is the slower one: torchvision is not imported (pictures are
resized by Pillow), and Flux's prompt is encoded once, while the script encodes it again in each step.
"""

import argparse
import copy
import logging
import math
import os
import shutil  # noqa: F401
import warnings  # noqa: F401
from contextlib import nullcontext  # noqa: F401
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, BitsAndBytesConfig, FlowMatchEulerDiscreteScheduler  # noqa: F401
from diffusers.optimization import get_scheduler
from diffusers.training_utils import (
    _collate_lora_metadata, cast_training_params, compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3, free_memory,  # noqa: F401
)
from diffusers.utils import convert_unet_state_dict_to_peft, is_wandb_available  # noqa: F401
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card  # noqa: F401
from diffusers.utils.torch_utils import is_compiled_module  # noqa: F401
from huggingface_hub import create_repo, upload_folder  # noqa: F401
from peft import LoraConfig, prepare_model_for_kbit_training, set_peft_model_state_dict  # noqa: F401
from peft.utils import get_peft_model_state_dict
from PIL import Image
from PIL.ImageOps import exif_transpose
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from tests.benchmarks.step_clock import StepClock

logger = get_logger(__name__)
PROMPT = "a picture in the style of sks, with a disc on a soft ground"


@dataclass(frozen=True)
class Script:
    """What differs between the scripts.

    encode(pipeline, prompt) -> text.  predict(transformer, noisy (B, C, h, w), timesteps, text) -> (B, C, h, w).
    latents(vae, encoded) -> scaled latents of a cached entry.  targets: the modules that ours trains too.
    """

    pipeline: str
    transformer: str
    autoencoder: str
    text: tuple[tuple[str, str], ...]
    tokenizers: tuple[tuple[str, str], ...]
    encode: Callable[[Any, str], Any]
    predict: Callable[[Any, torch.Tensor, torch.Tensor, Any], torch.Tensor]
    targets: str


def _predict_flux(transformer, noisy, timesteps, text):
    pack, (states, pooled, text_ids) = diffusers.FluxPipeline, text
    batch, channels, height, width = noisy.shape
    image_ids = pack._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
    guidance = torch.tensor([1.0]).expand(batch)
    output = transformer(hidden_states=pack._pack_latents(noisy, batch, channels, height, width), timestep=timesteps / 1000, guidance=guidance, pooled_projections=pooled,
                         encoder_hidden_states=states, txt_ids=text_ids, img_ids=image_ids, return_dict=False)[0]
    return pack._unpack_latents(output, height=height * 8, width=width * 8, vae_scale_factor=8)


def _predict_sd3(transformer, noisy, timesteps, text):
    return transformer(hidden_states=noisy, timestep=timesteps, encoder_hidden_states=text[0], pooled_projections=text[1], return_dict=False)[0]


def _predict_sana(transformer, noisy, timesteps, text):
    return transformer(hidden_states=noisy, encoder_hidden_states=text[0], encoder_attention_mask=text[1], timestep=timesteps, return_dict=False)[0]


def _predict_qwen(transformer, noisy, timesteps, text):
    pack, (batch, channels, height, width) = diffusers.QwenImagePipeline, noisy.shape
    output = transformer(
        hidden_states=pack._pack_latents(noisy.unsqueeze(1), batch_size=batch, num_channels_latents=channels, height=height, width=width), encoder_hidden_states=text[0],
        encoder_hidden_states_mask=text[1], timestep=timesteps / 1000, img_shapes=[(1, height // 2, width // 2)] * batch, return_dict=False)[0]
    return pack._unpack_latents(output, height * 8, width * 8, 8).squeeze(2)


def _predict_z_image(transformer, noisy, timesteps, text):
    found = transformer(list(noisy.unsqueeze(2).unbind(dim=0)), (1000 - timesteps) / 1000, text, return_dict=False)[0]
    return -torch.stack(found, dim=0).squeeze(2)


def _sana_text(pipeline, prompt):
    states, mask, *_ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=300)
    return states.float(), mask


JOINT = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
SCRIPTS = {
    "flux": Script(
        "FluxPipeline", "FluxTransformer2DModel", "AutoencoderKL", (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel")),
        (("tokenizer", "CLIPTokenizer"), ("tokenizer_2", "T5TokenizerFast")),
        lambda pipeline, prompt: pipeline.encode_prompt(prompt, None, max_sequence_length=512), _predict_flux, rf"(single_)?{JOINT}"),
    "sd3": Script(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", "AutoencoderKL",
        (("text_encoder", "CLIPTextModelWithProjection"), ("text_encoder_2", "CLIPTextModelWithProjection"), ("text_encoder_3", "T5EncoderModel")),
        (("tokenizer", "CLIPTokenizer"), ("tokenizer_2", "CLIPTokenizer"), ("tokenizer_3", "T5TokenizerFast")),
        lambda pipeline, prompt: pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=256)[::2], _predict_sd3, JOINT),
    "sana": Script(
        "SanaPipeline", "SanaTransformer2DModel", "AutoencoderDC", (("text_encoder", "Gemma2Model"),), (("tokenizer", "AutoTokenizer"),), _sana_text, _predict_sana,
        r"transformer_blocks\.\d+\.attn[12]\.(to_[qkv]|to_out\.0)"),
    "qwen_image": Script(
        "QwenImagePipeline", "QwenImageTransformer2DModel", "AutoencoderKLQwenImage", (("text_encoder", "Qwen2_5_VLForConditionalGeneration"),),
        (("tokenizer", "Qwen2Tokenizer"),), lambda pipeline, prompt: pipeline.encode_prompt(prompt=prompt, max_sequence_length=512), _predict_qwen, JOINT),
    "z_image": Script(
        "ZImagePipeline", "ZImageTransformer2DModel", "AutoencoderKL", (("text_encoder", "Qwen3Model"),), (("tokenizer", "Qwen2Tokenizer"),),
        lambda pipeline, prompt: pipeline.encode_prompt(prompt=prompt, do_classifier_free_guidance=False, max_sequence_length=512)[0], _predict_z_image,
        r"(layers|noise_refiner|context_refiner)\.\d+\.attention\.(to_[qkv]|to_out\.0)"),
}


class DreamBoothDataset(Dataset):
    """All pictures opened, resized and normalised before the first step, as the scripts do."""

    def __init__(self, folder: Path, size: int):
        self.pixel_values = []
        for path in sorted(folder.iterdir()):
            image = exif_transpose(Image.open(path)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            self.pixel_values.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5))

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        return {"instance_images": self.pixel_values[index], "instance_prompt": PROMPT}


def collate(examples):
    pixels = torch.stack([example["instance_images"] for example in examples]).to(memory_format=torch.contiguous_format).float()
    return {"pixel_values": pixels, "prompts": [example["instance_prompt"] for example in examples]}


def scaled(vae_config, encoded):
    """A draw from a cached entry, scaled. Z-Image's script takes the mode, which costs about the same."""
    if isinstance(encoded, torch.Tensor):
        return encoded * vae_config.scaling_factor
    if vae_config.get("latents_mean"):
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae_config.latents_mean, vae_config.latents_std))
        return ((encoded.sample() - mean) / deviation).squeeze(2)
    return (encoded.sample() - vae_config.shift_factor) * vae_config.scaling_factor


def load(script, base):
    """Everything at once, as the scripts hold it: scheduler, tokenizers, text encoders, VAE, transformer."""
    tokenizers = {slot: getattr(transformers, name).from_pretrained(base, subfolder=slot) for slot, name in script.tokenizers}
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(base, subfolder="scheduler")
    encoders = {slot: getattr(transformers, name).from_pretrained(base, subfolder=slot) for slot, name in script.text}
    vae = getattr(diffusers, script.autoencoder).from_pretrained(base, subfolder="vae")
    transformer = getattr(diffusers, script.transformer).from_pretrained(base, subfolder="transformer")
    for model in (transformer, vae, *encoders.values()):
        model.requires_grad_(False)
        model.to("cpu", dtype=torch.float32)
    pipeline = getattr(diffusers, script.pipeline).from_pretrained(base, vae=None, transformer=None, **tokenizers, **encoders)
    return scheduler, pipeline, vae, transformer


def cache_latents(name, vae, dataloader):
    """One distribution (or, of a deterministic autoencoder, its latents) a batch, as the scripts keep them."""
    return [encode(name, vae, batch) for batch in tqdm(dataloader, desc="Caching latents")]


@torch.no_grad()
def encode(name, vae, batch):
    pixels = batch["pixel_values"].to(dtype=vae.dtype)
    encoded = vae.encode(pixels.unsqueeze(2) if name == "qwen_image" else pixels)
    return encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist


def batch_loss(script, transformer, scheduler, model_input, text):
    noise = torch.randn_like(model_input)
    u = compute_density_for_timestep_sampling(weighting_scheme="none", batch_size=len(model_input), logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    timesteps = scheduler.timesteps[(u * scheduler.config.num_train_timesteps).long()]
    step_indices = [(scheduler.timesteps == t).nonzero().item() for t in timesteps]
    sigmas = scheduler.sigmas[step_indices].flatten().view(-1, *[1] * (model_input.ndim - 1))
    noisy = (1.0 - sigmas) * model_input + sigmas * noise
    prediction = script.predict(transformer, noisy, timesteps, text)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
    target = noise - model_input
    return torch.mean((weighting.float() * (prediction.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()


def train(args, accelerator, clock, transformer, optimizer, lr_scheduler, dataloader, loss_of):
    """loss_of: number of the batch and the batch -> its loss."""
    progress_bar, global_step = tqdm(range(args.steps), desc="Steps"), 0
    for _ in range(math.ceil(args.steps / len(dataloader))):
        transformer.train()
        for step, batch in enumerate(dataloader):
            with accelerator.accumulate([transformer]):
                loss = loss_of(step, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            progress_bar.update(1)
            global_step += 1
            progress_bar.set_postfix(loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])
            accelerator.log({"loss": loss.detach().item()}, step=global_step)
            clock.step_done()
            if global_step >= args.steps:
                break
    clock.training_done()


def main(args):
    script, clock = SCRIPTS[args.name], StepClock(args.started)
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=args.out, logging_dir=args.out / "logs"),
                              kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])
    logging.basicConfig(format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", level=logging.INFO)
    logger.info(accelerator.state, main_process_only=False)
    set_seed(0)
    os.makedirs(args.out, exist_ok=True)
    noise_scheduler, text_pipeline, vae, transformer = load(script, args.base)
    noise_scheduler_copy = copy.deepcopy(noise_scheduler)
    transformer.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, init_lora_weights="gaussian", target_modules=script.targets))
    trained = list(filter(lambda parameter: parameter.requires_grad, transformer.parameters()))
    optimizer = torch.optim.AdamW([{"params": trained, "lr": 1e-4}], betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    dataloader = torch.utils.data.DataLoader(DreamBoothDataset(args.pictures, args.pixels), batch_size=1, shuffle=True, collate_fn=collate, num_workers=0)

    with torch.no_grad():
        text = script.encode(text_pipeline, PROMPT)
    del text_pipeline
    free_memory()
    vae_config, latents_cache = vae.config, None
    if not args.encode_in_steps:
        latents_cache = cache_latents(args.name, vae, dataloader)
        del vae
        free_memory()
    lr_scheduler = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=500, num_training_steps=args.steps)
    transformer, optimizer, dataloader, lr_scheduler = accelerator.prepare(transformer, optimizer, dataloader, lr_scheduler)
    train(args, accelerator, clock, transformer, optimizer, lr_scheduler, dataloader, lambda step, batch: batch_loss(
        script, transformer, noise_scheduler_copy, scaled(vae_config, encode(args.name, vae, batch) if latents_cache is None else latents_cache[step]), text))

    accelerator.wait_for_everyone()
    transformer = accelerator.unwrap_model(transformer).to(torch.float32)
    getattr(diffusers, script.pipeline).save_lora_weights(save_directory=args.out, transformer_lora_layers=get_peft_model_state_dict(transformer),
                                                         **_collate_lora_metadata({"transformer": transformer}))
    clock.adapter_written()
    accelerator.end_training()
    clock.write(args.clock)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=SCRIPTS)
    for name in ("base", "pictures", "out", "clock"):
        parser.add_argument(name, type=Path)
    for name, kind in (("pixels", int), ("steps", int), ("rank", int), ("started", float)):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--encode-in-steps", action="store_true")
    main(parser.parse_args())
